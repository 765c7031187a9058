"""A study: stages with names, seeds and one budget, run side by side as one-thread processes.

Finished stages are not run again, so the same command goes on after an interruption. Arms recorded in a folder of
evidence under the same hash are not run at all, nor is what only they would need.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from diffrep.console import LINE_EVERY, status_line
from diffrep.errors import DiffrepError, Interrupted, RunError, UserError
from diffrep.evaluation import label_value
from diffrep.files import locked, read_json, short_hash, write_json
from diffrep.recipes.base import STAGE, Study, Task, is_same, recipe_hash, references, replace_strings, to_yaml
from diffrep.training.run import RunDir
from diffrep.words import numbers

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Instance:
    """One stage with one seed. hash: over its recipe and those of all stages it builds on, not over paths."""

    name: str
    seed: int
    task: Task
    needs: tuple[str, ...]
    hash: str

    @property
    def key(self) -> str:
        return f"{self.name}-s{self.seed}"


def instances(study: Study, out: Path) -> list[Instance]:
    """Every stage with every seed, references turned into folders, in an order that respects them."""
    found: list[Instance] = []
    for seed in study.seeds:
        hashes: dict[str, str] = {}
        for name, stage in study.stages.items():
            needs = references(stage)
            own = recipe_hash(stage)
            hashes[name] = short_hash([own, *(hashes[n] for n in needs)])
            folders = {f"{STAGE}{n}": str(out / f"{n}-s{seed}") for n in needs}
            values = replace_strings(stage.model_dump(mode="json"), folders) | {"seed": seed}
            task = type(stage).model_validate(values)
            found.append(Instance(name, seed, task, tuple(f"{n}-s{seed}" for n in needs), hashes[name]))
    return found


def run_study(
    study: Study,
    out: Path,
    jobs: int,
    record: Path | None = None,
    allow_code: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Run what is not done yet, ``jobs`` stages at a time, and write the study's ``result.json``.

    Args:
        record: a folder of evidence, one JSON file per arm and seed; finished arms are added, recorded ones skipped.
        say: called with each line for the user.
    """
    run = RunDir(out)
    run.check(partial(is_same, study))
    with locked(out):
        run.begin(to_yaml(study), partial(is_same, study))
        everything = instances(study, out)
        recorded = {i.key: r for i in everything if (r := _recorded(record, study, i))}
        wanted = _wanted(study, everything, set(recorded))
        results = dict(recorded)
        for instance, result in _run_all(wanted, out, jobs, allow_code, say):
            results[instance.key] = result
            if record and instance.name in study.arms:
                shared = {key: results[key] for key in _below(instance, everything) if key in results}
                write_json(_record_file(record, study, instance), _evidence(study, instance, result, shared))
        summary = _summary(study, everything, results) | {"recorded": recorded}
        run.finish(summary)
    return summary


def _wanted(study: Study, everything: list[Instance], recorded: set[str]) -> list[Instance]:
    """What must run: everything, or, where arms are recorded, the missing arms and what they build on."""
    if not recorded:
        return everything
    needed = {i.key for i in everything if i.name in study.arms and i.key not in recorded}
    for instance in reversed(everything):
        if instance.key in needed:
            needed |= set(instance.needs)
    return [i for i in everything if i.key in needed]


def _run_all(
    wanted: list[Instance], out: Path, jobs: int, allow_code: bool, say: Callable[[str], None]
) -> Iterator[tuple[Instance, dict[str, Any]]]:
    """Yield each instance with its result as it finishes."""
    waiting, running, done = list(wanted), dict[Future[dict[str, Any]], Instance](), set[str]()
    context = multiprocessing.get_context("spawn")
    news: Any = context.Queue()
    for variable in THREAD_VARIABLES:  # children read them when they import torch
        os.environ[variable] = "1"
    watch = _Watch(say, len(wanted))
    stop = context.Value("b", 0, lock=False)  # no lock, which a signal or a kill could leave taken
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _interrupt) if is_main else None
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_worker, initargs=(news, stop))
    try:
        while waiting or running:
            for instance in [i for i in waiting if done.issuperset(i.needs)][: jobs - len(running)]:
                waiting.remove(instance)
                running[pool.submit(_run_one, instance, out / instance.key, allow_code)] = instance
            finished, _ = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
            watch.read(news)
            for future in finished:
                instance = running.pop(future)
                result = future.result()
                done.add(instance.key)
                watch.finished(instance, result)
                yield instance, result
    except BrokenProcessPool:
        raise RunError("a stage's process died (out of memory?); the same command goes on from here") from None
    except KeyboardInterrupt:
        stop.value = 1  # a signal sent to this process alone does not reach the others
        raise Interrupted("study stopped; the same command goes on from here") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        if is_main:
            signal.signal(signal.SIGTERM, before)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


_stop: Any = None
_news: Any = None


def _worker(news: Any, stop: Any) -> None:
    """Set up one process: one thread, and Ctrl-C as a wish of all to stop after the current step."""
    global _news, _stop
    _news, _stop = news, stop
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _wish_to_stop)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import torch

    torch.set_num_threads(1)


