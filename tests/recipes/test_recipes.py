"""Recipes as values, files and overrides, and the line a wrong one prints: pytest tests/recipes/test_recipes.py"""

import json
import time
from pathlib import Path

import numpy
import pytest
import torch
import yaml
from official_files import guided_unet, saved, tiny_dit
from pydantic import ValidationError

from diffrep import dense
from diffrep.assemble import METHODS
from diffrep.data.batch import Batch
from diffrep.data.transforms import augmentation
from diffrep.diffusion.masking import masked_after
from diffrep.diffusion.selection import TimestepConfig
from diffrep.errors import UserError
from diffrep.frozen.answers import store_settings
from diffrep.frozen.classifier import ClassifierConfig, load_classifier
from diffrep.frozen.generator import DiffusionGenerator
from diffrep.frozen.teachers import load_teacher
from diffrep.methods.base import save_student
from diffrep.methods.synthesis import Synthesis
from diffrep.methods.token_predictor import mage_counts
from diffrep.models.masked_vit import TransformerConfig
from diffrep.models.students import Student, StudentConfig
from diffrep.randomness import Rows
from diffrep.recipes import RECIPES, dmkd_cifar10, dmkd_rows, quickstart
from diffrep.recipes.base import Recipe, Study, recipe_hash, references, replace_strings, to_yaml
from diffrep.recipes.loading import MAX_FILE_BYTES, load, merged

EVERY = pytest.mark.parametrize("name", sorted(RECIPES))


def stages(task):
    return dict(task.stages) if isinstance(task, Study) else {task.name: task}


ALL_STAGES = [(name, stage) for name, make in sorted(RECIPES.items()) for stage in stages(make())]


def file(tmp_path, text, name="mine.yaml"):
    path = tmp_path / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


def refused(reference, *overrides, **options):
    with pytest.raises(UserError) as caught:
        load(str(reference), overrides, **options)
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and len(message) < 1000
    return message


# What is shipped


@EVERY
def test_a_recipes_name_is_its_functions_name(name):
    task = RECIPES[name]()
    assert task.name == name and task.about
    assert type(task).model_validate(task.model_dump()) == task  # model_copy checks nothing: do it here


@EVERY
@pytest.mark.parametrize("suffix", [".yaml", ".yml", ".json"])
def test_files_and_values_are_two_spellings(name, suffix, tmp_path):
    task = RECIPES[name]()
    text = json.dumps(task.model_dump(mode="json"), indent="\t") if suffix == ".json" else to_yaml(task)
    again = load(file(tmp_path, text, "copy" + suffix))
    assert again == task == load(name) and recipe_hash(again) == recipe_hash(task)
    assert to_yaml(again) == to_yaml(task)


@pytest.mark.parametrize("name, stage", ALL_STAGES)
def test_every_stage_builds_and_takes_a_step(pipeline, token_networks, name, stage):
    """With something small and untrained in place of what was trained before, and nothing that an earlier run left."""
    task = stages(RECIPES[name]())[stage]
    if task.kind == "recipe":
        names = {"tokenizer": token_networks, "token_predictor": token_networks}
        method = {k: v for k, v in names.items() if k in type(task.method).model_fields}
        task = task.model_copy(update={"method": task.method.model_copy(update=method)})
    TRIALS[task.kind](task, pipeline)


