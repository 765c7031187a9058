"""WFLW: 98 points on each of 10,000 faces, from the official text lists or from either JSON form.

``FOLDER`` holds ``WFLW_annotations/list_98pt_rect_attr_train_test/*.txt`` and ``WFLW_images``, or
``annotations/face_landmarks_wflw_{train,test}.json`` and ``images``. A row is a face; one image may carry several.
JSON comes in two spellings: OpenMMLab's own files (``iscrowd``, whole-numbered boxes) and what mmpose's converter
writes (``is_crowd``, boxes in fractions); centre and scale are taken as they stand there. From text they follow the
rule of the official files: :func:`box`. Boxes of either form (``bbox``, the detector's rectangle) are not read: some
are cut off. The six subsets are the flags of the text, or the official subset files beside the JSON.
Letters: K points.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffrep.data.containers import existing
from diffrep.data.dense import DensePart, DenseRead, Task
from diffrep.data.label_maps import NOTE
from diffrep.errors import UserError

NUM_POINTS = 98
UNIT = 200  # pixels: a scale of 1
REGIONS = {"contour": 33, "brow": 18, "nose": 9, "eye": 16, "mouth": 20, "pupil": 2}  # in the order of the points
NAMES = tuple(f"{region} {k}" for region, count in REGIONS.items() for k in range(count))
EYE_CORNERS = (60, 72)  # the outer ones, whose distance is the unit of an error
SUBSETS = ("largepose", "expression", "illumination", "makeup", "occlusion", "blur")  # in the order of the flags
PARTS = ("train", "test")
LICENCE = "WFLW's and WIDER FACE's terms: academic and non-commercial research"
OVERHANG = 0.25  # of a face's side: how far beyond the image's edge a point of a cut face may be guessed

TEXT = "list_98pt_rect_attr_{}.txt"
TEXT_FOLDERS = tuple(f"{around}list_98pt_rect_attr_train_test" for around in ("WFLW_annotations/", "annotations/", ""))
JSON = "face_landmarks_wflw_{}.json"
IMAGE_FOLDERS = ("WFLW_images", "images")
LINE_FIELDS = 2 * NUM_POINTS + 4 + len(SUBSETS) + 1  # points, rectangle, flags, image


# Runs of pairs that a mirror image exchanges, (first, its partner, how many): one goes up while the other goes down.
_ACROSS = (
    (0, 32, 16), (33, 46, 5), (38, 50, 4), (55, 59, 2), (60, 72, 5), (65, 75, 3), (76, 82, 3), (83, 87, 2), (88, 92, 2),
    (93, 95, 1), (96, 97, 1),
)  # fmt: skip
MIRRORED = tuple((first + k, last - k) for first, last, count in _ACROSS for k in range(count))


@dataclass(frozen=True)
class Face:
    """K points of one face, and where it is cut out.

    points: (K, 2) float64, x and y in pixels. visible: (K,) bool; what is not has no part in losses and scores.
    center: (2,) float64. scale: the side of the box around the points, in units of 200 pixels.
    """

    points: Tensor
    visible: Tensor
    center: Tensor
    scale: float


def box(points: Tensor) -> tuple[Tensor, float]:
    """Centre (2,) and scale of the smallest box of whole pixels around (K, 2) points, as in the official JSON."""
    low, high = points.amin(0).floor(), points.amax(0).ceil()
    return (low + high) / 2, float((high - low).max()) / UNIT


@dataclass(frozen=True)
class Row:
    """One face of a list. flags: as :data:`SUBSETS`, None where the list has none; size: (width, height) it claims."""

    file: str
    face: Face
    flags: tuple[bool, ...] | None = None
    size: tuple[int, int] | None = None


def read_wflw(location: str, task: Task) -> DenseRead:
    """Train and test, whichever are there.

    Raises:
        UserError: no list, a damaged one, images that are missing.
    """
    found = _layout(location)
    parts = {name: _part(found, file) for name, file in found.lists.items()}
    return DenseRead(NAMES, parts, MIRRORED, {"normaliser": EYE_CORNERS})


def faults(location: str) -> Iterator[str]:
    """What is wrong with lists and images, a sentence each; one that begins with ``NOTE`` stops no run.

    Raises:
        UserError: no list, or one that cannot be read at all.
    """
    found = _layout(location)
    for file in found.lists.values():
        for where, made in _rows(file):
            try:
                row = made()
                yield from _faults(row, _size(found.images / row.file), where)
            except UserError as error:
                yield str(error)


# Where things lie


@dataclass(frozen=True)
class _Layout:
    lists: dict[str, Path]  # by part
    images: Path


def _layout(location: str) -> _Layout:
    base = existing(location)
    for root in (base, base / "WFLW", base / "wflw"):
        candidates = [(root / folder, TEXT) for folder in TEXT_FOLDERS] + [(root / "annotations", JSON), (root, JSON)]
        for folder, name in candidates:
            lists = {part: folder / name.format(part) for part in PARTS if (folder / name.format(part)).is_file()}
            if lists:
                return _Layout(lists, _images_of(root))
    wanted = f"{TEXT_FOLDERS[0]}/{TEXT.format('train')} or annotations/{JSON.format('train')} (or test)"
    raise UserError(f"wflw:{location}: no list of faces; the folder holds {wanted}")


def _images_of(root: Path) -> Path:
    for name in IMAGE_FOLDERS:
        if (root / name).is_dir():
            return root / name
    raise UserError(f"wflw:{root}: no folder {' or '.join(IMAGE_FOLDERS)} beside the annotations")


def _part(found: _Layout, file: Path) -> DensePart:
    listed = [(where, made()) for where, made in _rows(file)]
    if not listed:
        raise UserError(f"{file}: lists no face")
    wheres, rows = [where for where, _ in listed], [row for _, row in listed]
    names = list(dict.fromkeys(row.file for row in rows))
    sizes = {name: _bytes(found.images / name) for name in names}
    if missing := [name for name, size in sizes.items() if size is None]:
        told = f"{len(missing)} of {len(names)} images are missing, first {missing[0]:.150}"
        raise UserError(f"{file}: {told} (looked for in {found.images})")
    files = ((file.name, file.stat().st_size), *((name, size or 0) for name, size in sizes.items()))

    def truth(index: int) -> Face:
        _check_inside(rows[index], _size(found.images / rows[index].file), wheres[index])  # what a list claims may err
        return rows[index].face

    return DensePart(
        _titles(rows), lambda i: (found.images / rows[i].file).read_bytes(), truth, files, _subsets(file, rows)
    )


def _bytes(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except (OSError, ValueError):  # not there, or no path at all
        return None


def _size(path: Path) -> tuple[int, int]:
    """(width, height), without decoding."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.size
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except Exception as error:  # damaged bytes make Pillow raise nearly anything
        raise UserError(f"{path} is no image ({type(error).__name__})") from None


