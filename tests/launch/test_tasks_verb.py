"""``diffrep evaluate RUN --task ...``: an encoder taken to dense tasks: pytest tests/launch/test_tasks_verb.py"""

import json
import sys

import pytest
import torch
import yaml

from diffrep import cli
from diffrep.errors import UserError
from diffrep.frozen.tokens import write_network
from diffrep.methods.base import save_student
from diffrep.models.addp_vit import MEAN, STD, ADDPVit, ADDPVitConfig
from diffrep.models.students import Student, StudentConfig
from diffrep.models.weights import read_weights
from diffrep.randomness import seeded
from diffrep.transfer import plans

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "global_pool": "avg"}
STUDENTS = {
    "conv": StudentConfig(name="resnet10t", options={"stem_width": 8, "channels": [8, 16, 32, 64]}, mean=MEAN, std=STD),
    "vit": StudentConfig(name="vit_base_patch16_224", options=VIT, tap="blocks.1"),
    "deep": StudentConfig(name="vit_base_patch16_224", options=VIT | {"depth": 24, "embed_dim": 8}),
    "cifar": StudentConfig(name="resnet8_cifar"),
    "wide": StudentConfig(name="resnet18_cifar"),
}
PLACED, FACES, POINTS = "placed:digits", "celebamask-hq:data/fixtures/celebamask_hq", "wflw:data/fixtures/wflw"
SMALL = ["train.steps=2", "train.batch_size=2", "train.checkpoint_every=2", "optim.lr_schedule.warmup_steps=1"]
SMALL += ["evaluate.samples=0", "segment.method.views.crop=64", "segment.method.views.base=[64,64]"]
ON_POINTS = ["landmark.method.views.size=64", "landmark.method.views.sigma=1", "landmark.method.select=last"]
ON_POINTS += ["landmark.data.only_part=test"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder beside finished runs of some students, named as in STUDENTS, made when asked for."""
    monkeypatch.chdir(tmp_path)

    def kept(name):
        (tmp_path / name).mkdir()
        with seeded(1, "test"):
            save_student(tmp_path / name, Student(STUDENTS[name], 3))
        (tmp_path / name / "result.json").write_text(json.dumps({"licence": "MIT", "labels_seen": {"student": 5}}))
        return name

    return kept


@pytest.fixture
def fixtures(shared, monkeypatch):
    """Four faces with points, two drawn ones with masks."""
    monkeypatch.setenv("DIFFREP_DATA", str(shared))


@pytest.fixture
def said(monkeypatch, capsys):
    """said(arguments) -> exit code, stdout, stderr of ``diffrep evaluate``."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["diffrep", "evaluate", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, *capsys.readouterr()

    return call


def set_to(overrides):
    return [word for override in overrides for word in ("--set", override)]


# One command


def test_an_encoder_is_taken_to_two_tasks_and_each_is_scored(here, said, tmp_path, fixtures):
    run = here("conv")
    tasks = ["--task", "segment", "--data", FACES, "--task", "landmark", "--data", POINTS]
    code, out, err = said(run, *tasks, *set_to(SMALL + ON_POINTS), "--out", "runs", "--json")
    assert code == 0, err
    first, second = json.loads(out)
    assert (first["task"], second["task"], first["data"]) == ("segment", "landmark", FACES)
    assert {"miou", "pixel_accuracy"} <= first["result"]["scores"].keys() and "nme" in second["result"]["scores"]
    assert first["result"]["notes"][0].startswith("started from conv: matched 90, missing none, left over none")
    assert first["result"]["labels_behind"] == {"before: student": 5} and first["result"]["steps"] == 2
    for place, head in (("segment-celebamask-hq", "bisenet"), ("landmark-wflw", "deconv")):
        recipe = yaml.safe_load((tmp_path / f"runs/{place}/recipe.yaml").read_text())
        assert (recipe["name"], recipe["method"]["init"]) == (f"{place.replace('-', '_')}_conv", "conv")
        assert recipe["method"]["head"] == head and recipe["published"] is None
        assert recipe["method"]["student"] == STUDENTS["conv"].model_dump(mode="json")
        assert len(recipe["assumed"]) == 1 and recipe["assumed"][0].startswith("settings are those of ")


@pytest.fixture
def finished(here, said, fixtures):
    """A finished run of ``segment``, and what it scored."""
    arguments = ["--task", "segment", "--data", FACES, *set_to(SMALL), "--out", "runs", "--json"]
    code, out, err = said(here("conv"), *arguments)
    assert code == 0, err
    return "runs/segment-celebamask-hq", json.loads(out)[0]["result"]["scores"]


def test_a_finished_run_of_the_task_is_scored_as_it_is(finished, said, tmp_path):
    run, scores = finished
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    (tmp_path / "conv").rename(tmp_path / "gone")  # its encoder's place is not needed any more
    code, out, err = said(run, "--task", "segment", "--data", FACES, "--json")
    assert code == 0, err
    found = json.loads(out)[0]
    assert {k: v for k, v in scores.items() if isinstance(v, float)}.items() <= found["scores"].items()
    (tmp_path / "gone").rename(tmp_path / "conv")
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    code, out, err = said(run, "--task", "segment", "--data", FACES)
    assert code == 0 and out.startswith(f"segment on {FACES}\nmiou ") and "test images)" in out
    assert said(run, "--task", "segment", "--data", FACES, "--dry-run")[1].count("only be scored") == 1


def test_a_finished_run_is_no_encoder_for_others_and_knows_its_classes(finished, said):
    run, _ = finished
    code, _, err = said(run, "--task", "landmark", "--data", PLACED)
    assert code == 2 and "is a finished run of the task 'segment', and kept no encoder for 'landmark'" in err
    code, _, err = said(run, "--task", "segment", "--data", PLACED)
    assert code == 2 and err.count("\n") == 1
    assert f"{run} learnt other classes than placed:digits has: 19, not 11" in err
    code, _, err = said(run, "--task", "segment", "--data", f"{FACES}@dataset")
    assert code == 2 and err.endswith("has: class 2 is 'l_brow', not 'nose'\n")  # as many, in the other label order


def test_a_dry_run_says_what_each_would_cost_and_writes_nothing(here, said, tmp_path, fixtures):
    run = here("conv")
    before = sorted(tmp_path.rglob("*"))
    code, out, err = said(run, "--task", "segment", "--data", FACES, *set_to(SMALL), "--dry-run")
    assert code == 0, err
    assert "multiply-adds" in out and "nothing was written" in out and "head: bisenet" in out
    assert sorted(tmp_path.rglob("*")) == before


# Which recipe


def recipe(model, task, *overrides, source=PLACED, **look):
    return plans(model, [(task, source)], overrides, look=look)[0].recipe


def test_a_vit_gets_a_pyramid_and_positions_for_its_crops(here):
    method = recipe(here("vit"), "segment", "segment.method.views.crop=64").method
    assert (method.head, method.views.test, method.student.tap) == ("upernet", "slide", None)
    options = VIT | {"img_size": 64, "drop_path_rate": 0.1}
    assert method.student.options == options and method.student.mean == (0.5, 0.5, 0.5)
    chosen = recipe("vit", "segment", "method.student.options.img_size=128").method.student.options
    assert chosen["img_size"] == 128


def test_a_deep_vit_has_the_settings_of_the_large_one(here):
    found = recipe(here("deep"), "segment")
    assert found.assumed == ("settings are those of segment_ade20k_upernet_vit_l",) and found.optim.layer_decay == 0.8
    assert recipe("deep", "detect").assumed == ("settings are those of detect_coco_vitdet_l",)


def test_a_detector_keeps_the_table_of_pretraining(here):
    method = recipe(here("vit"), "detect").method
    assert method.student.options["img_size"] == 32 and method.init == "vit"


@pytest.mark.parametrize(("name", "doublings"), [("conv", 3), ("wide", 1), ("cifar", 0), ("vit", 1)])
def test_heatmaps_are_a_quarter_of_the_crop_whatever_the_stride(here, name, doublings):
    method = recipe(here(name), "landmark").method
    assert method.deconv == (256,) * doublings and method.backbone_std is None


def test_an_addp_folder_is_an_encoder(tmp_path):
    small = {"embed_dim": 16, "depth": 2, "num_heads": 2, "decoder_depth": 1, "decoder_num_heads": 2}
    network = ADDPVit(ADDPVitConfig(**small, image_size=16, patch_size=4, num_codes=11))
    write_network(tmp_path, "addp", network, "tiny", "MIT")
    method = recipe(str(tmp_path), "segment").method
    wanted = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "pre_norm": False}
    assert wanted.items() <= method.student.options.items() and method.student.mean == MEAN


