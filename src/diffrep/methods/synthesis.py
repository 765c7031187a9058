"""DM-KD, first half: a diffusion model draws a labelled set, shard by shard (Li et al. 2023, section 3.2).

A set is a list of slots (class, index); the classes take turns. Slot n of the set is the same image whoever draws it:
its noise is a function of (generator's hash, run seed, class, index), and it is computed in a block of fixed size.
So shards may be made in any order, by any number of workers, and again after a crash: the bytes are the same on one
device and build.

Letters: B images of a block, K classes, N images of the set.
Deviations from the official `AIGC_generate.py`: noise belongs to the image and not to its batch, and differs between
classes (``noise="shared"`` reproduces the official start, equal for all classes); the unconditional half is left out
where it has no effect; names carry no settings, the manifest does; an image may be refused by a teacher (``margin``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from diffrep.config import Config
from diffrep.data import shards
from diffrep.data.shards import ImageFormat, Sample
from diffrep.errors import Interrupted, RunError, UserError
from diffrep.frozen.generator import DiffusionGenerator, SamplingConfig, guidance_scales
from diffrep.frozen.judges import HardConfig, Hardness, MarginConfig, Referee, identity
from diffrep.randomness import derived_seed

TIMED = 2e12  # multiply-adds that a CPU is asked for when a block is timed: about a minute of one core


class SynthesisConfig(Config):
    """What a set consists of. All of it is part of the content hash."""

    sampling: SamplingConfig = SamplingConfig()
    images: Annotated[int, Field(ge=1)] | None = None  # N, spread evenly over the classes; or
    class_counts: tuple[Annotated[int, Field(ge=0)], ...] | None = None  # images of each class
    # The generator's ids; a label counts along them.
    classes: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] | None = None
    class_names: Annotated[tuple[str, ...], Field(min_length=1)] | None = None  # of those classes; needed by `prompt`
    prompt: str | None = None  # of a text-to-image generator, e.g. "a photo of a {}"
    noise: Literal["own", "shared"] = "own"  # shared: index i starts from the same noise in every class (official)
    block_size: int = Field(50, ge=1)  # images computed together; the last block is filled up
    shard_size: int = Field(1000, ge=1)  # images per shard: what a crash costs a worker at most
    image_format: ImageFormat = "png"
    margin: MarginConfig | None = None
    hard: HardConfig | None = None

    @model_validator(mode="after")
    def _fits(self) -> SynthesisConfig:
        if (self.images is None) == (self.class_counts is None):
            raise ValueError("give either images or class_counts")
        if self.class_counts is not None and not sum(self.class_counts):
            raise ValueError("class_counts asks for no image at all")
        if self.classes is not None and len(set(self.classes)) != len(self.classes):
            raise ValueError("classes names one twice")
        lengths = {len(v) for v in (self.classes, self.class_names, self.class_counts) if v is not None}
        if len(lengths) > 1:
            raise ValueError("classes, class_names and class_counts have different lengths")
        if self.prompt is not None and (self.class_names is None or "{}" not in self.prompt):
            raise ValueError("prompt needs class_names and a place for them, {}")
        return self

    @property
    def total(self) -> int:
        """N."""
        return self.images if self.images is not None else sum(self.class_counts or ())


# The slots of a set


@dataclass(frozen=True)
class Slot:
    """Image n of a set. label: its place among the classes asked for, -1 where the generator knows none."""

    number: int
    label: int
    index: int  # counts the images of one class


def plan(config: SynthesisConfig, num_classes: int | None) -> np.ndarray:
    """(N, 2) int64, label and index of every slot: index 0 of every class, then index 1 of those that have one, ..."""
    kinds = len(config.classes or config.class_names or range(num_classes or 0))
    if config.class_counts is None:
        turns, places = np.divmod(np.arange(config.total), max(kinds, 1))
        return np.stack([places if kinds else np.full_like(places, -1), turns], 1)
    labels = np.repeat(np.arange(len(config.class_counts)), config.class_counts)
    indices = np.concatenate([np.arange(count) for count in config.class_counts])
    return np.stack([labels, indices], 1)[np.lexsort((labels, indices))]


def image_seed(config: SynthesisConfig, seed: int, slot: Slot, attempt: int = 0) -> int:
    """What the noise of one slot is drawn from, together with the generator's hash."""
    kind = config.classes[slot.label] if config.classes else slot.label  # the generator's id, whatever else is asked
    which = ("shared",) if config.noise == "shared" else (kind,)
    return derived_seed(seed, "synthetic image", *which, slot.index, *([attempt] if attempt else []))


