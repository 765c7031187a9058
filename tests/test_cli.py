"""The command line: every failure is one line that says what, where and what would be valid, and its own exit code."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))

import commands

from diffrep import assemble, words
from diffrep.recipes.base import to_yaml
from diffrep.recipes.loading import load

SMALL = "{steps: 4, batch_size: 4, log_every: 1, checkpoint_every: 1}"
PIPELINE = "runs/denoiser_debug/pipeline/unet"
WEIGHTS = f"{PIPELINE}/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A folder with a finished run of denoiser_debug where recipes look for it."""
    folder = tmp_path_factory.mktemp("teacher")
    done = commands.run(folder, "run", "denoiser_debug", "--out", "runs/denoiser_debug")
    assert done.code == 0, done.err
    return folder


@pytest.fixture
def here(teacher, tmp_path):
    """A fresh folder with a copy of the teacher's run."""
    folder = tmp_path / "here"
    shutil.copytree(teacher / "runs", folder / "runs")
    return folder


def everything(folder):
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def refused(folder, *arguments, code=2, **environment):
    """The one line of a command that fails and writes nothing."""
    before = everything(folder)
    done = commands.run(folder, *arguments, **environment)
    assert done.code == code, done
    assert done.out == ""
    assert done.line.startswith("diffrep: ") and "Traceback" not in done.err
    assert everything(folder) == before
    return done.line