def _titles(rows: Sequence[Row]) -> list[str]:
    """What a message calls each face: its image, with a number where that has several."""
    total, seen = Counter(row.file for row in rows), Counter[str]()
    titles = []
    for row in rows:
        seen[row.file] += 1
        titles.append(row.file if total[row.file] == 1 else f"{row.file}, face {seen[row.file]}")
    return titles


def _subsets(file: Path, rows: Sequence[Row]) -> dict[str, Tensor]:
    """(N,) bool each: by the flags of a text list, else by the files of the subsets beside a JSON list."""
    if all(row.flags is not None for row in rows):
        flags = torch.tensor([row.flags for row in rows])
        return dict(zip(SUBSETS, flags.unbind(1), strict=True))
    found = {}
    for name in SUBSETS:
        beside = file.with_name(f"{file.stem}_{name}.json")
        if beside.is_file():
            chosen = {_key(made()) for _, made in _rows(beside)}
            if unknown := len(chosen - {_key(row) for row in rows}):
                raise UserError(f"{beside}: {unknown} of its faces are not in {file.name}")
            found[name] = torch.tensor([_key(row) in chosen for row in rows])
    return found


def _key(row: Row) -> tuple[str, tuple[float, ...]]:
    """A face by image and points: ids differ from file to file."""
    return Path(row.file).name, tuple(row.face.points.mul(100).round().flatten().tolist())


# Lists: every row by a function, so that one bad row can be told from the next

_Rows = Iterator[tuple[str, Callable[[], Row]]]


