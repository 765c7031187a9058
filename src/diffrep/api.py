"""The verbs, as functions. The command line parses and calls these; a program may call them too."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from diffrep import assets, stages
from diffrep.assemble import default_device, estimate, train
from diffrep.config import validate
from diffrep.console import progress, wish_to_stop
from diffrep.data import datasets
from diffrep.data.datasets import DataConfig, ImageSet, Split
from diffrep.data.shards import read_manifest
from diffrep.errors import RunError, UserError
from diffrep.evaluation.protocols import Scores
from diffrep.evaluation.tokenize import tokenize
from diffrep.files import short_hash
from diffrep.frozen.conversion import convert
from diffrep.frozen.teachers import has_preset, load_teacher
from diffrep.generation import generate, generation_cost
from diffrep.launch import ranks
from diffrep.launch.engines import chosen
from diffrep.launch.jobs import Engine, close
from diffrep.launch.reproduce import Plan, Reproduced, converted, planned
from diffrep.methods.repfusion import RepFusionConfig
from diffrep.models.export import export
from diffrep.recipes import RECIPES
from diffrep.recipes.base import FeatureTask, Published, Recipe, Study, SweepTask, SynthesisTask, recipe_hash, to_yaml
from diffrep.recipes.loading import load
from diffrep.rehearsal import rehearse
from diffrep.stages import run_task
from diffrep.studies import check_jobs, run_study
from diffrep.transfer import carried_out, plans

__all__ = [
    "card", "convert", "dry_run", "evaluate", "export", "features", "generate", "generation_cost", "load_data",
    "load_teacher", "probe", "recipes", "regenerate", "report", "reproduce", "run", "score", "show", "synthesis_cost",
    "synthesize", "tokenize", "transfer",
]  # fmt: skip


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
    known = {name for by_seed in result["arms"].values() for scores in by_seed.values() for name in scores}
    names += [name for name in ("top1", "frechet", "nme") if name in known and name not in names]
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
    notes += [f"published: {published.metric}; {published.source}", *_rivals(published)] if published else []
    notes += [f"ours: {ours.metric}; {ours.command}"] if ours else []
    return {
        "name": task.name,
        "kind": task.method.kind if isinstance(task, Recipe) else "study",
        "about": task.about,
        "status": f"needs {', '.join(wanting)}" if wanting else "run",
        "published": "-" if published is None else "not found" if published.value is None else f"{published.value}",
        "ours": f"{ours.value} ± {ours.spread} ({ours.seeds} seeds)" if ours else "-",
        "rivals": [rival.model_dump() for rival in published.rivals] if published else [],
        "notes": notes,
    }


def _rivals(published: Published) -> list[str]:
    """One line for each source that other methods' numbers come from."""
    by_source: dict[str, list[str]] = {}
    for rival in published.rivals:
        by_source.setdefault(rival.source, []).append(f"{rival.method} {rival.value}")
    return [f"others: {', '.join(numbers)}; {source}" for source, numbers in by_source.items()]


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
    if known is None or not has_preset(known):
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
    teacher: str, data: dict[str, Any], settings: dict[str, Any], out: str | Path, allow_code: bool = False,
    seed: int = 0, dry_run: bool = False, say: stages.Say = lambda found: None,
) -> dict[str, Any]:  # fmt: skip
    """Probe a teacher at taps and noise levels, or search for the best pair; goes on where it stopped.

    Args:
        data: the fields of a ``DataConfig``. settings: those of a ``SweepConfig``: taps, sigmas, pool, labels, ...
        say: told, before the first image, how many passes there will be. dry_run: return what it will take.

    Returns:
        ``rows``, ``best`` and, as words for --set, ``overrides``; of a search its rungs and cost in ``search``.
    """
    values = {"name": "probe", "teacher": teacher, "data": data, "sweep": settings, "seed": seed}
    task = validate(SweepTask, values, "probe")
    if dry_run:
        return stages.probe_cost(task, allow_code)
    with wish_to_stop() as stop, progress("probe") as told:
        return stages.probe(task, Path(out), stop, told, allow_code, say) | {"out": str(out)}


