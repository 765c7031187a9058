"""Images of token models as a job that any process can share: one image per seed, the same whoever makes it.

A piece of the job is a block of seeds. A block is computed at one size, the last filled up, because another size would
round otherwise; on a CPU a block is one image. The folder:

settings.json            all that decides about pixels, and no path; written first, other settings are refused
images/seed-000007.png   one per seed, and nothing else but manifest.json, which says how they were made
steps/                   the walks of the first few seeds (see :mod:`diffrep.launch.film`)
grid.png, film.png, film.gif, before.png (of a repair)
generated.json           what the folder holds, for the page and for programs; written last

Letters: B images of a block, L tokens.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from diffrep.config import Config
from diffrep.console import Report
from diffrep.data.shards import environment
from diffrep.diffusion.masking import AlternationConfig, ImageDraws, masked_after
from diffrep.errors import Interrupted, RunError, UserError
from diffrep.files import located, locked, read_json, write_atomic, write_json
from diffrep.frozen.generator import grid_png
from diffrep.frozen.tokens import FrozenADDP, FrozenPredictor, load_addp, load_predictor, load_tokenizer
from diffrep.launch import film
from diffrep.launch.jobs import Engine, Images, Stop
from diffrep.launch.repair import Repair, RepairConfig
from diffrep.methods.addp import Moment, alternate, as_uint8, first_step
from diffrep.methods.token_predictor import mage, mage_counts

SETTINGS, FOUND, IMAGES, STEPS = "settings.json", "generated.json", "images", "steps"
RELEASED = {"cosine": 20, "linear": 256}  # steps, where nobody says; fewer where there are fewer tokens
FILMED, SHOWN, COLUMNS = 4, 64, 8  # images whose walk is kept; images of the grid, and how many side by side
END = b"\0\0\0\0IEND\xaeB`\x82"  # of every whole PNG file


class GenerationConfig(Config):
    """How images are made. Defaults: the official ones."""

    by: Literal["addp", "predictor"] = "addp"  # predictor: MAGE's generation, tokens alone
    alternation: AlternationConfig = AlternationConfig()  # steps: 20 (cosine) or 256 (linear), never more than tokens
    rounding: Literal["truncate", "nearest"] = "truncate"  # to 8 bits; official: cut off
    precision: Literal["float32", "bfloat16"] = "float32"  # of the networks; ids are drawn in float32 in any case
    block_size: int | None = Field(None, ge=1)  # images computed together; None: 1 on a CPU, more on a GPU
    repair: RepairConfig | None = None  # begin with what is visible of an image

    @model_validator(mode="after")
    def _fits(self) -> GenerationConfig:
        if self.by == "predictor" and self.alternation.finish:
            raise ValueError("finish belongs to ADDP: MAGE's last image is of hard ids in any case")
        return self


def seed_file(folder: Path, seed: int) -> Path:
    return folder / IMAGES / f"seed-{seed:06d}.png"


def strip_file(folder: Path, seed: int) -> Path:
    return folder / STEPS / f"seed-{seed:06d}.png"


def start_file(folder: Path, seed: int) -> Path:
    """Of a repair: the image with what is painted anew in one colour."""
    return folder / STEPS / f"seed-{seed:06d}-masked.png"


def is_whole(path: Path) -> bool:
    """Whether a PNG file has its end."""
    try:
        with open(path, "rb") as file:
            file.seek(-len(END), 2)
            return file.read() == END
    except OSError:  # not there, or shorter
        return False


class Generation:
    """The networks, and how they make images.

    Raises:
        UserError: networks that are missing or do not fit each other, an image that does not fit, more steps than
            tokens.
    """

    def __init__(self, reference: str, config: GenerationConfig, seeds: Sequence[int]) -> None:
        self.config, self.seeds, self.size = config, seeds, config.block_size or 1
        self.tokenizer = load_tokenizer(reference)
        if not self.tokenizer.module.config.decoder:
            raise UserError(
                f"the tokenizer {self.tokenizer.name} has no decoder: it makes ids of images, and no images"
            )
        load = load_addp if config.by == "addp" else load_predictor
        self.network: FrozenADDP | FrozenPredictor = load(reference, self.tokenizer)
        self.grid = self._grid()
        height, width = self.grid
        self.image_size = height * self.tokenizer.stride, width * self.tokenizer.stride
        self.repair = Repair(config.repair, self.tokenizer, self.image_size) if config.repair else None
        self.masked = self.repair.count if self.repair else height * width
        self.set_walk(self._alternation())

    def set_walk(self, alternation: AlternationConfig) -> None:
        """The steps, and how many tokens are masked after each."""
        self.alternation = alternation
        self.counts = (masked_after if self.config.by == "addp" else mage_counts)(alternation, self.masked)

    def _grid(self) -> tuple[int, int]:
        if isinstance(self.network, FrozenADDP):
            return self.network.config.grid
        tokens = self.network.module.config.num_tokens
        side = math.isqrt(tokens)
        if side * side != tokens:
            raise UserError(f"{self.network.name} knows {tokens} tokens, which is no square: its images have no size")
        return side, side

    def _alternation(self) -> AlternationConfig:
        given = self.config.alternation
        if "steps" in given.model_fields_set:
            return given
        return given.model_copy(update={"steps": min(RELEASED[given.schedule], self.masked)})

    @property
    def num_tokens(self) -> int:
        """L."""
        return self.grid[0] * self.grid[1]

    @property
    def first_step(self) -> int:
        """The first step that is computed."""
        return first_step(self.counts, self.num_tokens) if self.config.by == "addp" else 0

    def settings(self) -> dict[str, Any]:
        """All that decides about pixels, and no path: networks and images stand there by their hashes."""
        return {
            "model": {self.config.by: self.network.sha256, "tokenizer": self.tokenizer.sha256},
            "repair": self.repair.settings() if self.repair else None,
            "alternation": self.alternation.model_dump(mode="json"),
            "rounding": self.config.rounding,
            "precision": self.config.precision,
            "block_size": self.size,
        }

    # Pieces

    def rows(self, number: int) -> list[int]:
        """The seeds of one block."""
        return list(self.seeds[number * self.size : (number + 1) * self.size])

    def filmed(self, seeds: Sequence[int]) -> list[int]:
        """Those of some seeds whose walk is kept."""
        return [seed for seed in seeds if seed in self.seeds[:FILMED]]

    def is_made(self, folder: Path, number: int) -> bool:
        seeds = self.rows(number)
        wanted = [seed_file(folder, seed) for seed in seeds]
        return all(map(is_whole, [*wanted, *(strip_file(folder, seed) for seed in self.filmed(seeds))]))

    def begin(self, folder: Path) -> list[int]:
        """Say what the folder will hold; the blocks that have to be made."""
        write_json(folder / SETTINGS, self.settings())
        write_json(folder / IMAGES / "manifest.json", {"name": self.network.name, "settings": self.settings()})
        blocks = range(-(-len(self.seeds) // self.size))
        return [number for number in blocks if not self.is_made(folder, number)]

    def check(self, folder: Path) -> None:
        """Raises UserError: the folder holds images of other settings, or of nobody knows which."""
        if not (folder / SETTINGS).exists():
            if any((folder / IMAGES).glob("seed-*.png")):
                raise UserError(f"{folder} holds images, and nothing says how they were made; choose another --out")
            return
        known, ours = read_json(folder / SETTINGS), self.settings()
        other = [name for name in ours if not isinstance(known, dict) or known.get(name) != ours[name]]
        if other:
            words = {"model": "another model", "block_size": f"another block_size than {self.size}"}
            words["repair"] = "another repair, or of none"
            told = words.get(other[0], f"other settings ({other[0]})")
            raise UserError(f"{folder} holds images of {told}; choose another --out")

    def make(self, folder: Path, number: int, device: torch.device | str) -> dict[str, Any]:
        """Make one block; files that are whole already stay as they are."""
        seeds = self.rows(number)
        filmed = self.filmed(seeds)
        watch = film.Watch([seeds.index(seed) for seed in filmed], self.grid, self.tokenizer.stride)
        images = self.draw(seeds + seeds[-1:] * (self.size - len(seeds)), device, watch if filmed else None)
        for place, seed in enumerate(filmed):
            write_atomic(strip_file(folder, seed), film.png(watch.strip(place)))
            if self.repair:
                start = film.marked(self.repair.image[None], self.repair.mask([seed]), self.grid, self.tokenizer.stride)
                write_atomic(start_file(folder, seed), film.png(start[0]))
        for seed, image in zip(seeds, images[: len(seeds)], strict=True):
            if not is_whole(seed_file(folder, seed)):
                write_atomic(seed_file(folder, seed), film.png(image))
        return {"images": len(seeds)}

    # Images

    @torch.no_grad()
    def draw(
        self,
        seeds: list[int],
        device: torch.device | str = "cpu",
        watch: Callable[[Tensor, Tensor], None] | None = None,
    ) -> Tensor:
        """(B, 3, H, W) uint8, on the CPU; each depends on its seed alone. watch: see :class:`film.Watch`."""
        ids, mask = self._start(seeds, device)
        self.network.follow(mask)
        if watch and self.repair:
            watch(self.repair.image.expand(len(seeds), -1, -1, -1), mask)
        walk = self._alternate if self.config.by == "addp" else self._mage
        with torch.autocast(mask.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16"):
            pixels = walk(ImageDraws(seeds, self.num_tokens), ids, mask, watch)
        images = as_uint8(pixels, self.config.rounding).cpu()
        return self.repair.pasted(images, seeds) if self.repair and self.repair.config.paste else images

    def _start(self, seeds: list[int], device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Ids and mask, (B, L) each, before the first step."""
        if self.repair:
            return self.repair.ids.expand(len(seeds), -1).to(device), self.repair.mask(seeds).to(device)
        blank = torch.zeros(len(seeds), self.num_tokens, dtype=torch.int64, device=device)
        return blank, torch.ones_like(blank, dtype=torch.bool)

    def _alternate(self, draws: ImageDraws, ids: Tensor, mask: Tensor, watch: Any) -> Tensor:
        def seen(moment: Moment) -> None:
            if watch:
                watch(as_uint8(moment.pixels, self.config.rounding), moment.mask)

        return alternate(self.network.module, self.tokenizer, self.alternation, draws, ids, mask, watch=seen)

    def _mage(self, draws: ImageDraws, ids: Tensor, mask: Tensor, watch: Any) -> Tensor:
        def seen(step: int, ids: Tensor, mask: Tensor) -> None:
            if watch:  # MAGE itself looks at no pixels on the way
                pixels = self.tokenizer.decode(self.tokenizer.lookup(ids), self.grid)
                watch(as_uint8(pixels, self.config.rounding), mask)

        assert isinstance(self.network, FrozenPredictor)
        return mage(self.network, self.tokenizer, self.alternation, draws, ids, mask, self.grid, seen)


