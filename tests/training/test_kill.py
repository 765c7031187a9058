"""Real commands, killed at random moments and started again, end with the bits of an unbroken run."""

import json
import random
import signal
import time
from pathlib import Path

import commands
import pytest

from diffrep import api
from diffrep.errors import UserError

RECIPE = """
base: denoiser_debug
train: {steps: 24, batch_size: 4, log_every: 1, checkpoint_every: 1, ema_decay: 0.9, clip_norm: 1.0}
evaluate: {samples: 2, num_sampling_steps: "2"}
"""
WEIGHTS = "pipeline/unet/diffusion_pytorch_model.safetensors"
CPU_TIMES = ("cpu_seconds", "wall_seconds")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with small.yaml, and its unbroken run in whole/."""
    folder = tmp_path_factory.mktemp("kill")
    (folder / "small.yaml").write_text(RECIPE)
    done = commands.run(folder, "run", "small.yaml", "--out", "whole")
    assert done.code == 0, done.err
    return folder


def start(folder: Path, out: str, *more: str) -> commands.Command:
    return commands.Command(folder, "run", "small.yaml", "--out", out, *more)


def logged(run: Path) -> list[dict]:
    file = run / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def has_lines(run: Path, count: int) -> bool:
    file = run / "metrics.jsonl"
    return file.exists() and file.read_bytes().count(b"\n") >= count


def without_times(run: Path) -> list[dict]:
    return [without_times_of(line) for line in logged(run)]


def without_times_of(values: dict) -> dict:
    return {k: v for k, v in values.items() if k not in CPU_TIMES}


def assert_same_run(run: Path, whole: Path) -> None:
    assert (run / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    last = "checkpoints/step-00000024/state.safetensors"
    assert (run / last).read_bytes() == (whole / last).read_bytes()
    assert (run / "samples/grid.png").read_bytes() == (whole / "samples/grid.png").read_bytes()
    assert without_times(run) == without_times(whole)
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-00000023", "step-00000024"]
    mine, whole_result = (without_times_of(json.loads((r / "result.json").read_text())) for r in (run, whole))
    assert mine == whole_result


def finish(folder: Path, out: str) -> None:
    done = start(folder, out).wait()
    assert done.code == 0, done.err
    assert_same_run(folder / out, folder / "whole")


def test_three_kills(folder):
    """checkpoint_every is 1, so a kill some milliseconds after a log line often hits a checkpoint being written."""
    rng, run = random.Random(0), folder / "three"
    for target in (4, 10, 18):
        command = start(folder, "three")
        command.until(lambda target=target: has_lines(run, target))
        time.sleep(rng.uniform(0, 0.02))
        command.send(signal.SIGKILL)
        assert command.wait().code == -signal.SIGKILL
        assert not (run / "result.json").exists()
    finish(folder, "three")


@pytest.mark.parametrize("moment", ["recipe.yaml", "pipeline", "samples"])
def test_a_kill_at_the_moment_a_thing_appears(folder, moment):
    """From the first file to the last: what was begun is known again, what was half exported is exported again."""
    run = folder / moment
    command = start(folder, run.name)
    command.until(lambda: any(run.glob(f"*{moment}*")) or any(run.glob(f".{moment}*")))
    command.send(signal.SIGKILL)
    assert command.wait().code == -signal.SIGKILL
    finish(folder, run.name)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_twenty_kills_at_any_time(folder, seed):
    rng, out = random.Random(seed), f"any{seed}"
    killed = 0
    while killed < 20:
        command = start(folder, out)
        time.sleep(rng.uniform(0.05, 0.35))
        command.send(signal.SIGKILL)
        killed += 1
        if command.wait().code == 0:
            break
    finish(folder, out)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["int", "term"])
def test_a_signal_saves_and_the_same_command_goes_on(folder, number):
    run = folder / f"signal{number}"
    command = start(folder, run.name, "--set", "train.checkpoint_every=1000")
    command.until(lambda: has_lines(run, 7))
    command.send(number)
    done = command.wait()
    assert done.code == 130
    step = len(logged(run))
    assert 7 <= step < 24
    assert done.line == f"diffrep: stopped at step {step} of 24, saved; the same command goes on from there"
    assert [p.name for p in (run / "checkpoints").iterdir()] == [f"step-{step:08d}"]
    done = start(folder, run.name, "--set", "train.checkpoint_every=1000").wait()
    assert done.code == 0, done.err
    assert (run / WEIGHTS).read_bytes() == (folder / "whole" / WEIGHTS).read_bytes()
    assert without_times(run) == without_times(folder / "whole")


def test_a_second_process_is_refused_until_the_first_is_dead(folder):
    run = folder / "shared"
    first = start(folder, "shared")
    first.until(lambda: has_lines(run, 2))
    first.send(signal.SIGSTOP)
    try:
        second = start(folder, "shared").wait()
        assert second.code == 2
        assert second.line == "diffrep: shared is in use by another process; wait for it or choose another --out"
        assert not (run / "result.json").exists()
    finally:
        first.send(signal.SIGKILL)
        first.send(signal.SIGCONT)
    assert first.wait().code == -signal.SIGKILL
    assert (run / ".lock").exists()  # the file stays, the lock does not
    finish(folder, "shared")


@pytest.mark.parametrize("change", ["train.steps=25", "seed=1", "method.layers_per_block=2"])
def test_another_recipe_in_the_same_folder_is_refused(folder, change):
    before = {p: p.read_bytes() for p in (folder / "whole").rglob("*") if p.is_file()}
    done = start(folder, "whole", "--set", change).wait()
    assert done.code == 2
    assert done.line == "diffrep: whole belongs to another recipe (see its recipe.yaml); choose another --out"
    assert {p: p.read_bytes() for p in (folder / "whole").rglob("*") if p.is_file()} == before


def test_another_recipe_in_an_unfinished_folder_is_refused(folder):
    run = folder / "unfinished"
    command = start(folder, run.name)
    command.until(lambda: has_lines(run, 2))
    command.send(signal.SIGKILL)
    command.wait()
    recipe = (run / "recipe.yaml").read_bytes()
    done = start(folder, run.name, "--set", "train.steps=25").wait()
    assert done.code == 2 and "belongs to another recipe" in done.line
    assert (run / "recipe.yaml").read_bytes() == recipe


def test_a_finished_run_says_its_result_again(folder):
    before = {p: p.stat().st_mtime_ns for p in (folder / "whole").rglob("*")}
    done = start(folder, "whole").wait()
    assert done.code == 0
    assert done.out.startswith("small, seed 0: 24 steps, 96 images") and "run folder: whole" in done.out
    assert {p: p.stat().st_mtime_ns for p in (folder / "whole").rglob("*")} == before


def test_a_folder_of_an_older_version_goes_on(tmp_path):
    """Its recipe lacks a setting that was added since, which stands at its default: it is the same recipe."""
    api.run("finetune_debug", out=tmp_path / "run")
    (tmp_path / "run/result.json").unlink()  # not finished, so the recipe is compared
    file = tmp_path / "run/recipe.yaml"
    text = file.read_text()
    assert "  only_part: null\n" in text
    file.write_text(text.replace("  only_part: null\n", ""))
    api.run("finetune_debug", out=tmp_path / "run")
    assert file.read_text() == text and (tmp_path / "run/result.json").exists()
    (tmp_path / "run/result.json").unlink()
    file.write_text(text.replace("only_part: null", "only_part: test"))
    with pytest.raises(UserError, match="belongs to another recipe"):
        api.run("finetune_debug", out=tmp_path / "run")
