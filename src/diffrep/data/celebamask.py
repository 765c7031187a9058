"""CelebAMask-HQ: 30,000 faces and 18 parts of each, merged into one mask, in the official split of CelebA.

``CelebA-HQ-img/0.jpg`` ... (1024x1024), ``CelebA-HQ-to-CelebA-mapping.txt`` and, for every part that is visible, one
white-on-black file ``CelebAMask-HQ-mask-anno/NUMBER // 2000/NUMBER_PART.png`` (512x512, five digits). Parts are merged
in the order of their labels, and later ones cover earlier ones. Two orders are about, and they differ in more than
numbers: in the first hair lies over cloth and glasses over eyes, in the second it is the other way round. A set that
``diffrep data prepare`` merged has ``mask-ORDER/NUMBER.png`` in place of the part files.
Source: switchablenorms/CelebAMask-HQ; zllrunning/face-parsing.PyTorch for the other order, which RepFusion took.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffrep.console import progress
from diffrep.data.celebahq import photographs
from diffrep.data.containers import existing
from diffrep.data.dense import DensePart, DenseRead, Task
from diffrep.data.images import Part, file_part
from diffrep.data.label_maps import NOTE, labels_in, opened
from diffrep.errors import UserError, nearest
from diffrep.files import located

# Label -> name. A label order belongs to a network as its weights do.
ORDERS = {
    "repfusion": (
        "background", "skin", "l_brow", "r_brow", "l_eye", "r_eye", "eye_g", "l_ear", "r_ear", "ear_r", "nose", "mouth",
        "u_lip", "l_lip", "neck", "neck_l", "cloth", "hair", "hat",
    ),
    "dataset": (
        "background", "skin", "nose", "eye_g", "l_eye", "r_eye", "l_brow", "r_brow", "l_ear", "r_ear", "mouth", "u_lip",
        "l_lip", "hair", "hat", "ear_r", "neck_l", "neck", "cloth",
    ),
}  # fmt: skip
FIRST_ORDER = "repfusion"  # where none is named
PART_FILES = "CelebAMask-HQ-mask-anno"
SIDE = 512  # pixels of an official mask
_WORKERS = 4
_MODES = ("1", "L", "P", "RGB", "RGBA")  # of Pillow, that the file of a part may have
_PER_FOLDER = 2000  # photographs whose part files share a folder
_NAME = re.compile(r"([0-9]{5})_(.+)\.png")
_PAIRS = (("l_brow", "r_brow"), ("l_eye", "r_eye"), ("l_ear", "r_ear"))  # ear_r: ear ring; l_lip: lower lip


def read_celebamask(location: str, _task: Task) -> DenseRead:
    """``FOLDER`` or ``FOLDER@ORDER``: ``CelebAMask-HQ``, the folder around it, or its ``CelebA-HQ-img``.

    Raises:
        UserError: an unknown order, photographs or masks missing, part files of no part; later, when a mask is asked
            for, one that is unreadable, of another size than the rest, or with a label that is none.
    """
    place, order = place_and_order(location)
    origin, classes = f"celebamask-hq:{location}", ORDERS[order]
    images, parts = photographs(origin, existing(place))
    merged = beside(images, merged_name(order))
    with_masks = _merged(origin, merged, order) if merged else _from_parts(origin, images, order, parts)
    mirrored = tuple((classes.index(left), classes.index(right)) for left, right in _PAIRS)
    return DenseRead(classes, {k: with_masks(part) for k, part in parts.items()}, mirrored, {"label_order": order})


def place_and_order(location: str) -> tuple[str, str]:
    """``FOLDER`` or ``FOLDER@ORDER`` -> the two sides; a folder may have an @ in its name."""
    if "@" not in location or located(location).exists():
        return location, FIRST_ORDER
    place, _, order = location.rpartition("@")
    if order not in ORDERS:
        raise UserError(f"celebamask-hq:{location}: no label order {order!r}; {nearest(order, ORDERS)}")
    return place, order


def merged_name(order: str) -> str:
    """The folder of merged masks of an order."""
    return f"mask-{order}"


def beside(images: Path, name: str) -> Path | None:
    """A folder among the photographs or beside theirs."""
    around = Path(os.path.abspath(images)).parent
    return next((folder / name for folder in (images, around) if (folder / name).is_dir()), None)


def number_of(name: str) -> int:
    """Of a photograph or merged mask, by its file name."""
    return int(Path(name).stem)


# Merged masks


def _merged(origin: str, folder: Path, order: str) -> Callable[[Part], DensePart]:
    def with_masks(part: Part) -> DensePart:
        names = [f"{number_of(name)}.png" for name in part.names]
        masks = file_part(f"{origin}, {folder.name}", folder, names, [-1] * len(names))
        return DensePart(
            part.names, part.read, lambda i: merged_pixels(folder / names[i], order), part.files + masks.files
        )

    return with_masks


def merged_pixels(path: Path, order: str) -> Tensor:
    """A mask as ``diffrep data prepare`` writes it, (H, W) uint8.

    Raises:
        UserError: an unreadable file, one of several channels, a label that the order lacks.
    """
    return torch.from_numpy(labels_in(path, len(ORDERS[order]) - 1))


# Masks of parts


def _from_parts(origin: str, images: Path, order: str, parts: Mapping[str, Part]) -> Callable[[Part], DensePart]:
    folder = beside(images, PART_FILES)
    if folder is None:
        others = [f"FOLDER@{other}" for other in ORDERS if beside(images, merged_name(other))]
        lost = "some programs lose it, unpack CelebAMask-HQ.zip with another one"
        raise UserError(f"{origin}: {PART_FILES} is missing; {f'merged is {others[0]}' if others else lost}")
    found, wrong = part_files(folder)
    if wrong:
        raise UserError(f"{origin}: {len(wrong)} part files are not as they should be, first {wrong[0]}")
    numbers = [number_of(name) for part in parts.values() for name in part.names]
    if bare := [number for number in numbers if number not in found]:
        raise UserError(f"{origin}: {len(bare)} of {len(numbers)} photographs have no part file, first {bare[0]}.jpg")

    def with_masks(part: Part) -> DensePart:
        rows = [number_of(name) for name in part.names]
        # To look up the sizes of 390,000 files takes too long: their names tell which set it is.
        files = tuple((f"{row}: {' '.join(found[row])}", 0) for row in rows)
        return DensePart(
            part.names, part.read, lambda i: mask_of(folder, rows[i], found[rows[i]], order), part.files + files
        )

    return with_masks


def part_files(folder: Path) -> tuple[dict[int, list[str]], list[str]]:
    """Number of a photograph -> the parts it has files for, by name; what is wrong with others, a sentence each."""
    found: dict[int, list[str]] = {}
    wrong = []
    for inner, name in _listed(folder):
        named = _NAME.fullmatch(name)
        told = _problem(inner, int(named[1]), named[2]) if named else "is not called NUMBER_PART.png, as 00012_hair.png"
        if named and told is None:
            found.setdefault(int(named[1]), []).append(named[2])
        else:
            wrong.append(f"{os.path.join(inner, name)}: {told}")
    return found, wrong


def _listed(folder: Path) -> Iterator[tuple[str, str]]:
    """(inner folder or "", name) of every PNG file."""
    inside = sorted(f.name for f in folder.iterdir() if f.is_dir() and not f.name.startswith("."))
    for inner in ("", *inside):
        for name in sorted(os.listdir(folder / inner)):
            if name.lower().endswith(".png") and not name.startswith("."):
                yield inner, name


def _problem(inner: str, number: int, part: str) -> str | None:
    if part not in ORDERS[FIRST_ORDER][1:]:
        return f"no part {part!r}; {nearest(part, ORDERS[FIRST_ORDER][1:])}"
    right = str(number // _PER_FOLDER)
    return None if inner == right else f"belongs into the folder {right}"


def part_path(folder: Path, number: int, part: str) -> Path:
    """Where the mask of one part lies."""
    return folder / str(number // _PER_FOLDER) / f"{number:05d}_{part}.png"


def mask_of(folder: Path, number: int, parts: Sequence[str], order: str) -> Tensor:
    """The mask of one photograph, (H, W) uint8, from the files of its parts.

    Raises:
        UserError: a file that is unreadable, or of another size than its siblings.
    """
    paths = [part_path(folder, number, part) for part in parts]
    where = [part_pixels(path) for path in paths]
    (height, width) = where[0].shape
    for path, found in zip(paths, where, strict=True):
        if found.shape != (height, width):
            sizes = f"{found.shape[1]}x{found.shape[0]} pixels, {paths[0].name} {width}x{height}"
            raise UserError(f"{path} has {sizes}; the masks of one face have one size")
    return torch.from_numpy(merge(dict(zip(parts, where, strict=True)), order))


def merge(parts: Mapping[str, np.ndarray], order: str) -> np.ndarray:
    """Part -> where it is, (H, W) bool -> labels (H, W) uint8; of two parts the one with the larger label."""
    mask = np.zeros(next(iter(parts.values())).shape, np.uint8)
    for label, part in enumerate(ORDERS[order]):
        if part in parts:
            mask[parts[part]] = label
    return mask


def part_pixels(path: Path) -> np.ndarray:
    """Where a part is, (H, W) bool: any of red, green and blue above 127.

    Files of one channel and with a palette read the same. The scripts of RepFusion and zllrunning look for 225, the
    index that Pillow's palette has for white, and find nothing in a grey-scale file.

    Raises:
        UserError: an unreadable file, or numbers of another range than 0 to 255.
    """
    image = opened(path)
    if image.mode not in _MODES:
        raise UserError(f"{path} has the mode {image.mode}; readable: {', '.join(_MODES)}")
    red, green, blue = map(np.asarray, image.convert("RGB").split())
    return (red | green | blue) > 127  # the highest bit


# Checking and merging a set


def faults(location: str) -> Iterator[str]:
    """What is wrong with the masks of ``FOLDER[@ORDER]``, a sentence each; one that begins with ``NOTE`` stops no run.

    Raises:
        UserError: as :func:`read_celebamask` of the photographs.
    """
    place, order = place_and_order(location)
    images, parts = photographs(f"celebamask-hq:{location}", existing(place))
    numbers = sorted(number_of(name) for part in parts.values() for name in part.names)
    if merged := beside(images, merged_name(order)):
        yield from _merged_faults(merged, numbers, order)
    elif folder := beside(images, PART_FILES):
        yield from _part_faults(folder, numbers)
    else:
        yield f"{PART_FILES} is missing"


def _merged_faults(folder: Path, numbers: Sequence[int], order: str) -> Iterator[str]:
    with progress("reading masks") as report:
        for done, number in enumerate(numbers):
            report(done, len(numbers))
            try:
                mask = merged_pixels(folder / f"{number}.png", order)
            except UserError as error:
                yield str(error)
            else:
                yield from _size_fault(folder / f"{number}.png", mask)


def _part_faults(folder: Path, numbers: Sequence[int]) -> Iterator[str]:
    found, wrong = part_files(folder)
    yield from wrong
    yield from (f"{number}.jpg has no part file" for number in numbers if number not in found)
    yield from (f"part files of {number}.jpg, which is not there" for number in sorted(found.keys() - {*numbers}))
    with progress("reading masks") as report, ThreadPoolExecutor(_WORKERS) as pool:
        for done, number in enumerate(sorted(found)):
            report(done, len(found))
            for told in pool.map(_part_fault, [part_path(folder, number, part) for part in found[number]]):
                yield from told


def _part_fault(path: Path) -> list[str]:
    try:
        where = part_pixels(path)
    except UserError as error:
        return [str(error)]
    return [*_size_fault(path, where), *([] if where.any() else [f"{NOTE}{path} is empty"])]


def _size_fault(path: Path, mask: Tensor | np.ndarray) -> list[str]:
    height, width = mask.shape
    return [] if (height, width) == (SIDE, SIDE) else [f"{path} has {width}x{height} pixels, official {SIDE}x{SIDE}"]


def write_merged(location: str, out: Path) -> None:
    """Write ``mask-ORDER`` of ``FOLDER[@ORDER]`` into a folder; photographs and lists too, where they are elsewhere.

    Raises:
        UserError: as :func:`read_celebamask`; masks that are merged already.
    """
    from PIL import Image

    place, order = place_and_order(location)
    images, parts = photographs(f"celebamask-hq:{location}", existing(place))
    if merged := beside(images, merged_name(order)):
        raise UserError(f"celebamask-hq:{location}: {merged} is there, and runs read it; nothing is to be merged")
    if images.resolve().is_relative_to(out.resolve()):
        out = images.parent
    else:
        _copy_photographs(images, [name for part in parts.values() for name in part.names], out)
    found, folder = read_celebamask(location, "segment"), out / merged_name(order)
    folder.mkdir()
    for name, part in found.parts.items():
        with progress(f"merging {name}") as report:
            for i, image_name in enumerate(part.names):
                report(i, len(part))
                Image.fromarray(part.truth(i).numpy()).save(folder / f"{number_of(image_name)}.png")


def _copy_photographs(images: Path, names: Sequence[str], out: Path) -> None:
    """With the lists beside them; links, which take no room, where both are on one disk."""
    lists = [f for folder in (images, images.resolve().parent) for f in folder.glob("CelebA*.txt")]
    (out / "CelebA-HQ-img").mkdir()
    for source in [images / name for name in names]:
        _link(source, out / "CelebA-HQ-img" / source.name)
    for source in lists:
        _link(source, out / source.name)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another disk, or one without links
        shutil.copyfile(source, target)
