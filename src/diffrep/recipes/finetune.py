"""Fine-tuning and from-scratch baselines (stage 2)."""

from __future__ import annotations

from diffrep.data.datasets import DataConfig
from diffrep.methods.finetune import FinetuneConfig
from diffrep.recipes.base import Recipe
from diffrep.recipes.repfusion import CONV
from diffrep.training.config import TrainConfig
from diffrep.training.optim import OptimConfig


def finetune_digits_conv() -> Recipe:
    """A small CNN on 50 labelled digits, from scratch unless ``method.init`` names a distilled run."""
    return Recipe(
        name="finetune_digits_conv",
        about="A 56 k-parameter CNN on 50 labelled digits, from scratch or from a distilled run.",
        data=DataConfig(source="digits", augment="shift:1", labels=50, labelled_share=1.0),
        method=FinetuneConfig(student=CONV),
        optim=OptimConfig(lr=1e-3, weight_decay=5e-3),
        train=TrainConfig(steps=300, batch_size=50),
    )


def finetune_debug() -> Recipe:
    """Two steps."""
    base = finetune_digits_conv()
    return base.model_copy(
        update={
            "name": "finetune_debug",
            "about": "Two steps of a classifier.",
            "train": TrainConfig(steps=2, batch_size=10, log_every=1, checkpoint_every=1),
        }
    )


RECIPES = (finetune_digits_conv, finetune_debug)
