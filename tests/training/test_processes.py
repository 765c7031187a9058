"""torchrun with two processes on the CPU gives what one process gives, to rounding; and only one of them writes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import commands
import pytest
import torch
from safetensors.torch import load_file

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")

SCRIPT = '''
"""Argument: where to leave each case's weights. The cases: one process's test runs the same functions."""
import os
import sys
from pathlib import Path

import cases
import torch
from safetensors.torch import save_file

from diffrep.errors import Interrupted, RunError, UserError

torch.set_num_threads(1)
out, rank = Path(sys.argv[1]), os.environ["RANK"]
for name, case in cases.CASES.items():
    save_file(case(out / f"run-{name}-{rank}"), out / f"{name}-{rank}.safetensors")
for name, case in cases.ENDINGS.items():  # the last one closes the process group
    try:
        said = case(out / f"run-{name}-{rank}")
    except (Interrupted, RunError, UserError) as error:
        said = f"{error.exit_code} {error}"
    (out / f"{name}-{rank}.txt").write_text(str(said))
'''

CASES = '''
import os

import tiny
from torch import nn

from diffrep.methods.repfusion import RepFusion, RepFusionConfig, TimestepConfig
from diffrep.models.students import StudentConfig
from diffrep.randomness import seeded

VIT = {"img_size": 4, "patch_size": 2, "embed_dim": 16, "depth": 1, "num_heads": 2}  # layer norm only
RANK = int(os.environ.get("RANK", "0"))


def steps(run_dir, made, count=6, **options):
    loop = tiny.trainer(run_dir, made, tiny.SGD.model_copy(update={"group_lr": {}}), **options)
    assert loop.accelerator.num_processes == int(os.environ.get("WORLD_SIZE", "1"))
    loop.method.train()
    for step in range(count):
        loop.step(step)
    return {name: value.contiguous() for name, value in tiny.weights(loop.method).items()}


def plain(run_dir):
    return steps(run_dir, tiny.method(), clip_norm=1.0)


def micro(run_dir):
    return steps(run_dir, tiny.method(), micro_batch_size=1, clip_norm=1.0)


class Teacher(nn.Module):
    image_size, in_channels = 4, 3

    def __init__(self):
        super().__init__()
        self.mid = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x, timestep):
        return self.mid(x * (1 + timestep.view(-1, 1, 1, 1) / 500))


def teacher():
    with seeded(1, "teacher"):
        return Teacher()


def policy(run_dir):
    """The policy's baseline is a mean over all processes; no batch statistics anywhere, so nothing else may differ."""
    config = RepFusionConfig(
        teacher="python:cases:teacher",
        tap="mid",
        student=StudentConfig(name="vit_tiny_patch16_224", options=VIT),
        timestep=TimestepConfig(select="policy", values=(0, 500, 999), entropy_until=1.0),
    )
    with seeded(2, "policy"):
        made = RepFusion(config, 2, 4, allow_code=True)
    return steps(run_dir, made)


CASES = {"plain": plain, "micro": micro, "policy": policy}


def not_divisible(run_dir):
    tiny.trainer(run_dir, batch_size=7)


def stopped(run_dir):
    """One process alone hears the signal, at its fifth step; both stop there."""
    made = tiny.method()
    tiny.trainer(run_dir, made).fit(lambda: RANK == 1 and len(made.seen) == 5)


def not_finite(run_dir):
    """One process alone sees the NaN; both must end, none may wait for the other."""
    tiny.trainer(run_dir, tiny.method(bad=0.5 if RANK == 1 else None)).fit()


def finished(run_dir):
    return tiny.trainer(run_dir, tiny.method()).fit()


ENDINGS = {"not_divisible": not_divisible, "stopped": stopped, "not_finite": not_finite, "finished": finished}
'''


def torchrun(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(folder), str(Path(__file__).parent)]),
        "CUDA_VISIBLE_DEVICES": "",
    }
    return subprocess.run(
        [*TORCHRUN, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


def left_by_two(folder: Path, files: dict[str, str], *arguments: str) -> Path:
    """``folder`` after two processes ran its script.py; files: what is written there first, by name."""
    for name, text in files.items():
        (folder / name).write_text(text)
    done = torchrun(folder, "script.py", *arguments, str(folder))
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """What two processes leave behind; one start of torchrun serves all tests."""
    return left_by_two(tmp_path_factory.mktemp("two"), {"script.py": SCRIPT, "cases.py": CASES})


@pytest.fixture(scope="module")
def cases(two):
    sys.path.insert(0, str(two))
    try:
        import cases

        yield cases
    finally:
        sys.path.remove(str(two))
        sys.modules.pop("cases", None)


@pytest.mark.parametrize("name", ["plain", "micro", "policy"])
def test_two_processes_equal_one_at_the_same_global_batch(two, cases, tmp_path, name):
    alone = cases.CASES[name](tmp_path)
    first, second = (load_file(two / f"{name}-{rank}.safetensors") for rank in (0, 1))
    assert first.keys() == alone.keys()
    for key, value in alone.items():
        if key in ("count",):
            continue  # of images seen by this process
        torch.testing.assert_close(first[key], value, rtol=1e-5, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")
        assert torch.equal(first[key], second[key]), key
    if name == "policy":
        assert float(alone["running_reward"]) < 0


def endings(two, name):
    return [(two / f"{name}-{rank}.txt").read_text() for rank in (0, 1)]


def test_a_batch_that_cannot_be_shared_is_refused(two):
    wanted = "2 train.batch_size 7 cannot be split over 2 processes"
    assert endings(two, "not_divisible") == [wanted, wanted]
    assert not list((two / "run-not_divisible-0").iterdir())


def test_a_signal_to_one_process_stops_all_at_one_step(two):
    for said in endings(two, "stopped"):
        assert said.startswith("130 stopped at step 5 of 12, saved")


def test_a_nan_in_one_process_ends_all_with_the_same_words(two):
    for said in endings(two, "not_finite"):
        assert said.startswith("3 entropy is NaN at step 7")


def test_the_log_is_the_mean_over_the_processes(two, cases, tmp_path):
    cases.finished(tmp_path)
    mine, theirs = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (tmp_path, two / "run-finished-0")
    )
    assert [line["step"] for line in mine] == [line["step"] for line in theirs]
    for one, other in zip(mine, theirs, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)


def test_the_command_runs_under_torchrun_and_one_process_writes(tmp_path):
    # SGD: Adam would make whole steps of the rounding of gradients that are nearly zero.
    arguments = ("run", "denoiser_debug", "--set", "optim={name: sgd, lr: 0.01}", "--out")
    done = torchrun(tmp_path, "-m", "diffrep", *arguments, "two")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("run folder: two") == 1
    assert len((tmp_path / "two" / "metrics.jsonl").read_text().splitlines()) == 2
    alone = commands.run(tmp_path, *arguments, "one")
    assert alone.code == 0, alone.err
    result = json.loads((tmp_path / "two" / "result.json").read_text())
    assert result["images_seen"] == 16
    files = [{str(p.relative_to(tmp_path / r)) for p in (tmp_path / r).rglob("*")} for r in ("one", "two")]
    assert files[0] == files[1]
    weights = "pipeline/unet/diffusion_pytorch_model.safetensors"
    one, two = (load_file(tmp_path / run / weights) for run in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
