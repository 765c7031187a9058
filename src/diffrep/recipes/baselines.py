"""What RepFusion is to be compared with: pretraining on the same images without a teacher, and a supervised teacher.

On CIFAR-10 every arm sees the same 30,000 images, in the same steps, with one optimiser: AdamW, whose steps do not
depend on a loss's scale, so no loss is favoured by its weight. Steps and rate are ours, chosen before the run.
"""

from __future__ import annotations

from typing import Any

from diffrep.data.datasets import DataConfig
from diffrep.evaluation.classify import EvaluateConfig
from diffrep.frozen.classifier import ClassifierConfig
from diffrep.methods.contrastive import ContrastiveConfig, ViewConfig
from diffrep.methods.dmkd import DMKDConfig, KdLossConfig
from diffrep.methods.finetune import FinetuneConfig
from diffrep.methods.repfusion import RepFusionConfig, TimestepConfig
from diffrep.recipes.base import MethodConfig, Recipe
from diffrep.recipes.dmkd_cifar10 import IMAGES, REAL, STUDENT
from diffrep.recipes.repfusion import CONV
from diffrep.training.config import TrainConfig
from diffrep.training.optim import LrScheduleConfig, OptimConfig

# Digits


def contrastive_digits() -> Recipe:
    """SimCLR on 8x8 digits; crops are mild and nothing is mirrored, or a 6 would be a 9's neighbour."""
    return Recipe(
        name="contrastive_digits",
        about="A 56 k-parameter CNN learns which views belong to one digit (SimCLR): no teacher, no label.",
        data=DataConfig(source="digits"),
        method=ContrastiveConfig(student=CONV, views=ViewConfig(smallest_crop=0.5, has_flip=False)),
        optim=OptimConfig(lr=2e-3),
        train=TrainConfig(steps=800, batch_size=64),
        evaluate=EvaluateConfig(probe_labels=(50, 100)),
    )


def contrastive_debug() -> Recipe:
    """Two steps."""
    changes = {
        "name": "contrastive_debug",
        "about": "Two steps of SimCLR.",
        "train": TrainConfig(steps=2, batch_size=8, log_every=1, checkpoint_every=1),
    }
    return contrastive_digits().model_copy(update=changes)


# CIFAR-10: one recipe, one budget

TEACHER = "runs/scratch_cifar10_small"
TAUGHT = (IMAGES, f"weights: diffrep run scratch_cifar10_small --out {TEACHER}")


def contrastive_cifar10_small() -> Recipe:
    """SimCLR on CIFAR-10; it makes its own views, and two passes per image."""
    about = "ResNet-20 learns which views belong to one image of CIFAR-10 (SimCLR): no teacher, no label."
    return _small("contrastive_cifar10_small", about, ContrastiveConfig(student=STUDENT), "none", (IMAGES,))


def scratch_cifar10_small() -> Recipe:
    """The supervised teacher: all labels, from scratch; with data.labels it is the baseline of few labels."""
    about = "ResNet-20 from the labels of CIFAR-10, from scratch: the supervised teacher of the others."
    return _small("scratch_cifar10_small", about, FinetuneConfig(student=STUDENT), "crop_flip:4", (IMAGES,))


def kd_cifar10_small() -> Recipe:
    """The classifier's answers, which no label stands beside."""
    method = DMKDConfig(
        teacher=ClassifierConfig(reference=TEACHER), student=STUDENT, loss=KdLossConfig(kd_temperature=4)
    )
    return _taught("kd_cifar10_small", "its answers (KD)", method)


def hint_supervised_cifar10_small() -> Recipe:
    """FitNets' hint (Romero et al. 2015) at the last map."""
    return _taught("hint_supervised_cifar10_small", "its last map (hint)", _features(loss="l2", hint_grid=None))


def at_supervised_cifar10_small() -> Recipe:
    """Attention transfer (Zagoruyko and Komodakis 2017) at the last map."""
    fields = {"loss": "at", "hint_grid": None, "kd_weight": 1000.0}
    return _taught("at_supervised_cifar10_small", "where it looks (attention transfer)", _features(**fields))


def rkd_supervised_cifar10_small() -> Recipe:
    """Relational distillation (Park et al. 2019) of the pooled last map."""
    return _taught("rkd_supervised_cifar10_small", "how images lie to each other (RKD)", _features(loss="rkd"))


def crd_supervised_cifar10_small() -> Recipe:
    """Contrastive distillation (Tian et al. 2020) of the pooled last map, with a memory of all images."""
    return _taught("crd_supervised_cifar10_small", "to know its images by their features (CRD)", _features(loss="crd"))


def _features(**fields: Any) -> RepFusionConfig:
    """RepFusion with a classifier in the diffusion model's place, whose features know no timestep."""
    clean = TimestepConfig(select="fixed", values=(0,))
    return RepFusionConfig(
        teacher=f"classifier:{TEACHER}", tap="network.layer3", student=STUDENT, timestep=clean, **fields
    )


def _taught(name: str, what: str, method: MethodConfig) -> Recipe:
    about = f"A classifier of CIFAR-10 teaches ResNet-20 {what}; no label but those behind the teacher."
    return _small(name, about, method, "crop_flip:4", TAUGHT)


def _small(name: str, about: str, method: MethodConfig, augment: str, needs: tuple[str, ...]) -> Recipe:
    return Recipe(
        name=name,
        about=about,
        data=DataConfig(source=REAL, augment=augment),
        method=method,
        optim=OptimConfig(lr=2e-3, weight_decay=1e-4, lr_schedule=LrScheduleConfig(warmup_steps=20)),
        train=TrainConfig(steps=234, batch_size=128, precision="bf16", log_every=18, checkpoint_every=117),
        evaluate=EvaluateConfig(probe_labels=(1_000,)),
        needs=needs,
    )


RECIPES = (
    contrastive_digits,
    contrastive_debug,
    contrastive_cifar10_small,
    scratch_cifar10_small,
    kd_cifar10_small,
    hint_supervised_cifar10_small,
    at_supervised_cifar10_small,
    rkd_supervised_cifar10_small,
    crd_supervised_cifar10_small,
)
