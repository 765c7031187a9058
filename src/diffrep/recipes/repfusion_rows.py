"""Every distillation and fine-tuning config of the official RepFusion repository, as a recipe.

``NAME`` is the row corrected as methods/repfusion.py lists; ``NAME_faithful`` keeps what the official configs do, as
far as that can be kept: no baseline for the policy, the 7x7 stem that stage 2 then drops, no entropy where it was
switched off by accident. What cannot be kept is said under ``assumed``. None of the paper's numbers was found in
public text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from diffrep.data.datasets import DataConfig
from diffrep.evaluation.classify import EvaluateConfig
from diffrep.methods.finetune import FinetuneConfig
from diffrep.methods.repfusion import RepFusionConfig, TimestepConfig
from diffrep.models.students import StudentConfig
from diffrep.recipes.base import Published, Recipe, Study
from diffrep.recipes.dmkd_rows import Course, named
from diffrep.training.optim import OptimConfig

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}  # of students, as in the configs
EPOCHS = 200
HELD_OUT = "10 % of the training images are held out for selection; the official configs choose on no images or on test"
ALL_FACES = "the training split of CelebA alone; the official configs see all 30,000 photographs, the tests' too"
NAMED_BATCH = "batch 128, as the file's name says; the config says 64"
RANGE = "the teacher sees images in [-1, 1], as it was trained; the official configs show it the student's (defect D7)"


@dataclass(frozen=True)
class Bench:
    """One data set with its teacher. images: that training sees; batch: of all devices together."""

    source: str
    augment: str
    images: int
    batch: int
    teacher: str
    tap: str
    needs: tuple[str, ...]
    table: str
    image_size: int | None = None
    student: dict[str, Any] | None = None  # how students look at images
    ema: bool = True

    def data(self) -> DataConfig:
        return DataConfig(source=self.source, image_size=self.image_size, augment=self.augment)


BENCHES = {
    "cifar10": Bench(
        "cifar10:data/cifar10", "crop_flip:4", 45_000, 128, "google/ddpm-cifar10-32", "mid_block.resnets.1.conv2",
        (
            "weights: google/ddpm-cifar10-32 from the Hub",
            "data: CIFAR-10 in data/cifar10 (diffrep data prepare cifar10 ARCHIVE data/cifar10)",
        ),
        "CIFAR-10 table",
    ),
    "tinyimagenet": Bench(
        "tiny-imagenet:data/tiny-imagenet-200", "resized_crop:1000", 90_000, 64, "adm-64",
        "middle_block.2.out_layers.3",
        (
            "weights: guided-diffusion's 64x64_diffusion.pt (diffrep assets fetch adm-64)",
            "data: Tiny-ImageNet in data/tiny-imagenet-200 (cs231n.stanford.edu/tiny-imagenet-200.zip)",
        ),
        "Tiny-ImageNet table", student=IMAGENET,
    ),
    "imagenet": Bench(
        "imagenet:data/imagenet", "resized_crop:1000", 1_153_050, 32, "adm-256-uncond", "middle_block.2.out_layers.3",
        (
            "weights: guided-diffusion's 256x256_diffusion_uncond.pt (diffrep assets fetch adm-256-uncond)",
            "data: ImageNet in data/imagenet",
        ),
        "no table: a config without a number", 256, IMAGENET,
    ),
    "celebahq": Bench(
        "celebahq:data/CelebAMask-HQ", "resized_crop:1000", 24_183, 64, "google/ddpm-ema-celebahq-256",
        "mid_block.resnets.1.conv2",
        (
            "weights: google/ddpm-ema-celebahq-256 from the Hub",
            "data: CelebAMask-HQ in data/CelebAMask-HQ (non-commercial research)",
        ),
        "stage 1 of the face tables", 256, IMAGENET, ema=False,
    ),
}  # fmt: skip

# The policy over all timesteps; and what the configs without one do: t below 50, or the clean end.
POLICY = {"cifar10": "conv", "tinyimagenet": "conv"}
EARLY = TimestepConfig(select="range", values=(0, 50))
CLEAN = TimestepConfig(select="fixed", values=(0,))

# (student, loss) -> (student's network, fields of a RepFusionConfig, timesteps where no policy chooses them)
Row = tuple[str, dict[str, Any], TimestepConfig | None]
NETWORKS = {"resnet18": "resnet18_cifar", "mbnv2": "mobilenetv2_cifar"}  # for small images
OPTIONS = {"hrnet_w18": {"head_conv_bias": False}}  # as the official neck
AT = {"loss": "at", "hint_grid": None, "kd_weight": 1000.0}
RKD = {"loss": "rkd"}
DENSE = {"loss": "l1", "hint_grid": None, "kd_weight": 10.0}
ROWS: dict[str, dict[str, Row]] = {
    "cifar10": {
        f"{student}{suffix}": (network, fields, None)
        for student, network in NETWORKS.items()
        for suffix, fields in (("", {}), ("_at", AT), ("_rkd", RKD))
    },
    "tinyimagenet": {
        "resnet18": ("resnet18_cifar", {}, None),
        "mbnv2": ("mobilenetv2_cifar", {}, EARLY),
        "resnet18_at": ("resnet18_cifar", AT, None),
        "mbnv2_at": ("mobilenetv2_cifar", AT, None),
        "resnet18_rkd": ("resnet18_cifar", RKD, EARLY),
        "mbnv2_rkd": ("mobilenetv2_cifar", RKD, EARLY),
    },
    "imagenet": {"resnet18": ("resnet18", {}, EARLY)},
    "celebahq": {
        "resnet18": ("resnet18", {"hint_grid": None}, CLEAN),
        "resnet50": ("resnet50", DENSE, CLEAN),
        "hrnet_w18": ("hrnet_w18", DENSE, CLEAN),
    },
}
# What a faithful twin does otherwise: (network, timesteps), where it does.
QUIRKS: dict[str, tuple[str, dict[str, Any]]] = {"tinyimagenet_resnet18": ("resnet18", {"entropy_weight": 0.0})}


def distilled(name: str, data: str, row: str, faithful: bool) -> Recipe:
    """Stage 1: a row of the official `distillation` folder."""
    bench, (network, fields, timestep) = BENCHES[data], ROWS[data][row]
    quirk = QUIRKS.get(f"{data}_{row}") if faithful else None
    network = quirk[0] if quirk else network
    course = _course(bench.batch)
    train = course.train(bench.images).model_copy(update={"ema_decay": 0.999 if bench.ema else None})
    return Recipe(
        name=name,
        about=f"{bench.teacher.split('/')[-1]} teaches {network}, {_words(fields)}{', as released' * faithful}.",
        data=bench.data(),
        method=RepFusionConfig(
            teacher=bench.teacher, tap=bench.tap,
            student=StudentConfig(name=network, options=OPTIONS.get(network, {}), **bench.student or {}),
            timestep=timestep or _policy(data, faithful, quirk[1] if quirk else {}), **fields,
        ),
        optim=_optim(course, nesterov=data == "tinyimagenet"),
        train=train,
        published=Published(
            value=None, metric="top-1 %, after fine-tuning" if data != "celebahq" else "mIoU / NME after fine-tuning",
            source=f"ICCV 2023, {bench.table}: not found in public text",
        ),
        assumed=(ALL_FACES if data == "celebahq" else HELD_OUT, RANGE),
        needs=bench.needs,
    )  # fmt: skip


def _policy(data: str, faithful: bool, changed: dict[str, Any]) -> TimestepConfig:
    baseline = "none" if faithful else "running_mean"
    fields = {"values": tuple(range(1000)), "policy": POLICY[data], "baseline": baseline} | changed
    return TimestepConfig(select="policy", **fields)


def _words(fields: dict[str, Any]) -> str:
    named = {"at": "attention transfer", "rkd": "relations", "l1": "whole maps, L1"}
    return named.get(fields.get("loss", ""), "whole maps" if fields else "the pooled hint")


def _course(batch: int) -> Course:
    """SGD 0.1, a tenth after epochs 100 and 150 of 200."""
    return Course(EPOCHS, batch, 0.1, 1e-4, (100, 150))


def _optim(course: Course, nesterov: bool) -> OptimConfig:
    return course.optim().model_copy(update={"nesterov": nesterov})


def classified(name: str, data: str, student: str, faithful: bool) -> Recipe:
    """Stage 2 and its baseline: cross-entropy on all labels; ``method.init`` names a distilled run."""
    bench, batch = BENCHES[data], 64 if faithful and data == "cifar10" else 128
    network = NETWORKS[student]
    course, cifar = _course(batch), data == "cifar10"
    train = course.train(bench.images).model_copy(update={"ema_decay": 0.999 if cifar else None})
    start = "from scratch, or with --set method.init=RUN from a distilled run"
    return Recipe(
        name=name,
        about=f"{network} from labels, {start}{', as released' * faithful}.",
        data=bench.data(),
        method=FinetuneConfig(student=StudentConfig(name=network, **bench.student or {})),
        optim=_optim(course, nesterov=cifar),
        train=train,
        evaluate=EvaluateConfig(protocol="classifier"),
        published=Published(
            value=None, metric="top-1 %", source=f"ICCV 2023, {bench.table}: not found in public text"
        ),
        assumed=(HELD_OUT, NAMED_BATCH) if cifar and not faithful else (HELD_OUT,),
        needs=bench.needs[1:],
    )  # fmt: skip


def _all() -> tuple[Callable[[], Recipe | Study], ...]:
    made = []
    for faithful, suffix in ((False, ""), (True, "_faithful")):
        for data, rows in ROWS.items():
            made += [named(f"repfusion_{data}_{row}{suffix}", distilled, data, row, faithful) for row in rows]
        for data in ("cifar10", "tinyimagenet"):
            made += [
                named(f"finetune_{data}_{student}{suffix}", classified, data, student, faithful) for student in NETWORKS
            ]
    return tuple(made)


RECIPES = _all()