def test_a_weights_file_is_named_and_hrnet_fuses_bilinearly(tmp_path):
    torch.save({"state_dict": {"student.backbone.conv1.weight": torch.zeros(1)}}, tmp_path / "epoch_200.pth")
    file = str(tmp_path / "epoch_200.pth")
    with pytest.raises(UserError, match="does not say which network it is of; name it: --architecture NAME"):
        recipe(file, "landmark")
    method = recipe(file, "landmark", architecture="hrnet_w18").method
    assert (method.student.name, method.head, method.fuse_upsample) == ("hrnet_w18", "concat", "bilinear")
    assert method.student.mean == MEAN
    grey = recipe(file, "landmark", architecture="resnet18", mean=[0.0] * 3, std=[1.0] * 3).method.student
    assert (grey.mean, grey.std) == ((0.0,) * 3, (1.0,) * 3)


def test_a_setting_may_be_of_one_task(here):
    here("conv")
    tasks = [("segment", PLACED), ("landmark", PLACED)]
    found = plans("conv", tasks, ["train.steps=7", "landmark.train.steps=9", "segment.seed=3"])
    assert [(plan.recipe.train.steps, plan.recipe.seed) for plan in found] == [(7, 3), (9, 0)]
    with pytest.raises(UserError, match=r"--set detect.seed=1: 'detect' is not among the tasks asked for"):
        plans("conv", tasks, ["detect.seed=1"])


