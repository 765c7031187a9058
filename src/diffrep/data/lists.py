"""Lists of images in text files, and the set of images that DM-KD released.

Source: dmkd.md section 8 of the official code's formats: ``path`` alone, the label standing in the file's own name, or
``path label``; and its flat folder of ``class_{C}_seed_{S}_num_{I}.png``.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path, PurePosixPath

from diffrep.data.containers import existing, part_named_in
from diffrep.data.images import IMAGE_SUFFIXES, Part, Read, file_part, some_of
from diffrep.data.shards import HELD_OUT
from diffrep.errors import UserError

_NAME = re.compile(r"class_(\d{1,9})_seed_(\d{1,18})_num_(\d{1,18})")


def read_lines(path: Path) -> list[str]:
    """The lines of a list that hold something, without the blanks around them.

    Raises:
        UserError: the file is not there, is not text, or holds nothing.
    """
    return [line for _, line in _numbered(path)]


def _numbered(path: Path) -> list[tuple[int, str]]:
    """:func:`read_lines`, each with its number in the file, which counts from 1."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # \r\n has become \n
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a readable list ({error})") from None
    found = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise UserError(f"{path}: the list is empty")
    return found


def labelled_lines(path: Path) -> list[tuple[str, str | None]]:
    """(path, label as written) of each line of ``path label`` or ``path``; a path may hold blanks."""
    return [_split(line) for line in read_lines(path)]


def _split(line: str) -> tuple[str, str | None]:
    name, _, label = line.rpartition(" ")
    return (line, None) if not name or line.lower().endswith(IMAGE_SUFFIXES) else (name.rstrip(), label)


def read_indexed(path: Path, num_classes: int) -> dict[str, int]:
    """Image -> class of a list of ``relative/path class_index`` lines; the index is the last word.

    Source: addp.md 6.17; the official code splits at every blank, so that names with blanks break there.

    Raises:
        UserError: file and number of the first line that has no class index, names no image, leaves the folder of the
            images or repeats a name.
    """
    found: dict[str, int] = {}
    for number, line in _numbered(path):
        name, label = _indexed(line, f"{path}, line {number}", num_classes)
        if name in found:
            raise UserError(f"{path}, line {number}: {name!r} is listed a second time")
        found[name] = label
    return found


def _indexed(line: str, where: str, num_classes: int) -> tuple[str, int]:
    words = line.rsplit(maxsplit=1)
    if not re.fullmatch("[0-9]{1,9}", words[-1]) or int(words[-1]) >= num_classes:
        told = f"class index {words[-1]!r}; valid: 0 to {num_classes - 1}"
        raise UserError(f"{where}: {told}, at the end of `relative/path class_index`")
    if not words[0].lower().endswith(IMAGE_SUFFIXES):
        raise UserError(f"{where}: {words[0]!r} is no image; a line is `relative/path class_index`")
    name = PurePosixPath(words[0])
    if name.is_absolute() or ".." in name.parts:
        raise UserError(f"{where}: {words[0]!r} leaves the folder; paths are relative to it and have no '..'")
    return str(name), int(words[-1])


def read_dmkd(location: str) -> Read:
    """A flat folder of images named after their class, or a list of images.

    A list's paths start at its folder unless they are absolute. A list whose name speaks of a part (``val.txt``) is
    that part. All else is train, less the last tenth of every class for validation, as of our own synthetic sets; a
    folder's images are ordered by class, seed and number.

    Raises:
        UserError: malformed names or labels, repeated or missing images, with their count and the first.
    """
    origin, path = f"dmkd:{location}", existing(location)
    if path.is_dir():
        names = [f.name for f in path.iterdir() if f.suffix.lower() in IMAGE_SUFFIXES and not f.name.startswith(".")]
        if not names:
            raise UserError(f"{origin}: holds no images; they lie directly in the folder, or name a list (.txt)")
        ordered = sorted((_numbers(name), name) for name in _all_named(names, origin))
        return (), _parts(origin, path, [name for _, name in ordered], [label for (label, _, _), _ in ordered])
    lines = labelled_lines(path)
    names = [name for name, _ in lines]
    if len(set(names)) < len(names):
        twice = Counter(names).most_common(1)[0][0]
        raise UserError(f"{origin}: {len(names) - len(set(names))} images are listed more than once, first {twice}")
    _all_named([name for name, label in lines if label is None], origin)
    labels = [_numbers(name)[0] if label is None else _label(name, label, origin) for name, label in lines]
    if part := part_named_in(path.stem):
        return (), {part: file_part(origin, path.parent, names, labels)}
    return (), _parts(origin, path.parent, names, labels)


def _parts(origin: str, base: Path, names: list[str], labels: list[int]) -> dict[str, Part]:
    """The last tenth of every class apart; classes of fewer than six images stay whole."""
    size, rank = Counter(labels), Counter[int]()
    chosen: dict[str, list[int]] = {"train": [], "validation": []}
    for row, label in enumerate(labels):
        rank[label] += 1
        is_held_out = rank[label] > size[label] - round(HELD_OUT * size[label])
        chosen["validation" if is_held_out else "train"].append(row)
    whole = file_part(origin, base, names, labels)
    return {part: some_of(whole, rows) for part, rows in chosen.items() if rows}


def _numbers(name: str) -> tuple[int, int, int]:
    """class_207_seed_3_num_9.png -> (207, 3, 9)"""
    found = _NAME.fullmatch(PurePosixPath(name).stem)
    return (int(found[1]), int(found[2]), int(found[3])) if found else (-1, -1, -1)


def _all_named(names: list[str], origin: str) -> list[str]:
    if odd := [name for name in names if _numbers(name)[0] < 0]:
        form = "class_{C}_seed_{S}_num_{I}.png"
        raise UserError(f"{origin}: {len(odd)} of {len(names)} names are not {form}, first {min(odd)!r}")
    return names


def _label(name: str, label: str, origin: str) -> int:
    if not re.fullmatch(r"\d{1,9}", label):
        raise UserError(f"{origin}: image {name!r} has label {label!r}; a line is `path label`, labels count from 0")
    return int(label)
