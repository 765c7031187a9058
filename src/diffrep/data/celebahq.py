"""CelebA-HQ, the photographs of CelebAMask-HQ, in the official split of CelebA; without classes.

``CelebA-HQ-img/0.jpg``, ``1.jpg``, ... and ``CelebA-HQ-to-CelebA-mapping.txt``, which says which photograph of CelebA
each of them is. CelebA's authors split theirs by position, hence 24,183 / 2,993 / 2,824 of the 30,000. RepFusion's
first stage was released with all of them, the second stage's test images included; here it sees the training part.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

from diffrep.data.containers import existing
from diffrep.data.images import IMAGE_SUFFIXES, Part, Read, file_part, some_of
from diffrep.data.lists import read_lines
from diffrep.errors import UserError

MAPPING = "CelebA-HQ-to-CelebA-mapping.txt"
FIRST_VALIDATION, FIRST_TEST = 162_771, 182_638  # positions in CelebA: list_eval_partition.txt of its authors


def read_celebahq(location: str) -> Read:
    """``CelebAMask-HQ``, the folder around it, its ``CelebA-HQ-img``, or any folder of photographs named by number.

    The mapping is beside or among the photographs. Every one that it lists is read, in the order of the numbers.

    Raises:
        UserError: no mapping, or a damaged one; photographs missing, not listed, twice there or without a number.
    """
    origin, base = f"celebahq:{location}", existing(location)
    return (), photographs(origin, base, otherwise=", or read folder:{} in a split of ours")[1]


def photographs(origin: str, base: Path, otherwise: str = "") -> tuple[Path, dict[str, Part]]:
    """The folder of the photographs, and the official parts of them, each in the order of the numbers.

    Args:
        origin: what a message calls the set.
        base: see :func:`read_celebahq`, and for what is refused.
        otherwise: what else may be done without a mapping; ``{}`` becomes the folder.
    """
    images, mapping = _places(origin, base, otherwise)
    position = read_mapping(mapping)
    files = _numbered(origin, images)
    if strange := sorted(files.keys() - position.keys()):
        found = f"{len(strange)} of {len(files)} images have no line in {MAPPING}"
        raise UserError(f"{origin}: {found}, first {files[strange[0]]}")
    numbers = sorted(position)
    whole = file_part(origin, images, [files.get(k, f"{k}.jpg") for k in numbers], [-1] * len(numbers))
    rows: dict[str, list[int]] = {"train": [], "validation": [], "test": []}
    for row, number in enumerate(numbers):
        rows[part_of(position[number])].append(row)
    return images, {part: some_of(whole, chosen) for part, chosen in rows.items() if chosen}


def part_of(position: int) -> str:
    """The part of a photograph by its position in CelebA, counted from 0."""
    if position < FIRST_VALIDATION:
        return "train"
    return "validation" if position < FIRST_TEST else "test"


def read_mapping(path: Path) -> dict[int, int]:
    """Number of a CelebA-HQ photograph -> its position in CelebA, from 0.

    A row is ``number position file``; a heading and further columns (two MD5 sums) are in some copies.

    Raises:
        UserError: an unreadable list, another row, a position that is not its file's, a number twice.
    """
    rows = [line.split() for line in read_lines(path)]
    rows = rows[1:] if rows[0][0] == "idx" else rows
    if odd := next((row for row in rows if not _is_row(row)), None):
        form = "`number position file`, file being position + 1: 0 119613 119614.jpg"
        raise UserError(f"{path}: {' '.join(odd[:3])!r} is not a row {form}")
    position = {int(row[0]): int(row[1]) for row in rows}
    if len(position) < len(rows):
        number, times = Counter(int(row[0]) for row in rows).most_common(1)[0]
        raise UserError(f"{path}: photograph {number} stands there {times} times")
    return position


def _is_row(row: list[str]) -> bool:
    stem = row[2].partition(".")[0] if len(row) > 2 else ""
    return all(_is_number(text) for text in (*row[:2], stem)) and int(stem) == int(row[1]) + 1


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 10


def _places(origin: str, base: Path, otherwise: str) -> tuple[Path, Path]:
    """The folder of the photographs, and the mapping."""
    base = base / "CelebAMask-HQ" if (base / "CelebAMask-HQ").is_dir() else base
    images = base / "CelebA-HQ-img" if (base / "CelebA-HQ-img").is_dir() else base
    if not images.is_dir():
        raise UserError(f"{origin} is a file; unpack CelebAMask-HQ.zip and name its folder")
    for folder in (images, Path(os.path.abspath(images)).parent):
        if (folder / MAPPING).is_file():
            return images, folder / MAPPING
    missing = f"{MAPPING} is in neither {images} nor the folder around it, and without it no test image is known"
    raise UserError(f"{origin}: {missing}; take it from CelebAMask-HQ.zip{otherwise.format(images)}")


def _numbered(origin: str, images: Path) -> dict[int, str]:
    """Number -> file name: ``12.jpg``, ``00012.png``."""
    names = sorted(f for f in os.listdir(images) if f.lower().endswith(IMAGE_SUFFIXES) and not f.startswith("."))
    if odd := [name for name in names if not _is_number(Path(name).stem)]:
        raise UserError(f"{origin}: {len(odd)} of {len(names)} images are not named by number, first {odd[0]}")
    files = {int(Path(name).stem): name for name in names}
    if len(files) < len(names):
        kept = set(files.values())
        twice = [name for name in names if name not in kept]
        raise UserError(f"{origin}: {len(twice)} numbers have two images, first {int(Path(twice[0]).stem)}")
    return files
