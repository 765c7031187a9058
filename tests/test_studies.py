"""Studies: stages once each, side by side; recorded arms not at all; stopped and gone on with."""

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import commands

from diffrep import studies
from diffrep.errors import RunError, UserError
from diffrep.evaluation.classify import EvaluateConfig
from diffrep.recipes import RECIPES, addp, quickstart
from diffrep.recipes.base import Study
from diffrep.recipes.loading import load
from diffrep.studies import Instance, instances, run_study

TINY = """
kind: study
name: tiny
seeds: [0, 1]
headline: linear_probe_20
arms: {scratch: From scratch, tuned: Fine-tuned}
stages:
  teacher: {kind: recipe, name: teacher, data: {source: digits},
    method: {kind: denoiser, in_channels: 1, block_out_channels: [8, 16]}, optim: {lr: 0.001},
    train: {steps: 2, batch_size: 8}, evaluate: {samples: 0}}
  scratch: {kind: recipe, name: scratch, data: {source: digits, labels: 20, labelled_share: 1.0},
    method: {kind: finetune, student: {name: conv_small}}, optim: {lr: 0.001},
    train: {steps: STEPS, batch_size: 8, log_every: 1, checkpoint_every: 100000}, evaluate: {probe_labels: [20]}}
  tuned: {kind: recipe, name: tuned, data: {source: digits, labels: 20, labelled_share: 1.0},
    method: {kind: finetune, student: {name: conv_small}, init: "stage:scratch"}, optim: {lr: 0.001},
    train: {steps: 2, batch_size: 8}, evaluate: {probe_labels: [20]}}
"""


def tiny(folder, *overrides, steps=2) -> Study:
    (folder / "tiny.yaml").write_text(TINY.replace("STEPS", str(steps)))
    return load(str(folder / "tiny.yaml"), overrides)


def inline(monkeypatch):
    """Stages run in this process, one after the other; returns the names of those that were run."""
    ran = []

    def run_all(wanted, out, jobs, allow_code, say):
        for instance in wanted:
            ran.append(instance.key)
            yield instance, studies._run_one(instance, out / instance.key, allow_code)

    monkeypatch.setattr(studies, "_run_all", run_all)
    monkeypatch.setattr(studies, "_stop", type("Never", (), {"value": 0}))
    monkeypatch.setattr(studies, "_news", type("Nobody", (), {"put": staticmethod(lambda news: None)}))
    return ran


def test_instances_name_folders_needs_and_hashes(tmp_path):
    study = tiny(tmp_path)
    found = {i.key: i for i in instances(study, tmp_path / "out")}
    assert list(found) == [f"{stage}-s{seed}" for seed in (0, 1) for stage in ("teacher", "scratch", "tuned")]
    tuned = found["tuned-s1"]
    assert tuned.needs == ("scratch-s1",) and tuned.task.seed == 1
    assert tuned.task.method.init == str(tmp_path / "out" / "scratch-s1")
    assert tuned.hash == found["tuned-s0"].hash


def test_the_hash_follows_what_a_stage_builds_on_and_not_the_folder(tmp_path):
    def hashes(*overrides, out="out"):
        return {i.name: i.hash for i in instances(tiny(tmp_path, *overrides), tmp_path / out)}

    plain = hashes()
    assert hashes(out="elsewhere") == plain
    changed = hashes("scratch.optim.lr=0.5")
    assert changed["teacher"] == plain["teacher"]
    assert changed["scratch"] != plain["scratch"] and changed["tuned"] != plain["tuned"]
    later = hashes("tuned.optim.lr=0.5")
    assert later["scratch"] == plain["scratch"] and later["tuned"] != plain["tuned"]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("tuned.method.init=stage:scrach", "stage 'tuned' refers to 'stage:scrach'; earlier stages: scratch, teacher"),
        ("scratch.method.init=stage:tuned", "stage 'scratch' refers to 'stage:tuned'; earlier stages: teacher"),
        ("arms={scrach: A}", "arms names 'scrach', which is no stage; did you mean 'scratch'"),
        ("scratch.optim.lr=-1", "stages.scratch.optim.lr = -1"),
        ("stages={}", "stages"),
        ("seeds=[]", "seeds"),
    ],
)
def test_wrong_references_are_refused(tmp_path, override, words):
    with pytest.raises(UserError) as error:
        tiny(tmp_path, override)
    assert words in str(error.value)


