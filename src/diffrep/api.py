"""The verbs, as functions. The command line parses and calls these; a program may call them too."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffrep.assemble import estimate, train
from diffrep.console import progress
from diffrep.frozen.diffusion import DiffusionTeacher, load_teacher
from diffrep.recipes.base import FeatureTask, Recipe, Study, SweepTask, load, recipe_hash, to_yaml
from diffrep.stages import run_task
from diffrep.studies import check_jobs, run_study

__all__ = ["default_run_dir", "dry_run", "features", "load_teacher", "probe", "run", "show"]


def run(
    recipe: str | Recipe | Study,
    overrides: Sequence[str] = (),
    out: str | Path | None = None,
    seeds: Sequence[int] | None = None,
    jobs: int | None = None,
    threads: int = 1,
    record: str | Path | None = None,
    allow_code: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Run a recipe or study to its end, or go on where it stopped; returns its result.

    Args:
        recipe: a shipped name, a YAML or JSON file, or the value itself.
        overrides: ``a.b=value``; in a study ``STAGE.a.b=value``.
        out: the run folder; default ``runs/NAME-sSEED-HASH8``.
        threads: of one training process; one is the default because more change rounding and collide.
        record: a study's folder of evidence (see studies.py).
        say: called with lines for the user.

    Raises:
        UserError: the input cannot be used. RunError: the run cannot go on. Interrupted: stopped after a checkpoint.
    """
    task = load(recipe, overrides, allow_code) if isinstance(recipe, str) else recipe
    if isinstance(task, Study):
        task = task.model_copy(update={"seeds": tuple(seeds)}) if seeds else task
        folder = Path(out) if out else default_run_dir(task)
        return run_study(task, folder, check_jobs(jobs), Path(record) if record else None, allow_code, say)
    folder = Path(out) if out else default_run_dir(task)
    _set_threads(threads)
    with wish_to_stop() as stop, progress(task.name) as report:
        return train(task, folder, stop, report, allow_code)


def show(recipe: str, overrides: Sequence[str] = (), allow_code: bool = False) -> str:
    """The resolved recipe as YAML, ready to be edited."""
    return to_yaml(load(recipe, overrides, allow_code))


def dry_run(recipe: str, overrides: Sequence[str] = (), allow_code: bool = False) -> dict[str, Any]:
    """What a run will cost (see :func:`diffrep.assemble.estimate`); nothing is written."""
    task = load(recipe, overrides, allow_code)
    if isinstance(task, Study):
        return {name: _stage_cost(stage, allow_code) for name, stage in task.stages.items()}
    return estimate(task, allow_code)


def _stage_cost(stage: Any, allow_code: bool) -> dict[str, Any]:
    if stage.kind == "recipe" and "stage:" not in to_yaml(stage):
        return estimate(stage, allow_code)
    steps = stage.train.steps * stage.train.batch_size if stage.kind == "recipe" else None
    return {"images": steps, "note": "its cost is known once the stages before it have run"}


def features(task: FeatureTask, out: str | Path, allow_code: bool = False) -> dict[str, Any]:
    """Write a teacher's features to ``out``; see :mod:`diffrep.frozen.features`."""
    with progress("features") as report:
        return run_task(task, Path(out), progress=report, allow_code=allow_code)


def probe(task: SweepTask, out: str | Path, allow_code: bool = False) -> dict[str, Any]:
    """Probe a teacher at taps and timesteps; the rows are in the result."""
    with progress("probe") as report:
        return run_task(task, Path(out), progress=report, allow_code=allow_code)


def default_run_dir(task: Recipe | Study) -> Path:
    """``runs/NAME-sSEED-HASH8``."""
    seed = "_".join(map(str, task.seeds)) if isinstance(task, Study) else str(task.seed)
    return Path("runs") / f"{task.name}-s{seed}-{recipe_hash(task)}"


@contextmanager
def wish_to_stop() -> Iterator[Callable[[], bool]]:
    """Ctrl-C or SIGTERM becomes a question the loop asks after each step; a second Ctrl-C ends at once."""
    wished = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield wished.is_set
        return

    def note(_number: int, _frame: object) -> None:
        wished.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield wished.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _set_threads(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)


def teacher(reference: str, allow_code: bool = False) -> DiffusionTeacher:
    """A frozen diffusion model; see :func:`diffrep.frozen.diffusion.load_teacher`."""
    return load_teacher(reference, allow_code)