# What the user types


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["rnu"], "No such command 'rnu'"),
        (["run", "denoiser_digit"], "no recipe 'denoiser_digit'; did you mean 'denoiser_digits'"),
        (["show", "nothing_like_it"], "no recipe 'nothing_like_it'; valid: "),
        (["run"], "Missing argument"),
        (["run", "denoiser_debug", "--no-such"], "No such option"),
        (["run", "denoiser_debug", "--set", "optim.lr=-1"], "optim.lr = -1: Input should be greater than 0"),
        (["run", "denoiser_debug", "--set", "optm.lr=1"], "unknown key 'optm'; did you mean 'optim'"),
        (["run", "denoiser_debug", "--set", "optim.lr=fast"], "optim.lr = 'fast'"),
        (["run", "denoiser_debug", "--set", "optim.lr"], "write it as a.b=value"),
        (["run", "denoiser_debug", "--set", "format=2"], "the recipe is of format 2; this diffrep reads format 1"),
        (["run", "denoiser_debug", "--set", "data.source=digitz"], "no kind 'digitz'; did you mean 'digits'"),
        (["run", "denoiser_debug", "--seeds", "0,1"], "--seeds, --jobs and --record are for studies"),
        (["run", "quickstart_debug", "--seeds", "0;1"], "--seeds takes whole numbers"),
        (["run", "denoiser_debug", "--jobs", "2"], "is one run"),
        (["run", "nowhere.yaml"], "recipe nowhere.yaml cannot be read: No such file"),
        (["run", "denoiser_debug", "--set", "train.batch_size=0"], "train.batch_size = 0"),
        (["run", "denoiser_debug", "--set", "optim.group_lr={polcy: 2}"], "the method has no part 'polcy'"),
        (["run", "denoiser_debug", "--set", "train.track=[wandb]"], "'wandb' is not installed"),
        (["run", "denoiser_debug", "--set", "evaluate.num_sampling_steps='2000'"], "num_sampling_steps '2000'"),
        (["run", "finetune_debug", "--set", "evaluate.probe_labels=[5000]"], "the split has 1078 labelled images"),
        (["run", "finetune_debug", "--set", "method.student.name=resnt18"], "student 'resnt18' is no timm model"),
        (["run", "finetune_debug", "--set", "method.init=runs/none"], "runs/none is no finished run"),
        (["run", "finetune_debug", "--set", "data.source=folder:none"], "none does not exist"),
        (["run", "repfusion_debug", "--set", "method.teacher=none"], "neither a folder here nor a Hub id"),
        (["run", "repfusion_debug", "--set", "method.timestep.values=[5,1000]"], "1000 is outside 0..999"),
        (["features", "nowhere", "--data", "digits"], "neither a folder here nor a Hub id"),
        (["probe", "runs", "--data", "digits"], "runs is no diffusers folder"),
        (["evaluate", "runs", "--data", "digits"], "runs holds no student"),
        (["evaluate", "no_such_net", "--data", "digits"], "student 'no_such_net' is no timm model"),
        (["features", "runs/denoiser_debug", "--data", "digits", "--timesteps", "0,x"], "--timesteps takes whole"),
        (["features", "runs/denoiser_debug", "--data", "digits", "--timesteps", "1000"], "1000 is outside 0..999"),
        (["data", "check", "cifar10", "none"], "none"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_one_line_and_exit_2(teacher, arguments, words):
    assert words in refused(teacher, *arguments)


def test_fp16_and_a_taken_folder_are_refused_before_anything_is_written(here):
    fp16 = ["--set", "train.precision=fp16"]
    assert "needs a GPU" in refused(here, "run", "denoiser_debug", *fp16, CUDA_VISIBLE_DEVICES="")
    (here / "mine").mkdir()
    (here / "mine" / "thesis.txt").write_text("")
    done = commands.run(here, "run", "denoiser_debug", "--out", "mine")
    assert done.code == 2 and "mine is not empty and holds no run" in done.line
    assert {p.name for p in (here / "mine").iterdir()} <= {"thesis.txt", ".lock"}
    assert "a file is in its way" in refused(here, "run", "denoiser_debug", "--out", "mine/thesis.txt")


# What only loading can show


@pytest.mark.parametrize(
    "arguments",
    [
        ["features", "runs/denoiser_debug", "--data", "digits", "--taps", "mid_blok", "--out", "new"],
        ["probe", "runs/denoiser_debug", "--data", "digits", "--taps", "mid_blok", "--out", "new"],
        ["run", "repfusion_debug", "--set", "method.tap=mid_blok", "--out", "new"],
    ],
    ids=lambda value: value[0],
)
def test_an_unknown_tap_names_the_near_ones_and_nothing_is_written(teacher, arguments):
    assert "tap 'mid_blok' does not exist in UNet2DModel; did you mean 'mid_block" in refused(teacher, *arguments)


RUN_WITH_TEACHER = ("run", "repfusion_debug", "--set", "method.teacher=runs/denoiser_debug", "--out", "new")


def test_a_damaged_teacher_is_named(here):
    weights = here / WEIGHTS
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert "diffusion_pytorch_model.safetensors is corrupt or truncated" in refused(here, *RUN_WITH_TEACHER)
    (here / PIPELINE / "config.json").write_text('{"_class_name": "UN')
    assert "config.json is not readable JSON" in refused(here, *RUN_WITH_TEACHER)
    (here / "runs/denoiser_debug/result.json").unlink()
    assert "is a run that has not finished (no result.json)" in refused(here, *RUN_WITH_TEACHER)
    shutil.rmtree(here / "runs/denoiser_debug")
    (here / "runs/denoiser_debug").mkdir()
    assert "no diffusers folder: no unet/config.json" in refused(here, *RUN_WITH_TEACHER)


def test_a_teacher_without_weights_is_one_line(here):
    (here / WEIGHTS).unlink()
    assert "cannot be loaded" in refused(here, *RUN_WITH_TEACHER)


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("pickle_was_run",)


def test_a_pickle_as_teacher_is_refused_and_not_run(here):
    (here / WEIGHTS).unlink()
    (here / PIPELINE / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps({"conv_in.weight": Malicious()}))
    before = everything(here)
    done = commands.run(here, *RUN_WITH_TEACHER)
    assert done.code == 2 and "pipeline: its weights cannot be loaded" in done.err.splitlines()[-1]
    assert not (here / "pickle_was_run").exists() and everything(here) == before


def test_a_pickle_as_teacher_is_one_line(here):
    (here / WEIGHTS).unlink()
    (here / PIPELINE / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps({"conv_in.weight": Malicious()}))
    refused(here, *RUN_WITH_TEACHER)


def test_foreign_code_needs_a_word(here):
    (here / "theirs.py").write_text("import os\nos.mkdir('code_was_run')\n")
    line = refused(here, "run", "repfusion_debug", "--set", "method.teacher=python:theirs:make")
    assert line.endswith("'python:theirs:make' runs foreign code; if you trust it, say --allow-code")
    refused(here, "features", "python:theirs:make", "--data", "digits")
    assert not (here / "code_was_run").exists()


def test_a_damaged_checkpoint_is_named_and_the_one_before_goes_on(here):
    (here / "small.yaml").write_text(f"base: denoiser_debug\ntrain: {SMALL}\n")
    command = commands.Command(here, "run", "small.yaml", "--out", "run", "--set", "train.steps=200")
    command.until(lambda: (here / "run/checkpoints/step-00000005").exists())
    command.send(signal.SIGINT)
    assert command.wait().code == 130
    last = sorted((here / "run/checkpoints").glob("step-*"))[-1]
    state = last / "state.safetensors"
    state.write_bytes(state.read_bytes()[:1000])
    metrics = (here / "run/metrics.jsonl").read_bytes()
    done = commands.run(here, "run", "small.yaml", "--out", "run", "--set", "train.steps=200")
    assert done.code == 2 and f"run/checkpoints/{last.name} is corrupt or truncated" in done.line
    assert (here / "run/metrics.jsonl").read_bytes() == metrics
    shutil.rmtree(last)  # as the line says
    command = commands.Command(here, "run", "small.yaml", "--out", "run", "--set", "train.steps=200")
    command.until(lambda: last.exists())
    command.send(signal.SIGKILL)
    command.wait()


# Images


def folder_of_images(root, count=12, broken=()):
    for k in range(count):
        file = root / ("cat" if k % 2 else "dog") / f"{k:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(k).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file)
        if k in broken:
            file.write_bytes(file.read_bytes()[:40])


ON_FOLDER = ("run", "finetune_debug", "--set", "data.source=folder:images", "--set", "data.labels=null")
ON_FOLDER += ("--set", "data.labelled_share=null", "--set", "evaluate.probe_labels=[]", "--out", "new")


def test_an_unreadable_image_is_an_error_or_left_out_as_asked(here):
    folder_of_images(here / "images", 30, broken=(4,))
    line = refused(here, *ON_FOLDER)
    assert "image 'dog/04.png' is unreadable" in line and "data.unreadable=skip" in line
    done = commands.run(here, *ON_FOLDER, "--set", "data.unreadable=skip", "--json")
    assert done.code == 0, done.err
    data = json.loads(done.out)["data"]
    assert data["skipped"] + data["train_images"] + data["test_images"] <= 30
    assert json.loads((here / "new/result.json").read_text())["data"] == data


def test_an_empty_folder_and_other_sizes_are_named(here):
    (here / "images").mkdir()
    assert "images: holds no images" in refused(here, *ON_FOLDER)
    folder_of_images(here / "images")
    Image.new("RGB", (16, 8)).save(here / "images/cat/wide.png")
    assert "set data.image_size" in refused(here, *ON_FOLDER)


def test_one_class_teaches_nothing_to_tell_apart(here):
    folder_of_images(here / "images", 30)
    for file in (here / "images/dog").iterdir():
        file.rename(here / "images/cat" / file.name)
    (here / "images/dog").rmdir()
    assert "folder:images has one class, 'cat'; student learns to tell two or more apart" in refused(here, *ON_FOLDER)
    assert not (here / "new").exists()


def test_a_label_out_of_range_is_named(here):
    png = here / "one.png"
    Image.new("RGB", (8, 8)).save(png)
    images = [{"bytes": png.read_bytes(), "path": None}] * 4
    pa.parquet.write_table(pa.table({"image": images, "label": [0, 1, -7, 1]}), here / "train.parquet")
    line = refused(here, "run", "denoiser_debug", "--set", "data.source=parquet:train.parquet")
    assert "has label -7; valid: 0 to 1, or -1 = hidden" in line


# The machine


@pytest.mark.parametrize("limit", [3_000, 60_000], ids=["first files", "weights"])
def test_a_full_disk_stops_in_order_and_the_same_command_goes_on(here, limit):
    """The kernel refuses files above ``limit`` bytes, as a full disk refuses all."""
    arguments = ("run", "denoiser_debug", "--out", "run")
    done = commands.run(here, *arguments, TEST_FILE_LIMIT=str(limit))
    assert done.code == 3, done
    assert "cannot write run" in done.line and "File too large" in done.line and "free some space" in done.line
    left = [p.name for p in (here / "run").rglob("*") if p.name.startswith(".") and p.name != ".lock"]
    assert left == []
    assert not (here / "run/result.json").exists()
    done = commands.run(here, *arguments)
    assert done.code == 0, done.err
    assert (here / "run" / "metrics.jsonl").read_text().count("\n") == 2
    assert (here / "run/pipeline/unet/diffusion_pytorch_model.safetensors").read_bytes() == (
        here / WEIGHTS
    ).read_bytes()


def test_a_full_disk_while_writing_features(here):
    arguments = ("features", "runs/denoiser_debug", "--data", "digits", "--pool", "1", "--out", "kept")
    done = commands.run(here, *arguments, TEST_FILE_LIMIT="20000")
    assert done.code == 3 and "cannot write kept" in done.line
    assert not (here / "kept/manifest.json").exists()
    done = commands.run(here, *arguments)
    assert done.code == 0, done.err
    assert (here / "kept/manifest.json").exists()


def test_a_loss_that_is_not_finite_names_step_term_and_checkpoint(here):
    changes = ("--set", "optim.lr=1e30", "--set", "train.steps=6", "--set", "train.clip_norm=null")
    done = commands.run(here, "run", "denoiser_debug", *changes, "--set", "optim.name=sgd", "--out", "run")
    assert done.code == 3
    assert " at step " in done.line and ("the last good checkpoint is run/checkpoints/step-" in done.line)
    assert not (here / "run/result.json").exists()


def test_a_reader_that_goes_away_is_no_error(here):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "diffrep", "recipes"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


def test_our_own_fault_is_one_line_too_and_debug_shows_where(here):
    (here / "broken.py").write_text(
        "from diffrep import api\n\ndef break_it():\n    def show(*_):\n"
        "        raise KeyError('a fault\\nof two lines')\n    api.show = show\n"
    )
    arguments = ("show", "denoiser_debug")
    done = commands.run(here, *arguments, TEST_PREPARE="broken:break_it")
    assert done.code == 1 and "a fault of ours: KeyError" in done.line and "(--debug shows where)" in done.line
    done = commands.run(here, *arguments, "--debug", TEST_PREPARE="broken:break_it")
    assert done.code == 1 and "Traceback" in done.err and "broken.py" in done.err


def test_debug_shows_where_the_input_was_refused(here):
    done = commands.run(here, "--debug", "run", "nothing")
    assert "Traceback" in done.err and "no recipe 'nothing'" in done.err and done.code != 0


# What works


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["recipes", "--json"], lambda found: any(row["name"] == "quickstart" for row in found)),
        (["assets", "--json"], lambda found: all({"key", "licence"} <= asset.keys() for asset in found)),
        (["doctor", "--json"], lambda found: found["packages"]["torch"] and found["free_bytes"] > 0),
        (["run", "denoiser_debug", "--dry-run", "--json"], lambda found: found["images"] == 16),
        (["run", "runs/denoiser_debug/recipe.yaml", "--out", "runs/denoiser_debug", "--json"],
         lambda found: found["name"] == "denoiser_debug"),
        (["evaluate", "conv_small", "--data", "digits", "--labels", "20", "--json"],
         lambda found: {"linear_probe_20", "knn_20", "test_images"} <= found.keys()),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_json_is_for_programs(teacher, arguments, expected):
    done = commands.run(teacher, *arguments)
    assert done.code == 0, done.err
    assert expected(json.loads(done.out))