def test_a_record_skips_arms_of_the_same_hash_and_what_only_they_need(tmp_path, monkeypatch):
    ran, record, seed_0 = inline(monkeypatch), tmp_path / "record", "seeds=[0]"
    first = run_study(tiny(tmp_path, seed_0), tmp_path / "one", 1, record)
    assert len(ran) == 3
    assert sorted(p.name for p in record.iterdir()) == ["tiny-scratch-s0.json", "tiny-tuned-s0.json"]
    kept = json.loads((record / "tiny-tuned-s0.json").read_text())
    assert kept["study"] == "tiny" and kept["seed"] == 0 and "linear_probe_20" in kept["scores"]
    assert str(tmp_path) not in json.dumps(kept)

    ran.clear()  # the same study elsewhere: nothing to do, the same table
    second = run_study(tiny(tmp_path, seed_0), tmp_path / "two", 1, record)
    assert ran == [] and second["arms"] == first["arms"]
    assert json.loads((tmp_path / "two/result.json").read_text())["arms"] == first["arms"]

    # Another rate of one arm: it alone runs again, with the stage it builds on (whose folder is not there).
    ran.clear()
    third = run_study(tiny(tmp_path, seed_0, "tuned.optim.lr=0.5"), tmp_path / "three", 1, record)
    assert ran == ["scratch-s0", "tuned-s0"]
    assert third["arms"]["scratch"] == first["arms"]["scratch"] and third["arms"]["tuned"] != first["arms"]["tuned"]
    assert json.loads((record / "tiny-tuned-s0.json").read_text())["hash"] != kept["hash"]

    ran.clear()  # one more seed
    run_study(tiny(tmp_path, "tuned.optim.lr=0.5"), tmp_path / "four", 1, record)
    assert ran == ["scratch-s1", "tuned-s1"]


def test_finished_stages_are_not_run_again_and_unfinished_ones_are(tmp_path, monkeypatch):
    inline(monkeypatch)
    out = tmp_path / "out"
    first = run_study(tiny(tmp_path, "seeds=[0]"), out, 1)
    (out / "tuned-s0" / "result.json").unlink()
    before = {p: p.stat().st_mtime_ns for p in (out / "scratch-s0").rglob("*")}
    again = run_study(tiny(tmp_path, "seeds=[0]"), out, 1)
    assert again["arms"] == first["arms"]
    assert {p: p.stat().st_mtime_ns for p in (out / "scratch-s0").rglob("*")} == before
    assert (out / "tuned-s0" / "result.json").exists()
    with pytest.raises(UserError, match="belongs to another recipe"):
        run_study(tiny(tmp_path, "seeds=[0]", "scratch.optim.lr=0.5"), out, 1)


def test_a_failing_stage_is_named(tmp_path, monkeypatch):
    inline(monkeypatch)
    with pytest.raises(UserError, match=r"stage teacher-s0: data.source folder:none.*|stage teacher-s0: none"):
        run_study(tiny(tmp_path, "teacher.data.source=folder:none"), tmp_path / "out", 1)


def test_jobs_are_checked():
    with pytest.raises(UserError, match="--jobs 0: at least 1"):
        studies.check_jobs(0)
    assert studies.check_jobs(3) == 3 and studies.check_jobs(None) == studies.default_jobs() >= 1


# Real processes


STAGE = "out/scratch-s0"


def start(folder: Path) -> commands.Command:
    return commands.Command(folder, "run", "tiny.yaml", "--out", "out", "--jobs", "1", "--set", "seeds=[0]")


