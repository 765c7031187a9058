"""Annotation files of COCO's form: which there are, and what is in them once everything was looked at.

Source: the COCO data format (cocodataset.org, "Data format").
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from diffrep.data import rle
from diffrep.data.containers import part_named_in
from diffrep.errors import UserError

_OTHER_TASKS = ("captions", "image_info", "panoptic", "stuff")  # annotation files without objects
_LAYOUT = "the official layout is annotations/instances_train2017.json beside train2017/, and val2017 likewise"
_NEEDED = "images (id, file_name, height, width), annotations (image_id, category_id, bbox, segmentation), categories"

Complain = Callable[[str], None]  # what a fault does: end the reading, or be written down


@dataclass(frozen=True)
class Annotated:
    """One annotation file, as far as it can be used.

    digest: hex SHA-256 of the file. categories: id and name, by ascending id. images: as the file has them.
    annotations: those of each picture id, with category_id, bbox (four floats), segmentation
    (:func:`diffrep.data.rle.packed`), area and iscrowd.
    """

    file: Path
    digest: str
    categories: tuple[tuple[int, str], ...]
    images: tuple[dict[str, Any], ...]
    annotations: dict[int, list[dict[str, Any]]]


def annotation_files(root: Path, origin: str) -> dict[str, Path]:
    """The file of each part: instances_*.json, else the only other one that names it.

    What is called val is the test part, unless there is another: nobody outside has the truth of COCO's test pictures,
    and everything published is by val2017.

    Raises:
        UserError: none that names a part, or several of one.
    """
    named: dict[str, list[Path]] = {}
    for file in sorted((root / "annotations").glob("*.json")):
        part = part_named_in(file.stem)
        if part is not None and not file.stem.startswith(_OTHER_TASKS):
            named.setdefault(part, []).append(file)
    if not named:
        raise UserError(f"{origin}: no file annotations/*.json that names a part; {_LAYOUT}")
    for part, files in named.items():
        named[part] = [file for file in files if file.stem.startswith("instances")] or files
        if len(named[part]) > 1:
            shown = ", ".join(file.name for file in named[part])
            raise UserError(f"{origin}: several annotation files of the {part} part ({shown}); leave one")
    if "validation" in named and "test" not in named:
        named["test"] = named.pop("validation")
    return {part: files[0] for part, files in named.items()}


def annotated(file: Path) -> Annotated:
    """Read an annotation file, once as long as it stays as it is.

    Raises:
        UserError: not JSON, not COCO's, ids that nobody declared, boxes or outlines that are none.
    """
    about = file.stat()
    return _annotated(file, about.st_size, about.st_mtime_ns)


@functools.lru_cache(maxsize=4)
def _annotated(file: Path, size: int, changed: int) -> Annotated:
    def refuse(fault: str) -> NoReturn:
        raise UserError(f"{file}: {fault}")

    return examined(file, refuse)


def examined(file: Path, complain: Complain) -> Annotated:
    """What is in a file. A fault of one entry is told to ``complain``; if that returns, the entry is left out.

    Raises:
        UserError: not JSON, or not COCO's.
    """
    try:
        content = json.loads(stored := file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is no JSON ({str(error).splitlines()[0]})") from None
    try:
        return _entries(file, hashlib.sha256(stored).hexdigest(), content, complain)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        what = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{file} is no JSON of COCO's ({what}); it needs {_NEEDED}") from None


def _entries(file: Path, digest: str, content: Any, complain: Complain) -> Annotated:
    images = _single(content["images"], "picture", complain)
    categories = _single(content["categories"], "category", complain)
    for image in images.values():
        if min(_whole(image["height"]), _whole(image["width"])) < 1 or not isinstance(image["file_name"], str):
            raise ValueError(f"picture {image['id']} has no size or no file_name")
    found: dict[int, list[dict[str, Any]]] = {number: [] for number in images}
    for annotation in content["annotations"]:
        name = f"annotation {annotation.get('id', '?')}"
        picture, kind = annotation["image_id"], annotation["category_id"]
        if picture not in images:
            complain(f"{name} is of picture {picture}, which 'images' does not have")
        elif kind not in categories:
            complain(f"{name} is of category {kind}, which 'categories' does not have")
        elif (used := _used(annotation, images[picture], name, complain)) is not None:
            found[picture].append(used)
    named = tuple(sorted((number, str(category["name"])) for number, category in categories.items()))
    return Annotated(file, digest, named, tuple(images.values()), found)


def _single(entries: Any, what: str, complain: Complain) -> dict[int, dict[str, Any]]:
    """Entries by their ids."""
    found: dict[int, dict[str, Any]] = {}
    for entry in entries:
        if _whole(entry["id"]) in found:
            complain(f"two entries have the {what} id {entry['id']}")
        else:
            found[entry["id"]] = entry
    return found


def _whole(number: Any) -> int:
    if not isinstance(number, int) or isinstance(number, bool):
        raise TypeError(f"{str(number)[:40]!r} is no whole number")
    return number


def _used(annotation: dict[str, Any], image: dict[str, Any], name: str, complain: Complain) -> dict[str, Any] | None:
    """What is needed of an annotation, its numbers packed; None after a complaint."""
    where, box = f"{name} of {image['file_name']!r}", annotation["bbox"]
    if len(box) != 4 or not all(isinstance(side, int | float) and math.isfinite(side) for side in box):
        complain(f"{where}: bbox is x, y, width, height; found {str(box)[:60]}")
        return None
    try:
        outline = rle.packed(annotation.get("segmentation"), image["height"], image["width"])
    except ValueError as error:
        complain(f"{where}: segmentation: {error}")
        return None
    return {
        "category_id": annotation["category_id"],
        "bbox": [float(side) for side in box],
        "segmentation": outline,
        "area": float(annotation.get("area", box[2] * box[3])),
        "iscrowd": bool(annotation.get("iscrowd", 0)),
    }


def folder_of(found: Annotated, root: Path) -> Path:
    """Where a file's pictures are: what its name ends in (val2017), here or below images/, or images/ itself."""
    ending = found.file.stem.rpartition("_")[2]
    places = [root / ending, root / "images" / ending, root / "images", root]
    first = found.images[0]["file_name"] if found.images else ""
    return next((place for place in places if bytes_of(place, first)), places[0])


def bytes_of(folder: Path, name: str) -> int | None:
    """Of a picture's file; None where there is none, or the name leads out of the folder."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        return None
    try:
        return (folder / name).stat().st_size
    except (OSError, ValueError):  # a name may be too long, or hold a zero byte
        return None
