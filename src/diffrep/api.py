"""The verbs, as functions. The command line parses and calls these; a program may call them too."""

from __future__ import annotations

import signal
import statistics
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffrep import assets
from diffrep.assemble import default_device, estimate, train
from diffrep.config import validate
from diffrep.console import progress
from diffrep.data import datasets
from diffrep.data.datasets import DataConfig, ImageSet, Split
from diffrep.errors import UserError
from diffrep.files import short_hash
from diffrep.frozen.diffusion import load_teacher
from diffrep.methods.repfusion import RepFusionConfig
from diffrep.recipes import RECIPES
from diffrep.recipes.base import FeatureTask, Recipe, Study, SweepTask, recipe_hash, to_yaml
from diffrep.recipes.loading import load
from diffrep.rehearsal import rehearse
from diffrep.stages import run_task
from diffrep.studies import check_jobs, run_study

__all__ = ["dry_run", "evaluate", "features", "load_data", "load_teacher", "probe", "recipes", "report", "run", "show"]


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
        seeds, jobs, record: of a study (see studies.py).
        threads: of one training process; one is the default because more change rounding and collide.
        say: called with lines for the user.

    Raises:
        UserError: the input cannot be used. RunError: the run cannot go on. Interrupted: stopped after a checkpoint.
    """
    task = load(recipe, overrides, allow_code) if isinstance(recipe, str) else recipe
    if isinstance(task, Study):
        task = validate(Study, task.model_dump(mode="json") | {"seeds": list(seeds)}, "--seeds") if seeds else task
        folder = Path(out) if out else default_run_dir(task)
        result = run_study(task, folder, check_jobs(jobs), Path(record) if record else None, allow_code, say)
        return result | _study_words(task, result) | {"report": str(report([folder], folder / "report.html"))}
    if seeds or jobs or record:
        raise UserError(f"{task.name} is one run; --seeds, --jobs and --record are for studies (one run: --set seed=1)")
    folder = Path(out) if out else default_run_dir(task)
    _set_threads(threads)
    with wish_to_stop() as stop, progress(task.name) as told:
        result = train(task, folder, stop, told, allow_code)
    return result | {"run_dir": str(folder)} if result else result


def _study_words(task: Study, result: dict[str, Any]) -> dict[str, Any]:
    """The table a terminal shows: each arm's mean and standard deviation over the seeds."""
    names = [task.headline] if task.headline else []
    names += ["top1"] if any("top1" in s for by_seed in result["arms"].values() for s in by_seed.values()) else []
    rows = [(task.arms[arm], [_mean(by_seed, name) for name in names]) for arm, by_seed in result["arms"].items()]
    return {"columns": names, "table": rows, "next_commands": list(task.next_commands)}


def _mean(by_seed: dict[str, dict[str, float]], name: str) -> str:
    values = [s[name] for s in by_seed.values() if name in s]
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def recipes() -> list[dict[str, Any]]:
    """The ledger: each shipped recipe with its published number, ours, and whether it can run as it is."""
    return [_ledger_row(make()) for make in RECIPES.values()]


def _ledger_row(task: Recipe | Study) -> dict[str, Any]:
    published, ours = task.published, task.ours
    wanting = sorted({need.partition(":")[0] for need in task.needs})
    notes = [f"needs {need}" for need in task.needs] + [f"assumed: {a}" for a in task.assumed]
    notes += [f"published: {published.metric}; {published.source}"] if published else []
    notes += [f"ours: {ours.metric}; {ours.command}"] if ours else []
    return {
        "name": task.name,
        "kind": task.method.kind if isinstance(task, Recipe) else "study",
        "about": task.about,
        "status": f"needs {', '.join(wanting)}" if wanting else "run",
        "published": "-" if published is None else "not found" if published.value is None else f"{published.value}",
        "ours": f"{ours.value} ± {ours.spread} ({ours.seeds} seeds)" if ours else "-",
        "notes": notes,
    }


def show(recipe: str, overrides: Sequence[str] = (), allow_code: bool = False) -> str:
    """The resolved recipe as YAML, ready to be edited."""
    return to_yaml(load(recipe, overrides, allow_code))


