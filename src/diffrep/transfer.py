"""What an encoder is worth elsewhere: the recipe by which it learns each dense task that it fits.

A recipe is the published one of the task whose head reads such maps, with the encoder, where it starts and the data
put in; settings that the user changes are laid over it. A finished run of a task is scored as it is.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffrep.assemble import estimate
from diffrep.data.dense import load_dense
from diffrep.data.sources import DENSE_TASKS, parse_any
from diffrep.dense import TASKS, of_dense
from diffrep.errors import UserError, nearest
from diffrep.files import located, read_json
from diffrep.frozen.classifier_sources import of_timm
from diffrep.frozen.start import TIMM
from diffrep.frozen.tokens import held, read_part
from diffrep.methods.dense import DenseConfig
from diffrep.models.addp_vit import MEAN, STD
from diffrep.models.maps import STRIDES, MapBackbone
from diffrep.models.students import StudentConfig
from diffrep.models.vit_students import vit_student
from diffrep.recipes import RECIPES
from diffrep.recipes.base import Recipe, to_yaml
from diffrep.recipes.loading import changed, load
from diffrep.training import best

# task -> family of the backbone -> the recipe whose settings are taken
PRESETS = {
    "segment": {
        "convolutional": "segment_celebamask_bisenet_r18", "hrnet": "segment_celebamask_bisenet_r18",
        "vit": "segment_ade20k_upernet_vit_b", "large vit": "segment_ade20k_upernet_vit_l",
    },
    "landmark": {
        "convolutional": "landmark_wflw_r50", "hrnet": "landmark_wflw_hrnet_w18", "vit": "landmark_wflw_r50",
        "large vit": "landmark_wflw_r50",
    },
    "detect": {"vit": "detect_coco_vitdet_b", "large vit": "detect_coco_vitdet_l"},
}  # fmt: skip
LARGE_DEPTH = 24  # blocks of a ViT from which the settings of ViT-L are taken
HEATMAP_STRIDE = 4  # pixels of a crop per cell of a heatmap, as published


@dataclass(frozen=True)
class Plan:
    """One task on one set: a recipe to run, or a finished run to score."""

    task: str
    source: str
    recipe: Recipe
    finished: Path | None = None

    @property
    def name(self) -> str:
        return f"{self.task}-{self.source.partition(':')[0]}"

    def scores(self, device: torch.device) -> dict[str, Any]:
        """Of the finished run's network on the test split of the set.

        Raises:
            UserError: the run learnt other classes.
        """
        assert self.finished is not None
        data = self.recipe.data.model_copy(update={"source": self.source})
        test = load_dense(data, "test", of_dense(self.recipe).kind)
        place = self.finished / best.BEST if best.known(self.finished) else self.finished
        learnt = read_json(place / "config.json").get("classes", list(test.classes))
        if told := _differing(learnt, test.classes):
            raise UserError(f"evaluate: {self.finished} learnt other classes than {self.source} has: {told}")
        method = TASKS[self.task].method(of_dense(self.recipe).model_copy(update={"init": None}), test)
        method.load(place)
        found = TASKS[self.task].scores(method.eval().to(device), test, device, None, 0)
        return found | {"test_images": len(test)}


def _differing(learnt: Sequence[str], here: Sequence[str]) -> str | None:
    """Two lists of classes: their lengths, or the first that differs; two label orders have the same classes."""
    if len(learnt) != len(here):
        return f"{len(learnt)}, not {len(here)}"
    pairs = enumerate(zip(learnt, here, strict=True))
    return next((f"class {k} is {a!r}, not {b!r}" for k, (a, b) in pairs if a != b), None)


def plans(
    model: str,
    tasks: Sequence[tuple[str, str]],
    overrides: Sequence[str] = (),
    allow_code: bool = False,
    look: dict[str, Any] | None = None,
) -> list[Plan]:
    """What is to be done for each (task, data reference), before anything of it is.

    Args:
        model: a run with a student, a folder with an ADDP network, a finished run of the task, ``timm:NAME``, or a
            weights file.
        overrides: ``a.b=value`` for all tasks, ``TASK.a.b=value`` for one.
        look: of a weights file ``architecture``, and how it sees images, ``mean`` and ``std``.

    Raises:
        UserError: no encoder, a task that it does not fit, wrong settings.
    """
    for task, source in tasks:
        _check(task, source)
    _check_prefixes(overrides, [task for task, _ in tasks])
    place = located(model)
    result = read_json(place / "result.json") if (place / "result.json").is_file() else {}
    if result.get("kind") in TASKS:
        return [_of_finished(place, result["kind"], task, source, overrides) for task, source in tasks]
    encoder = _Encoder.of(model, _student(model, place, look or {}))
    made = [Plan(task, source, _recipe(encoder, task, source, overrides, allow_code)) for task, source in tasks]
    for plan in made[1:]:  # what is wrong with the first, its run says at once; with others, only hours later
        for split in ("train", "test"):
            load_dense(plan.recipe.data, split, of_dense(plan.recipe).kind)
    return made


def _check(task: str, source: str) -> None:
    if task not in TASKS:
        raise UserError(f"--task {task}: {nearest(task, TASKS)}")
    kind = parse_any(source)[0]
    if task not in DENSE_TASKS.get(kind, ()):
        fitting = ", ".join(name for name, known in DENSE_TASKS.items() if task in known)
        raise UserError(f"--data {source}: has no truth for the task '{task}'; sources that have: {fitting}")


def _check_prefixes(overrides: Sequence[str], tasks: Sequence[str]) -> None:
    for override in overrides:
        first = override.partition("=")[0].partition(".")[0]
        if first in TASKS and first not in tasks:
            raise UserError(f"--set {override}: '{first}' is not among the tasks asked for ({', '.join(tasks)})")


def _of_finished(place: Path, learnt: str, task: str, source: str, overrides: Sequence[str]) -> Plan:
    if learnt != task:
        start = "give the run that it started from"
        raise UserError(f"{place} is a finished run of the task '{learnt}', and kept no encoder for '{task}'; {start}")
    recipe = load(str(place / "recipe.yaml"), _for_task(overrides, task))
    assert isinstance(recipe, Recipe)
    return Plan(task, source, recipe, place)


def carried_out(
    plan: Plan,
    perform: Callable[..., dict[str, Any]],
    out: str | Path | None,
    device: torch.device,
    dry_run: bool = False,
    say: Callable[[dict[str, Any]], None] = lambda found: None,
) -> dict[str, Any]:
    """``scores`` of a finished run, ``result`` of a new one, or ``recipe`` and ``cost`` of what is only tried.

    Args:
        perform: runs a recipe, in a folder ``out`` or where runs are.
    """
    found: dict[str, Any] = {"task": plan.task, "data": plan.source}
    if plan.finished:
        found |= {} if dry_run else {"scores": plan.scores(device)}
    elif dry_run:
        found |= {"recipe": to_yaml(plan.recipe), "cost": estimate(plan.recipe)}
    else:
        found |= {"result": perform(plan.recipe, out=Path(out) / plan.name if out else None)}
    say(found)
    return found


# The encoder


def _student(model: str, place: Path, look: dict[str, Any]) -> StudentConfig:
    """Which network it is, and how it sees images."""
    if model.startswith(TIMM):
        found, name = of_timm(model.removeprefix(TIMM), {}), model.removeprefix(TIMM).partition(".")[0]
        return StudentConfig(name=name, mean=found.mean or MEAN, std=found.std or STD)
    if place.is_file():
        return _of_file(place, look)
    card = read_json(place / "config.json") if (place / "config.json").is_file() else {}
    if "student" in card:
        if not (place / "result.json").is_file():
            raise UserError(f"{place} is a run that has not finished (no result.json): run its command again first")
        return StudentConfig.model_validate(card["student"]).model_copy(update={"tap": None})
    if place.is_dir() and "addp" in (parts := held(place)):
        network = read_part(parts["addp"], "addp")[0]
        return vit_student(network.image_size, network.patch_size, network, pre_norm=False)
    lacks = "holds no encoder" if place.exists() else "does not exist"
    raise UserError(
        f"evaluate --task: {model} {lacks}; valid: a finished run with a student or of the task, a folder "
        "with an ADDP network, timm:NAME, a weights file with --architecture"
    )


def _of_file(place: Path, look: dict[str, Any]) -> StudentConfig:
    if not look.get("architecture"):
        raise UserError(f"evaluate --task: {place} does not say which network it is of; name it: --architecture NAME")
    return StudentConfig(
        name=look["architecture"], mean=tuple(look.get("mean") or MEAN), std=tuple(look.get("std") or STD)
    )


@dataclass(frozen=True)
class _Encoder:
    """What decides on its recipes. has_table: of positions, for images of one size; maps: name and stride of each."""

    model: str
    student: StudentConfig
    family: str
    has_table: bool
    maps: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, model: str, student: StudentConfig) -> _Encoder:
        backbone = _on_paper(student, ())
        depth = len(getattr(backbone.net, "blocks", ()))
        family = "hrnet" if student.name.startswith("hrnet") else "convolutional"
        if backbone.names[0].startswith("blocks.") and len(set(backbone.strides)) == 1:
            family = "large vit" if depth >= LARGE_DEPTH else "vit"
        has_table = "vit" in family and hasattr(backbone.net, "pos_embed")
        return cls(model, student, family, has_table, _maps(backbone))


def _on_paper(student: StudentConfig, maps: Sequence[str]) -> MapBackbone:
    with torch.device("meta"):
        return MapBackbone(student, maps)


def _maps(backbone: MapBackbone) -> tuple[tuple[str, int], ...]:
    return tuple(zip(backbone.names, backbone.strides, strict=True))


# The recipe


def _recipe(encoder: _Encoder, task: str, source: str, overrides: Sequence[str], allow_code: bool) -> Recipe:
    """The preset with encoder and data put in; refused where its head cannot read such maps."""
    model, family = encoder.model, encoder.family
    if family not in PRESETS[task]:
        name = encoder.student.name
        raise UserError(f"{model}: no preset of '{task}' takes {name}: a detector stands on a plain ViT")
    preset = PRESETS[task][family]
    base = RECIPES[preset]()
    assert isinstance(base, Recipe)
    values = base.model_dump(mode="json")
    values |= {
        "name": _name(task, source, model), "about": f"What {model} is worth on {source}: {task}, as {preset}.",
        "published": None, "needs": [], "assumed": [f"settings are those of {preset}"],
    }  # fmt: skip
    values["data"]["source"] = source
    values["method"] |= {"student": _student_values(encoder, of_dense(base)), "init": model}
    if task == "landmark":
        values["method"] |= _points(encoder, values["method"])
    found = changed(values, model, _for_task(overrides, task), allow_code)
    assert isinstance(found, Recipe)
    _check_maps(encoder, of_dense(found))
    return found if task == "detect" else _at_size(found, encoder)


def _student_values(encoder: _Encoder, preset: DenseConfig) -> dict[str, Any]:
    """The encoder, with what the preset's network does at random in a step."""
    names = ("drop_path_rate",) if "vit" in encoder.family else ()
    options = encoder.student.options | {k: v for k, v in preset.student.options.items() if k in names}
    return encoder.student.model_copy(update={"options": options}).model_dump(mode="json")


