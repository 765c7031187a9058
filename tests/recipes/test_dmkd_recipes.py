"""DM-KD's tables as recipes, held against the numbers of its README: pytest tests/recipes/test_dmkd_recipes.py

The numbers are typed from the published tables, not taken from the recipes.
"""

import json
import re

import commands
import pytest
import torch

from diffrep import wordnet, words
from diffrep.data.datasets import DataConfig, load_data
from diffrep.frozen.classifier_sources import built
from diffrep.recipes import RECIPES
from diffrep.recipes.base import Recipe
from diffrep.recipes.dmkd_more import FLOWER_NAMES, IMAGENET100
from diffrep.stages import run_task
from diffrep.studies import instances
from diffrep.training.optim import lr_factor

DMKD = {name: make() for name, make in RECIPES.items() if re.match("dmkd_(cifar100|imagenet|flowers)", name)}
STUDIED = {name: task for name, task in DMKD.items() if isinstance(task, Recipe) and not name.endswith("_debug")}
SETS = {name: task.stages["set"].synthesis for name, task in DMKD.items() if name not in STUDIED and "_set_" in name}


# CIFAR-100, top-1 %

PAIRS = ("rn34_rn18", "vgg11_rn18", "wrn40_2_wrn16_1", "wrn40_2_wrn40_1", "wrn40_2_wrn16_2")
CIFAR100 = {
    "teacher": (78.05, 71.32, 75.83, 75.83, 75.83),
    "labels": (77.10, 77.10, 65.31, 72.19, 73.56),
    "real": (77.87, 75.07, 64.06, 68.58, 70.79),
    "drawn": (76.58, 70.83, 56.29, 65.01, 66.89),
}
RIVALS = {  # of the row "drawn"
    ("DM-KD README", "DeepInv"): (61.32, 54.13, 53.77, 61.33, 61.34),
    ("DM-KD README", "DAFL"): (74.47, 54.16, 20.88, 42.83, 43.70),
    ("DM-KD README", "DFQ"): (77.01, 66.21, 51.27, 54.43, 64.79),
    ("DM-KD README", "FastDFKD"): (74.34, 67.44, 54.02, 63.91, 65.12),
    ("DM-KD README", "One-Image"): (74.56, 68.51, 34.62, 52.39, 54.71),
    ("FastDFKD README", "CMI-500"): (77.04, 70.56, 57.91, 68.88, 68.75),
    ("FastDFKD README", "ZSKT"): (67.74, 54.31, 36.66, 53.60, 54.59),
    ("FastDFKD README", "Fast-2"): (69.76, 62.83, 41.77, 53.15, 57.08),
    ("FastDFKD README", "Fast-5"): (72.82, 65.28, 52.90, 61.80, 63.83),
    ("CMI README", "DFQ"): (77.01, 68.32, 54.77, 62.92, 59.01),
    ("CMI README", "DAFL"): (74.47, 57.29, 22.50, 34.66, 40.00),
    ("CMI README", "ZSKT"): (67.74, 34.72, 30.15, 29.73, 28.44),
}
LATER = {"NAYER": {70.2, 71.2, 71.7}, "FastDFKD,": {67.1, 68.0, 68.3}, "SpaceshipNet": {69.7}, "MAD": {64.1}}
# Parameters with 100 classes, as RepDistiller's and FastDFKD's networks have them.
PARAMETERS = {
    "rn34": 21_328_292,
    "rn18": 11_220_132,
    "vgg11": 9_277_284,
    "wrn40_2": 2_255_156,
    "wrn40_1": 569_780,
    "wrn16_2": 703_284,
    "wrn16_1": 180_916,
}
FILES = {"rn34": "resnet34", "vgg11": "vgg11", "wrn40_2": "wrn40_2"}  # of FastDFKD's download


def published(name):
    return DMKD[name].published.value


def parameters(architecture, classes, **options):
    with torch.device("meta"):
        return sum(p.numel() for p in built(architecture, options, classes).parameters())


def split(pair):
    teacher = next(name for name in FILES if pair.startswith(name + "_"))
    return teacher, pair.removeprefix(teacher + "_")


