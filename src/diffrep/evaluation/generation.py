"""Scores of generated images: FID, IS, KID, precision and recall, or distances in a named classifier's features.

A score never goes without what it is a score of: protocol, number of images, hash of the reference.
Letters: N images, D width of the features, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from diffrep.config import Config
from diffrep.console import Report
from diffrep.data.datasets import ImageSet
from diffrep.data.reference import EXPECTED, SIDE, content_hash, image_digest
from diffrep.data.reference import NAME as VAL256
from diffrep.errors import UserError
from diffrep.evaluation import inception
from diffrep.evaluation.distances import frechet_distance, gaussian, kernel_distance, subset_size
from diffrep.evaluation.fidelity import ENOUGH
from diffrep.evaluation.made import Opened, opened
from diffrep.evaluation.protocols import ABSENT, NAMED, PROTOCOLS, Protocol, Score, Scores
from diffrep.evaluation.survey import Witness
from diffrep.frozen.classifier import ClassifierConfig, ClassifierTeacher, load_classifier

BLOCK = 64  # images at once
ENOUGH_FOR_FID = 10_000
Watch = Callable[[str], AbstractContextManager[Report]]  # label -> what to tell (done, total)


class ScoreConfig(Config):
    """How images are scored."""

    protocol: str | None = None  # a key of PROTOCOLS; None: inception-val for a set of `data prepare`, else inception
    inception: str | None = None  # file of Inception's weights; None = where torch-fidelity keeps it
    features: ClassifierConfig | None = None  # compare in this classifier's pooled features instead
    image_size: Annotated[int, Field(ge=1)] | None = None  # both sides are resized to it; None = as stored
    precision_recall: bool = False  # also these two: all pairs of images, minutes for 50,000

    @field_validator("protocol")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        if value in ABSENT:
            raise ValueError(f"not available here: {ABSENT[value]}; valid: {', '.join(PROTOCOLS)}")
        if value is not None and value not in PROTOCOLS:
            raise ValueError(f"valid: {', '.join(PROTOCOLS)}")
        return value

    @model_validator(mode="after")
    def _one_space(self) -> ScoreConfig:
        if self.features is not None and (self.protocol or self.inception):
            raise ValueError("features is a space of its own: leave protocol and inception out")
        return self


@dataclass(frozen=True)
class Look:
    """What a network saw of N images. pooled (N, D) and logits (N, K) float32; digest: of all pixels."""

    pooled: Tensor
    logits: Tensor
    digest: str


Network = Callable[[Tensor], tuple[Tensor, Tensor]]  # (B, 3, H, W) uint8 -> pooled (B, D), logits (B, K)


def score_images(
    images: str,
    reference: str,
    config: ScoreConfig,
    device: torch.device | str = "cpu",
    watch: Watch = lambda label: nullcontext(lambda *_: None),
    allow_code: bool = False,
) -> Scores:
    """Score a set of images against a reference.

    Args:
        images: a folder of images, the folder of a synthetic set, or any data reference; all its parts are looked at.
        reference: the same, or a file of Inception statistics (``.npz`` with mu and sigma, torch-fidelity's ``.pt``).
        watch: opens a progress report for a long part.

    Raises:
        UserError: no such thing, fewer than two images, sizes that do not fit, no weights, no torch-fidelity.
    """
    least = inception.NEIGHBOURS + 1 if config.precision_recall else 2
    if config.features is None or config.precision_recall:
        inception.need_torch_fidelity()
    weights = inception.find_weights(config.inception) if config.features is None else None
    ours = _enough(opened(images, config.image_size), least)
    theirs = None
    if not inception.is_statistics(reference):
        theirs = _enough(opened(reference, config.image_size), least)
        _check_sizes(ours.images, theirs.images)
    _check_kind(config, reference, theirs)
    see = partial(look, device=torch.device(device), watch=watch)
    if weights is None:
        assert config.features is not None and theirs is not None  # else there are weights; checked above
        teacher = load_classifier(config.features, allow_code=allow_code)
        return _in_named_space(config, teacher, ours, theirs, see)
    network = inception.inception(weights, torch.device(device))
    if theirs is None:
        return _against_statistics(config, network, ours, reference, see)
    return _against_images(config, network, ours, theirs, see)


def check_ready(reference: str, config: ScoreConfig, allow_code: bool = False) -> None:
    """Refuse now what would only fail after images were made for hours: no reference, no judge, no weights."""
    if config.features is None or config.precision_recall:
        inception.need_torch_fidelity()
    if config.features is None:
        inception.find_weights(config.inception)
    else:
        load_classifier(config.features, allow_code=allow_code)
    if not inception.is_statistics(reference):
        opened(reference, config.image_size)


def _enough(found: Opened, least: int) -> Opened:
    if len(found.images) < least:
        why = "a score needs 2 images" if least == 2 else f"precision and recall need {least} images"
        raise UserError(f"{found.images.name} holds {len(found.images)} of them: {why} at least")
    return found


def _check_kind(config: ScoreConfig, reference: str, theirs: Opened | None) -> None:
    """Images or statistics."""
    if config.features is not None and theirs is None:
        raise UserError(f"{reference} does not say of which features its statistics are: --features needs images")
    if config.protocol == "inception-adm" and theirs is not None:
        raise UserError(f"inception-adm compares with ADM's stored statistics (.npz); {reference} is images")


def _check_sizes(ours: ImageSet, theirs: ImageSet) -> None:
    if ours.image_size != theirs.image_size:
        sizes = ", ".join(f"{s.name} is {s.image_size[0]}x{s.image_size[1]}" for s in (ours, theirs))
        raise UserError(
            f"{sizes}: set --image-size {min(*ours.image_size, *theirs.image_size)} to bring both to one size"
        )


@torch.no_grad()
def look(what: str, images: ImageSet, network: Network, device: torch.device, watch: Watch) -> Look:
    """Every image once, in order; ``what`` they are is the label of the progress report."""
    digests: list[bytes] = []
    pooled, logits = [], []
    with watch(what) as report:
        for start in range(0, len(images), BLOCK):
            pixels = images.gather(torch.arange(start, min(start + BLOCK, len(images)))).cpu()
            digests += [image_digest(image) for image in pixels.numpy()]
            features, answers = network(pixels.to(device))
            pooled.append(features.cpu())
            logits.append(answers.cpu())
            report(len(digests), len(images))
    return Look(torch.cat(pooled), torch.cat(logits), content_hash(digests))


See = Callable[[str, ImageSet, Network], Look]


def _protocol(name: str, ours: Opened, image_size: int | None, resize: Sequence[str] = ()) -> Callable[..., Protocol]:
    """What is known before the reference was looked at."""
    first = [f"shorter side to {image_size} (bilinear, antialiased), centre crop"] if image_size else []
    return partial(
        Protocol, name, len(ours.images), resize="; then ".join([*first, *resize]) or "none", files=ours.made.files,
        sampler=ours.made.sampler, steps=ours.made.steps, guidance=ours.made.guidance,
    )  # fmt: skip


# Inception


def _against_images(config: ScoreConfig, network: Network, ours: Opened, theirs: Opened, see: See) -> Scores:
    name = config.protocol or ("inception-val" if theirs.made.name == VAL256 else "inception")
    drawn, real = see("images", ours.images, network), see("reference", theirs.images, network)
    protocol = _protocol(name, ours, config.image_size, [inception.RESIZE])(
        reference=theirs.images.name, reference_hash=real.digest, reference_images=len(real.pooled),
        features="Inception, 2048 pooled",
    )  # fmt: skip
    distance = inception.fid(inception.moments(drawn.pooled), inception.moments(real.pooled))
    mean, spread, size = inception.kid(drawn.pooled, real.pooled)
    scores = [
        Score("FID", distance, protocol),
        _inception_score(drawn, protocol),
        Score("KID", mean, protocol, spread, f"{inception.SUBSETS} subsets of {size:,}"),
    ]
    scores += _precision_recall(drawn, real, protocol, "Inception") if config.precision_recall else []
    return Scores(tuple(scores), tuple(_said(protocol, ours, theirs, "KID stands beside it and has no such bias")))


def _against_statistics(config: ScoreConfig, network: Network, ours: Opened, reference: str, see: See) -> Scores:
    known = inception.read_statistics(reference, config.precision_recall)
    if known.images is not None:
        _check_sizes(ours.images, known.images)
    drawn = see("images", ours.images, network)
    protocol = _protocol(config.protocol or "inception", ours, config.image_size, [inception.RESIZE])(
        reference=reference, reference_hash=known.sha256, reference_images=None, features="Inception, 2048 pooled"
    )
    scores = [
        Score("FID", inception.fid(inception.moments(drawn.pooled), known.moments), protocol),
        _inception_score(drawn, protocol),
    ]
    said = _said(protocol, ours, None, "KID has none, and needs a reference of images")
    if config.precision_recall and known.images is None:
        said.append(f"precision and recall are left out: {reference} holds no images.")
    elif known.images is not None:  # ADM's 10,000, which serve these two and never FID
        real = see("reference", known.images, network)
        beside = replace(protocol, reference_images=len(known.images))
        scores += _precision_recall(drawn, real, beside, "Inception")
    return Scores(tuple(scores), tuple(said))


def _inception_score(drawn: Look, protocol: Protocol) -> Score:
    mean, spread, splits = inception.inception_score(drawn.logits)
    return Score("IS", mean, protocol, spread, f"{splits} splits")


def _precision_recall(drawn: Look, real: Look, protocol: Protocol, whose: str) -> list[Score]:
    values = inception.precision_recall(drawn.pooled, real.pooled)
    detail = f"{inception.NEIGHBOURS} neighbours in {whose}'s pooled features"
    return [Score(n, v, protocol, None, detail) for n, v in zip(("precision", "recall"), values, strict=True)]


# A named feature space


def _in_named_space(config: ScoreConfig, teacher: ClassifierTeacher, ours: Opened, theirs: Opened, see: See) -> Scores:
    network = pooled_features(teacher, ours.images.image_size)
    drawn, real = see("images", ours.images, network), see("reference", theirs.images, network)
    whose = f"{teacher.name}'s pooled features"
    protocol = _protocol(NAMED, ours, config.image_size)(
        reference=theirs.images.name, reference_hash=real.digest, reference_images=len(real.pooled),
        features=f"{whose}, D = {real.pooled.shape[1]}, weights {teacher.sha256[:12]}",
    )  # fmt: skip
    size = subset_size(len(drawn.pooled), len(real.pooled))
    mean, spread = kernel_distance(drawn.pooled, real.pooled, size)
    distance = frechet_distance(gaussian(drawn.pooled), gaussian(real.pooled))
    scores = [
        Score(f"Frechet distance on {whose}", distance, protocol),
        Score(f"kernel distance on {whose}", mean, protocol, spread, f"100 subsets of {size:,}"),
    ]
    scores += _precision_recall(drawn, real, protocol, teacher.name) if config.precision_recall else []
    said = _said(protocol, ours, theirs, "the kernel distance stands beside it and has no such bias")
    if min(len(drawn.pooled), len(real.pooled)) < ENOUGH * real.pooled.shape[1]:
        said.append(f"fewer images than {ENOUGH} for each of the {real.pooled.shape[1]} features: unreliable.")
    return Scores(tuple(scores), tuple(said))


def pooled_features(teacher: ClassifierTeacher, image_size: tuple[int, int]) -> Network:
    """What a classifier's last layer reads.

    Raises:
        UserError: it has no such layer, or does not take images of this size.
    """
    if image_size[0] != image_size[1]:
        raise UserError(f"{teacher.name} needs square images: set --image-size {min(image_size)}")
    try:
        teacher.multiply_adds(image_size[0])
    except UserError as error:
        raise UserError(f"{error}; set --image-size {teacher.image_size or 'to what it was trained at'}") from None
    witness = Witness(teacher)
    if not witness(torch.zeros(1, 3, *image_size))[1].numel():
        raise UserError(f"{teacher.name} has no linear classifier on top, so its pooled features are unknown")
    return lambda pixels: witness(pixels.float() / 255)[::-1]


# What has to be said aloud


def _said(protocol: Protocol, ours: Opened, theirs: Opened | None, kernel: str) -> list[str]:
    said = []
    fewest = min(protocol.images, protocol.reference_images or protocol.images)
    if fewest < ENOUGH_FOR_FID:
        bias = "a Frechet distance then comes out too large, by an amount that depends on N"
        said.append(f"{fewest:,} images are fewer than {ENOUGH_FOR_FID:,}: {bias}; {kernel}.")
    for opened_set in (ours, theirs):
        if opened_set is not None and "jpeg" in opened_set.made.files:
            changed = "compression changes every score (FID 13.74 against a JPEG reference, 11.18 against PNG)"
            said.append(f"{opened_set.images.name} holds JPEG files: {changed}; use PNG.")
    return said + _departures(protocol, ours)


def _departures(protocol: Protocol, ours: Opened) -> list[str]:
    """Where a protocol with a fixed number of images is not followed."""
    if protocol.name not in ("inception-val", "inception-adm"):
        return []
    met = [f"{protocol.images:,} images"] if protocol.images != EXPECTED else []
    if protocol.reference_images not in (None, EXPECTED):
        met.append(f"a reference of {protocol.reference_images:,}")
    if ours.images.image_size != (SIDE, SIDE):
        met.append(f"{ours.images.image_size[0]}x{ours.images.image_size[1]} pixels")
    wanted = f"{EXPECTED:,} images of {SIDE} pixels"
    return [f"{protocol.name} means {wanted}, here: {', '.join(met)}: not comparable with papers."] if met else []
