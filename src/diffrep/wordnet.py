"""The 1,000 classes of ILSVRC-2012 by their WordNet ids, which say the same in every data set."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from diffrep import _torchvision_compat
from diffrep.errors import UserError, nearest


@cache
def official_ids() -> tuple[str, ...]:
    """The 1,000 WordNet ids in label order, which is sorted; timm carries the table."""
    _torchvision_compat.install()
    from timm.data import ImageNetInfo

    return tuple(ImageNetInfo("imagenet-1k").label_names())


def is_wordnet_id(name: str) -> bool:
    """``n`` and eight digits."""
    return len(name) == 9 and name[0] == "n" and name[1:].isdigit()


def label_of(text: str, num_classes: int) -> int:
    """A class that a user named: its number, or its WordNet id where the classes are those of ILSVRC-2012.

    Raises:
        UserError: neither, or outside the classes.
    """
    if is_wordnet_id(text) and num_classes == len(official_ids()):
        if text not in official_ids():
            raise UserError(f"{text} is none of the 1,000 WordNet ids of ILSVRC-2012; {nearest(text, official_ids())}")
        return official_ids().index(text)
    if not (text.isascii() and text.isdigit()) or int(text) >= num_classes:
        raise UserError(f"class '{text}' is outside 0..{num_classes - 1}")
    return int(text)


def labels_among(classes: Sequence[str], num_classes: int) -> tuple[int, ...]:
    """For each class of a data set its label in a network of ``num_classes``.

    WordNet ids decide where the network knows ILSVRC-2012's classes; else as many classes are taken for the same ones.
    Position says nothing: class 0 of Tiny-ImageNet is not class 0 of ImageNet.

    Raises:
        UserError: the classes are not WordNet ids, or not those the network knows.
    """
    by_id = num_classes == len(official_ids()) and all(map(is_wordnet_id, classes))
    if len(classes) == num_classes and not by_id:
        return tuple(range(num_classes))
    if num_classes != len(official_ids()) or not all(map(is_wordnet_id, classes)):
        known = f"{len(classes)} classes ({', '.join(classes[:3])}, ...)"
        raise UserError(f"{known} cannot be mapped onto the network's {num_classes}: both must be WordNet ids")
    place = {name: label for label, name in enumerate(official_ids())}
    strange = [name for name in classes if name not in place]
    if strange:
        raise UserError(f"{len(strange)} classes are not among the network's 1,000 (first: {strange[0]})")
    return tuple(place[name] for name in classes)
