"""COCO 2017 and what is stored like it: one JSON per part with boxes, outlines and sparse category ids.

Labels are 0..K-1 by ascending category id. Crowds and boxes without an inside stay, because AP knows them; training
has neither as a target (:attr:`Objects.learnable`). The training part is the pictures with such a target; other parts
keep empty ones, in which every detection is wrong.
Source: the COCO data format (cocodataset.org, "Data format").
Letters: n objects of a picture, H and W pixels, K classes.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diffrep.data import rle
from diffrep.data.coco_files import Annotated, annotated, annotation_files, bytes_of, examined, folder_of
from diffrep.data.containers import existing
from diffrep.data.dense import DensePart, DenseRead, Task
from diffrep.data.label_maps import NOTE
from diffrep.errors import UserError

LICENCE = "COCO: annotations CC BY 4.0; photographs under Flickr's terms, each its own"
OFFICIAL = {"train2017": 118_287, "val2017": 5_000}  # pictures, with those without objects
MIN_SIDE = 1e-5  # pixels; official boxes of no width or height are faults


@dataclass(frozen=True)
class Objects:
    """What is to be found in one picture.

    boxes: (n, 4) float64 x0 y0 x1 y1 in pixels; labels: (n,) int64, 0..K-1.
    crowd: (n,) bool, a group that is no single object; area: (n,) float64 in pixels, as stored.
    outlines: polygons or run lengths of each (:mod:`diffrep.data.rle`); size: H, W; picture: its official id.
    """

    boxes: Tensor
    labels: Tensor
    crowd: Tensor
    area: Tensor
    outlines: tuple[rle.Outline, ...]
    size: tuple[int, int]
    picture: int = 0

    def __len__(self) -> int:
        return len(self.outlines)

    @property
    def learnable(self) -> Tensor:
        """(n,) bool: objects that training has as targets."""
        return ~self.crowd & ((self.boxes[:, 2:] - self.boxes[:, :2]).min(1).values >= MIN_SIDE)

    def masks(self, chosen: Sequence[int] | None = None) -> Tensor:
        """(m, H, W) bool, filled now: of all objects, or of the chosen ones in their order."""
        rows = range(len(self)) if chosen is None else chosen
        masks = [torch.from_numpy(rle.mask_of(self.outlines[row], *self.size)) for row in rows]
        return torch.stack(masks) if masks else torch.zeros(0, *self.size, dtype=torch.bool)

    @classmethod
    def from_masks(cls, masks: Tensor, labels: Tensor, picture: int = 0) -> Objects:
        """Of masks (n, H, W) bool, none of them empty: boxes are the tightest ones, areas are counts of pixels."""
        outlines = tuple(rle.runs_of(mask.numpy()) for mask in masks)
        crowd = torch.zeros(len(masks), dtype=torch.bool)
        area, size = masks.sum((1, 2)).double(), (masks.shape[1], masks.shape[2])
        return cls(tight_boxes(masks), labels, crowd, area, outlines, size, picture)


def scoring_library() -> str:
    """The package that computes AP.

    Raises:
        UserError: none is installed.
    """
    for name in ("faster_coco_eval", "pycocotools"):
        if importlib.util.find_spec(name) is not None:
            return name
    raise UserError("detection is scored by faster-coco-eval, which is not installed: pip install 'diffrep[detect]'")


def tight_boxes(masks: Tensor) -> Tensor:
    """(n, H, W) bool -> (n, 4) float64 x0 y0 x1 y1, from the first pixel to behind the last; 0 for an empty mask."""
    sides = []
    for axis in (1, 2):  # what is left of a mask: its columns, its rows
        seen = masks.any(axis).byte()
        last = seen.shape[1] - seen.flip(1).argmax(1)
        sides.append(torch.stack([seen.argmax(1), last * seen.any(1)], 1) if len(masks) else torch.zeros(0, 2))
    return torch.stack(sides, 1).transpose(1, 2).flatten(1).double()


# Reading


def read_coco(location: str, task: Task) -> DenseRead:
    """A folder with ``annotations/`` and a folder of pictures for each part.

    Raises:
        UserError: no such layout, a file that is not COCO's, pictures that are missing, a category without pictures.
    """
    origin, root = f"coco:{location}", existing(location)
    found = {part: annotated(file) for part, file in annotation_files(root, origin).items()}
    first = next(iter(found.values()))
    if odd := next((other for other in found.values() if other.categories != first.categories), None):
        raise UserError(f"{odd.file}: its categories differ from those of {first.file}")
    if "train" in found and (unseen := _unseen(found["train"])):
        advice = "nothing can be learnt of it; take it out of 'categories', or add pictures"
        raise UserError(f"{found['train'].file}: no picture shows category {unseen[0]}: {advice}")
    parts = {part: _part(of_part, root, part == "train") for part, of_part in found.items()}
    facts = {"category_ids": [number for number, _ in first.categories]}
    return DenseRead(tuple(name for _, name in first.categories), parts, facts=facts)


def _unseen(found: Annotated) -> list[str]:
    seen = {a["category_id"] for of_picture in found.annotations.values() for a in of_picture}
    return [f"{name!r} (id {number})" for number, name in found.categories if number not in seen]


def _part(found: Annotated, root: Path, trains: bool) -> DensePart:
    label = {number: k for k, (number, _) in enumerate(found.categories)}
    kept = [i for i in found.images if not trains or any(_is_target(a) for a in found.annotations[i["id"]])]
    folder, names = folder_of(found, root), [image["file_name"] for image in kept]
    files = [(f"{found.file.name} {found.digest}", found.file.stat().st_size)]
    for name in names:
        size = bytes_of(folder, name)
        if size is None:
            raise UserError(f"{found.file}: picture {name!r} is not in {folder}")
        files.append((name, size))

    def truth(row: int) -> Objects:
        return _objects(kept[row], found.annotations[kept[row]["id"]], label)

    return DensePart(names, lambda row: (folder / names[row]).read_bytes(), truth, tuple(files))


def _is_target(annotation: dict[str, Any]) -> bool:
    return not annotation["iscrowd"] and min(annotation["bbox"][2:]) >= MIN_SIDE


def _objects(image: dict[str, Any], annotations: list[dict[str, Any]], label: dict[int, int]) -> Objects:
    boxes = torch.tensor([a["bbox"] for a in annotations], dtype=torch.float64).view(-1, 4)
    return Objects(
        boxes=torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1),
        labels=torch.tensor([label[a["category_id"]] for a in annotations], dtype=torch.int64),
        crowd=torch.tensor([bool(a["iscrowd"]) for a in annotations], dtype=torch.bool),
        area=torch.tensor([a["area"] for a in annotations], dtype=torch.float64),
        outlines=tuple(a["segmentation"] for a in annotations),
        size=(image["height"], image["width"]),
        picture=image["id"],
    )


# Checking


def faults(location: str) -> Iterator[str]:
    """What is wrong on disk, a sentence each: counts, ids nobody declared, outlines, boxes, missing pictures, sizes."""
    root = existing(location)
    for part, file in annotation_files(root, f"coco:{location}").items():
        said: list[str] = []
        found = examined(file, said.append)
        yield from said
        if len(found.images) != (official := OFFICIAL.get(file.stem.rpartition("_")[2], len(found.images))):
            yield f"{part} lists {len(found.images):,} of {official:,} pictures"
        yield from (f"no picture of {part} shows category {name}" for name in _unseen(found))
        folder = folder_of(found, root)
        for image in found.images:
            yield from _faults_of(image, found.annotations[image["id"]], folder)
        empty = sum(not any(_is_target(a) for a in of_picture) for of_picture in found.annotations.values())
        if empty and part == "train":
            yield f"{NOTE}{empty:,} pictures of {part} have no object to learn from, and are left out in training"


def _faults_of(image: dict[str, Any], annotations: list[dict[str, Any]], folder: Path) -> Iterator[str]:
    name, size = image["file_name"], (image["width"], image["height"])
    if bytes_of(folder, name) is None:
        yield f"picture {name!r} is not in {folder}"
    else:
        with contextlib.suppress(OSError), Image.open(folder / name) as picture:  # unreadable ones are told elsewhere
            if picture.size != size:
                yield f"picture {name!r} is {picture.size}, its annotations say {size}"
    for annotation in annotations:
        x, y, width, height = annotation["bbox"]
        if min(width, height) < MIN_SIDE:
            yield f"{NOTE}a box of {name!r} has no inside ({width:g} x {height:g}), and is no target in training"
        elif min(x, y) < -1 or x + width > size[0] + 1 or y + height > size[1] + 1:
            yield f"a box of {name!r} reaches out of the picture ({x:g}, {y:g}, {width:g}, {height:g})"
