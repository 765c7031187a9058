"""Whoever makes the shards, the set is the same: processes, torchrun, Ray with a worker killed, Slurm's array."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import commands
import pytest

from diffrep import api
from diffrep.errors import UserError
from diffrep.launch import ray_tasks, slurm
from diffrep.launch.engines import chosen
from diffrep.launch.jobs import here

SETTINGS = {"images": 22, "block_size": 2, "shard_size": 4, "sampling": {"num_sampling_steps": "3"}}
TESTS = str(Path(__file__).parents[1])
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "diffrep")


def content_hash(folder):
    return json.loads((folder / "manifest.json").read_text())["content_hash"]


def visible(folder):
    return sorted(p.name for p in folder.iterdir())


def assert_same_set(folder, whole):
    assert content_hash(folder) == content_hash(whole)
    for shard in sorted(whole.glob("*.tar")):
        assert (folder / shard.name).read_bytes() == shard.read_bytes()
    assert visible(folder) == visible(whole)  # no logs, no tokens, nothing half-written
    assert json.loads((folder / "manifest.json").read_text()) == json.loads((whole / "manifest.json").read_text())


def test_two_processes(whole, paint, tmp_path):
    done = commands.run(tmp_path, *paint, "--out", "two", "--jobs", 2)
    assert done.code == 0, done.err
    assert_same_set(tmp_path / "two", whole)
    cost, of_one = (json.loads((s / "cost.json").read_text()) for s in (tmp_path / "two", whole))
    assert cost["network_calls"] == of_one["network_calls"] == 22 * 3


def test_workers_do_not_outlive_a_killed_command(whole, paint, tmp_path):
    (tmp_path / "pids").mkdir()
    slow = {"TOY_SECONDS": "0.2", "TOY_PIDS": str(tmp_path / "pids")}
    command = commands.Command(tmp_path, *paint, "--out", "two", "--jobs", 2, **slow)
    command.until(lambda: len(list((tmp_path / "pids").iterdir())) == 2)
    command.send(signal.SIGKILL)
    assert command.wait().code == -signal.SIGKILL
    workers = [int(p.name) for p in (tmp_path / "pids").iterdir()]
    command = commands.Command(tmp_path, *paint, "--out", "two")  # and the lock went with the command
    assert command.wait().code == 0
    assert not [pid for pid in workers if Path(f"/proc/{pid}/stat").exists() and is_running(pid)]
    assert_same_set(tmp_path / "two", whole)


def is_running(pid):
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def test_torchrun_with_two(whole, paint, tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": TESTS}
    done = subprocess.run(
        [*TORCHRUN, *map(str, paint), "--out", "two"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=90,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("content hash") == 1  # one process speaks
    assert_same_set(tmp_path / "two", whole)


def test_ray_with_a_worker_killed_in_mid_shard(whole, paint, tmp_path):
    pids = tmp_path / "pids"
    pids.mkdir()
    slow = {"TOY_SECONDS": "0.2", "TOY_PIDS": str(pids), "PYTHONPATH": TESTS}
    command = commands.Command(tmp_path, *paint, "--out", "two", "--ray", "local", **slow)
    command.until(lambda: len(list(pids.iterdir())) >= 2)
    workers = [int(p.name) for p in pids.iterdir()]
    os.kill(workers[0], signal.SIGKILL)
    done = command.wait()
    assert done.code == 0, done.err
    assert len(list(pids.iterdir())) > len(workers)  # somebody took the dead worker's place
    assert_same_set(tmp_path / "two", whole)


def test_a_worker_that_does_not_see_the_folder_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(ray_tasks, "LATE", 0.2)
    with ray_tasks._token(tmp_path) as token:
        ray_tasks._see(tmp_path, token)
        (tmp_path / "elsewhere").mkdir()
        with pytest.raises(UserError, match=r"the worker on .* does not see .*elsewhere: choose an --out that all"):
            ray_tasks._see(tmp_path / "elsewhere", token)
    assert list(tmp_path.iterdir()) == [tmp_path / "elsewhere"]


@pytest.fixture
def at_once(monkeypatch):
    """Jobs of submitit's local executor, which find ``toys`` too."""
    monkeypatch.setenv("PYTHONPATH", TESTS)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    submitit = pytest.importorskip("submitit")
    return slurm.on_slurm("", 2, executor=lambda logs: submitit.LocalExecutor(folder=logs))


def test_jobs_of_submitit(whole, at_once, monkeypatch, tmp_path):
    monkeypatch.setattr(api, "chosen", lambda *_: at_once)
    api.synthesize("python:toys:painter", SETTINGS, tmp_path / "two", allow_code=True)
    assert_same_set(tmp_path / "two", whole)
    assert not (tmp_path / "two" / slurm.LOGS).exists()


SBATCH = """#!/bin/sh
cp "$1" {folder}/submitted.sh
echo "Submitted batch job 77"
"""
SACCT = """#!/bin/sh
echo "JobID|State|NodeList"
for k in 0 1 2 3 4 5; do echo "77_$k|CANCELLED by 0|"; done
"""


def test_what_slurm_is_asked_for(paint, tmp_path):
    """With programs in Slurm's place that write down what they are told."""
    programs = {"sbatch": SBATCH.format(folder=tmp_path), "sacct": SACCT, "srun": "", "scancel": "#!/bin/sh\n"}
    programs["sinfo"] = '#!/bin/sh\necho "gpu:a100:8"\n'
    (tmp_path / "bin").mkdir()
    for name, text in programs.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    done = commands.run(tmp_path, *paint, "--out", "set", "--slurm", "fast", "--jobs", 3, PATH=path)
    assert done.code == 3 and "did not end well" in done.err and "the same command goes on" in done.err
    asked = (tmp_path / "submitted.sh").read_text()
    for line in ("--partition=fast", "--array=0-2%", "--gpus-per-node=1", "--time=1440", "--cpus-per-task=1"):
        assert f"#SBATCH {line}" in asked, asked


def test_an_engine_is_chosen_by_what_was_said(monkeypatch):
    assert chosen() is here and chosen(jobs=1) is here and chosen(jobs=2) is not here
    with pytest.raises(UserError, match="--jobs 0: at least 1"):
        chosen(jobs=0)
    with pytest.raises(UserError, match="--ray and --jobs at once"):
        chosen(jobs=2, ray="local")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="there is no sbatch on this machine"):
        chosen(slurm="")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="torchrun and --jobs at once"):
        chosen(jobs=2)


@pytest.mark.parametrize(("package", "asked"), [("ray", {"ray": "auto"}), ("submitit", {"slurm": ""})])
def test_a_missing_package_names_its_extra(monkeypatch, package, asked):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=r"install it with: pip install 'diffrep\[(ray|slurm)\]'"):
        chosen(**asked)