def learns(task, pipeline):
    """Images of 224 pixels are tried at 32, which ImageNet's networks take as well."""
    if task.method.kind in NARROW:
        learns_pixels_points_or_objects(task, pipeline)
        return
    student = getattr(task.method, "student", None)
    told = f"{task.data.source} {student and student.name}"
    tokens = isinstance(getattr(task.method, "network", None), TransformerConfig)  # 16 of 2x2 pixels stand in
    size = 32 if not tokens and (task.data.image_size or "cifar" in told or "imagenet" in told) else 8
    assert augmentation(task.data.augment).reach < size
    changes = {"teacher": teacher_of(task, pipeline, size), "features": None, "init": None, "answers": None}
    changes |= {"student": small_vit(student, size)} if getattr(student, "name", "").startswith("vit_") else {}
    changes |= in_place_of_stages(task.method)
    changes |= {"network": TransformerConfig(embed_dim=48, depth=1)} if tokens and task.data.image_size else {}
    changes |= {"taps": ("mid_block", "up_blocks.1")} if task.method.kind == "mixing" else {}  # of the small network
    changes |= {"taps": ("up_blocks.0", "up_blocks.1")} if task.method.kind == "clean_input" else {}
    method = task.method.model_copy(update={k: v for k, v in changes.items() if k in type(task.method).model_fields})
    built = METHODS[method.kind](method, 10, size).train()
    count = 3 if getattr(task.method, "loss", None) == "rkd" else 2  # relations are among three
    built.check_data("", task.data.augment, count)  # crd makes room for as many images
    images = torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))
    shown = Batch(images, torch.arange(count), torch.arange(count), torch.zeros(count, dtype=torch.int64))
    loss = built(shown, Rows(torch.Generator().manual_seed(0), count), 0.0)["loss"]
    loss.backward()
    assert torch.isfinite(loss) and any(p.grad is not None and p.grad.any() for p in built.parameters())
    unknown = set(task.optim.group_lr) - set(built.parameter_groups())
    assert not unknown, unknown


def learns_pixels_points_or_objects(task, pipeline):
    """On canvases of digits, 64 pixels of them; a ViT keeps its depth, for its blocks are read, and loses its width."""
    config, side = task.method, 64
    views = config.views.model_copy(update=NARROW[config.kind](config.views, side))
    student = config.student
    if student.name.startswith("vit_"):
        narrow = {"img_size": side, "embed_dim": 48, "num_heads": 3}
        student = student.model_copy(update={"options": student.options | narrow})
    small = {"views": views, "student": student, "init": None, "init_skip": ()}
    method = type(config).model_validate(config.model_copy(update=small).model_dump())
    data = task.data.model_copy(update={"source": "placed:digits", "only_part": None, "labels": 4})
    train = task.train.model_copy(update={"batch_size": 2})
    trial = task.model_copy(update={"data": data, "method": method, "train": train})
    parts = dense.assembled(trial, torch.device("cpu"))
    loss = parts.method.train()(parts.feed.batch(0, [0, 1], torch.device("cpu")), None, 0.0)["loss"]
    loss.backward()
    assert torch.isfinite(loss) and any(p.grad is not None and p.grad.any() for p in parts.method.parameters())
    assert set(task.optim.group_lr) <= set(parts.method.parameter_groups())


NARROW = {
    "segment": lambda views, side: {"base": (side, side), "crop": side, "window": side, "stride": side},
    "landmark": lambda views, side: {"size": side},
    "detect": lambda views, side: {"size": side},
}


def small_vit(student, size):
    """The same for images of another size, with one block in the place of many."""
    return student.model_copy(update={"options": student.options | {"img_size": size, "depth": 1}})


def in_place_of_stages(method):
    """What a probe would have found, and a tap of the small network for that of a learned mix."""
    found = {}
    if getattr(getattr(method, "timestep", None), "select", "") == "probed":
        found["timestep"] = TimestepConfig(select="fixed", values=(50,))
    return found | ({"tap": "up_blocks.1"} if getattr(method, "tap", "") == "descriptor" else {})


def teacher_of(task, pipeline, size):
    if task.method.kind == "dmkd":
        return JUDGE
    place, _, said = str(getattr(task.method, "teacher", "")).partition("?")
    if place.startswith("classifier:"):
        return f"classifier:{classifier_run(pipeline().parent / 'classifier')}"
    if str(getattr(task.method, "tap", "")).startswith("network.blocks"):
        return f"{encoder_run(pipeline().parent / 'encoder')}?image_size={size}"
    if Path(place).name in OFFICIAL:
        return f"{saved(OFFICIAL[Path(place).name](), pipeline().parent / Path(place).name)}?{said}"
    if str(getattr(task.method, "tap", "")).startswith("middle_block"):
        said = f"image_size={size}&head_width=16&attention_order=new&noise_schedule=cosine"
        return f"{saved(guided_unet(image_size=size), pipeline().parent / f'adm_{size}.pt')}?{said}"
    return diffusion_of(pipeline, size)


OFFICIAL = {"tiny_adm.pt": guided_unet, "tiny_dit.pt": tiny_dit}


