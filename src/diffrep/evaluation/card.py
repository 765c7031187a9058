"""The numbers behind a data card: what a set is, what a teacher says to it, whom it repeats, how far it is from real.

Everything is plain values, images as small PNG in text form under ``png``; :mod:`diffrep.report.card` shows them.
Letters: N images, K classes, D width of the pooled features.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffrep.console import Report
from diffrep.data.datasets import ImageSet
from diffrep.data.shards import read_manifest
from diffrep.errors import UserError
from diffrep.evaluation.fidelity import frechet
from diffrep.evaluation.memorisation import in_turn, neighbours, spaces
from diffrep.evaluation.opinion import opinion
from diffrep.evaluation.survey import Survey, Witness, open_real, open_whole, reference_of, survey
from diffrep.evaluation.thumbnails import strip, thumbnails
from diffrep.files import read_json
from diffrep.frozen.classifier import ClassifierTeacher

COST = "cost.json"
SHEET_CLASSES, SHEET_IMAGES = 20, 10  # of the contact sheet: rows and columns at most

Watch = Callable[[str], AbstractContextManager[Report]]  # label -> what to tell (done, total)
Rivals = tuple[Survey, Survey]  # real images: those of training, and held-out ones


def data_card(
    reference: str,
    teacher: ClassifierTeacher | None = None,
    real: str | None = None,
    image_size: int | None = None,
    device: torch.device | str = "cpu",
    watch: Watch = lambda label: nullcontext(lambda *_: None),
) -> dict[str, Any]:
    """Look at a whole set and say what can be said of it.

    Args:
        reference: the folder of a synthetic set, or any data reference; all of its parts are looked at.
        teacher: who judges the images, and in whose features they are compared; in pixels alone without one.
        real: data reference of the images the set is held against: its train split, and a held-out one.
        image_size: both sets are resized to it.
        watch: opens a progress report for a long part.

    Raises:
        UserError: no such set, an unfinished or damaged one, sizes that do not fit each other or the teacher.
    """
    reference, device = reference_of(reference), torch.device(device)
    images, names = open_whole(reference, image_size)
    opened = [images, *(open_real(real, image_size) if real else ())]
    _check_sizes(opened, teacher)
    witness = Witness(teacher) if teacher else None
    with watch("images") as told:
        turns = in_turn(told, [len(s) for s in opened])
        drawn, *others = (survey(s, witness, device, t) for s, t in zip(opened, turns, strict=True))
    rivals = (others[0], others[1]) if others else None
    found = {
        "set": _about(drawn),
        "made": _made(reference),
        "teacher": _about_teacher(drawn, teacher),
        "real": _about_real(*rivals) if rivals else None,
        "said": _said(drawn, rivals, teacher, image_size),
        "sheet": _sheet(drawn),
        "opinion": opinion(drawn, rivals[1] if rivals else None, names),
        "repeats": _repeats(drawn, rivals),
        "spaces": _spaces(drawn, rivals, teacher.name if teacher else None, names, device, watch),
    }
    if teacher is None or rivals is None or not drawn.pooled.numel():
        return found | {"frechet": None}
    return found | {"frechet": frechet(teacher.name, drawn, *rivals)}


def without_pictures(found: Any) -> Any:
    """The same values for programs: nothing under ``png``."""
    if isinstance(found, dict):
        return {k: without_pictures(v) for k, v in found.items() if k != "png"}
    return [without_pictures(v) for v in found] if isinstance(found, list | tuple) else found


# What does not fit


def _check_sizes(opened: Sequence[ImageSet], teacher: ClassifierTeacher | None) -> None:
    height, width = opened[0].image_size
    own = f"the set's images are {height}x{width}"
    for other in opened[1:]:
        if other.image_size != (height, width):
            theirs = f"those of {other.name} {other.image_size[0]}x{other.image_size[1]}"
            smallest = min(height, width, *other.image_size)
            raise UserError(f"{own}, {theirs}: set --image-size {smallest} to bring both to one size")
    if teacher is None:
        return
    if height != width:
        raise UserError(f"{own}, and {teacher.name} needs square ones: set --image-size {min(height, width)}")
    try:
        teacher.multiply_adds(height)
    except UserError as error:
        raise UserError(f"{error}; set --image-size {teacher.image_size or 'to what it was trained at'}") from None


def _said(drawn: Survey, rivals: Rivals | None, teacher: ClassifierTeacher | None, image_size: int | None) -> list[str]:
    """What has to be said aloud, because something was left out or taken on trust."""
    own, said = drawn.images.classes, []
    if image_size is not None:
        said.append(f"Every image was brought to {image_size} pixels before anything was looked at.")
    if teacher and teacher.image_size not in (None, drawn.images.image_size[0]):
        sees = f"{teacher.image_size}-pixel images and sees {drawn.images.image_size[0]}-pixel ones here"
        said.append(f"{teacher.name} was trained on {sees}; --image-size brings them to its size.")
    if drawn.images.labels is None:
        said.append("The set has no labels: counts per class and agreement are left out.")
    elif teacher and teacher.num_classes != len(own):
        said.append(
            f"{teacher.name} knows {teacher.num_classes} classes, the set has {len(own)}: agreement is left out."
        )
    if teacher and not drawn.pooled.numel():
        said.append(f"{teacher.name} has no linear classifier on top, so its pooled features are unknown: left out.")
    theirs = rivals[0].images.classes if rivals else ()
    if teacher and rivals and drawn.images.labels is not None and own != theirs:
        same = "both are taken to be in one order" if len(theirs) == len(own) else "labels cannot be matched"
        said.append(f"Classes of the set ({_some(own)}) and of the real images ({_some(theirs)}) differ: {same}.")
    return said


def _some(names: Sequence[str]) -> str:
    return (", ".join(names[:3]) or "none") + (f", ... {len(names)} in all" if len(names) > 3 else "")


# What it is


def _about(drawn: Survey) -> dict[str, Any]:
    images, labels = drawn.images, drawn.labels
    counts = Counter(labels.tolist())
    whole = hashlib.sha256("".join(drawn.digests).encode() + labels.numpy().tobytes())
    return {
        "name": _short(images.name),
        "reference": images.name,
        "images": len(images),
        "image_size": list(images.image_size),
        "licence": images.licence,
        "classes": list(images.classes),
        "counts": None if images.labels is None else [counts[k] for k in range(len(images.classes))],
        "without_label": counts[-1],
        "pixels_sha256": whole.hexdigest(),
    }


def _short(reference: str) -> str:
    kind, _, location = reference.partition(":")
    return Path(location).name or location or kind


def _made(reference: str) -> dict[str, Any] | None:
    """What the manifest and cost.json beside it say of a synthetic set."""
    if not reference.startswith("synthetic:"):
        return None
    folder, manifest = read_manifest(reference.partition(":")[2])
    kept = ("content_hash", "settings", "generator", "calls_per_image", "environment")
    made = {key: manifest[key] for key in kept if key in manifest}
    return made | {"cost": read_json(folder / COST) if (folder / COST).exists() else None}


def _about_teacher(drawn: Survey, teacher: ClassifierTeacher | None) -> dict[str, Any] | None:
    if teacher is None:
        return None
    return {
        "name": teacher.name,
        "sha256": teacher.sha256,
        "licence": teacher.licence,
        "num_classes": teacher.num_classes,
        "labels_seen": teacher.labels_seen,
        "pooled": drawn.pooled.shape[1],
    }


def _about_real(train: Survey, held_out: Survey) -> dict[str, Any]:
    return {
        "reference": train.images.name,
        "licence": train.images.licence,
        "fingerprint": train.images.fingerprint,
        "train_images": len(train.images),
        "held_out_images": len(held_out.images),
        "held_out_split": held_out.images.split,
    }


def _sheet(drawn: Survey) -> dict[str, Any]:
    """Rows of images, a class each; of an unlabelled set, rows of what comes."""
    names, labels = drawn.images.classes, drawn.labels
    if drawn.images.labels is None:
        at = _spread(torch.arange(len(labels)), SHEET_IMAGES**2).split(SHEET_IMAGES)
        rows = [{"name": "", "png": _row(drawn, where)} for where in at]
        return {"classes": 0, "columns": SHEET_IMAGES, "rows": rows}
    present = torch.tensor([k for k in range(len(names)) if bool((labels == k).any())])
    chosen = _spread(present, SHEET_CLASSES).tolist()
    rows = [{"name": names[k], "png": _row(drawn, (labels == k).nonzero()[:, 0])} for k in chosen]
    return {"classes": len(names), "columns": SHEET_IMAGES, "rows": rows}


def _row(drawn: Survey, positions: Tensor) -> str:
    return strip(drawn.images, _spread(positions, SHEET_IMAGES).tolist(), SHEET_IMAGES)


def _spread(values: Tensor, count: int) -> Tensor:
    """At most ``count`` of them, evenly from first to last."""
    return values[torch.linspace(0, len(values) - 1, min(count, len(values))).round().long()]


# Whom it repeats


def _repeats(drawn: Survey, rivals: Rivals | None) -> dict[str, Any]:
    """Images that equal another pixel for pixel."""
    times, real = Counter(drawn.digests), set(rivals[0].digests if rivals else ())
    copies = sum(digest in real for digest in drawn.digests)
    repeated = len(drawn.digests) - len(times)
    return {"repeated": repeated, "most": max(times.values()), "copies": copies if rivals else None}


def _spaces(
    drawn: Survey, rivals: Rivals | None, teacher: str | None, names: Sequence[str], device: torch.device, watch: Watch
) -> list[dict[str, Any]]:
    """Neighbours in each space, the nearest pairs with their pictures."""
    found = spaces(drawn, rivals, teacher)
    with watch("neighbours") as told:
        turns = iter(in_turn(told, [weight for space in found for weight in space.work()]))
        near = [neighbours(space, device, [next(turns) for _ in space.work()]) for space in found]
    for each in near:
        each["within"]["pairs"] = _pictured(each["within"]["pairs"], drawn.images, drawn.images, names, names)
        if rivals:
            train = rivals[0].images
            train_names = [f"training image {i}" for i in range(len(train))]
            each["against"]["pairs"] = _pictured(each["against"]["pairs"], drawn.images, train, names, train_names)
    return near


def _pictured(
    pairs: Sequence[tuple[int, int, float]],
    left: ImageSet, right: ImageSet, left_names: Sequence[str], right_names: Sequence[str],
) -> list[dict[str, Any]]:  # fmt: skip
    first, second = thumbnails(left, [p[0] for p in pairs]), thumbnails(right, [p[1] for p in pairs])
    return [
        {"images": [left_names[i], right_names[j]], "distance": distance, "png": [a, b]}
        for (i, j, distance), a, b in zip(pairs, first, second, strict=True)
    ]
