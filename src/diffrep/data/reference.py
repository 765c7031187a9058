"""The reference set of ImageNet at 256 pixels: every validation image resized, cropped and stored as PNG.

OUT/NAME.png      shorter side 256 (bilinear, antialiased), centre crop of 256, as torchvision's Resize and CenterCrop
OUT/manifest.json written last: how many, how made, and their content hash

MAGE and ADDP score against such a folder. PNG is essential: with JPEG another FID comes out (13.74 in place of 11.18).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from diffrep.console import progress
from diffrep.data.containers import existing
from diffrep.data.images import IMAGE_SUFFIXES, Part, UnreadableError, decode, decoded, file_part
from diffrep.data.shards import MANIFEST, encoded
from diffrep.data.tars import shard_part
from diffrep.errors import UserError
from diffrep.files import write_atomic, write_json

NAME, SIDE, EXPECTED = "imagenet-val256", 256, 50_000
RESIZE = f"shorter side {SIDE} (bilinear, antialiased), centre crop {SIDE}"
VAL_TAR = "ILSVRC2012_img_val.tar"


@dataclass(frozen=True)
class Prepared:
    """A finished reference set."""

    source: str  # data reference, for --reference
    images: int
    made: int  # of them by this call; the others were there
    expected: int
    content_hash: str

    def lines(self) -> list[str]:
        """The report for a terminal."""
        said = f"{self.images} images ({self.made} made now), sha256 {self.content_hash[:16]}"
        fewer = f"{self.images} of {self.expected} images: scores against it are not those that papers report"
        return [f"source: {self.source}", f"reference: {said}", *([fewer] if self.images != self.expected else [])]

    def to_json(self) -> dict[str, Any]:
        """The same as plain values."""
        return asdict(self)


def image_digest(pixels: np.ndarray) -> bytes:
    """SHA-256 over size and pixels of one (3, H, W) uint8 image."""
    return hashlib.sha256(f"{pixels.shape[1]}x{pixels.shape[2]}:".encode() + pixels.tobytes()).digest()


def content_hash(digests: Iterable[bytes]) -> str:
    """64 hex digits over the pixels of a set, whatever its images are called and in which order they come."""
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()


def prepare_reference(path: str | Path, out: str | Path) -> Prepared:
    """Write the PNG that are not there yet, then the manifest; the same command goes on after an interruption.

    Args:
        path: a folder that holds ``val/`` or ILSVRC2012_img_val.tar, that tar itself, or a folder of the images, with
            or without class folders below; labels are not asked for.

    Raises:
        UserError: no images there, two of one name, an unreadable one, images of another set in ``out``.
    """
    folder = Path(out).expanduser()
    part = _validation_images(existing(str(path)))
    targets = [folder / f"{name}.png" for name in _plain_names(part)]
    _refuse_strangers(folder, targets)
    (folder / MANIFEST).unlink(missing_ok=True)  # while it is there, the set is whole
    found = _digests_of_present(targets)
    missing = [k for k, target in enumerate(targets) if target not in found]
    made = _write_missing(part, targets, missing)
    digest = content_hash([*found.values(), *made])
    write_json(folder / MANIFEST, _manifest(len(targets), digest))
    return Prepared(f"folder:{folder}", len(targets), len(missing), EXPECTED, digest)


def _manifest(images: int, digest: str) -> dict[str, Any]:
    how = {"resize": RESIZE, "format": "png", "pillow": version("pillow")}
    return {"name": NAME, "images": images, "expected": EXPECTED, "content_hash": digest} | how


def _validation_images(path: Path) -> Part:
    tar = path if path.is_file() else path / VAL_TAR
    root = path / "val" if (path / "val").is_dir() else path
    if path.is_file() or (root is path and tar.is_file()):
        part = shard_part([str(tar)])  # NAME.JPEG is a sample of its own
    else:
        names = sorted(str(f.relative_to(root)) for f in root.rglob("*") if _is_image(f.relative_to(root)))
        part = file_part(str(path), root, names, [-1] * len(names))
    if not len(part):
        raise UserError(f"{path}: no images of ImageNet's validation set; give val/, {VAL_TAR} or the folder of either")
    return part


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and not any(p.startswith(".") for p in path.parts)


def _plain_names(part: Part) -> list[str]:
    """File names without folder and ending: the reference is one flat folder, as torch-fidelity reads it."""
    names = [PurePosixPath(name.rpartition(":")[2]).stem for name in part.names]
    first: dict[str, str] = {}
    for name, origin in zip(names, part.names, strict=True):
        if name in first:
            raise UserError(f"{first[name]} and {origin} would both become {name}.png; ImageNet's names differ")
        first[name] = origin
    return names


def _refuse_strangers(folder: Path, targets: Sequence[Path]) -> None:
    """What stands in the folder would be part of the reference."""
    there = {entry.name for entry in os.scandir(folder)} if folder.is_dir() else set()
    expected = {target.name for target in targets} | {MANIFEST}
    if strange := sorted(name for name in there - expected if not name.startswith(".")):
        raise UserError(f"{folder} holds {strange[0]}, which comes from no image of this source; choose another folder")


def _digests_of_present(targets: Sequence[Path]) -> dict[Path, bytes]:
    """Of the PNG that are whole; a damaged one, or one of another size, is made again."""
    there = [target for target in targets if target.is_file()]
    part = Part([t.name for t in there], lambda k: there[k].read_bytes(), None)
    found = {}
    with progress("reading what is there") as report:
        for done, target in enumerate(there):
            report(done, len(there))
            image = decode(part, done, None)
            if isinstance(image, np.ndarray) and image.shape == (3, SIDE, SIDE):
                found[target] = image_digest(image)
    return found


def _write_missing(part: Part, targets: Sequence[Path], missing: Sequence[int]) -> list[bytes]:
    digests = []
    with progress(NAME) as report:
        for done, (k, image) in enumerate(zip(missing, decoded(part, missing, SIDE), strict=True)):
            report(done, len(missing))
            if isinstance(image, UnreadableError):
                raise UserError(f"{part.names[k]} is unreadable ({image}); get it anew, the same command goes on")
            write_atomic(targets[k], encoded(image, "png"))
            digests.append(image_digest(image))
    return digests