def classifier_run(folder):
    """What a finished fine-tuning of ResNet-20 leaves, untrained."""
    if not (folder / "result.json").exists():
        folder.mkdir()
        student = Student(StudentConfig(name="resnet20_cifar"), 10)
        student.try_out(32)
        save_student(folder, student)
        (folder / "result.json").write_text("{}")
    return folder


def encoder_run(folder):
    """A ViT of four blocks for 8-pixel images as a run of ours leaves it, untrained."""
    if not (folder / "result.json").exists():
        folder.mkdir()
        options = {"img_size": 8, "patch_size": 2, "embed_dim": 16, "depth": 4, "num_heads": 2}
        save_student(folder, Student(StudentConfig(name="vit_base_patch16_224", options=options)))
        (folder / "result.json").write_text("{}")
    return folder


def diffusion_of(pipeline, size):
    return str(pipeline(image_size=size, in_channels=1 if size == 8 else 3, mid_attention=True))


JUDGE = ClassifierConfig(
    reference="random:timm:conv_small",
    options={"widths": [4, 8], "pool": 1},
    num_classes=10,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
)


def has_taps(task, pipeline):
    part = task.features if task.kind == "features" else task.sweep
    network = load_teacher(diffusion_of(pipeline, 32 if "cifar" in task.data.source else 8))
    assert all(len(network.tap(tap).shape) == 3 for tap in part.taps)
    assert max(part.timesteps, default=0) < network.num_train_timesteps


def draws(task, pipeline):
    """The set opens with a generator of as many classes: its plan is whole and even, and an image comes out of it."""
    config = task.synthesis
    if task.generator == dmkd_cifar10.GENERATOR:  # knows no classes
        folder = pipeline(in_channels=3)
    else:
        classes = len(config.class_names or ()) or (1000 if task.generator == dmkd_rows.DIT else 10)
        folder = pipeline(num_classes=classes, conditional=True, in_channels=3)
    generator = DiffusionGenerator(load_teacher(str(folder)))
    opened = Synthesis(generator, config, task.seed, allow_code=False)
    counts = numpy.unique(opened.plan[:, 0], return_counts=True)[1]
    assert counts.sum() == len(opened.plan) == config.total and counts.max() - counts.min() <= 1
    assert sum(len(opened.rows(number)) for number in range(opened.num_shards)) == config.total
    assert opened.calls_per_image() >= int(config.sampling.num_sampling_steps) * (1 + config.sampling.is_guided)
    last = opened.slots(range(len(opened.plan) - 1, len(opened.plan)))
    few = config.sampling.model_copy(update={"num_sampling_steps": "2"})
    image = generator.sample(opened.labels(last), [task.seed], few)
    assert image.shape == (1, 3, 8, 8) and image.isfinite().all()


def is_answered(task, pipeline):
    judge = load_classifier(JUDGE)
    views = augmentation(task.data.augment).num_views
    settings = store_settings(judge, task.answers, 4, views, {})
    assert settings["num_views"] == views and settings["num_classes"] == 10
    assert judge.logits(torch.rand(4, 3, 8, 8)).shape == (4, 10)


def makes_images(task, pipeline):
    """As many steps as asked for fit the 16 tokens of digits; released models have 256."""
    tokens = 256 if task.alternation.steps > 16 or "steps" not in task.alternation.model_fields_set else 16
    counts = (masked_after if task.by == "addp" else mage_counts)(task.alternation, tokens)
    assert len(counts) == task.alternation.steps and counts == sorted(counts, reverse=True)
    assert task.score.features is None or task.reference


TRIALS = {"recipe": learns, "features": has_taps, "probe": has_taps, "synthesis": draws, "answers": is_answered}
TRIALS["generation"] = makes_images


@EVERY
def test_a_study_refers_to_earlier_stages_only(name):
    earlier = set()
    for stage, task in stages(RECIPES[name]()).items():
        assert set(references(task)) <= earlier
        earlier.add(stage)


@pytest.mark.parametrize("name", [n for n in RECIPES if n.endswith("_debug")])
def test_debug_recipes_are_short(name):
    steps = [t.train.steps for t in stages(RECIPES[name]()).values() if t.kind == "recipe"]
    assert max(steps) <= 2


