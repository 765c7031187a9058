"""Fetching published weights: whole or not at all, and where it stopped.

A file grows as NAME.part and gets its name when it is whole; NAME.part.json says what it is a part of, so that no two
versions are ever joined. Nothing is scraped: a link that only a browser can follow is told, not followed.
"""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import os
import re
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from diffrep import __version__, assets
from diffrep.assets import ASSETS, Asset
from diffrep.console import progress
from diffrep.errors import RunError, UserError, nearest
from diffrep.files import disk_errors, read_json, sha256_of, write_json

TIMEOUT = 30.0  # seconds without a byte
TRIES, PAUSE = 4, 1.0  # tries in a row that bring nothing; seconds of pause, more each time
_BLOCK = 1 << 18


# What there is


def listing() -> list[dict[str, Any]]:
    """Every published file or folder, with its state and where it belongs here."""
    return [_row(asset) for asset in ASSETS.values()]


def _row(asset: Asset) -> dict[str, Any]:
    place = assets.local(asset) or assets.expected_path(asset)
    known = assets.recorded_hash(place) if place.is_file() else None
    told = {"state": assets.state(asset), "path": str(place), "recorded_sha256": known}
    return vars(asset) | {"non_commercial": asset.non_commercial} | told


# Fetching


def fetch(
    reference: str,
    to: str | Path | None = None,
    accept_licence: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Bring one asset to where recipes look for it, or into the folder ``to``.

    Args:
        say: is told the licence before anything is fetched.

    Returns:
        key, path, licence, hash (in words), and whether it was fetched or there already.

    Raises:
        UserError: no such asset, a licence that has to be accepted, a link for browsers, no network, another file.
        RunError: the connection ended in the middle; the same call goes on.
    """
    asset = _wanted(reference)
    target = Path(to).expanduser() / asset.name if to else assets.expected_path(asset)
    is_there = assets.is_whole(target, asset)
    if not is_there:
        _refuse(asset, target, accept_licence)
        say(f"{asset.key}: licence: {asset.licence}")
        with disk_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            download(asset, target) if asset.source == "http" else _from_hub(asset, target)
    told = {"key": asset.key, "path": str(target), "licence": asset.licence, "fetched": not is_there}
    return told | {"hash": assets.check_or_record(target, asset)}


def _wanted(reference: str) -> Asset:
    asset = assets.find(reference)
    if asset is None:
        raise UserError(f"assets fetch '{reference}': no such asset; {nearest(reference, ASSETS)}")
    return asset


def _refuse(asset: Asset, target: Path, accept_licence: bool) -> None:
    if asset.source == "browser":
        files = f" ({', '.join(asset.holds)})" if asset.holds else ""
        raise UserError(
            f"{asset.key}: only a browser can follow its link, {asset.page}; put what it gives at {target}{files}; "
            f"licence: {asset.licence}"
        )
    if asset.non_commercial and not accept_licence:
        raise UserError(f"{asset.key}: licence: {asset.licence}; if you keep to that, say --accept-licence")
    if target.exists():
        raise UserError(f"{target} is there but is not whole: delete it, and fetch again")


def _without_network(asset: Asset, target: Path, why: str) -> UserError:
    files = f", {asset.file}," if asset.source == "hub" and asset.file else ""
    return UserError(f"{asset.key}: {why}; fetch {asset.location}{files} elsewhere, and put it at {target}")


# From an address


class _EndedError(Exception):
    """A request brought no more; why is in the words."""


class _OtherFileError(_EndedError):
    """The part that is here does not belong to what the server has."""


def download(asset: Asset, target: Path) -> None:
    """The file at ``asset.location``; see the page's first lines.

    Raises:
        UserError: the server cannot be reached, refuses, answers with a web page or with another file.
        RunError: the connection ended, and so did it again at each of the next tries.
    """
    with _growing(target) as part, progress(f"{asset.name}, MB") as report:
        idle = 0
        while idle < TRIES:
            before = _size(part)
            try:
                _continue(asset, target, part, report)
                return _finish(asset, target, part)
            except _OtherFileError as ended:
                part.truncate(0)
                why = str(ended)
            except _EndedError as ended:
                why = str(ended)
            idle = 0 if _size(part) > before else idle + 1
            time.sleep(PAUSE * idle)
        raise RunError(f"{asset.key}: {why}; {_size(part):,} bytes are here, and the same command goes on")


@contextlib.contextmanager
def _growing(target: Path) -> Iterator[IO[bytes]]:
    """The part of ``target``, for this process alone; it stays where the block ends in the middle."""
    whole = assets.part_of(target)
    with open(whole, "ab") as part:
        try:
            fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{target} is being fetched by another process: wait for it") from None
        try:
            yield part
        finally:
            if whole.exists() and not _size(part):
                whole.unlink()


def _size(part: IO[bytes]) -> int:
    return os.fstat(part.fileno()).st_size


def _continue(asset: Asset, target: Path, part: IO[bytes], report: Callable[[int, int], None]) -> None:
    """One request for all that is missing."""
    known = _known(target, asset.location)
    if not known:
        part.truncate(0)
    start = _size(part)
    if start and start == known["total"]:
        return
    with _asked(asset, target, start, known.get("version")) as response:
        total = _continuation(response, part, known)
        write_json(_about(target), {"url": asset.location, "version": _version(response), "total": total})
        for block in _blocks(response):
            part.write(block)
            part.flush()
            report(_size(part) // 10**6, (total or _size(part)) // 10**6)
    if total is not None and _size(part) != total:
        raise _EndedError(f"the connection ended at {_size(part):,} of {total:,} bytes")


def _asked(asset: Asset, target: Path, start: int, version: str | None) -> Any:
    """The server's answer to a request for the bytes from ``start`` on."""
    headers = {"User-Agent": f"diffrep/{__version__}", "Accept-Encoding": "identity"}
    if start:
        headers |= {"Range": f"bytes={start}-"} | ({"If-Range": version} if version else {})
    host = urlsplit(asset.location).netloc
    try:
        response = urllib.request.urlopen(urllib.request.Request(asset.location, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # it has nothing behind our last byte
            raise _OtherFileError(f"{host} has another file now") from None
        raise _without_network(asset, target, f"{host} says {error.code} {error.reason}") from None
    except urllib.error.URLError as error:
        if start:
            raise _EndedError(f"cannot reach {host} ({error.reason})") from None
        raise _without_network(asset, target, f"cannot reach {host} ({error.reason})") from None
    except (OSError, http.client.HTTPException) as error:
        raise _EndedError(f"{host} gives no answer ({type(error).__name__})") from None
    if response.headers.get_content_type() == "text/html":
        raise _without_network(asset, target, f"{host} answers with a web page, not a file")
    return response


def _continuation(response: Any, part: IO[bytes], known: dict[str, Any]) -> int | None:
    """Bytes of the whole, None where the server does not say; what it sends anew is dropped from the part."""
    if response.status != 206:
        part.truncate(0)
        length = response.headers.get("Content-Length")
        return int(length) if length else None
    told = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
    if told is None or (int(told[1]), int(told[2])) != (_size(part), known.get("total")):
        raise _OtherFileError(f"{urlsplit(response.url).netloc} sends something else than was asked for")
    return int(told[2])


def _version(response: Any) -> str:
    """What changes with the file: a strong ETag, else a date, else nothing."""
    tag = response.headers.get("ETag", "")
    return tag if tag and not tag.startswith("W/") else response.headers.get("Last-Modified", "")


def _blocks(response: Any) -> Iterator[bytes]:
    while True:
        try:
            block = response.read(_BLOCK)
        except (OSError, http.client.HTTPException) as error:
            raise _EndedError(f"the connection ended ({type(error).__name__})") from None
        if not block:
            return
        yield block


def _finish(asset: Asset, target: Path, part: IO[bytes]) -> None:
    """What arrived gets its name, if it is what was published; else it goes."""
    os.fsync(part.fileno())
    whole = assets.part_of(target)
    if not assets.is_whole(whole, asset):
        wrong = f"{_size(part):,} bytes, not the published {asset.size[0]:,}" if asset.size else "an empty file"
    elif asset.sha256 and not sha256_of(whole).startswith(asset.sha256):
        wrong = f"a file whose SHA-256 does not begin with the published {asset.sha256}"
    else:
        wrong = ""
        os.replace(whole, target)
    whole.unlink(missing_ok=True)
    _about(target).unlink(missing_ok=True)
    if wrong:
        raise UserError(f"{asset.key}: {asset.location} gave {wrong}; nothing of it was kept")


def _about(target: Path) -> Path:
    return target.with_name(f"{assets.part_of(target).name}.json")


def _known(target: Path, url: str) -> dict[str, Any]:
    """What the part is a part of; {} where nobody wrote that down, and it cannot be continued."""
    try:
        found = read_json(_about(target))
    except UserError:
        return {}
    is_ours = isinstance(found, dict) and found.get("url") == url and isinstance(found.get("total"), int)
    return found if is_ours else {}


# From the Hub


def _from_hub(asset: Asset, target: Path) -> None:
    """A folder in diffusers' layout, or one file of a repository; huggingface_hub knows where it stopped."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    part = assets.part_of(target)
    # Old repositories hold no safetensors; of those that do, the same weights are not fetched twice.
    attempts = [[asset.file, f"*/{asset.file}"]] if asset.file else [["*.json", "*.safetensors"], ["*.json", "*.bin"]]
    for wanted in attempts:
        try:
            snapshot_download(asset.location, local_dir=part, allow_patterns=wanted)
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
                raise  # of the disk
            raise _without_network(asset, target, f"cannot reach the Hub ({type(error).__name__})") from None
        found = next(part.rglob(asset.file), None) if asset.file else part
        if found is not None and assets.is_whole(found, asset):
            break
    else:
        raise UserError(f"{asset.key}: {asset.location} on the Hub does not hold it whole; look at {part}")
    shutil.rmtree(part / ".cache", ignore_errors=True)  # huggingface_hub's own notes
    os.replace(found, target)
    if asset.file:
        shutil.rmtree(part)
