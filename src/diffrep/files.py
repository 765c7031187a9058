"""Writing so that nothing is ever half there: aside, fsync, rename. Locks that a killed process cannot leave behind."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from diffrep.errors import RunError, UserError

ROOT_VARIABLE = "DIFFREP_DATA"


def located(place: str | Path) -> Path:
    """A relative path that is not here is looked for below $DIFFREP_DATA.

    Shipped recipes say ``data/cifar10`` or ``weights/...``; where that is on a machine must not change their hash.
    """
    path = Path(place).expanduser()
    root = os.environ.get(ROOT_VARIABLE)
    if root and not path.is_absolute() and not path.exists() and (Path(root) / path).exists():
        return Path(root) / path
    return path


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full or read-only disk into one line (exit 3) that says where, and that nothing half-written stays."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        told = re.search(r"os error (\d+)", str(error))  # safetensors says it in words only
        number = error.errno if isinstance(error, OSError) else int(told[1]) if told else None
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES):
            raise RunError(
                f"cannot write {path}: {os.strerror(number)}; free some space and run the same command again"
            ) from error
        raise


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write a whole file or none: readers see the old content until the new one is safe on disk."""
    data = content.encode() if isinstance(content, str) else content
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(aside, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)
        _fsync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """``write_atomic`` of readable JSON with a final newline; NaN is refused."""
    write_atomic(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


@contextlib.contextmanager
def folder_aside(path: Path) -> Iterator[Path]:
    """Fill a folder aside; it takes the place of ``path`` only when the block ends well."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    with disk_errors(path):
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        try:
            yield aside
            for file in aside.rglob("*"):
                _fsync_folder(file)
            _fsync_folder(aside)
            old = path.with_name(f".{path.name}.{os.getpid()}.old")
            if path.exists():
                os.replace(path, old)
            try:
                os.replace(aside, path)
            except OSError:
                if old.exists():
                    os.replace(old, path)
                raise
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        _fsync_folder(path.parent)


def _fsync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold ``folder`` for this process; a second one is refused. The kernel drops the lock when the holder dies."""
    with disk_errors(folder):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise UserError(f"{folder} cannot be a folder: a file is in its way; choose another --out") from None
        file = open(folder / ".lock", "a")  # noqa: SIM115 - held until the block ends
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder} is in use by another process; wait for it or choose another --out") from None
        yield
    finally:
        file.close()


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of one file, read in blocks."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def short_hash(value: Any, length: int = 8) -> str:
    """The first hex digits of the SHA-256 of a value's canonical JSON (sorted keys, no spaces)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def read_json(path: Path) -> Any:
    """Parse a JSON file of ours; a damaged one is named in one line."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not readable JSON ({error}); it was not written by a finished command") from None