def _wish_to_stop(*_: object) -> None:
    _stop.value = 1


def _end_with_parent() -> None:
    """A killed study must not leave processes that hold its folders; a stage survives being killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _run_one(instance: Instance, folder: Path, allow_code: bool) -> dict[str, Any]:
    from diffrep.stages import run_task

    began = time.process_time()
    said = 0.0

    def progress(done: int, total: int) -> None:
        nonlocal said
        if time.monotonic() - said > 1:
            said = time.monotonic()
            _news.put((instance.key, done, total))

    try:
        result = run_task(instance.task, folder, lambda: bool(_stop.value), progress, allow_code)
    except Interrupted:
        raise
    except DiffrepError as error:
        raise type(error)(f"stage {instance.key}: {error}") from None
    return result | {"hash": instance.hash, "stage_cpu_seconds": round(time.process_time() - began, 2)}


class _Watch:
    """Tells the user what is going on: a line when a stage ends, and how far long ones are."""

    def __init__(self, say: Callable[[str], None], total: int) -> None:
        self.say, self.total, self.count = say, total, 0
        self.began: dict[str, tuple[float, int]] = {}
        self.said = time.monotonic()

    def read(self, news: Any) -> None:
        latest: dict[str, tuple[int, int]] = {}
        while True:
            try:
                key, done, total = news.get_nowait()
            except queue.Empty:
                break
            latest[key] = (done, total)
            self.began.setdefault(key, (time.monotonic(), done))
        if latest and time.monotonic() - self.said > LINE_EVERY:
            self.said = time.monotonic()
            for key, (done, total) in latest.items():
                began, first = self.began[key]
                self.say("  " + status_line(key, done, total, time.monotonic() - began, first))

    def finished(self, instance: Instance, result: dict[str, Any]) -> None:
        self.count += 1
        shown = ", ".join(f"{name} {value:.1f}" for name, value in numbers(result.get("scores", {})))
        self.say(
            f"[{self.count}/{self.total}] {instance.key}: {result.get('cpu_seconds', 0):.1f} CPU s"
            + (f", {shown}" if shown else "")
        )


def _record_file(record: Path, study: Study, instance: Instance) -> Path:
    return record / f"{study.name}-{instance.name}-s{instance.seed}.json"


def _recorded(record: Path | None, study: Study, instance: Instance) -> dict[str, Any] | None:
    """An arm's evidence, whichever study wrote it: the hash covers all that it builds on."""
    if record is None or instance.name not in study.arms:
        return None
    files = [_record_file(record, study, instance), *sorted(record.glob(f"*-{instance.name}-s{instance.seed}.json"))]
    found = (read_json(file) for file in files if file.exists())
    return next((arm for arm in found if arm.get("hash") == instance.hash), None)


KEPT = (
    "name",
    "kind",
    "hash",
    "seed",
    "scores",
    "steps",
    "images_seen",
    "multiply_adds",
    "cpu_seconds",
    "parameters",
    "labels_seen",
)


def _below(instance: Instance, everything: list[Instance]) -> list[str]:
    """The keys of all that ``instance`` builds on."""
    by_key, found, open_ = {i.key: i for i in everything}, set[str](), list(instance.needs)
    while open_:
        if (key := open_.pop()) not in found:
            found.add(key)
            open_ += by_key[key].needs
    return sorted(found)


def _evidence(
    study: Study, instance: Instance, result: dict[str, Any], shared: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """The few facts of an arm that are committed: what, which seed, scores, cost, and the cost of what it builds on."""
    seconds = {key.rpartition("-s")[0]: found.get("cpu_seconds", 0) for key, found in shared.items()}
    kept = {k: result[k] for k in KEPT if k in result}
    return {"study": study.name, "stage": instance.name, **kept, "built_on_cpu_seconds": seconds}


def _summary(study: Study, everything: list[Instance], results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Every arm's scores by seed; the mean and spread are the report's business."""
    arms = {
        name: {str(i.seed): results[i.key].get("scores", {}) for i in everything if i.name == name and i.key in results}
        for name in study.arms
    }
    runs = {n: (study.stages[n].model_dump(mode="json"), {int(s): results[f"{n}-s{s}"] for s in arms[n]}) for n in arms}
    return {
        "name": study.name,
        "kind": "study",
        "recipe_hash": recipe_hash(study),
        "seeds": list(study.seeds),
        "headline": study.headline,
        "arms": arms,
        "worth_labels": label_value.worth(runs),
        "cpu_seconds": round(sum(r.get("cpu_seconds", 0) for r in results.values()), 1),
    }


def default_jobs() -> int:
    """One process per GPU where there is one, else one per core that this process may use."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.device_count()
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def check_jobs(jobs: int | None) -> int:
    if jobs is not None and jobs < 1:
        raise UserError(f"--jobs {jobs}: at least 1")
    return jobs or default_jobs()
