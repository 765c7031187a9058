"""``diffrep generate``: images of ADDP, or of MAGE's predictor alone, into a folder with a page."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from diffrep.config import validate
from diffrep.console import progress, wish_to_stop
from diffrep.errors import UserError
from diffrep.launch import ranks
from diffrep.launch.engines import chosen
from diffrep.launch.generate import GenerateJob, GenerationConfig, close, make_images
from diffrep.launch.generation_cost import estimate

BLOCK = 16  # images computed together on a GPU; on a CPU one, so that no neighbour can change a rounding


def generate(
    model: str | Path,
    out: str | Path,
    settings: dict[str, Any] | None = None,
    seeds: Iterable[int] = range(16),
    jobs: int | None = None,
    ray: str | None = None,
) -> dict[str, Any]:
    """One image per seed into ``out``, from pure masks or from what is visible of an image; goes on where it stopped.

    Args:
        model: folder with addp/ (or token_predictor/) and tokenizer/, or an official file.
        settings: the fields of a ``GenerationConfig``.
        jobs: one-thread processes on this machine. ray: ``auto``, ``local`` or an address.

    Returns:
        what ``generated.json`` says, and ``out``; {} in all but the first process of torchrun.

    Raises:
        UserError: the input does not fit, or the folder holds images of another model or other settings.
    """
    from diffrep.report.generated import write_page  # matplotlib: as long to import as all pages together

    job = _job(model, out, settings, seeds)
    torch.set_num_threads(1)
    try:
        with ranks.group() as rank, wish_to_stop() as stop, progress("images") as told:
            if rank:
                ranks.help_out(job, stop)
                return {}
            found = make_images(job, chosen(jobs, ray), stop, told)
            write_page(Path(job.folder))
    finally:
        close()
    return found | {"out": str(out)}


def generation_cost(
    model: str | Path, settings: dict[str, Any] | None = None, seeds: Iterable[int] = range(16)
) -> dict[str, Any]:
    """What :func:`generate` will take: calls and multiply-adds of each part, counted; time, from one block; memory."""
    job = _job(model, ".", settings, seeds)
    torch.set_num_threads(1)
    try:
        return estimate(job.open(), job.place())
    finally:
        close()


def _job(model: str | Path, out: str | Path, settings: dict[str, Any] | None, seeds: Iterable[int]) -> GenerateJob:
    config = validate(GenerationConfig, settings or {}, "generate")
    if config.block_size is None:
        size = BLOCK if torch.cuda.is_available() else 1
        config = config.model_copy(update={"block_size": size})
    return GenerateJob(str(model), config.model_dump_json(exclude_unset=True), _checked(seeds), str(out))


def _checked(seeds: Iterable[int]) -> range | tuple[int, ...]:
    """A range stays one: a job is sent to every worker, and 50,000 numbers with each piece of it would be much."""
    found = seeds if isinstance(seeds, range) else tuple(seeds)
    if not found:
        raise UserError("no image was asked for: give at least one seed")
    if min(found) < 0:
        raise UserError(f"seed {min(found)}: seeds are 0 or more")
    if len(set(found)) < len(found):
        twice = next(seed for seed in found if list(found).count(seed) > 1)
        raise UserError(f"seed {twice} was given twice; every seed is one image")
    return found
