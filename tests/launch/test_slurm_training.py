"""A run as a Slurm job, with submitit's local executor in Slurm's place: pytest tests/launch/test_slurm_training.py"""

import json
import os
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import commands
import pytest
import torch
from safetensors.torch import load_file

from diffrep.errors import RunError, UserError
from diffrep.launch import slurm_training
from diffrep.launch.slurm_training import Process, train_on_slurm, variables
from diffrep.recipes.loading import load

# SGD: Adam would make whole steps of the rounding of gradients that are nearly zero.
RECIPE = ("denoiser_debug", "--set", "optim={name: sgd, lr: 0.01}")
WEIGHTS = "pipeline/unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def local(monkeypatch):
    """local(n) makes submitit's local executor of jobs with n processes."""
    submitit = pytest.importorskip("submitit")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    def make(tasks):
        def executor(logs):
            made = submitit.LocalExecutor(folder=logs)
            made.update_parameters(tasks_per_node=tasks, timeout_min=5)
            return made

        return executor

    return make


def test_a_job_of_two_processes_trains_as_one_process_does(tmp_path, local, monkeypatch):
    monkeypatch.chdir(tmp_path)
    task, folder = load(RECIPE[0], RECIPE[2:]), tmp_path / "job"
    train_on_slurm(task, ["run", *RECIPE, "--out", "job"], folder, "", tasks=2, executor=local(2))
    assert json.loads((folder / "result.json").read_text())["images_seen"] == 16
    assert not (folder / slurm_training.LOGS).exists()
    alone = commands.run(tmp_path, "run", *RECIPE, "--out", "one")
    assert alone.code == 0, alone.err
    one, other = (load_file(tmp_path / run / WEIGHTS) for run in ("one", "job"))
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
    # It has finished: nobody is asked again.
    train_on_slurm(task, [], folder, "", executor=lambda logs: pytest.fail("submitted"))


def test_what_the_run_refuses_is_refused_here(tmp_path, local, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "mine.txt").write_text("not a run")
    with pytest.raises(UserError, match=r"^job is not empty and holds no run; choose another --out$"):
        train_on_slurm(load(RECIPE[0]), ["run", RECIPE[0], "--out", "job"], tmp_path / "job", "", executor=local(1))


def test_what_does_not_fit_is_never_submitted(tmp_path, monkeypatch):
    def refused(recipe, **options):
        with pytest.raises(UserError) as refusal:
            train_on_slurm(load(recipe), [], tmp_path / "job", "", **options)
        assert not (tmp_path / "job").exists()
        return str(refusal.value)

    monkeypatch.setenv("PATH", "")
    assert refused("denoiser_debug", nodes=3, tasks=1) == (
        "train.batch_size 8 cannot be split over 3 processes (--nodes 3 --tasks 1)"
    )
    assert refused("denoiser_debug", nodes=2, tasks=8).startswith("train.batch_size 8 cannot be split over 16")
    assert "is a study; submit its stages" in refused("addp_debug")
    assert "there is no sbatch on this machine" in refused("denoiser_debug")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "torchrun and --slurm at once" in refused("denoiser_debug")


class Ended:
    """A job of submitit's that has ended."""

    job_id, paths = "7", SimpleNamespace(stderr="7_0_log.err")

    def __init__(self, code=0, line="", failed=None):
        self.found, self.failed = (code, line), failed

    def task(self, number):
        return self

    def exception(self):
        return self.failed

    def result(self):
        return self.found


def test_how_a_job_ended_is_said_in_a_line():
    slurm_training._checked(Ended())
    with pytest.raises(RunError, match=r"^job 7: loss is NaN at step 9; its log is 7_0_log.err; the same command"):
        slurm_training._checked(Ended(3, "diffrep: loss is NaN at step 9"))
    with pytest.raises(RunError, match=r"^job 7 did not end well \(node failed\); its log is"):
        slurm_training._checked(Ended(failed=ValueError("x\nnode failed")))


def test_what_each_process_is_told():
    job = SimpleNamespace(
        num_tasks=16, num_nodes=2, global_rank=11, local_rank=3, job_id="40123", hostnames=["n1", "n2"]
    )
    assert variables(job) == {
        "RANK": "11", "WORLD_SIZE": "16", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "8",
        "MASTER_ADDR": "n1", "MASTER_PORT": "20123",
    }  # fmt: skip
    assert variables(SimpleNamespace(num_tasks=1)) == {}


WAITING = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (print("diffrep: stopped, saved", file=sys.stderr), sys.exit(130)))
os.kill(os.getpid(), signal.SIGUSR2)  # Slurm's warning goes to all processes: this one must live
open("ready", "w").close()
time.sleep(60)
"""


def test_before_its_time_is_up_the_run_is_told_and_the_job_queued_again(tmp_path, monkeypatch):
    submitit = pytest.importorskip("submitit")
    monkeypatch.chdir(tmp_path)
    plain = subprocess.Popen
    monkeypatch.setattr(
        slurm_training.subprocess, "Popen", lambda command, **how: plain([sys.executable, "-c", WAITING], **how)
    )
    monkeypatch.setattr(slurm_training, "variables", lambda job: {})
    monkeypatch.setattr(submitit, "JobEnvironment", lambda: None)
    process, again = Process(("run", "x")), []

    def warn():
        while not (tmp_path / "ready").exists():
            time.sleep(0.05)
        again.append(process.checkpoint())

    thread = threading.Thread(target=warn)
    thread.start()
    assert process() == (130, "diffrep: stopped, saved")
    thread.join()
    assert again[0].function is process


SBATCH = """#!/bin/sh
cp "$1" {folder}/submitted.sh
echo "Submitted batch job 77"
"""
SACCT = """#!/bin/sh
echo "JobID|State|NodeList"
for k in 0 1 2 3 4 5 6 7; do echo "77_$k|CANCELLED by 0|"; done
echo "77|CANCELLED by 0|"
"""


def test_what_slurm_is_asked_for(tmp_path):
    """With programs in Slurm's place that write down what they are told."""
    programs = {"sbatch": SBATCH.format(folder=tmp_path), "sacct": SACCT, "srun": "", "scancel": "#!/bin/sh\n"}
    programs["sinfo"] = '#!/bin/sh\necho "gpu:h100:8"\n'
    (tmp_path / "bin").mkdir()
    for name, text in programs.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    asked = ("--slurm", "fast", "--nodes", 2, "--tasks", 4)
    done = commands.run(tmp_path, "run", *RECIPE, "--out", "job", *asked, PATH=path)
    assert done.code == 3 and "did not end well" in done.err and "the same command goes on" in done.err
    script = (tmp_path / "submitted.sh").read_text()
    for line in ("--partition=fast", "--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "--signal=USR2@90"):
        assert f"#SBATCH {line}" in script, script
    assert slurm_training.SAVING < 90
    assert not (tmp_path / "job" / "recipe.yaml").exists()
