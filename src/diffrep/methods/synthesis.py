"""DM-KD, first half: a diffusion model draws a labelled set, shard by shard (Li et al. 2023, section 3.2).

A set is a list of slots (class, index); the classes take turns. Slot n of the set is the same image whoever draws it:
its noise is a function of (generator's hash, run seed, class, index), and it is computed in a block of fixed size.
So shards may be made in any order, by any number of workers, and again after a crash: the bytes are the same on one
device and build.

Letters: B images of a block, K classes, N images of the set.
Deviations from the official `AIGC_generate.py`: noise belongs to the image and not to its batch, and differs between
classes (``noise="shared"`` reproduces the official start, equal for all classes); the unconditional half is left out
where it has no effect; names carry no settings, the manifest does; a class may be refused by the teacher (``margin``).
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from diffrep import losses
from diffrep.config import Config
from diffrep.data.shards import ImageFormat, Sample, finished_shard, write_manifest, write_shard
from diffrep.errors import Interrupted, UserError
from diffrep.files import read_json, write_json
from diffrep.frozen.classifier import ClassifierConfig, ClassifierTeacher, load_classifier
from diffrep.frozen.generator import DiffusionGenerator, Judge, SamplingConfig, guidance_scales
from diffrep.randomness import derived_seed

SETTINGS = "settings.json"  # written first: by it a folder of another set is known


class MarginConfig(Config):
    """Keep an image only where the teacher is sure of the class that was asked for."""

    teacher: ClassifierConfig
    margin: float = Field(gt=0, lt=1)  # probability of the asked class minus the largest other
    tries: int = Field(4, ge=1)  # draws per slot; the last one is kept as it is, so that classes stay balanced


class HardConfig(Config):
    """Steer each walk towards images that a student finds hard and the teacher still knows (Hemmat et al. 2025)."""

    student: ClassifierConfig
    teacher: ClassifierConfig
    entropy_weight: float = Field(1.0, ge=0)  # on the entropy of the student's answer; 0 is the control
    class_weight: float = Field(1.0, ge=0)  # on the teacher's log probability of the asked class


class SynthesisConfig(Config):
    """What a set consists of. All of it is part of the content hash."""

    sampling: SamplingConfig = SamplingConfig()
    images: Annotated[int, Field(ge=1)] | None = None  # N, spread evenly over the classes; or
    class_counts: tuple[Annotated[int, Field(ge=0)], ...] | None = None  # images of each class
    classes: tuple[Annotated[int, Field(ge=0)], ...] | None = None  # the generator's ids; a label counts along them
    class_names: tuple[str, ...] | None = None  # of those classes; needed by `prompt`
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


def slots(config: SynthesisConfig, num_classes: int | None) -> list[Slot]:
    """All slots in order: index 0 of every class, then index 1 of those that have one, ..."""
    kinds = len(config.classes or config.class_names or range(num_classes or 0))
    if config.class_counts is None:
        spread = [divmod(n, kinds)[::-1] if kinds else (-1, n) for n in range(config.total)]
    else:
        counts = config.class_counts
        spread = [(k, i) for i in range(max(counts)) for k in range(len(counts)) if i < counts[k]]
    return [Slot(n, label, index) for n, (label, index) in enumerate(spread)]


def image_seed(config: SynthesisConfig, seed: int, slot: Slot, attempt: int = 0) -> int:
    """What the noise of one slot is drawn from, together with the generator's hash."""
    which = ("shared",) if config.noise == "shared" else (slot.label,)
    return derived_seed(seed, "synthetic image", *which, slot.index, *([attempt] if attempt else []))


# One set, opened for making