# As a job


@dataclass(frozen=True)
class GenerateJob:
    """What a worker has to know.

    config: the plain values of a ``GenerationConfig`` that were set, as JSON text.
    seeds:  a range where it can be: it is sent with every piece.
    device: where to compute; None: a GPU where the worker has one.
    """

    model: str
    config: str
    seeds: range | tuple[int, ...]
    folder: str
    device: str | None = None

    def open(self) -> Generation:
        return _opened(self.model, self.config, self.seeds)

    def make(self, number: int, report: Images = lambda images: None, stop: Stop = lambda: False) -> dict[str, Any]:
        if stop():
            raise Interrupted("stopped; the same command goes on from here")
        found = self.open().make(Path(self.folder), number, self.place())
        report(found["images"])
        return found

    def place(self) -> str:
        """The device."""
        return self.device or ("cuda" if torch.cuda.is_available() else "cpu")

    def anywhere(self) -> GenerateJob:
        """The same job for a worker that starts in another folder: paths in full."""
        values, place = json.loads(self.config), located(self.model)
        for name in {"image", "mask"} & set(values.get("repair") or {}):
            values["repair"][name] = str(Path(values["repair"][name]).expanduser().absolute())
        model = str(place.resolve()) if place.exists() else self.model
        return replace(self, model=model, config=json.dumps(values), folder=str(Path(self.folder).resolve()))


