"""One pass over all images of a set, which keeps what its data card needs: digests, small pixels, a teacher's answers.

Letters: N images, B of a block, K classes, D width of the pooled features.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffrep.console import Report
from diffrep.data.datasets import DataConfig, ImageSet, Split, load_data
from diffrep.data.images import Part, Stream
from diffrep.data.shards import MANIFEST, SETTINGS
from diffrep.data.sources import KINDS, read_source
from diffrep.errors import UserError
from diffrep.frozen.classifier import ClassifierTeacher

BLOCK = 256  # images at once
SMALL_SIDE = 32  # pixels a side that distances between images look at; larger images are averaged down


@dataclass(frozen=True)
class Survey:
    """What one pass saw.

    digests:    of the decoded pixels of each image; equal ones belong to equal images.
    small:      (N, 3 s s) uint8, s = SMALL_SIDE at most.
    said:       (N,) int64, the teacher's answer. All of a teacher's are empty without one.
    confidence: (N,) its probability of that answer.
    margin:     (N,) its probability of the image's label less that of any other class; nan without a label it knows.
    pooled:     (N, D) float32, what its last layer reads.
    """

    images: ImageSet
    digests: list[str]
    small: Tensor
    said: Tensor
    confidence: Tensor
    margin: Tensor
    pooled: Tensor

    @property
    def labels(self) -> Tensor:
        return labels_of(self.images)


def labels_of(images: ImageSet) -> Tensor:
    """(N,) int64 on the CPU, -1 where an image has none."""
    return torch.full((len(images),), -1) if images.labels is None else images.labels.cpu()


# Opening


def reference_of(text: str) -> str:
    """The data reference that ``text`` means: itself, or ``synthetic:FOLDER`` for the folder of a finished set.

    Raises:
        UserError: neither of the two, or a set that is not finished.
    """
    if text.partition(":")[0] in KINDS:
        return text
    path = Path(text).expanduser()
    if not path.exists():
        raise UserError(f"no such set '{text}': give the folder of a synthetic set, or a data reference (folder:PATH)")
    if path.is_dir() and not (path / MANIFEST).exists():
        if (path / SETTINGS).exists():
            raise UserError(f"{text} is a synthetic set that is not finished (no {MANIFEST}): the same command goes on")
        raise UserError(f"{text} holds no {MANIFEST}, so it is no synthetic set; images of your own are folder:{text}")
    return f"synthetic:{text}"


def open_whole(reference: str, image_size: int | None) -> tuple[ImageSet, Sequence[str]]:
    """Every image of every part of a source, one part after the other, and their names; nothing is decoded yet.

    Raises:
        UserError: no such source, a damaged one, images of different sizes without ``image_size``.
    """
    source = read_source(reference)
    part = _joined(list(source.parts.values()))
    stream = Stream(reference, part, torch.arange(len(part)), image_size)
    stream.fix_shape(skip=False)
    return ImageSet(reference, "whole", source.classes, source.licence, stream, part.labels), part.names


def _joined(parts: Sequence[Part]) -> Part:
    ends = list(accumulate(map(len, parts)))

    def read(position: int) -> bytes | np.ndarray:
        number = next(n for n, end in enumerate(ends) if position < end)
        return parts[number].read(position - ends[number] + len(parts[number]))

    labels = [torch.full((len(p),), -1) if p.labels is None else p.labels for p in parts]
    known = None if all(p.labels is None for p in parts) else torch.cat(labels)
    return Part([n for p in parts for n in p.names], read, known, tuple(f for p in parts for f in p.files))


def open_real(reference: str, image_size: int | None) -> tuple[ImageSet, ImageSet]:
    """The train split of a real set, and its test split, or validation where there is no test."""
    parts = read_source(reference).parts
    held_out: Split = "validation" if "validation" in parts and "test" not in parts else "test"
    config = DataConfig(source=reference, image_size=image_size)
    return load_data(config, "train"), load_data(config, held_out)


# Looking


class Witness:
    """A classifier that also shows what its last layer reads.

    layer: its last linear layer with one output per class; None where it has none.
    """

    def __init__(self, teacher: ClassifierTeacher) -> None:
        linear = [m for m in teacher.module.modules() if isinstance(m, nn.Linear)]
        fitting = [m for m in linear if m.out_features == teacher.num_classes]
        self.teacher, self.layer = teacher, fitting[-1] if fitting else None

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) in [0, 1] -> logits (B, K) and pooled features (B, D), (B, 0) where they are no vectors."""
        read = [images.new_empty(len(images), 0)]
        if self.layer is None:
            return self.teacher.logits(images), read[0]
        handle = self.layer.register_forward_pre_hook(lambda _layer, inputs: read.append(inputs[0]))
        try:
            logits = self.teacher.logits(images)
        finally:
            handle.remove()
        return logits, read[-1].float() if read[-1].dim() == 2 else read[0]


def survey(images: ImageSet, witness: Witness | None, device: torch.device, report: Report = lambda *_: None) -> Survey:
    """Look at every image once, in order."""
    digests: list[str] = []
    small: list[Tensor] = []
    answers: list[tuple[Tensor, ...]] = []
    for start in range(0, len(images), BLOCK):
        index = torch.arange(start, min(start + BLOCK, len(images)))
        pixels = images.gather(index).cpu()
        digests += [hashlib.blake2b(image.numpy().tobytes(), digest_size=16).hexdigest() for image in pixels]
        small.append(_small(pixels))
        if witness is not None:
            answers.append(_answers(witness, pixels.to(device).float() / 255, labels_of(images)[index], images.classes))
        report(len(digests), len(images))
    nothing = [(torch.empty(0),) * 4]
    return Survey(images, digests, torch.cat(small), *map(torch.cat, zip(*(answers or nothing), strict=True)))


def _answers(witness: Witness, images: Tensor, labels: Tensor, classes: Sequence[str]) -> tuple[Tensor, ...]:
    """said, confidence, margin and pooled of one block."""
    logits, pooled = witness(images)
    probs = logits.softmax(1).cpu()
    confidence, said = probs.max(1)
    known = labels if len(classes) == witness.teacher.num_classes else torch.full_like(labels, -1)
    return said, confidence, _margin(probs, known), pooled.cpu()


def _margin(probs: Tensor, labels: Tensor) -> Tensor:
    """(B, K), (B,) -> (B,), in (-1, 1)."""
    column = labels.clamp(min=0)[:, None]
    asked = probs.gather(1, column).squeeze(1)
    others = probs.scatter(1, column, 0).amax(1)
    return torch.where(labels >= 0, asked - others, torch.nan)


def _small(pixels: Tensor) -> Tensor:
    """(B, 3, H, W) uint8 -> (B, 3 h w) uint8 with h and w of 32 at most, each the mean of the pixels it covers."""
    height, width = (min(side, SMALL_SIDE) for side in pixels.shape[-2:])
    if (height, width) == tuple(pixels.shape[-2:]):
        return pixels.flatten(1)
    return F.adaptive_avg_pool2d(pixels.float(), (height, width)).round().to(torch.uint8).flatten(1)