@pytest.mark.parametrize("column, pair", enumerate(PAIRS))
def test_cifar100_column(column, pair):
    teacher, student = split(pair)
    assert published(f"dmkd_cifar100_{pair}") == CIFAR100["drawn"][column]
    assert published(f"dmkd_cifar100_{pair}_real") == CIFAR100["real"][column]
    assert published(f"dmkd_cifar100_{student}_labels") == CIFAR100["labels"][column]
    assert published(f"dmkd_cifar100_{teacher}_teacher") == CIFAR100["teacher"][column]


@pytest.mark.parametrize("column, pair", enumerate(PAIRS))
def test_cifar100_rivals(column, pair):
    found = DMKD[f"dmkd_cifar100_{pair}"].published.rivals
    for (source, method), values in RIVALS.items():
        (value,) = [r.value for r in found if r.source.startswith(source) and r.method.startswith(method)]
        assert value == values[column], (source, method)
    for method, values in LATER.items():  # known for the last pair alone
        said = {r.value for r in found if r.source.startswith("NAYER") and r.method.startswith(method)}
        assert said == (values if pair == "wrn40_2_wrn16_2" else set())
    later = sum(map(len, LATER.values())) if pair == "wrn40_2_wrn16_2" else 0
    assert len(found) == len(RIVALS) + later


def test_the_rival_that_the_paper_left_out_stands_above_it_in_four_pairs_of_five():
    cmi = [next(r.value for r in DMKD[f"dmkd_cifar100_{p}"].published.rivals if r.method == "CMI-500") for p in PAIRS]
    assert [c > published(f"dmkd_cifar100_{p}") for c, p in zip(cmi, PAIRS, strict=True)].count(True) == 4


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("suffix", ["", "_real"])
def test_cifar100_networks(pair, suffix):
    teacher, student = split(pair)
    method = DMKD[f"dmkd_cifar100_{pair}{suffix}"].method
    assert parameters(method.teacher.architecture, method.teacher.num_classes) == PARAMETERS[teacher]
    assert parameters(method.student.name, method.teacher.num_classes) == PARAMETERS[student]
    assert method.teacher.reference == f"weights/fastdfkd/cifar100_{FILES[teacher]}.pth"
    # Teacher and student look at images with the same figures.
    assert method.teacher.mean == method.student.mean == (0.5071, 0.4867, 0.4408)
    assert method.teacher.std == method.student.std == (0.2675, 0.2565, 0.2761)


def test_repdistillers_own_numbers_stand_beside_the_weak_baseline():
    found = {r.method.split(",")[0]: r.value for r in DMKD["dmkd_cifar100_wrn40_2_wrn16_2_real"].published.rivals}
    assert found == {"KD": 74.92, "CRD": 75.48, "labels": 73.26}
    found = {r.method.split(",")[0]: r.value for r in DMKD["dmkd_cifar100_wrn40_2_wrn40_1_real"].published.rivals}
    assert found == {"KD": 73.54, "CRD": 74.14, "labels": 71.98}
    assert published("dmkd_cifar100_wrn40_2_repdistiller") == 75.61


# ImageNet-1K, top-1 %

AMOUNTS = {"140k": 140_000, "200k": 200_000, "1280k": 1_280_000}
IMAGENET = {
    "rn50": {"140k": 66.74, "200k": 68.63, "1280k": 72.43},
    "rn18": {"140k": 60.10, "200k": 61.61, "1280k": 68.25},
}
IMAGENET_RIVALS = {
    "rn50": {"Places365": 55.74, "BigGAN": 64.00, "DeepInv": 68.00, "FastDFKD": 68.61, "One-Image": 66.20,
             "Generative DFD": 69.75, "256 pixels": 64.96, "1024 pixels": 69.24},
    "rn18": {"Places365": 45.53, "FastDFKD": 53.45, "Generative DFD": 54.66},
}  # fmt: skip
REAL_LABELS = {"rn50": [75.45, 73.59], "rn18": [68.45]}  # FastDFKD's and Azizi's "from scratch"
IMAGENET_PARAMETERS = {"resnet18": 11_689_512, "resnet50": 25_557_032}