@lru_cache(maxsize=1)
def _opened(model: str, config: str, seeds: Sequence[int]) -> Generation:
    return Generation(model, GenerationConfig.model_validate_json(config), seeds)


def close() -> None:
    """Let go of the networks."""
    _opened.cache_clear()


def make_images(job: GenerateJob, engine: Engine, stop: Stop, progress: Report) -> dict[str, Any]:
    """Make what is missing with any engine, then the pictures of all; returns what ``generated.json`` says."""
    job.open().check(Path(job.folder))
    with locked(Path(job.folder)):
        return fill(job, engine, stop, progress)


def fill(job: GenerateJob, engine: Engine, stop: Stop, progress: Report) -> dict[str, Any]:
    """The same in a folder that is this process's own already."""
    opened = job.open()
    missing = opened.begin(Path(job.folder))
    to_make = sum(len(opened.rows(number)) for number in missing)
    total = done = len(job.seeds)
    done -= to_make

    def report(images: int) -> None:
        nonlocal done
        done += images
        progress(done, total)

    report(0)
    engine(job, missing, report, stop)
    return _finish(job, opened, to_make)


def _finish(job: GenerateJob, opened: Generation, made: int) -> dict[str, Any]:
    """Grid, film and ``generated.json``, once every image is there."""
    folder, seeds = Path(job.folder), list(job.seeds)
    lost = [seed for seed in seeds if not is_whole(seed_file(folder, seed))]
    if lost:
        raise RunError(f"{folder}: {len(lost)} images are missing, first seed {lost[0]}; the same command makes them")
    _write_pictures(folder, opened)
    found = {
        "images": len(seeds),
        "made": made,  # by this command; the others were there
        "seeds": seeds,
        "by": opened.config.by,
        "image_size": list(opened.image_size),
        "tokens": opened.num_tokens,
        "masked": [opened.masked, *opened.counts],  # before the first step, and after each
        "first_step": opened.first_step,
        "name": opened.network.name,
        "licences": {"network": opened.network.licence, "tokenizer": opened.tokenizer.licence},
        "repair": opened.config.repair.model_dump(mode="json") if opened.config.repair else None,
        "filmed": seeds[:FILMED],
        "environment": environment(job.place()),
    }
    write_json(folder / FOUND, found)
    return found


def _write_pictures(folder: Path, opened: Generation) -> None:
    side = max(opened.image_size)
    shown = torch.stack([film.stored(seed_file(folder, seed)) for seed in opened.seeds[:SHOWN]])
    write_atomic(folder / "grid.png", grid_png(film.enlarged(shown, side).float() / 255, COLUMNS))
    film.write_film(folder, [film.stored(strip_file(folder, seed)) for seed in opened.seeds[:FILMED]])
    if opened.repair:
        write_atomic(folder / "before.png", film.png(opened.repair.image))


def write_stand_in(folder: Path, opened: Generation) -> None:
    """As many images of the right size, all of them black: what later stages of a study are costed against."""
    black = film.png(torch.zeros(3, *opened.image_size, dtype=torch.uint8))
    (folder / IMAGES).mkdir(parents=True)
    for seed in opened.seeds:
        seed_file(folder, seed).write_bytes(black)
    licences = {"network": opened.network.licence, "tokenizer": opened.tokenizer.licence}
    write_json(folder / FOUND, {"seeds": list(opened.seeds), "licences": licences})