def workers(command: commands.Command) -> list[int]:
    """The processes that a study started for its stages."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            parent = int(status.read_text().rpartition(")")[2].split()[1])
            if parent == command.pid and b"spawn_main" in (status.parent / "cmdline").read_bytes():
                found.append(int(status.parent.name))
    return found


def steps_of(run: Path) -> int:
    file = run / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


@pytest.fixture
def long_study(tmp_path):
    """A study whose second stage would take minutes."""
    folder = tmp_path / "work"
    folder.mkdir()
    tiny(folder, steps=50_000)
    return folder


def test_a_signal_to_a_study_alone_reaches_its_stages(long_study):
    command = start(long_study)
    command.until(lambda: steps_of(long_study / STAGE) > 3)
    command.send(signal.SIGTERM)
    began = time.monotonic()
    done = command.wait(60)
    assert done.code == 130 and time.monotonic() - began < 30
    assert done.err.strip().splitlines()[-1] == "diffrep: study stopped; the same command goes on from here"
    step = steps_of(long_study / STAGE)
    assert [p.name for p in (long_study / STAGE / "checkpoints").iterdir()] == [f"step-{step:08d}"]


@pytest.mark.slow
def test_ctrl_c_and_a_kill_and_it_goes_on(long_study):
    # Ctrl-C in a terminal reaches all processes of the group at once.
    command = start(long_study)
    command.until(lambda: steps_of(long_study / STAGE) > 3)
    os.killpg(command.pid, signal.SIGINT)
    assert command.wait(60).code == 130
    step = steps_of(long_study / STAGE)

    # Killed outright, it leaves no process behind that holds a folder, and goes on from there.
    command = start(long_study)
    command.until(lambda: steps_of(long_study / STAGE) > step + 3)
    left = workers(command)
    assert len(left) == 1
    command.send(signal.SIGKILL)
    command.wait()
    end = time.monotonic() + 20
    while time.monotonic() < end and any(Path(f"/proc/{pid}").exists() for pid in left):
        time.sleep(0.1)
    assert not [pid for pid in left if Path(f"/proc/{pid}").exists()]
    reached = steps_of(long_study / STAGE)
    command = start(long_study)
    command.until(lambda: steps_of(long_study / STAGE) > reached + 3)
    command.send(signal.SIGTERM)
    assert command.wait(60).code == 130


@pytest.mark.slow
def test_the_shipped_debug_study_runs_side_by_side_and_then_has_nothing_left_to_do(tmp_path):
    done = commands.run(tmp_path, "run", "quickstart_debug", "--jobs", "2", "--record", "record", "--out", "study")
    assert done.code == 0, done.err
    study = RECIPES["quickstart_debug"]()
    assert "next:" in done.out and (tmp_path / "study" / "report.html").stat().st_size > 10_000
    assert sorted(p.name for p in (tmp_path / "record").iterdir()) == sorted(
        f"quickstart_debug-{arm}-s0.json" for arm in study.arms
    )
    result = json.loads((tmp_path / "study" / "result.json").read_text())
    assert result["arms"].keys() == study.arms.keys()
    judged = dict.fromkeys(quickstart.SECOND_ROAD, "top1") | dict.fromkeys(addp.ARMS, "frechet")
    assert all(judged.get(arm, study.headline) in found["0"] for arm, found in result["arms"].items())
    began = time.monotonic()
    again = commands.run(tmp_path, "run", "quickstart_debug", "--record", "record", "--out", "elsewhere")
    assert again.code == 0 and time.monotonic() - began < 20, again.err
    assert json.loads((tmp_path / "elsewhere" / "result.json").read_text())["arms"] == result["arms"]
    assert not list((tmp_path / "elsewhere").glob("*-s0"))


def test_a_dead_stage_is_a_run_error(tmp_path, monkeypatch):
    """As when the kernel ends a process that took too much memory."""
    study = tiny(tmp_path, "seeds=[0]")
    ran = iter(studies._run_all(dying(study, tmp_path), tmp_path, 1, False, lambda line: None))
    with pytest.raises(RunError, match="process died"):
        list(ran)


class Dies(EvaluateConfig):
    """Ends the process that unpickles it."""

    def __reduce__(self):
        return os._exit, (9,)


def dying(study: Study, out: Path) -> list[Instance]:
    first = instances(study, out)[0]
    return [Instance(first.name, 0, Dies(), (), first.hash)]