# One set, opened for making


class Synthesis:
    """A generator and what it is to draw; every shard can be made alone.

    Raises:
        UserError: classes that the generator does not have, counts that do not fit, guidance without classes, more
            steps than the schedule has, a teacher of other classes.
    """

    def __init__(self, generator: DiffusionGenerator, config: SynthesisConfig, seed: int, allow_code: bool) -> None:
        self.generator, self.config, self.seed = generator, config, seed
        _check_classes(generator, config)
        self.asked = tuple(range(generator.num_classes or 0) if config.classes is None else config.classes)
        generator.check(torch.tensor(self.asked) if self.asked else None, config.sampling)
        if not self.asked and (config.margin or config.hard):
            raise UserError(f"{generator.name} knows no classes: margin and hard ask for one")
        known = (self.asked, generator.num_classes or 0, allow_code)
        self.referee = Referee(config.margin, *known) if config.margin else None
        self.judge = Hardness(config.hard, *known) if config.hard else None
        self.plan = plan(config, generator.num_classes)

    def settings(self) -> dict[str, Any]:
        """All that decides about pixels, and no path: a classifier stands there by its weights."""
        chosen = self.config.model_dump(mode="json")
        if self.referee:
            chosen["margin"]["teacher"] = identity(self.referee.teacher)
        if self.judge:
            chosen["hard"] |= {"student": identity(self.judge.student), "teacher": identity(self.judge.teacher)}
        return {"generator": self.generator.sha256, "seed": self.seed, "synthesis": chosen}

    # Shards

    @property
    def num_shards(self) -> int:
        return -(-len(self.plan) // self.config.shard_size)

    def rows(self, number: int) -> range:
        """The slots of one shard."""
        size = self.config.shard_size
        return range(number * size, min((number + 1) * size, len(self.plan)))

    def begin(self, folder: Path) -> list[int]:
        """Say what the folder will hold; the numbers of the shards that have to be made.

        Raises:
            UserError: it holds, or was begun for, another generator's images or other settings.
        """
        shards.begin_set(folder, self.settings())
        known = shards.known_shards(folder)
        missing = [n for n in range(self.num_shards) if shards.finished_shard(folder, n, known) is None]
        for number in missing:
            shards.forget_shard(folder, number)
        return missing

    def is_made(self, folder: Path, number: int) -> bool:
        """Whether some worker has made this shard since :meth:`begin`; its bytes are not looked at."""
        return shards.is_noted(folder, number)

    def make_shard(
        self,
        folder: Path,
        number: int,
        device: torch.device | str = "cpu",
        report: Callable[[int], None] = lambda images: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> dict[str, Any]:
        """Draw one shard and write it whole; returns its note. ``report`` is told of each block's images."""
        began, cpu_began, drawn, samples = time.monotonic(), time.process_time(), 0, list[Sample]()
        rows, size = self.rows(number), self.config.block_size
        for start in range(rows.start, rows.stop, size):
            if stop():
                raise Interrupted(f"stopped in shard {number}; the same command goes on from here")
            block = self.slots(range(start, min(start + size, rows.stop)))
            made, attempts = self._block(block, device)
            samples, drawn = samples + made, drawn + attempts * size
            report(len(block))
        about = {
            "drawn": drawn,  # images computed, with those that filled up blocks and those that were refused
            "seconds": round(time.monotonic() - began, 3),
            "cpu_seconds": round(time.process_time() - cpu_began, 3),
            "environment": shards.environment(device),
        }
        return shards.write_shard(folder, number, samples, self.config.image_format, about)

    # Images

    def slots(self, rows: Sequence[int]) -> list[Slot]:
        return [Slot(n, *self.plan[n].tolist()) for n in rows]

    def _block(self, block: list[Slot], device: torch.device | str) -> tuple[list[Sample], int]:
        """The images of one block and how often it was drawn: a slot whose image the teacher refuses is drawn again."""
        tries = self.config.margin.tries if self.config.margin else 1
        found: dict[int, Sample] = {}
        for attempt in range(tries):
            missing = [slot for slot in block if slot.number not in found]
            images, seeds = self._draw(missing, attempt, device)
            sure = self._is_sure(images, missing) | (attempt + 1 == tries)
            pixels = as_pixels(images)
            for k, slot in enumerate(missing):
                if sure[k]:
                    note = self._note(slot, seeds[k], attempt)
                    found[slot.number] = Sample(f"{slot.number:08d}", pixels[k], slot.label, note)
            if len(found) == len(block):
                break
        return [found[slot.number] for slot in block], attempt + 1

    def _draw(self, block: list[Slot], attempt: int, device: torch.device | str) -> tuple[Tensor, list[int]]:
        """(B, 3, H, W) in [0, 1]. The block is filled up with its last slot: another size would round otherwise."""
        full = block + block[-1:] * (self.config.block_size - len(block))
        seeds = [image_seed(self.config, self.seed, slot, attempt) for slot in full]
        images = self.generator.sample(self.labels(full), seeds, self.config.sampling, device, self.judge)
        return images[: len(block)], seeds[: len(block)]

    def labels(self, block: list[Slot]) -> Tensor | None:
        """(B,) int64, in the generator's own numbers."""
        return torch.tensor([self.asked[slot.label] for slot in block]) if self.asked else None

    def _is_sure(self, images: Tensor, block: list[Slot]) -> Tensor:
        """(B,) bool."""
        labels = self.labels(block)
        if self.referee is None or labels is None:
            return torch.ones(len(block), dtype=torch.bool)
        return self.referee.is_sure(images, labels)

    def _note(self, slot: Slot, seed: int, attempt: int) -> dict[str, Any]:
        note: dict[str, Any] = {"index": slot.index, "seed": seed}
        if slot.label >= 0:
            note["label"] = slot.label
        if isinstance(self.config.sampling.guidance_scale, tuple):
            note["guidance_scale"] = round(float(guidance_scales(self.config.sampling, [seed])), 6)
        return note | ({"attempt": attempt} if attempt else {})

    # Cost

    def calls_per_image(self) -> int:
        return sum(self.generator.calls(self.config.sampling))

    def counted(self, numbers: Sequence[int]) -> dict[str, int]:
        """What some shards take, with what fills up their last blocks; a margin may take up to its ``tries`` of it."""
        size = self.config.block_size
        computed = sum(-(-len(self.rows(n)) // size) * size for n in numbers)
        return {
            "images": sum(len(self.rows(n)) for n in numbers),
            "network_calls": computed * self.calls_per_image(),
            "multiply_adds": computed * self.generator.multiply_adds(self.config.sampling),
        }


def as_pixels(images: Tensor) -> np.ndarray:
    """(B, 3, H, W) in [0, 1] -> uint8, rounded as the official code does: floor(255 u + 1/2)."""
    return (images * 255 + 0.5).to(torch.uint8).cpu().numpy()


def _check_classes(generator: DiffusionGenerator, config: SynthesisConfig) -> None:
    classes = generator.num_classes
    named = [field for field in ("class_counts", "classes", "class_names") if getattr(config, field) is not None]
    if classes is None and named:
        raise UserError(f"{generator.name} knows no classes: leave out {named[0]} and give images")
    beyond = [c for c in config.classes or () if c >= (classes or 0)]
    if beyond:
        raise UserError(f"classes: {beyond[0]} is outside 0..{(classes or 0) - 1} of {generator.name}")
    length = len(config.class_counts or config.class_names or ())
    if length and config.classes is None and length != classes:
        raise UserError(f"{generator.name} has {classes} classes, {named[0]} names {length}; say which with classes")


# A whole set


def finish(folder: Path, synthesis: Synthesis, recipe: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The manifest and what the set took, once every shard is there.

    Args:
        recipe: the plain values that the set can be made from again.

    Raises:
        RunError: a shard is missing or damaged.
    """
    known = shards.known_shards(folder)
    found = [shards.finished_shard(folder, number, known) for number in range(synthesis.num_shards)]
    notes = [note for note in found if note is not None]
    if len(notes) < len(found):
        number = found.index(None)
        raise RunError(f"{folder}: shard {number} is missing or damaged; the same command makes it again")
    generator = synthesis.generator
    about = {
        "generator": {
            "reference": recipe["generator"],
            "name": generator.name,
            "sha256": generator.sha256,
            "licence": generator.licence,
            "labels_seen": generator.labels_seen,
        },
        "classes": list(synthesis.config.class_names or map(str, synthesis.asked)),
        "counts": shards.label_counts(synthesis.plan[:, 0]),
        "calls_per_image": synthesis.calls_per_image(),
        "environment": shards.common_environment(folder, notes),
        "recipe": recipe,
    }
    return shards.write_manifest(folder, synthesis.settings(), notes, about), _cost(synthesis, notes)


def _cost(synthesis: Synthesis, notes: list[dict[str, Any]]) -> dict[str, Any]:
    """Of all shards together, whoever made them and when."""
    drawn = sum(note.get("drawn", 0) for note in notes)
    return {
        "cpu_seconds": round(sum(note.get("cpu_seconds", 0) for note in notes), 2),
        "seconds": round(sum(note.get("seconds", 0) for note in notes), 2),
        "network_calls": drawn * synthesis.calls_per_image(),
        "multiply_adds": drawn * synthesis.generator.multiply_adds(synthesis.config.sampling),
    }


# Before a set: what it will cost, and something in its place


def estimate(synthesis: Synthesis, device: torch.device | str = "cpu") -> tuple[dict[str, Any], np.ndarray]:
    """What a set will take, counted, and timed on one block; and that block's pixels (B, 3, H, W) uint8.

    On a CPU a block that would take minutes is timed on fewer images, or on a walk of two steps.
    """
    config, generator = synthesis.config, synthesis.generator
    each, calls = generator.multiply_adds(config.sampling), synthesis.calls_per_image()
    short = config.sampling.model_copy(update={"num_sampling_steps": "2"})
    affordable = config.block_size if torch.device(device).type == "cuda" else max(1, int(TIMED / max(each, 1)))
    block = synthesis.slots(range(min(config.block_size, affordable, len(synthesis.plan))))
    images, seconds = _timed(synthesis, block, short, device)  # also warms up
    if each <= TIMED or torch.device(device).type == "cuda":
        images, seconds = _timed(synthesis, block, config.sampling, device)
    else:
        seconds *= calls / sum(generator.calls(short))
    pixels = as_pixels(images)
    counted = synthesis.counted(range(synthesis.num_shards))
    found = {
        **counted,
        "shards": synthesis.num_shards,
        "seconds": seconds / len(block) * counted["network_calls"] / calls,
        "disk_bytes": len(synthesis.plan) * shards.bytes_per_image(pixels, config.image_format),
        "licences": {"generator": generator.licence},
    }
    return found, pixels


def _timed(
    synthesis: Synthesis, block: list[Slot], sampling: SamplingConfig, device: torch.device | str
) -> tuple[Tensor, float]:
    seeds = [image_seed(synthesis.config, synthesis.seed, slot) for slot in block]
    began = time.monotonic()
    images = synthesis.generator.sample(synthesis.labels(block), seeds, sampling, device, synthesis.judge).cpu()
    return images, time.monotonic() - began


def write_stand_in(folder: Path, synthesis: Synthesis, image_size: int) -> None:
    """A set of the right images and labels, all of them black: what later stages are costed against.

    Shards of the same labels are one file, so it is made in no time and takes next to no disk.
    """
    black, written = np.zeros((3, image_size, image_size), np.uint8), dict[bytes, dict[str, Any]]()
    notes = []
    for number in range(synthesis.num_shards):
        labels = synthesis.plan[list(synthesis.rows(number)), 0]
        if labels.tobytes() not in written:
            samples = [Sample(f"{k:08d}", black, label, {}) for k, label in enumerate(labels.tolist())]
            written[labels.tobytes()] = shards.write_shard(folder, number, samples, synthesis.config.image_format, {})
        notes.append(written[labels.tobytes()])
    generator = {"labels_seen": synthesis.generator.labels_seen, "licence": synthesis.generator.licence}
    about = {"generator": generator, "classes": list(synthesis.config.class_names or map(str, synthesis.asked))}
    shards.write_manifest(folder, synthesis.settings(), notes, about)