@pytest.mark.parametrize("student, amount", [(s, a) for s in IMAGENET for a in AMOUNTS])
def test_imagenet_row(student, amount):
    recipe = DMKD[f"dmkd_imagenet_{student}_{amount}"]
    assert recipe.published.value == IMAGENET[student][amount]
    assert recipe.train.steps == 200 * AMOUNTS[amount] // 256 and recipe.train.batch_size == 256
    assert recipe.method.teacher.reference == "torchvision:resnet18"
    set_name = recipe.data.source.split("/")[-2]
    assert SETS[set_name].total == AMOUNTS[amount]
    found = recipe.published.rivals
    for method, value in IMAGENET_RIVALS[student].items():
        assert [r.value for r in found if r.method.startswith(method)] == [value]
    assert [r.value for r in found if r.method == "real images and labels"] == REAL_LABELS[student]
    assert len(found) == len(IMAGENET_RIVALS[student]) + len(REAL_LABELS[student])


@pytest.mark.parametrize("student, size", IMAGENET_PARAMETERS.items())
def test_imagenet_networks(student, size):
    config = DMKD[f"dmkd_imagenet_{student.replace('resnet', 'rn')}_200k"].method.student
    assert config.name == student and parameters(student, 1000, **config.options) == size
    # The last norm of each block starts at 1, as the official code has it.
    norms = [m for n, m in built(student, config.options, 10).named_modules() if re.fullmatch(r"layer.*\.bn[23]", n)]
    assert norms and all(bool((m.weight == 1).all()) for m in norms)


def test_the_released_script():
    """scripts/imagenet_distill.sh of zhengli97/DM-KD, flag by flag."""
    recipe = DMKD["dmkd_imagenet_rn18_script"]
    assert recipe.train.steps == 78_125 and recipe.train.batch_size == 256
    optim = recipe.optim
    assert (optim.name, optim.lr, optim.momentum, optim.weight_decay, optim.nesterov) == ("sgd", 0.1, 0.9, 1e-4, False)
    loss = recipe.method.loss
    assert (loss.name, loss.kd_temperature, loss.kd_weight, loss.label_weight) == ("kl", 10, 1, 0)
    assert recipe.data.augment.startswith("resized_crop:") and recipe.data.source == "dmkd:data/dmkd/s2_st100_200k.txt"
    assert recipe.published.value is None and "not found" in recipe.published.source


# Others, teacher RN-18, student RN-50, top-1 %

OTHERS = {"imagenet100": (89.6, 84.4, 85.9), "flowers102": (87.9, 81.5, 85.4)}  # teacher, One-Image, DM-KD


@pytest.mark.parametrize(
    "data, suffix", [("imagenet100", ""), ("flowers102", ""), ("flowers102", "_prompt")], ids=lambda x: x or "plain"
)
def test_other_data(data, suffix):
    teacher, one_image, value = OTHERS[data]
    recipe, taught_by = DMKD[f"dmkd_{data}_rn50{suffix}"], f"dmkd_{data}_rn18_teacher"
    assert recipe.published.value == value and published(taught_by) == teacher
    assert [(r.method, r.value) for r in recipe.published.rivals] == [("One-Image", one_image)]
    assert recipe.method.teacher.reference == f"runs/{taught_by}"
    assert (DMKD[taught_by].method.student.name, recipe.method.student.name) == ("resnet18", "resnet50")
    assert recipe.evaluate.source == DMKD[taught_by].data.source


def test_the_hundred_classes_are_those_of_the_common_list():
    ids = [wordnet.official_ids()[k] for k in IMAGENET100]
    assert len(set(ids)) == 100 and ids == sorted(ids) and ids[0] == "n01558993"
    assert {"n02869837", "n01749939", "n02488291", "n02107142"} <= set(ids)  # the file's first lines
    for name in ("dmkd_imagenet100_set_low", "dmkd_imagenet100_set_high"):
        assert SETS[name].classes == IMAGENET100