def test_few_label_stages_of_a_study_see_one_number_of_labels():
    """Those of the first road; the second teaches with a classifier that saw all labels, and hides none."""
    study = RECIPES["quickstart"]()
    reading = {n: t for n, t in study.stages.items() if t.kind == "recipe" and t.method.label_readers()}
    first = [task for name, task in reading.items() if name not in quickstart.SECOND_ROAD]
    assert len(first) == 8
    for task in first:
        assert task.data.labels == 50 and task.evaluate.probe_labels == (50,) and task.data.label_seed is None
    assert all(reading[name].data.labels is None for name in quickstart.SECOND_ROAD if name in reading)


# Files


def test_base_lays_a_file_on_a_shipped_recipe(tmp_path):
    mine = load(file(tmp_path, "base: finetune_debug\noptim: {lr: 0.5}\ntrain:\n  steps: 7\n", "My-Try.yaml"))
    shipped = RECIPES["finetune_debug"]()
    assert mine.name == "my_try" and mine.optim.lr == 0.5 and mine.train.steps == 7
    assert mine.optim.weight_decay == shipped.optim.weight_decay and mine.data == shipped.data
    assert load(file(tmp_path, "base: finetune_debug\nname: other\n")).name == "other"


def test_base_lays_a_file_on_a_file_and_stages_on_stages(tmp_path):
    file(tmp_path, "base: quickstart_debug\nseeds: [3]\nstages:\n  teacher: {train: {steps: 1}}\n", "under.yaml")
    mine = load(file(tmp_path, "base: under.yaml\nstages: {teacher: {train: {batch_size: 5}}}\n", "over.yaml"))
    assert mine.name == "over" and mine.seeds == (3,) and list(mine.stages) == list(RECIPES["quickstart"]().stages)
    assert (mine.stages["teacher"].train.steps, mine.stages["teacher"].train.batch_size) == (1, 5)


def test_a_part_of_another_kind_replaces_the_whole_part(tmp_path):
    text = "base: repfusion_digits_conv\nmethod: {kind: finetune, student: {name: conv_small}}\noptim: {group_lr: {}}\n"
    mine = load(file(tmp_path, text))
    assert mine.method.kind == "finetune" and mine.method.student.options == {}
    assert merged({"kind": "a", "x": 1}, {"kind": "b"}) == {"kind": "b"}
    assert merged({"a": {"x": 1, "y": 2}}, {"a": {"y": 3}, "b": None}) == {"a": {"x": 1, "y": 3}, "b": None}


