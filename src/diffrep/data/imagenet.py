"""ImageNet-1k (ILSVRC-2012) in the forms in which people have it.

A part is the first of these that is there:

- lists: what ``meta/train.txt``, ``meta/val.txt`` name in the folder, or in its ``train``, ``val`` (addp.md 6.17);
- class folders: ``train/nXXXXXXXX/*.JPEG``, ``val/nXXXXXXXX/*.JPEG``; or all of ``val/*.JPEG``;
- the official tar files: ``ILSVRC2012_img_train.tar``, a tar of one tar per class, and ``ILSVRC2012_img_val.tar``;
- WebDataset shards: ``*.tar`` whose names speak of train, or of val or validation, with the label in ``.cls``.

But for the shards, image i is the same one in every form: sorted by name, as class folders are. No tar is unpacked.

The official validation images are our "test": papers score on them, and the labels of the official test images are
secret. What a run calls validation is held out of train. A flat val needs its labels beside it, see ``ilsvrc``.

A label is the position of the class in the sorted list of WordNet ids: of all 1,000, or of those in a class list.
"""

from __future__ import annotations

import contextlib
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO

import torch

from diffrep.data.containers import existing, part_named_in
from diffrep.data.ilsvrc import read_classes, read_val_labels
from diffrep.data.images import IMAGE_SUFFIXES, Part, Read, file_part, read_at
from diffrep.data.lists import read_indexed
from diffrep.data.tars import shard_part
from diffrep.errors import UserError
from diffrep.wordnet import official_ids

TRAIN_TAR, VAL_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
Member = tuple[str, int, int]  # name, offset and bytes of a file inside a tar


def _split_location(location: str) -> tuple[str, str | None]:
    """``FOLDER`` or ``FOLDER@LIST`` -> the two sides (None = no list); a folder may have an @ in its name."""
    if "@" not in location or Path(location).expanduser().is_dir():
        return location, None
    folder, _, classes = location.rpartition("@")
    return folder, classes


def read_imagenet(location: str) -> Read:
    """The parts of a folder, all classes or those of a list: ``FOLDER`` or ``FOLDER@LIST``.

    Raises:
        UserError: no part is there, a folder of no such class, missing labels, a listed class without images.
    """
    origin = f"imagenet:{location}"
    folder, classes = _split_location(location)
    base = existing(folder)
    ids = official_ids() if classes is None else read_classes(existing(classes))
    number = {wordnet_id: k for k, wordnet_id in enumerate(ids)}
    found = {"train": _train(origin, base, number), "test": _val(origin, base, number)}
    parts = {name: part for name, part in found.items() if part is not None}
    if not parts:
        forms = f"train/, {TRAIN_TAR}, val/, {VAL_TAR}, meta/train.txt, meta/val.txt, tar shards called train or val"
        raise UserError(f"{origin}: holds none of {forms}")
    for name, part in parts.items() if classes is not None else ():
        if absent := classes_without_image(part, ids):
            raise UserError(f"{origin}: {name} has no image of {len(absent)} listed classes, first {absent[0]}")
    return ids, parts


def classes_without_image(part: Part, ids: tuple[str, ...]) -> list[str]:
    """Which classes a labelled part lacks."""
    labels = torch.empty(0, dtype=torch.int64) if part.labels is None else part.labels
    return [ids[k] for k in (labels.bincount(minlength=len(ids)) == 0).nonzero()[:, 0].tolist()]


def _train(origin: str, base: Path, number: dict[str, int]) -> Part | None:
    if (base / "meta/train.txt").is_file():
        return _list(origin, base, "train", number)
    if (base / "train").is_dir():
        return _class_folders(origin, base / "train", number)
    if (base / TRAIN_TAR).is_file():
        return _class_tars(base / TRAIN_TAR, number)
    return _shards(origin, base, "train", number)


def _val(origin: str, base: Path, number: dict[str, int]) -> Part | None:
    if (base / "meta/val.txt").is_file():
        return _list(origin, base, "val", number)
    if (base / "val").is_dir():
        is_flat = not _folders(base / "val")
        return _flat_folder(origin, base, number) if is_flat else _class_folders(origin, base / "val", number)
    if (base / VAL_TAR).is_file():
        return _flat_tar(origin, base / VAL_TAR, number)
    return _shards(origin, base, "validation", number)


def _list(origin: str, base: Path, folder: str, number: dict[str, int]) -> Part:
    """What ``meta/FOLDER.txt`` lists, sorted by name; its class indices count all 1,000 sorted WordNet ids."""
    ids = official_ids()
    listed = read_indexed(base / f"meta/{folder}.txt", len(ids))
    # Which of the two folders its paths are of is decided once, by the first image that is there.
    tried = ((name, prefix) for name in listed for prefix in ("", f"{folder}/"))
    prefix = next((prefix for name, prefix in tried if os.path.isfile(base / prefix / name)), "")
    found = {f"{prefix}{name}": number[ids[k]] for name, k in sorted(listed.items()) if ids[k] in number}
    return file_part(origin, base, list(found), list(found.values()))