def synthesize(
    generator: str,
    settings: dict[str, Any],
    out: str | Path,
    seed: int = 0,
    jobs: int | None = None,
    ray: str | None = None,
    slurm: str | None = None,
    allow_code: bool = False,
    say: Callable[[dict[str, Any]], None] = lambda found: None,
) -> dict[str, Any]:
    """Draw a labelled set of images into ``out``, or go on where it stopped, or mend it; returns what it is.

    Args:
        generator: a diffusers folder or Hub id, a run folder with a diffusion model, ``python:module:factory``.
        settings: the fields of a ``SynthesisConfig``.
        jobs: one-thread processes on this machine, or jobs of a Slurm array.
        ray: ``auto``, ``local`` or an address. slurm: a partition, "" for the cluster's default.
        say: told, before the first image, what has to be made and what that takes.

    Under torchrun its processes share the work, and all but the first return {}.
    """
    task = _synthesis_task(generator, settings, seed)
    return _drawn(task, Path(out), chosen(jobs, ray, slurm), allow_code, say)


def regenerate(
    manifest: str | Path,
    out: str | Path,
    generator: str | None = None,
    jobs: int | None = None,
    ray: str | None = None,
    slurm: str | None = None,
    allow_code: bool = False,
    say: Callable[[dict[str, Any]], None] = lambda found: None,
) -> dict[str, Any]:
    """Draw a set again from its manifest alone.

    Args:
        generator: where it lies now, if no longer where it lay; the others as for :func:`synthesize`.

    Raises:
        RunError: the new set is whole, but its bytes are others.
    """
    folder, known = read_manifest(manifest)
    if Path(out).resolve() == folder.resolve():
        raise UserError(f"--out {out} is the set itself; choose another")
    task = stages.again(known, generator, allow_code)
    found = _drawn(task, Path(out), chosen(jobs, ray, slurm), allow_code, say)
    if found and found["content_hash"] != known["content_hash"]:
        told = stages.differences(known, read_manifest(out)[1])
        raise RunError(f"{out} is whole, but not equal to {manifest}: other bytes, {told}")
    return found | {"equal": True} if found else found


def _synthesis_task(generator: str, settings: dict[str, Any], seed: int) -> SynthesisTask:
    values = {"name": "synthesize", "generator": generator, "seed": seed, "synthesis": settings}
    return validate(SynthesisTask, values, "synthesize")


