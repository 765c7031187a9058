"""What docs/coming-from says is our name for something, exists: pytest tests/test_coming_from.py

Every cell but the first of a row holds names in backquotes: a command, an option, a recipe, a setting with or without a
value, a page or function of the package, a network, a data reference, a file that a run writes. A row without any says
"none", and why.
"""

from __future__ import annotations

import importlib
import re
import typing
from functools import cache
from pathlib import Path

import pytest
import typer

from diffrep import cli
from diffrep.config import Config
from diffrep.data.sources import parse
from diffrep.errors import UserError
from diffrep.models.students import check_name
from diffrep.recipes import RECIPES
from diffrep.recipes.base import AnswerTask, FeatureTask, GenerationTask, Recipe, Study, SweepTask, SynthesisTask
from diffrep.recipes.loading import load

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs" / "coming-from").glob("*.md"))
TASKS = (Recipe, Study, SynthesisTask, AnswerTask, FeatureTask, SweepTask, GenerationTask)
# Something to lay a setting with a value on; of a study, the stage it belongs to.
BASES = (
    *((name, "") for name in ("dmkd_cifar100_debug", "finetune_debug", "repfusion_debug", "denoiser_debug")),
    *(("dmkd_set_debug", f"{stage}.") for stage in ("set", "answers", "pupil")),
)


def rows(page: Path) -> list[list[str]]:
    """The cells of every table's rows, without its head."""
    tables = re.findall(r"(?:^\|.*\|\n)+", page.read_text(), re.MULTILINE)
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for table in tables for line in table.splitlines()[2:]
    ]


def targets(row: list[str]) -> list[str]:
    return [name for cell in row[1:] for name in re.findall(r"`([^`]+)`", cell)]


ROWS = [(page.stem, row) for page in PAGES for row in rows(page)]
TARGETS = sorted({(page, target) for page, row in ROWS for target in targets(row)})


# What a name may be


def is_command(text: str) -> bool:
    """``diffrep VERB ...``: the verb, its options, and the recipe that it runs."""
    if not text.startswith("diffrep "):
        return False
    words, found = text.split()[1:], typer.main.get_command(cli.app)
    while words and words[0] in getattr(found, "commands", {}):
        found = found.commands[words.pop(0)]
    asked = {word for word in words if word.startswith("--")}
    runs = text.split()[1] in ("run", "show")
    return not hasattr(found, "commands") and asked <= options(found) and (not runs or words[0] in RECIPES)


def options(command) -> set[str]:
    return {name for parameter in command.params for name in parameter.opts if name.startswith("-")}


@cache
def all_options() -> set[str]:
    def within(command) -> set[str]:
        inner = getattr(command, "commands", {}).values()
        return options(command).union(*map(within, inner))

    return within(typer.main.get_command(cli.app))


def is_setting(text: str) -> bool:
    """``optim.lr``, or ``synthesis.noise=shared``, which some recipe has to accept."""
    path, equals, _ = text.partition("=")
    if not re.fullmatch(r"[a-z_0-9]+(\.[a-z_0-9]+)*", path) or not any(has(task, path.split(".")) for task in TASKS):
        return False
    return not equals or any(accepts(name, stage + text) for name, stage in BASES)


def has(kind: type[Config], path: list[str]) -> bool:
    """Whether a config has a field of this dotted name; what a mapping holds, nobody knows."""
    field = kind.model_fields.get(path[0])
    if field is None:
        return False
    inner = configs(field.annotation)
    return len(path) == 1 or any(has(config, path[1:]) for config in inner)


def configs(annotation: object) -> list[type[Config]]:
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return [annotation]
    return [config for part in typing.get_args(annotation) for config in configs(part)]


def accepts(recipe: str, override: str) -> bool:
    try:
        load(recipe, [override])
    except UserError:
        return False
    return True


def is_code(text: str) -> bool:
    """``diffrep.module`` or ``diffrep.module.name``."""
    if not re.fullmatch(r"diffrep(\.\w+)+", text):
        return False
    try:
        importlib.import_module(text)
    except ModuleNotFoundError:
        module, _, name = text.rpartition(".")
        return hasattr(importlib.import_module(module), name)
    return True


def is_network(text: str) -> bool:
    try:
        check_name(text)
    except UserError:
        return False
    return True


def is_data(text: str) -> bool:
    try:
        parse(text)
    except UserError:
        return False
    except ValueError:
        return False
    return ":" in text


def is_written(text: str) -> bool:
    """A file whose name stands in the package."""
    is_name = re.fullmatch(r"[\w.-]+\.(json|jsonl|yaml|safetensors|html|npy|tar)", text)
    return bool(is_name) and any(f'"{text}"' in page.read_text() for page in (ROOT / "src").rglob("*.py"))


def exists(text: str) -> bool:
    known = text in RECIPES or text in all_options()
    return known or any(is_one(text) for is_one in (is_command, is_setting, is_code, is_written, is_data, is_network))


@pytest.mark.parametrize("page, target", TARGETS)
def test_what_a_page_names_exists(page, target):
    assert exists(target), f"docs/coming-from/{page}.md names `{target}`, which is nothing of ours"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_every_row_has_an_answer(page):
    for row in rows(page):
        assert targets(row) or any(cell.startswith("none") for cell in row[1:]), row
    assert rows(page)


@pytest.mark.parametrize(
    "wrong",
    [
        "dmkd_cifar100_rn34_rn19",
        "--guidanse",
        "diffrep run dmkd_nothing",
        "diffrep data chek",
        "diffrep data",
        "diffrep evaluate FILE --classifer",
        "synthesis.sampling.guidance",
        "optim.lr.x",
        "synthesis.noise=shard",
        "data.augment=mixup",
        "diffrep.losses.kd_kll",
        "diffrep.method",
        "results.json",
        "cifar1000:data",
        "resnet8x5_cifar",
        "modell",
    ],
)
def test_a_wrong_name_is_found(wrong):
    assert not exists(wrong)


def test_the_page_of_dmkd_knows_every_flag_of_the_official_scripts():
    """Typed from their parsers."""
    text = " ".join(row[0] for page, row in ROWS if page == "dmkd")
    synthesis = """model ckpt vae image-size num-classes cfg-scale num-sampling-steps
        start_seed end_seed start_id end_id save_dir"""
    training = """print-freq batch_size num_workers epochs gpu_id experiments_dir experiments_name
        learning_rate lr_decay_epochs lr_decay_rate weight_decay momentum dataset model_t model_s path-t distill gamma
        alpha kd_T save_model use_aug data_amount data_quality s_step multiprocessing-distributed dist-url rank
        deterministic resume"""
    missing = [flag for flag in f"{synthesis} {training}".split() if f"`--{flag}`" not in text]
    assert not missing
