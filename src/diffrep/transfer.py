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
from diffrep.data.datasets import DataConfig
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
        test = load_dense(DataConfig(source=self.source), "test", of_dense(self.recipe).kind)
        config = of_dense(self.recipe).model_copy(update={"init": None})
        method = TASKS[self.task].method(config, test)
        method.load(self.finished / best.BEST if best.known(self.finished) else self.finished)
        learnt = read_json(self.finished / "config.json").get("classes", list(test.classes))
        if list(learnt) != list(test.classes):
            told = f"{len(learnt)} classes, {self.source} has {len(test.classes)}"
            raise UserError(f"evaluate: {self.finished} knows {told}, or others by name")
        found = TASKS[self.task].scores(method.eval().to(device), test, device, None, 0)
        return found | {"test_images": len(test)}


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
    student = _encoder(model, place, look or {})
    return [Plan(task, source, _recipe(model, student, task, source, overrides, allow_code)) for task, source in tasks]


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


def _encoder(model: str, place: Path, look: dict[str, Any]) -> StudentConfig:
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
    raise UserError(
        f"evaluate --task: {model} holds no encoder; valid: a finished run with a student or of the task, a folder "
        "with an ADDP network, timm:NAME, a weights file with --architecture"
    )


def _of_file(place: Path, look: dict[str, Any]) -> StudentConfig:
    if not look.get("architecture"):
        raise UserError(f"evaluate --task: {place} does not say which network it is of; name it: --architecture NAME")
    return StudentConfig(
        name=look["architecture"], mean=tuple(look.get("mean") or MEAN), std=tuple(look.get("std") or STD)
    )


def _family(student: StudentConfig) -> str:
    backbone = _on_paper(student, ())
    depth = len(getattr(backbone.net, "blocks", ()))
    if backbone.names[0].startswith("blocks.") and len(set(backbone.strides)) == 1:
        return "large vit" if depth >= LARGE_DEPTH else "vit"
    return "hrnet" if student.name.startswith("hrnet") else "convolutional"


def _on_paper(student: StudentConfig, maps: Sequence[str]) -> MapBackbone:
    with torch.device("meta"):
        return MapBackbone(student, maps)


# The recipe


def _recipe(
    model: str, student: StudentConfig, task: str, source: str, overrides: Sequence[str], allow_code: bool
) -> Recipe:
    """The preset with encoder and data put in; refused where its head cannot read such maps."""
    family = _family(student)
    if family not in PRESETS[task]:
        raise UserError(f"{model}: no preset of '{task}' takes {student.name}: a detector stands on a plain ViT")
    preset = PRESETS[task][family]
    base = RECIPES[preset]()
    assert isinstance(base, Recipe)
    values = base.model_dump(mode="json")
    values |= {
        "name": _name(task, source, model), "about": f"What {model} is worth on {source}: {task}, as {preset}.",
        "published": None, "needs": [], "assumed": [f"settings are those of {preset}"],
    }  # fmt: skip
    values["data"]["source"] = source
    # As the preset's network, but for what a step does at random in it.
    dropped = {k: v for k, v in of_dense(base).student.options.items() if k == "drop_path_rate" and "vit" in family}
    values["method"]["student"] = _dumped(student, dropped)
    values["method"]["init"] = model
    if task == "landmark":
        values["method"] |= _points(student, values["method"])
    found = changed(values, model, _for_task(overrides, task), allow_code)
    assert isinstance(found, Recipe)
    _check_maps(model, of_dense(found))
    return found if task == "detect" else _at_size(found, student, family)


def _dumped(student: StudentConfig, more: dict[str, Any]) -> dict[str, Any]:
    options = {**student.options, **more}
    return student.model_copy(update={"options": options}).model_dump(mode="json")


def _for_task(overrides: Sequence[str], task: str) -> list[str]:
    own = [o.removeprefix(f"{task}.") for o in overrides]
    return [o for o in own if o.partition(".")[0] not in TASKS]


def _name(task: str, source: str, model: str) -> str:
    words = re.sub(r"[^a-z0-9]+", "_", f"{task}_{source.partition(':')[0]}_{Path(model).name}".lower())
    return words[:80].strip("_")


def _points(student: StudentConfig, method: dict[str, Any]) -> dict[str, Any]:
    """A backbone that starts from somewhere is not drawn; each transposed convolution doubles the coarsest map."""
    fields: dict[str, Any] = {"backbone_std": None}
    if method["head"] == "deconv":
        coarsest = _on_paper(student, ()).strides[-1]
        doublings = max(0, round(math.log2(coarsest / HEATMAP_STRIDE)))
        fields["deconv"] = [method["deconv"][0]] * doublings
    return fields


def _at_size(recipe: Recipe, student: StudentConfig, family: str) -> Recipe:
    """A ViT's table of positions is one for the crops of training, resized as it is loaded: mmsegmentation's way."""
    config = of_dense(recipe)
    has_table = "vit" in family and hasattr(_on_paper(student, ()).net, "pos_embed")
    if not has_table or config.student.options.get("img_size") != student.options.get("img_size"):
        return recipe
    side = config.views.crop if config.kind == "segment" else config.views.size
    sized = config.student.model_copy(update={"options": config.student.options | {"img_size": side}})
    return recipe.model_copy(update={"method": config.model_copy(update={"student": sized})})


def _check_maps(model: str, config: DenseConfig) -> None:
    """Refuse in the user's words what the head would refuse when it is built."""
    if getattr(config, "head", None) != "bisenet":
        return
    backbone = _on_paper(config.student, config.maps)
    if backbone.strides == STRIDES:
        return
    found = ", ".join(f"{name} at 1/{stride}" for name, stride in zip(backbone.names, backbone.strides, strict=True))
    raise UserError(
        f"{model}: BiSeNet reads four maps, at 1/4, 1/8, 1/16 and 1/32 of a picture, and {config.student.name} has "
        f"{found}; name four such taps (--set segment.method.maps=[...]), or read these: --set "
        "segment.method.head=upernet"
    )