def test_a_base_that_leads_in_a_circle_is_refused(tmp_path):
    file(tmp_path, "base: b.yaml", "a.yaml")
    file(tmp_path, "base: a.yaml", "b.yaml")
    assert "base leads in a circle" in refused(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    "text, words",
    [
        ("base: [1]", "base = [1]: is the name of a recipe, or a file"),
        ('base: "a\\0.yaml"', "is the name of a recipe, or a file"),
        ("base: nowhere.yaml", "nowhere.yaml cannot be read: No such file"),
        ("base: finetune_debgu", "no recipe 'finetune_debgu'; did you mean 'finetune_debug'"),
        ("- 1\n- 2\n", "is a list, not a mapping"),
        ("", "is a NoneType, not a mapping"),
        ("just words", "is a str, not a mapping"),
        ("a: [1", "is not YAML at line 1"),
        ("a: 1\n b: 2", "is not YAML at line 2"),
        ("a: \0", "is not YAML: unacceptable character"),
        (b"\xff\xfe\x00", "is not UTF-8 text"),
        (b"name: caf\xe9", "is not UTF-8 text"),
        ("a: &x {b: 1}\nc: *x\n", "uses YAML aliases (*name)"),
        ("a: !!python/object/apply:os.system ['touch /tmp/diffrep_was_here']", "is not YAML at line 1"),
        ("base: finetune_debug\nseed: 2026-01-01", "seed is a date; write text in quotes"),
        ("base: finetune_debug\nseed: !!binary AAAA", "seed is a bytes"),
        ("base: finetune_debug\nabout: !!set {a, b}", "about is a set"),
        ("base: finetune_debug\nabout: !!timestamp soon", "is not a recipe"),
        ("base: finetune_debug\nabout: !!bool soon", "is not a recipe"),
        (
            "base: finetune_debug\nmethod: {student: {options: {a: .nan}}}",
            "method.student.options.a: nan is no finite number",
        ),
        ("base: finetune_debug\n1: 2", "the key 1 is not plain text"),
        ('base: finetune_debug\n"a\\nb": 2', "the key 'a\\nb' is not plain text"),
        ("base: finetune_debug\nseed: " + "9" * 5000, "is not a recipe: Exceeds the limit"),
        ("base: finetune_debug\nseed: 0x" + "f" * 5000, "seed: an integer of 20000 bits"),
        ('base: finetune_debug\nabout: "\\ud800"', "(a lone surrogate)"),
        ("base: finetune_debug\nseed: '" + "9" * 300 + "'", "seed: a number of 300 digits"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_in_a_line(tmp_path, text, words):
    assert words in refused(file(tmp_path, text))


@pytest.mark.parametrize(
    "text, words",
    [
        ("{", "is not JSON at line 1"),
        ('{"a": 1,\n}', "is not JSON at line 2"),
        ('{"base": "finetune_debug", "seed": NaN}', "seed: nan is no finite number"),
        ('{"base": "finetune_debug", "about": "\\ud800"}', "(a lone surrogate)"),
        ("[1, 2]", "is a list, not a mapping"),
    ],
)
def test_a_json_file_that_is_no_recipe_is_refused_in_a_line(tmp_path, text, words):
    assert words in refused(file(tmp_path, text, "mine.json"))


def test_json_is_read_as_json(tmp_path):
    """Tabs and escaped emoji are JSON, but not YAML to PyYAML."""
    text = '{\n\t"base": "finetune_debug",\n\t"about": "\\ud83d\\ude00"\n}'
    assert load(file(tmp_path, text, "mine.json")).about == "\N{GRINNING FACE}"


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
@pytest.mark.parametrize("opening, closing", [("[", "]"), ('{"a":', "}")])
@pytest.mark.parametrize("depth", [40, 30000])
def test_brackets_without_end_are_refused_at_once(tmp_path, opening, closing, depth, suffix):
    began = time.process_time()
    reference = file(tmp_path, opening * depth + "1" + closing * depth, "deep" + suffix)
    assert "is nested more than 32 deep" in refused(reference)
    assert time.process_time() - began < 3  # PyYAML's parser alone takes minutes


def test_a_bomb_of_aliases_is_refused_at_once(tmp_path):
    lines = ["a0: &a0 [x, x]"] + [f"a{k}: &a{k} [*a{k - 1}, *a{k - 1}, *a{k - 1}]" for k in range(1, 60)]
    assert "uses YAML aliases" in refused(file(tmp_path, "\n".join(lines)))


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    assert "is larger than" in refused(file(tmp_path, "#" * (MAX_FILE_BYTES + 1)))


def test_files_that_are_not_there_or_are_folders(tmp_path):
    assert "cannot be read: No such file or directory" in refused(tmp_path / "nowhere.yaml")
    (tmp_path / "folder.yaml").mkdir()
    assert "cannot be read: Is a directory" in refused(tmp_path / "folder.yaml")


# Overrides


@pytest.mark.parametrize(
    "override, read, value",
    [
        ("optim.lr=1e-4", lambda t: t.optim.lr, 1e-4),
        ("method.student.options.in_chans=3", lambda t: t.method.student.options, {"in_chans": 3}),
        ("method.student.options={}", lambda t: t.method.student.options, {}),
        ("evaluate.probe_labels=[50, 100]", lambda t: t.evaluate.probe_labels, (50, 100)),
        ("optim.group_lr={head: 2, student: 0.1}", lambda t: t.optim.group_lr, {"head": 2, "student": 0.1}),
        ("optim.lr_schedule={name: step, milestones: [0.5]}", lambda t: t.optim.lr_schedule.milestones, (0.5,)),
        ("data.label_seed=null", lambda t: t.data.label_seed, None),
        ("about=a: b", None, None),
        ("about='a: b'", lambda t: t.about, "a: b"),
        (" seed =3", lambda t: t.seed, 3),
        ("published.value=3.5", None, None),
        ("published={value: 3.5, metric: top-1, source: here}", lambda t: t.published.value, 3.5),
    ],
)
def test_overrides_are_typed_values(override, read, value):
    if read is None:
        refused("finetune_debug", override)
    else:
        assert read(load("finetune_debug", [override])) == value


def test_a_mapping_given_to_set_is_taken_whole():
    """Not only its first key: this was a silent loss once."""
    task = load("repfusion_debug", ["method.timestep={select: range, values: [3, 9], entropy_weight: 0.5}"])
    assert (task.method.timestep.select, task.method.timestep.values) == ("range", (3, 9))
    assert task.method.timestep.entropy_weight == 0.5 and task.method.timestep.entropy_until == 0.5


def test_later_overrides_win_and_the_shipped_recipe_stays():
    before = RECIPES["finetune_debug"]()
    assert load("finetune_debug", ["seed=1", "seed=2"]).seed == 2
    assert RECIPES["finetune_debug"]() == before and recipe_hash(load("finetune_debug")) == recipe_hash(before)


def test_overrides_of_a_study_may_begin_with_a_stage():
    study = load("quickstart_debug", ["conv_policy.optim.lr=0.25", "stages.sweep.sweep.pool=1", "seeds=[4, 5]"])
    assert study.stages["conv_policy"].optim.lr == 0.25 and study.stages["sweep"].sweep.pool == 1
    assert study.stages["conv_best"].optim.lr != 0.25 and study.seeds == (4, 5)


# The line a wrong setting prints: path, value, what is legal, the nearest key


@pytest.mark.parametrize(
    "override, words",
    [
        ("optm.lr=1", ["finetune_debug: unknown key 'optm'", "did you mean 'optim'?"]),
        ("optim.lrr=1", ["unknown key 'optim.lrr'", "did you mean 'lr'"]),
        ("method.student.nam=x", ["unknown key 'method.student.nam'", "did you mean 'name'"]),
        ("method.teacher=x", ["unknown key 'method.teacher'", "valid: augment, drop_path, head_first"]),
        ("optim.lr=-1", ["optim.lr = -1: Input should be greater than 0"]),
        ("optim.lr=fast", ["optim.lr = 'fast': Input should be a valid number"]),
        ("optim.lr=.inf", ["--set optim.lr=.inf: inf is no finite number"]),
        ("optim.name=adamm", ["optim.name = 'adamm': Input should be 'adamw', 'adam', 'sgd', 'lars' or 'muon'"]),
        ("train.steps=2.5", ["train.steps = 2.5: Input should be a valid integer"]),
        ("train.steps=[2]", ["train.steps = [2]: Input should be a valid integer"]),
        ("seed=-1", ["seed = -1: Input should be greater than or equal to 0"]),
        ("data=3", ["data = 3"]),
        ("data.source=digit", ["data.source = 'digit'", "did you mean 'digits'?"]),
        ("data.augment=shift:0", ["data.augment = 'shift:0'", "valid:"]),
        ("data.labels=null", ["labelled_share needs labels"]),
        ("optim.base_lr=1", ["give either lr or base_lr"]),
        ("method.kind=finetun", ["method = ", "'repfusion', 'finetune', 'contrastive'"]),
        ("format=2", ["the recipe is of format 2; this diffrep reads format 1"]),
        ("name=Capital", ["name = 'Capital'", "match pattern"]),
        ("name=../../etc", ["name = '../../etc'"]),
        ("kind=stud", ["kind = 'stud'", "valid: recipe, study"]),
        ("train", ["--set train: write it as a.b=value"]),
        ("a..b=1", ["write it as a.b=value"]),
        ("=1", ["write it as a.b=value"]),
        ("seed.x=1", ["--set seed.x=1: there is nothing below 0"]),
        ("evaluate.probe_labels.0=1", ["there is nothing below"]),
        ("seed=[", ["--set seed=[", "is not YAML"]),
        ("seed=*x", ["uses YAML aliases"]),
    ],
)
def test_a_wrong_setting_is_named_in_a_line(override, words):
    message = refused("finetune_debug", override)
    assert all(word in message for word in words), message


def test_the_line_for_a_union_shows_the_path_a_user_would_write():
    message = refused("quickstart_debug", "conv_best.method.timestep.selct=fixed")
    assert "unknown key 'stages.conv_best.method.timestep.selct'; did you mean 'select'?" in message


def test_what_is_missing_is_named(tmp_path):
    assert "optim is missing" in refused(
        file(tmp_path, "name: x\nmethod: {kind: denoiser}\ndata: {source: digits}\ntrain: {steps: 1}")
    )
    several = refused(file(tmp_path, "name: x\nmethdo: 1"))
    assert "unknown key 'methdo'; did you mean 'method'?" in several and "more)" in several


@pytest.mark.parametrize("name", ["repfusion_digts", "", "a\nb", "x" * 300])
def test_an_unknown_recipe_is_refused_with_the_nearest(name):
    with pytest.raises(UserError, match="no recipe") as caught:
        load(name)
    if name == "repfusion_digts":
        assert "did you mean 'repfusion_digits_conv'" in str(caught.value)
    assert "a recipe of yours ends in .yaml or .json" in str(caught.value)


def test_foreign_code_is_refused_before_anything_loads():
    override = "method.teacher=python:no_such_module:make"
    assert "runs foreign code; if you trust it, say --allow-code" in refused("repfusion_debug", override)
    assert load("repfusion_debug", [override], allow_code=True).method.teacher == "python:no_such_module:make"


# Studies


def study(stages_, **changes):
    shared = {"name": "s", "kind": "study", "stages": stages_}
    return Study.model_validate(shared | changes)


def stage(init=None):
    values = RECIPES["finetune_debug"]().model_dump()
    values["method"]["init"] = init
    return values


@pytest.mark.parametrize(
    "stages_, changes, words",
    [
        ({"a": stage("stage:b"), "b": stage()}, {}, "stage 'a' refers to 'stage:b'; earlier stages: none"),
        ({"b": stage(), "a": stage("stage:c")}, {}, "refers to 'stage:c'; earlier stages: b"),
        ({"a": stage("stage:a")}, {}, "refers to 'stage:a'"),
        ({}, {}, "at least 1 item"),
        ({"a": stage()}, {"arms": {"b": "B"}}, "arms names 'b', which is no stage; valid: a"),
        ({"a": stage()}, {"seeds": ()}, "at least 1 item"),
        ({"../../up": stage()}, {}, "match pattern"),
        ({"a/b": stage()}, {}, "match pattern"),
    ],
)
def test_a_study_that_cannot_run_is_refused(stages_, changes, words):
    with pytest.raises(ValidationError, match=words):
        study(stages_, **changes)


def test_references_are_found_and_replaced_also_behind_random():
    task = Recipe.model_validate(stage("stage:first"))
    assert references(task) == ["first"]
    change = {"stage:first": "/runs/first"}
    values = {"a": ["stage:first", "random:stage:first", "stage:firstly"], "b": "on stage:first", "c": 3}
    expected = {"a": ["/runs/first", "random:/runs/first", "stage:firstly"], "b": "on stage:first", "c": 3}
    assert replace_strings(values, change) == expected


# Hashes


def test_a_hash_changes_with_what_can_change_a_result_and_with_nothing_else():
    base = recipe_hash(load("finetune_debug"))
    silent = ["seed=5", "name=other", "about=x", "needs=[a]", "assumed=[b]", "ours=null"]
    assert all(recipe_hash(load("finetune_debug", [o])) == base for o in silent)
    telling = [
        "optim.lr=0.1",
        "train.steps=3",
        "data.labels=60",
        "method.student.options.in_chans=3",
        "data.label_seed=1",
    ]
    hashes = [recipe_hash(load("finetune_debug", [o])) for o in telling]
    assert len({base, *hashes}) == len(telling) + 1 and all(len(h) == 8 for h in hashes)


def test_yaml_can_be_read_by_people():
    text = to_yaml(RECIPES["finetune_debug"]())
    assert text.startswith(("kind: recipe", "format: 1"))
    assert "&" not in text and "!!" not in text
    assert yaml.safe_load(text)["method"]["student"]["name"] == "conv_small"


@pytest.mark.parametrize("override", ["train.steps=yes", "optim.lr=true", "train.precision=no", "data.image_size=off"])
def test_a_truth_value_is_no_number_and_no_word(override):
    with pytest.raises(UserError, match="truth value"):
        load("denoiser_debug", [override])


def test_no_debug_recipe_claims_a_measured_number():
    assert not [name for name, make in RECIPES.items() if name.endswith("_debug") and make().ours]