def _for_task(overrides: Sequence[str], task: str) -> list[str]:
    own = [o.removeprefix(f"{task}.") for o in overrides]
    return [o for o in own if o.partition(".")[0] not in TASKS]


def _name(task: str, source: str, model: str) -> str:
    words = re.sub(r"[^a-z0-9]+", "_", f"{task}_{source.partition(':')[0]}_{Path(model).name}".lower())
    return words[:80].strip("_")


def _points(encoder: _Encoder, method: dict[str, Any]) -> dict[str, Any]:
    """A backbone that starts from somewhere is not drawn; each transposed convolution doubles the coarsest map."""
    fields: dict[str, Any] = {"backbone_std": None}
    if method["head"] == "deconv":
        doublings = max(0, round(math.log2(encoder.maps[-1][1] / HEATMAP_STRIDE)))
        fields["deconv"] = [method["deconv"][0]] * doublings
    return fields


def _at_size(recipe: Recipe, encoder: _Encoder) -> Recipe:
    """A ViT's table of positions is one for the crops of training, resized as it is loaded: mmsegmentation's way."""
    config = of_dense(recipe)
    options, taught = config.student.options, encoder.student.options
    if not encoder.has_table or options.get("img_size") != taught.get("img_size"):
        return recipe
    side = config.views.crop if config.kind == "segment" else config.views.size
    sized = config.student.model_copy(update={"options": options | {"img_size": side}})
    return recipe.model_copy(update={"method": config.model_copy(update={"student": sized})})


def _check_maps(encoder: _Encoder, config: DenseConfig) -> None:
    """Refuse in the user's words what the head would refuse when it is built."""
    if getattr(config, "head", None) != "bisenet":
        return
    is_changed = config.maps or config.student != encoder.student
    maps = _maps(_on_paper(config.student, config.maps)) if is_changed else encoder.maps
    if tuple(stride for _, stride in maps) == STRIDES:
        return
    found = ", ".join(f"{name} at 1/{stride}" for name, stride in maps)
    raise UserError(
        f"{encoder.model}: BiSeNet reads four maps, at 1/4, 1/8, 1/16 and 1/32 of a picture, and "
        f"{config.student.name} has {found}; name four such taps (--set segment.method.maps=[...]), or read these: "
        "--set segment.method.head=upernet"
    )