def _shards(origin: str, base: Path, part_word: str, number: dict[str, int]) -> Part | None:
    """Every tar of the folder that speaks of this part; classes that ``number`` lacks are left out."""
    places = sorted(str(path) for path in base.glob("*.tar") if part_named_in(path.name) == part_word)
    if not places:
        return None
    part, ids = shard_part(places), official_ids()
    assert part.labels is not None
    if len(wrong := ((part.labels < 0) | (part.labels >= len(ids))).nonzero()):
        name, label = part.names[int(wrong[0])], int(part.labels[wrong[0]])
        raise UserError(f"{origin}: image {name!r} has label {label}; valid: 0 to {len(ids) - 1}, in .cls or .json")
    labels = torch.tensor([number.get(wordnet_id, -1) for wordnet_id in ids])[part.labels]
    rows = (labels >= 0).nonzero()[:, 0].tolist()
    return Part([part.names[r] for r in rows], lambda i: part.read(rows[i]), labels[rows], part.files)


def _folders(root: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))


def _images(root: Path) -> list[str]:
    """The names of the images directly in a folder, sorted."""
    return sorted(f for f in os.listdir(root) if f.lower().endswith(IMAGE_SUFFIXES) and not f.startswith("."))


def _refuse_foreign(where: Path, found: list[str]) -> None:
    if foreign := sorted(set(found) - set(official_ids())):
        advice = "folder: reads other classes"
        raise UserError(f"{where}: {foreign[0]!r} is none of the 1,000 WordNet ids of ILSVRC-2012; {advice}")


def _class_folders(origin: str, root: Path, number: dict[str, int]) -> Part:
    """Sorted by class, then by name."""
    folders = _folders(root)
    _refuse_foreign(root, folders)
    chosen = [folder for folder in folders if folder in number]
    found = [(f"{root.name}/{folder}/{image}", number[folder]) for folder in chosen for image in _images(root / folder)]
    return file_part(origin, root.parent, [name for name, _ in found], [label for _, label in found])


def _class_tars(path: Path, number: dict[str, int]) -> Part:
    """Sorted as class folders are, so that image i is the same one in either form."""
    found: list[tuple[str, Member]] = []
    with _opened(path) as outer:
        inner = {PurePosixPath(m.name).stem: m for m in outer if m.isreg()}
        _refuse_foreign(path, list(inner))
        for wordnet_id in sorted(inner.keys() & number.keys()):
            with _opened(path, outer.extractfile(inner[wordnet_id])) as tar:
                start = inner[wordnet_id].offset_data
                found += [(wordnet_id, member) for member in sorted(_members(tar, start))]
    names = [f"train/{wordnet_id}/{member[0]}" for wordnet_id, member in found]
    return _tar_part(path, names, [m for _, m in found], [number[wordnet_id] for wordnet_id, _ in found])


@contextlib.contextmanager
def _opened(path: Path, inside: IO[bytes] | None = None) -> Iterator[tarfile.TarFile]:
    """An uncompressed tar file, or one inside it."""
    try:
        with tarfile.open(path, "r:") if inside is None else tarfile.open(fileobj=inside, mode="r:") as tar:
            yield tar
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"{path} is not a readable tar file ({error})") from None


def _members(tar: tarfile.TarFile, start: int = 0) -> list[Member]:
    """The images of a tar that begins ``start`` bytes into its file."""
    images = (m for m in tar if m.isreg() and m.name.lower().endswith(IMAGE_SUFFIXES))
    return [(PurePosixPath(m.name).name, start + m.offset_data, m.size) for m in images]


def _tar_part(path: Path, names: list[str], members: list[Member], labels: list[int]) -> Part:
    def read(row: int) -> bytes:
        _, offset, size = members[row]
        return read_at(path, offset, size)

    return Part(names, read, torch.tensor(labels, dtype=torch.int64), ((path.name, path.stat().st_size),))


def _flat_folder(origin: str, base: Path, number: dict[str, int]) -> Part:
    listed = _listed(origin, base, _images(base / "val"), number)
    return file_part(origin, base, [f"val/{name}" for name in listed], list(listed.values()))


def _flat_tar(origin: str, path: Path, number: dict[str, int]) -> Part:
    with _opened(path) as tar:
        members = {member[0]: member for member in _members(tar)}
    listed = _listed(origin, path.parent, list(members), number)
    if missing := [name for name in listed if name not in members]:
        raise UserError(
            f"{origin}: {len(missing)} of {len(listed)} images are missing in {path.name}, first {missing[0]}"
        )
    return _tar_part(path, [f"val/{n}" for n in listed], [members[n] for n in listed], list(listed.values()))


def _listed(origin: str, base: Path, present: list[str], number: dict[str, int]) -> dict[str, int]:
    """Image name -> label of what the labels' table lists and ``number`` wants, sorted by name."""
    named = read_val_labels(base)
    if strange := sorted(set(present) - named.keys()):
        raise UserError(f"{origin}: {len(strange)} images of val have no label, first {strange[0]}")
    return {name: number[wordnet_id] for name, wordnet_id in sorted(named.items()) if wordnet_id in number}