class Synthesis:
    """A generator and what it is to draw; every shard can be made alone.

    Raises:
        UserError: classes that the generator does not have, counts that do not fit, guidance without classes, more
            steps than the schedule has, more shards than one image each.
    """

    def __init__(self, generator: DiffusionGenerator, config: SynthesisConfig, seed: int, allow_code: bool) -> None:
        self.generator, self.config, self.seed = generator, config, seed
        _check_classes(generator, config)
        self.slots = slots(config, generator.num_classes)
        generator.check(self._labels(self.slots), config.sampling)
        self.referee = load_classifier(config.margin.teacher, allow_code=allow_code) if config.margin else None
        self.judge = hardness(config.hard, allow_code) if config.hard else None
        if generator.num_classes is None and (config.margin or config.hard):
            raise UserError(f"{generator.name} knows no classes: margin and hard ask for one")

    @property
    def num_shards(self) -> int:
        return -(-len(self.slots) // self.config.shard_size)

    def settings(self) -> dict[str, Any]:
        """All that decides about pixels."""
        return {
            "generator": self.generator.sha256,
            "seed": self.seed,
            "synthesis": self.config.model_dump(mode="json"),
        }

    def missing(self, folder: Path) -> list[int]:
        """The numbers of the shards that have to be made."""
        return [n for n in range(self.num_shards) if finished_shard(folder, n) is None]

    def make_shard(
        self,
        folder: Path,
        number: int,
        device: torch.device | str = "cpu",
        report: Callable[[int], None] = lambda images: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> dict[str, Any]:
        """Draw one shard and write it whole; returns its note. ``report`` is told of each block's images."""
        size, samples = self.config.shard_size, list[Sample]()
        ours = self.slots[number * size : (number + 1) * size]
        for start in range(0, len(ours), self.config.block_size):
            if stop():
                raise Interrupted(f"stopped in shard {number}; the same command goes on from here")
            block = ours[start : start + self.config.block_size]
            samples += self._samples(block, device)
            report(len(block))
        return write_shard(folder, number, samples, self.config.image_format)

    def _samples(self, block: list[Slot], device: torch.device | str) -> Iterator[Sample]:
        """The images of one block; a slot whose image the teacher refuses is drawn again."""
        tries = self.config.margin.tries if self.config.margin else 1
        found: dict[int, Sample] = {}
        for attempt in range(tries):
            open_slots = [slot for slot in block if slot.number not in found]
            if not open_slots:
                break
            images, seeds = self._draw(open_slots, attempt, device)
            sure = self._is_sure(images, open_slots) | (attempt + 1 == tries)
            pixels = (images * 255 + 0.5).to(torch.uint8).cpu().numpy()  # the official rounding: floor(255 u + 1/2)
            for k, slot in enumerate(open_slots):
                if sure[k]:
                    found[slot.number] = Sample(
                        f"{slot.number:08d}", pixels[k], slot.label, self._note(slot, seeds[k], attempt)
                    )
        return (found[slot.number] for slot in block)

    def _draw(self, block: list[Slot], attempt: int, device: torch.device | str) -> tuple[Tensor, list[int]]:
        """(B, 3, H, W) in [0, 1]. The block is filled up with its last slot: another size would round otherwise."""
        full = block + block[-1:] * (self.config.block_size - len(block))
        seeds = [image_seed(self.config, self.seed, slot, attempt) for slot in full]
        images = self.generator.sample(self._labels(full), seeds, self.config.sampling, device, self.judge)
        return images[: len(block)], seeds[: len(block)]

    def _labels(self, block: list[Slot]) -> Tensor | None:
        """(B,) int64, in the generator's own numbers."""
        if self.generator.num_classes is None:
            return None
        own = self.config.classes
        return torch.tensor([slot.label if own is None else own[slot.label] for slot in block])

    def _is_sure(self, images: Tensor, block: list[Slot]) -> Tensor:
        if self.config.margin is None or self.referee is None:
            return torch.ones(len(block), dtype=torch.bool)
        labels = torch.tensor([slot.label for slot in block], device=images.device)
        return (margin(self.referee.logits(images), labels) >= self.config.margin.margin).cpu()

    def _note(self, slot: Slot, seed: int, attempt: int) -> dict[str, Any]:
        note: dict[str, Any] = {"index": slot.index, "seed": seed}
        if slot.label >= 0:
            note["label"] = slot.label
        if isinstance(self.config.sampling.guidance_scale, tuple):
            note["guidance_scale"] = round(float(guidance_scales(self.config.sampling, [seed])), 6)
        return note | ({"attempt": attempt} if attempt else {})

    def calls_per_image(self) -> int:
        return sum(self.generator.calls(self.config.sampling))


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


# The teacher's say


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """(B, K), (B,) -> (B,): probability of the asked class minus the largest other, in (-1, 1)."""
    probs = logits.softmax(1)
    asked = probs.gather(1, labels[:, None]).squeeze(1)
    return asked - probs.scatter(1, labels[:, None], 0).amax(1)


def hardness(config: HardConfig, allow_code: bool) -> Judge:
    """w_e H(p_student(. | x_0)) + w_c log p_teacher(y | x_0), what a steered walk climbs."""
    student, teacher = (load_classifier(c, allow_code=allow_code) for c in (config.student, config.teacher))

    def judge(images: Tensor, labels: Tensor) -> Tensor:
        known = _differentiable(teacher, images).log_softmax(1).gather(1, labels[:, None]).squeeze(1)
        puzzled = losses.entropy(_differentiable(student, images))
        return config.entropy_weight * puzzled + config.class_weight * known

    return judge


def _differentiable(classifier: ClassifierTeacher, images: Tensor) -> Tensor:
    """A frozen network's logits with a gradient to the images (its weights have none)."""
    classifier.follow(images)
    return classifier.module(classifier.normalise(images))


# The folder of a set


def begin(folder: Path, synthesis: Synthesis) -> None:
    """Say what the folder will hold.

    Raises:
        UserError: it holds, or was begun for, another generator's images or other settings.
    """
    wanted, path = synthesis.settings(), folder / SETTINGS
    if path.exists():
        for key, value in read_json(path).items():
            if value != wanted[key]:
                what = {"generator": "images of another generator", "seed": "images of another seed"}
                raise UserError(f"{folder} holds {what.get(key, 'images of other settings')}; choose another --out")
    write_json(path, wanted)


def finish(folder: Path, synthesis: Synthesis, reference: str) -> dict[str, Any]:
    """The manifest, once every shard is there."""
    notes = [finished_shard(folder, number) for number in range(synthesis.num_shards)]
    lost = [number for number, note in enumerate(notes) if note is None]
    if lost:
        raise UserError(f"{folder}: shard {lost[0]} is missing or damaged; the same command makes it again")
    generator, config = synthesis.generator, synthesis.config
    kinds = range(generator.num_classes or 0) if config.classes is None else config.classes
    about = {
        "generator": {
            "reference": reference,
            "name": generator.name,
            "sha256": generator.sha256,
            "licence": generator.licence,
            "labels_seen": generator.labels_seen,
        },
        "classes": list(config.class_names or map(str, kinds)),
        "calls_per_image": synthesis.calls_per_image(),
        "environment": environment(),
    }
    return write_manifest(folder, synthesis.settings(), [n for n in notes if n is not None], about)


def environment() -> dict[str, Any]:
    """What the bytes depend on besides the settings: device, threads and builds."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "threads": torch.get_num_threads(),
        "dtype": "float32",
        **{name: version(name) for name in ("torch", "diffusers", "pillow")},
    }