# Bad input


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("conv", "--task segmnt --data placed:digits", "--task segmnt: did you mean 'segment'"),
        ("conv", "--task segment --data digits", "--data digits: has no truth for the task 'segment'"),
        ("conv", "--task segment --data wflw:x", "sources that have: celebamask-hq, ade20k, placed"),
        ("conv", "--task detect --data placed:digits", "takes resnet10t: a detector stands on a plain ViT"),
        ("cifar", "--task segment --data placed:digits", "resnet8_cifar has layer1 at 1/1, layer2 at 1/2, layer3 at"),
        ("cifar", "--task segment --data placed:digits", "name four such taps (--set segment.method.maps=[...])"),
        ("conv", "--task segment --data placed:digits --data placed:digits", "1 --task and 2 --data"),
        ("conv", "--task segment --data coco:a --task segment --data coco:a", "the same task on the same set twice"),
        ("conv", "--task segment --data placed:digits --labels 20", "--labels evaluates images as wholes"),
        ("conv", "--data digits --dry-run", "--dry-run belongs to --task"),
        ("conv", "--data digits --set a=1", "--set belongs to --task"),
        ("conv", "--data digits --data digits", "one set at a time"),
        ("conv", "--task segment --data placed:digits --set method.heads=x", "method.heads"),
        (None, "--task segment --data placed:digits", "nowhere does not exist; valid: a finished run"),
    ],
)
def test_what_cannot_be_is_one_line_and_exit_code_two(here, said, tmp_path, name, arguments, words):
    code, out, err = said(here(name) if name else "nowhere", *arguments.split())
    assert code == 2 and not out and words in err and err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_what_is_wrong_with_a_later_task_is_said_before_the_first_runs(here, said, tmp_path):
    tasks = ["--task", "segment", "--data", PLACED, "--task", "landmark", "--data", "wflw:nowhere"]
    code, _, err = said(here("conv"), *tasks, *set_to(SMALL))
    assert code == 2 and "nowhere" in err and not (tmp_path / "runs").exists()


def test_an_unfinished_run_is_refused(here, said, tmp_path):
    (tmp_path / here("conv") / "result.json").unlink()
    code, _, err = said("conv", "--task", "segment", "--data", PLACED)
    assert code == 2 and "is a run that has not finished" in err


def test_the_encoder_is_where_training_begins(here, said, tmp_path, fixtures):
    """With a rate of next to nothing the kept network still holds the run's filters."""
    arguments = ["--task", "segment", "--data", FACES, *set_to(SMALL), "--set", "optim.lr=1e-12", "--out", "runs"]
    assert said(here("conv"), *arguments)[0] == 0
    kept, before = (
        read_weights(tmp_path / place / "weights.safetensors") for place in ("runs/segment-celebamask-hq", "conv")
    )
    name = next(n for n in kept if n.endswith("layer4.0.conv1.weight"))
    torch.testing.assert_close(kept[name], before["layer4.0.conv1.weight"], atol=1e-6, rtol=0)