def _drawn(
    task: SynthesisTask, out: Path, engine: Engine, allow_code: bool, say: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    _set_threads(1)
    with ranks.group() as rank, wish_to_stop() as stop, progress("images") as told:
        if rank:
            ranks.help_out(stages.shard_job(task, out, allow_code), stop)
            return {}
        return stages.synthesize(task, out, engine, stop, told, allow_code, say) | {"out": str(out)}


def synthesis_cost(generator: str, settings: dict[str, Any], seed: int = 0, allow_code: bool = False) -> dict[str, Any]:
    """What a set will take, counted, and timed on one block; nothing is written."""
    _set_threads(1)
    task = _synthesis_task(generator, settings, seed)
    try:
        return stages.synthesis_cost(task, allow_code)
    finally:
        close()


def evaluate(
    model: str,
    data: str,
    labels: Sequence[int] = (),
    knn: int = 1,
    seed: int = 0,
    image_size: int | None = None,
    foreign: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Score a run folder, a safetensors file beside its ``config.json``, or a timm model without weights.

    Args:
        labels: label counts for the linear probe and the neighbours; () uses all training labels.
        seed: which class-balanced draw of labelled images.
        foreign: the fields of a ``ClassifierConfig`` besides its reference; ``model`` is then somebody else's
            classifier (a weights file, ``timm:NAME``, ``torchvision:NAME``), scored by its own top-1, top-5 and
            calibration.
    """
    from diffrep.evaluation.any_model import foreign_scores, own_scores

    values = {"source": data, "image_size": image_size}
    if foreign is not None:
        return foreign_scores(model, values, foreign, default_device())
    return own_scores(model, values, labels, knn, seed, default_device())


def transfer(
    model: str, tasks: Sequence[tuple[str, str]], overrides: Sequence[str] = (), out: str | Path | None = None,
    look: dict[str, Any] | None = None, dry_run: bool = False, allow_code: bool = False,
    say: Callable[[dict[str, Any]], None] = lambda found: None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Take an encoder to dense tasks, (task, data reference), in turn; a finished run of the task is scored as it is.

    Args:
        model, overrides, look: see :func:`diffrep.transfer.plans`. say: told of each what was found.
        out: holds a run folder of each, TASK-KIND; default ``runs/NAME-sSEED-HASH8``.
    """
    wanted, perform = plans(model, tasks, overrides, allow_code, look), partial(run, allow_code=allow_code)
    return [carried_out(plan, perform, out, default_device(), dry_run, say) for plan in wanted]


def card(
    images: str,
    teacher: dict[str, Any] | None = None,
    real: str | None = None,
    image_size: int | None = None,
    out: str | Path = "card.html",
    allow_code: bool = False,
) -> dict[str, Any]:
    """Write one HTML page about a set of images and return its numbers (see :func:`evaluation.card.data_card`).

    Args:
        images: the folder of a synthetic set, or a data reference.
        teacher: the fields of a ``ClassifierConfig``; its network judges the images and gives features to compare.
        real: data reference of the images the set is held against.
    """
    from diffrep.evaluation.card import data_card, without_pictures
    from diffrep.frozen.classifier import ClassifierConfig, load_classifier
    from diffrep.report.card import write_card

    if Path(out).is_dir():
        raise UserError(f"{out} is a folder; name the HTML file to write")
    config = validate(ClassifierConfig, teacher, "data card --teacher") if teacher else None
    judge = load_classifier(config, allow_code=allow_code) if config else None
    found = data_card(images, judge, real, image_size, default_device(), progress)
    write_card(found, Path(out))
    return without_pictures(found)


def score(images: str, reference: str, settings: dict[str, Any] | None = None, allow_code: bool = False) -> Scores:
    """Score generated images (see :func:`diffrep.evaluation.generation.score_images`).

    Args:
        settings: the fields of a ``ScoreConfig``: protocol, inception, features, image_size, precision_recall.
    """
    from diffrep.evaluation.generation import ScoreConfig, score_images

    config = validate(ScoreConfig, settings or {}, "score")
    return score_images(images, reference, config, default_device(), progress, allow_code)


def reproduce(
    name: str, jobs: int | None = None, ray: str | None = None, dry_run: bool = False, **wanted: Any
) -> Plan | Reproduced | None:
    """Published scores again (``wanted``: see :func:`diffrep.launch.reproduce.planned`); goes on where it stopped.

    Returns None in all but the first process of torchrun.
    """
    from diffrep.evaluation.generation import ScoreConfig, check_ready

    plan = planned(name, **wanted)
    check_ready(plan.reference, validate(ScoreConfig, plan.judging, "reproduce"))
    if dry_run:
        return replace(plan, cost=generation_cost(plan.model, plan.settings, plan.seeds))
    found = generate(converted(plan), plan.out, plan.settings, plan.seeds, jobs, ray)
    return Reproduced(plan, found, score(plan.png, plan.reference, plan.judging)).kept() if found else None


def load_data(data: str | DataConfig, split: Split = "train") -> ImageSet:
    """One split of a data reference such as ``digits`` or ``folder:PATH``."""
    config = validate(DataConfig, {"source": data}, "load_data") if isinstance(data, str) else data
    return datasets.load_data(config, split)


def report(runs: Sequence[str | Path], out: str | Path = "report.html") -> Path:
    """One HTML page about one study or several runs; returns its path."""
    from diffrep.evaluation.label_value import worth
    from diffrep.report.build import write_report

    return write_report([Path(r) for r in runs], Path(out), worth)


def default_run_dir(task: Recipe | Study) -> Path:
    """``runs/NAME-sSEED-HASH8``."""
    seed = "_".join(map(str, task.seeds if isinstance(task, Study) else [task.seed]))
    return Path("runs") / f"{task.name}-s{seed if len(seed) < 40 else short_hash(seed)}-{recipe_hash(task)}"


def _set_threads(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