def _rows(file: Path) -> _Rows:
    """(where it stands, what makes it; UserError: what is wrong there) of each face."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read ({type(error).__name__})") from None
    return _json_rows(file, text) if file.suffix == ".json" else _text_rows(file, text)


def _text_rows(file: Path, text: str) -> _Rows:
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            where = f"{file}, line {number}"
            yield where, lambda line=line, where=where: _of_line(line, where)  # type: ignore[misc]


def _of_line(line: str, where: str) -> Row:
    fields = line.split(maxsplit=LINE_FIELDS - 1)  # the image's path is what remains
    if len(fields) < LINE_FIELDS or len(fields[-1].split()) > 1:
        told = (
            f"{len(line.split())} fields; {NUM_POINTS} points, a rectangle, six flags and an image take {LINE_FIELDS}"
        )
        raise UserError(f"{where}: {told}")
    points = _numbers(fields[: 2 * NUM_POINTS], where).view(NUM_POINTS, 2)
    flags = fields[-1 - len(SUBSETS) : -1]
    if wrong := [flag for flag in flags if flag not in ("0", "1")]:
        raise UserError(f"{where}: flag {wrong[0]!r}; each of the six is 0 or 1")
    face = Face(points, torch.ones(NUM_POINTS, dtype=torch.bool), *_box(points, where))
    return Row(fields[-1].strip(), face, tuple(flag == "1" for flag in flags))


def _box(points: Tensor, where: str) -> tuple[Tensor, float]:
    center, scale = box(points)
    if not scale:
        raise UserError(f"{where}: all points are one, so there is nothing to cut out")
    return center, scale


def _numbers(values: Sequence[Any], where: str) -> Tensor:
    numbers = [_number(value) for value in values]
    if wrong := [value for value, number in zip(values, numbers, strict=True) if not math.isfinite(number)]:
        raise UserError(f"{where}: {str(wrong[0])[:40]!r} stands where a finite number is needed")
    return torch.tensor(numbers, dtype=torch.float64)


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _json_rows(file: Path, text: str) -> _Rows:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON ({error})") from None
    lists = {key: content.get(key) for key in ("images", "annotations")} if isinstance(content, dict) else {}
    if not lists or not all(isinstance(v, list) and all(isinstance(e, dict) for e in v) for v in lists.values()):
        raise UserError(f"{file}: not COCO's form: an object with the lists 'images' and 'annotations' is needed")
    images = {str(entry.get("id")): entry for entry in lists["images"] or []}
    for number, entry in enumerate(lists["annotations"] or []):
        if not entry.get("iscrowd", entry.get("is_crowd", 0)):
            where = f"{file}, annotation {entry.get('id', f'number {number}')}"
            yield where, lambda entry=entry, where=where: _of_entry(entry, images, where)  # type: ignore[misc]


def _of_entry(entry: dict[str, Any], images: dict[str, dict[str, Any]], where: str) -> Row:
    image = images.get(str(entry.get("image_id")), {})
    if not isinstance(image.get("file_name"), str):
        raise UserError(f"{where}: image_id {entry.get('image_id')!r} names no entry of 'images' with a file_name")
    values = entry.get("keypoints")
    if not isinstance(values, list) or len(values) != 3 * NUM_POINTS:
        told = f"{len(values)} numbers" if isinstance(values, list) else "no list"
        raise UserError(f"{where}: keypoints: {told}; {NUM_POINTS} points (x, y, v) take {3 * NUM_POINTS}")
    numbers = _numbers(values, where).view(NUM_POINTS, 3)
    points, visible = numbers[:, :2].contiguous(), numbers[:, 2] > 0
    if not visible.any():
        raise UserError(f"{where}: no point is visible")
    row = Row(image["file_name"], Face(points, visible, *_cut(entry, points[visible], where)), None, _claimed(image))
    if row.size is not None:
        _check_inside(row, row.size, where)
    return row


def _cut(entry: dict[str, Any], points: Tensor, where: str) -> tuple[Tensor, float]:
    """Centre and scale as an entry has them, by the rule of :func:`box` where it does not."""
    if "center" not in entry or "scale" not in entry:
        return _box(points, where)
    center = entry["center"] if isinstance(entry["center"], list) else [entry["center"]]
    numbers = _numbers([*center, entry["scale"]], f"{where}, center and scale")
    if len(numbers) != 3 or numbers[2] <= 0:
        raise UserError(f"{where}: center and scale {numbers.tolist()}: two numbers, and one above 0, are needed")
    return numbers[:2], float(numbers[2])


def _claimed(image: dict[str, Any]) -> tuple[int, int] | None:
    """(width, height) as the list has them, where it has."""
    width, height = image.get("width"), image.get("height")
    return (width, height) if isinstance(width, int) and isinstance(height, int) else None


# Points and images together


def _beyond(face: Face, size: tuple[int, int]) -> Tensor:
    """How many pixels each visible point lies outside an image, (K,); 0 inside."""
    excess = torch.maximum(-face.points, face.points - torch.tensor(size)).amax(1).clamp(min=0)
    return excess * face.visible


def _check_inside(row: Row, size: tuple[int, int], where: str) -> None:
    beyond = _beyond(row.face, size)
    worst = int(beyond.argmax())
    if beyond[worst] > OVERHANG * UNIT * row.face.scale:
        at = ", ".join(f"{x:g}" for x in row.face.points[worst].tolist())
        raise UserError(f"{where}: point {worst} at ({at}) lies outside {row.file}, which is {size[0]}x{size[1]}")


def _faults(row: Row, size: tuple[int, int], where: str) -> Iterator[str]:
    """Of a row beside its image; UserError where the points lie elsewhere."""
    if row.size not in (None, size):
        yield f"{where}: {row.file} is {size[0]}x{size[1]}, the list says {row.size[0]}x{row.size[1]}"
    _check_inside(row, size, where)
    if outside := int((_beyond(row.face, size) > 0).sum()):
        yield f"{NOTE}{where}: {outside} points lie beyond the edge of {row.file}"
    if math.dist(*(row.face.points[k].tolist() for k in EYE_CORNERS)) == 0:
        yield f"{NOTE}{where}: both eye corners are one point, so the face has no score"
