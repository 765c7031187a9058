"""Archives unpacked below a folder: plain files only, every one below it, none twice."""

from __future__ import annotations

import errno
import lzma
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from diffrep.errors import UserError

_DAMAGED = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, ValueError)
_LOCKED = (RuntimeError, NotImplementedError)  # of zipfile: a password, a compression that Python does not know
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)  # that is written to
_NO_PLACE = (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)
Member = tuple[str, bool, IO[bytes] | None]  # name, whether it is a plain file, what it holds


def unpack(archive: Path, folder: Path) -> None:
    """Write what a zip or tar file holds; folders and what a Mac adds are passed over.

    Raises:
        UserError: a file that is no archive, a damaged or locked one; a member that is no plain file below ``folder``,
            or has no place there because of another one.
    """
    try:
        file = open(archive, "rb")  # noqa: SIM115 - closed below
    except OSError as error:
        raise UserError(f"{archive} cannot be read ({error.strerror})") from None
    with file:
        try:
            for name, is_plain, content in _zipped(file) if zipfile.is_zipfile(file) else _tarred(file):
                _write(archive, folder, name, is_plain, content)
        except UserError:
            raise
        except (*_DAMAGED, *_LOCKED, OSError) as error:  # offsets of a damaged archive end in OSError, too
            if getattr(error, "errno", None) in _OF_THE_DISK:
                raise
            reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(": ")
            raise UserError(f"{archive} is no readable zip or tar file ({reason}); nothing was written") from None


def _zipped(file: IO[bytes]) -> Iterator[Member]:
    with zipfile.ZipFile(file) as opened:
        for member in opened.infolist():
            kind = stat.S_IFMT(member.external_attr >> 16)  # 0 where the archive was made on Windows
            if not member.is_dir():
                with opened.open(member) as content:
                    yield member.filename, kind in (0, stat.S_IFREG), content


def _tarred(file: IO[bytes]) -> Iterator[Member]:
    file.seek(0)
    with tarfile.open(fileobj=file, mode="r:*") as opened:
        for member in opened:
            if not member.isdir():
                yield member.name, member.isreg(), opened.extractfile(member) if member.isreg() else None
        while opened.fileobj and opened.fileobj.read(1 << 20):
            pass  # the checksum of a compressed tar stands at its end


def _write(archive: Path, folder: Path, name: str, is_plain: bool, content: IO[bytes] | None) -> None:
    path = PurePosixPath(name)
    if path.parts[:1] == ("__MACOSX",) or path.name.startswith("._") or path.name == ".DS_Store":
        return
    if not is_plain or content is None or path.is_absolute() or ".." in path.parts or "\\" in name:
        raise UserError(f"{archive}: member {name!r} is not a plain file below the folder; nothing was written")
    target = folder / path
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        written = open(target, "xb")  # noqa: SIM115 - closed below, where an error is the disk's
    except OSError as error:
        if error.errno not in _NO_PLACE:
            raise
        told = f"member {name!r} has no place beside the others ({error.strerror}); nothing was written"
        raise UserError(f"{archive}: {told}") from None
    with written:
        shutil.copyfileobj(content, written, 1 << 20)