def test_the_flowers_are_named_in_the_official_order():
    assert len(FLOWER_NAMES) == len(set(FLOWER_NAMES)) == 102
    assert not [name for name in FLOWER_NAMES if name != name.strip() or not name or "\n" in name]
    known = {1: "pink primrose", 30: "sweet william", 50: "common dandelion", 74: "rose", 102: "blackberry lily"}
    assert {n: FLOWER_NAMES[n - 1] for n in known} == known
    assert all(SETS[f"dmkd_flowers102_set_{f}"].class_names == FLOWER_NAMES for f in ("low", "high"))


# Sets

FIDELITY = {"low": ("100", 2.0), "high": ("250", 4.0)}  # T, s


@pytest.mark.parametrize("data", ["cifar100", "imagenet", "imagenet100", "flowers102"])
@pytest.mark.parametrize("fidelity", FIDELITY)
def test_both_fidelities_of_every_data_set(data, fidelity):
    found = SETS[f"dmkd_{data}_set_{fidelity}"]
    steps, scale = FIDELITY[fidelity]
    assert (found.sampling.sampler, found.sampling.num_sampling_steps) == ("ddpm", steps)
    assert found.sampling.guidance_scale == scale and found.noise == "own"
    # Official DiT guides three latent channels of four; a text-to-image pipeline guides by itself.
    assert found.sampling.guided_channels == (None if data == "flowers102" else 3)


@pytest.mark.parametrize("data", ["cifar100", "imagenet", "imagenet100"])
@pytest.mark.parametrize("fidelity", FIDELITY)
def test_faithful_twins_share_their_noise_between_classes_and_differ_in_nothing_else(data, fidelity):
    own, twin = SETS[f"dmkd_{data}_set_{fidelity}"], SETS[f"dmkd_{data}_set_{fidelity}_faithful"]
    assert twin.noise == "shared" and twin.model_copy(update={"noise": "own"}) == own
    assert "one noise for all classes" in RECIPES[f"dmkd_{data}_set_{fidelity}_faithful"]().about


def test_a_smaller_set_is_the_beginning_of_a_larger_one():
    small, large = SETS["dmkd_imagenet_set_low_140k"], SETS["dmkd_imagenet_set_low_1280k"]
    assert small.model_copy(update={"images": large.images}) == large


# What all have in common

COURSES = {  # epochs and batch of every recipe that trains, by what its name has
    "dmkd_cifar100_(?!.*_(real|labels|teacher|repdistiller)$)": (240, 128),
    "dmkd_cifar100_.*_real$": (200, 128),
    "dmkd_cifar100_.*_(labels|teacher)$": (200, 256),
    "dmkd_cifar100_wrn40_2_repdistiller$": (240, 64),
    "dmkd_imagenet_rn(18|50)_[0-9]+k$": (200, 256),
    "dmkd_imagenet_rn18_script$": (100, 256),
    "dmkd_imagenet100_rn18_teacher$": (100, 256),
    "dmkd_(imagenet100|flowers102)_rn50": (200, 256),
    "dmkd_flowers102_rn18_teacher$": (200, 64),
}
REAL_IMAGES = {"cifar100": 50_000, "imagenet100": 128_117, "flowers102": 1_020}


@pytest.mark.parametrize("name", STUDIED)
def test_steps_are_epochs_times_images_by_batch(name):
    ((epochs, batch),) = [course for pattern, course in COURSES.items() if re.match(pattern, name)]
    train, source = STUDIED[name].train, STUDIED[name].data.source
    if source.startswith("dmkd:"):
        images = 200_000
    elif source.startswith("synthetic:"):
        images = SETS[source.split("/")[-2]].total
    else:
        images = REAL_IMAGES[name.split("_")[1]]
    assert train.batch_size == batch and train.steps == round(epochs * images / batch)


@pytest.mark.parametrize("epoch, rate", [(1, 0.1), (30, 0.1), (31, 0.01), (60, 0.01), (61, 0.001), (100, 0.0001)])
def test_the_scripts_rate_falls_after_epochs_30_60_and_90(epoch, rate):
    recipe = DMKD["dmkd_imagenet_rn18_script"]
    per_epoch = recipe.train.steps / 100
    for step in (int((epoch - 1) * per_epoch) + 1, int(epoch * per_epoch) - 1):
        factor = lr_factor(recipe.optim.lr_schedule, step, recipe.train.steps)
        assert recipe.optim.rate(256) * factor == pytest.approx(rate)