def test_features_and_probe_answer_in_json(here):
    done = commands.run(here, "features", "runs/denoiser_debug", "--data", "digits", "--pool", "1", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["shapes"] == {"mid_block": [16, 1, 1]}
    done = commands.run(
        here, "probe", "runs/denoiser_debug", "--data", "digits", "--timesteps", "0", "--labels", "20", "--draws", "2",
        "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert [row["tap"] for row in json.loads(done.out)] == ["pixels", "mid_block"]
    taps = commands.run(here, "features", "runs/denoiser_debug", "--data", "digits", "--list-taps")
    assert taps.code == 0 and "up_blocks.1" in taps.out


SLOW_STUDY = pytest.param("quickstart_debug", marks=pytest.mark.slow)


@pytest.mark.parametrize("recipe", ["denoiser_debug", "repfusion_debug", SLOW_STUDY])
def test_a_dry_run_writes_nothing(teacher, recipe):
    before = everything(teacher)
    done = commands.run(teacher, "run", recipe, "--dry-run")
    assert done.code == 0, done.err
    assert "multiply-adds" in done.out and done.out.startswith("kind:")
    assert everything(teacher) == before


def test_a_dry_run_of_no_steps_and_of_one(teacher):
    for steps in (0, 1):
        more = ("--set", f"train.steps={steps}", "--set", "optim.lr_schedule.name=polynomial", "--json")
        done = commands.run(teacher, "run", "denoiser_debug", "--dry-run", *more)
        assert done.code == 0 and json.loads(done.out)["images"] == 8 * steps, done.err


def test_a_costly_step_is_timed_on_a_share_of_its_batch(monkeypatch):
    """A published batch may take a CPU many minutes, and more memory than there is."""
    recipe = load("denoiser_debug")
    whole = assemble.estimate(recipe)
    per_image = whole["multiply_adds"] // whole["images"]
    monkeypatch.setattr(assemble.torch.cuda, "is_available", lambda: False)
    for budget, expected in ((3 * per_image, 3), (1, 2)):  # batch norm refuses a single image
        monkeypatch.setattr(assemble, "TIMED_MULTIPLY_ADDS", budget)
        share = assemble.estimate(recipe)
        assert (whole["timed_images"], share["timed_images"], share["batch_size"]) == (8, expected, 8)
        assert {k: share[k] for k in ("images", "multiply_adds")} == {k: whole[k] for k in ("images", "multiply_adds")}
    assert "steps of 2 of 8 images, as is memory" in words.cost("", share) and "whole steps" in words.cost("", whole)


def test_what_is_terminated_leaves_nothing_aside(tmp_path):
    """SIGTERM ends a command as Ctrl-C does: half of 30,000 merged masks does not stay behind."""
    faces, count = tmp_path / "here/faces", 600
    (faces / "CelebA-HQ-img").mkdir(parents=True)
    (faces / "CelebAMask-HQ-mask-anno/0").mkdir(parents=True)
    Image.fromarray(np.full((512, 512), 255, np.uint8)).save(tmp_path / "skin.png")
    for k in range(count):
        (faces / f"CelebA-HQ-img/{k}.jpg").write_bytes(b"not looked at")
        os.link(tmp_path / "skin.png", faces / f"CelebAMask-HQ-mask-anno/0/{k:05d}_skin.png")
    rows = "".join(f"{k} {k} {k + 1}.jpg\n" for k in range(count))
    (faces / "CelebA-HQ-to-CelebA-mapping.txt").write_text(rows)
    command = commands.Command(tmp_path / "here", "data", "prepare", "celebamask-hq", "faces", "out/masks")
    command.until(lambda: any((tmp_path / "here/out").glob(".*/mask-repfusion/*.png")))
    command.send(signal.SIGTERM)
    done = command.wait()
    assert (done.code, done.line) == (130, "interrupted")
    assert list((tmp_path / "here/out").iterdir()) == []


def test_what_show_prints_can_be_run(here):
    shown = commands.run(here, "show", "denoiser_debug")
    assert shown.code == 0
    (here / "mine.yaml").write_text(shown.out)
    done = commands.run(here, "run", "mine.yaml")
    assert done.code == 0, done.err
    (folder,) = (here / "runs").glob("denoiser_debug-s0-*")
    assert f"run folder: runs/{folder.name}" in done.out
    assert (folder / "recipe.yaml").read_text() == shown.out
    from diffrep.recipes import RECIPES

    assert shown.out == to_yaml(RECIPES["denoiser_debug"]())


def test_version():
    done = subprocess.run([sys.executable, "-m", "diffrep", "--version"], capture_output=True, text=True)
    from diffrep import __version__

    assert (done.returncode, done.stdout.strip()) == (0, __version__)