def dry_run(recipe: str, overrides: Sequence[str] = (), allow_code: bool = False) -> dict[str, Any]:
    """What a run, or each stage of a study, will cost; nothing is written.

    See :func:`diffrep.assemble.estimate` and :func:`diffrep.rehearsal.rehearse`.
    """
    task = load(recipe, overrides, allow_code)
    return rehearse(task, allow_code) if isinstance(task, Study) else estimate(without_weights(task), allow_code)


def without_weights(recipe: Recipe) -> Recipe:
    """The recipe with a published teacher's architecture in place of its weights, which cost the same to run."""
    method = recipe.method
    known = assets.find(method.teacher) if isinstance(method, RepFusionConfig) else None
    if known is None or not known.unet:
        return recipe
    return recipe.model_copy(update={"method": method.model_copy(update={"teacher": f"random:{known.key}"})})


def features(
    teacher: str,
    data: dict[str, Any],
    settings: dict[str, Any],
    out: str | Path,
    split: str = "train",
    allow_code: bool = False,
) -> dict[str, Any]:
    """Write a teacher's features to ``out``.

    Args:
        data: the fields of a ``DataConfig``; every view of its ``augment`` is written.
        settings: the fields of a ``FeatureConfig``: taps, timesteps, pool, dtype, noise.
    """
    values = {"name": "features", "teacher": teacher, "data": data, "split": split, "features": settings}
    task = validate(FeatureTask, values, "features")
    with wish_to_stop() as stop, progress("features") as told:
        return run_task(task, Path(out), stop, told, allow_code)


def probe(
    teacher: str, data: dict[str, Any], settings: dict[str, Any], out: str | Path, allow_code: bool = False
) -> dict[str, Any]:
    """Probe a teacher at taps and timesteps; the rows are in ``rows``.

    Args:
        data: the fields of a ``DataConfig``.
        settings: the fields of a ``SweepConfig``: taps, timesteps, pool, labels, draws.
    """
    values = {"name": "probe", "teacher": teacher, "data": data, "sweep": settings}
    task = validate(SweepTask, values, "probe")
    with wish_to_stop() as stop, progress("probe") as told:
        return run_task(task, Path(out), stop, told, allow_code)


def evaluate(
    model: str,
    data: str,
    labels: Sequence[int] = (),
    knn: int = 1,
    seed: int = 0,
    image_size: int | None = None,
) -> dict[str, Any]:
    """Score a run folder, a safetensors file beside its ``config.json``, or a timm model without weights.

    Args:
        labels: label counts for the linear probe and the neighbours; () uses all training labels.
        seed: which class-balanced draw of labelled images.
    """
    from diffrep.evaluation.classify import EvaluateConfig, load_student, student_scores

    values = {"source": data, "image_size": image_size}
    config = validate(DataConfig, values, "evaluate --data")
    wanted = validate(EvaluateConfig, {"probe_labels": tuple(labels), "knn": knn}, "evaluate")
    student = load_student(model)
    train_split, test_split = load_data(config, "train"), load_data(config, "test")
    counts = wanted.probe_labels or (len(train_split),)
    return student_scores(student, train_split, test_split, counts, wanted.knn, seed, default_device())


def load_data(data: str | DataConfig, split: Split = "train") -> ImageSet:
    """One split of a data reference such as ``digits`` or ``folder:PATH``."""
    config = validate(DataConfig, {"source": data}, "load_data") if isinstance(data, str) else data
    return datasets.load_data(config, split)


def report(runs: Sequence[str | Path], out: str | Path = "report.html") -> Path:
    """One HTML page about one study or several runs; returns its path."""
    from diffrep.report.build import write_report

    return write_report([Path(r) for r in runs], Path(out))


def default_run_dir(task: Recipe | Study) -> Path:
    """``runs/NAME-sSEED-HASH8``."""
    seed = "_".join(map(str, task.seeds)) if isinstance(task, Study) else str(task.seed)
    seed = seed if len(seed) < 40 else short_hash(seed)
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