@pytest.mark.parametrize("name", STUDIED)
def test_what_the_source_does_not_state_is_said(name):
    recipe = STUDIED[name]
    assert recipe.published.source and recipe.published.metric.startswith("top-1 %") and recipe.assumed
    assert recipe.evaluate.protocol == "classifier" and recipe.evaluate.source


@pytest.mark.parametrize("name", DMKD)
def test_whatever_is_needed_from_another_recipe_has_a_recipe(name):
    task = DMKD[name]
    told = " ".join(task.needs)
    asked = set(re.findall(r"runs/(\w+)", json.dumps(task.model_dump(mode="json", exclude={"needs", "about"}))))
    assert asked == set(re.findall(r"diffrep run (\w+) --out runs/\1\b", told)), "what it reads and what it says"
    for other in asked:
        made = RECIPES[other]()
        assert isinstance(made, Recipe) or list(made.stages) == ["set"]
    for source in re.findall(r"synthetic:runs/\S+", json.dumps(task.model_dump(mode="json"))):
        assert re.fullmatch(r"synthetic:runs/(\w+)/set-s0[\"',]*", source)
    files = set(re.findall(r'"weights/([\w-]+)', json.dumps(task.model_dump(mode="json"))))
    assert all(f"weights/{folder}" in told for folder in files)


# The commands


def test_the_ledger_lists_them_with_rivals_and_stays_narrow(tmp_path):
    done = commands.run(tmp_path, "recipes", "--json")
    assert done.code == 0 and done.err == ""
    rows = {row["name"]: row for row in json.loads(done.out)}
    assert set(DMKD) <= set(rows) and set(rows) == set(RECIPES)
    first = rows["dmkd_cifar100_rn34_rn18"]
    assert first["published"] == "76.58" and {r["method"]: r["value"] for r in first["rivals"]}["CMI-500"] == 77.04
    assert first["status"] == "needs data, weights"
    assert rows["dmkd_imagenet_rn18_script"]["published"] == "not found"
    table, _, notes = words.ledger(list(rows.values())).partition("\n\n")
    assert max(map(len, table.splitlines())) <= 116
    assert "dmkd_cifar100_rn34_rn18: others: CMI-500 77.04, ZSKT 67.74" in notes


@pytest.mark.parametrize(
    "name, missing",
    [
        ("dmkd_imagenet_rn18_200k", "runs/dmkd_imagenet_set_low/set-s0 is no finished synthetic set"),
        ("dmkd_imagenet100_rn18_teacher", "data/imagenet does not exist"),
        ("dmkd_imagenet_set_low", "dit-xl-2-256 is not here: diffrep assets fetch dit-xl-2-256"),
        ("dmkd_flowers102_set_low", "weights/diffusers/stable-diffusion"),
    ],
)
def test_what_is_missing_is_one_line_before_anything_is_written(tmp_path, name, missing):
    done = commands.run(tmp_path, "run", name, "--dry-run")
    assert done.code == 2 and done.out == "" and done.line.startswith("diffrep: ") and missing in done.line
    assert not list(tmp_path.iterdir())


def test_the_small_road_runs_from_end_to_end(tmp_path):
    """Stage by stage in this process, in the folders of a study; tests/test_quickstart.py has the processes."""
    study = RECIPES["dmkd_set_debug"]()
    results = {stage.name: run_task(stage.task, tmp_path / stage.key) for stage in instances(study, tmp_path)}
    assert list(results) == list(study.stages) and set(study.arms) <= set(results)
    # The set stands where the sources of the other recipes look for theirs: STUDY/set-s0.
    images = load_data(DataConfig(source=f"synthetic:{tmp_path / 'set-s0'}"), "train")
    assert len(images) == 18 and results["set"]["images"] == 20  # a tenth is held out
    pupil = results["pupil"]
    assert {"top1", "top5", "agreement", "ece"} <= set(pupil["scores"]) and pupil["steps"] == 2
    behind = {part.partition(":")[0] for part in pupil["labels_behind"]}
    assert behind == {"teacher", "generator"} and not pupil["labels_seen"]
