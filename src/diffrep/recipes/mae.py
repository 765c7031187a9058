"""MAE at the size of a test; the arm of pixels beside ADDP's on CIFAR-10 stands in addp_cifar10.py."""

from __future__ import annotations

from diffrep.data.datasets import DataConfig
from diffrep.evaluation.classify import EvaluateConfig
from diffrep.methods.mae import MAEConfig
from diffrep.models.mae_vit import MAEVitConfig
from diffrep.recipes.base import Recipe
from diffrep.training.config import TrainConfig
from diffrep.training.optim import OptimConfig


def mae_debug() -> Recipe:
    """16 patches of 2x2 pixels, 4 of them in sight."""
    network = MAEVitConfig(
        patch_size=2, embed_dim=16, depth=1, num_heads=2, decoder_dim=8, decoder_depth=1, decoder_num_heads=2
    )
    return Recipe(
        name="mae_debug",
        about="Two steps of MAE on digits.",
        data=DataConfig(source="digits"),
        method=MAEConfig(network=network),
        optim=OptimConfig(lr=2e-3, betas=(0.9, 0.95), weight_decay=0.05),
        train=TrainConfig(steps=2, batch_size=8, log_every=1, checkpoint_every=1),
        evaluate=EvaluateConfig(probe_labels=(50,)),
    )


RECIPES = (mae_debug,)
