"""Mixing: learn from few labels which taps and timesteps of a diffusion model matter."""

from __future__ import annotations

from diffrep.data.datasets import DataConfig
from diffrep.frozen.passes import PassConfig
from diffrep.methods.mixing import MixingConfig
from diffrep.recipes.base import Recipe
from diffrep.recipes.dmkd_cifar10 import DENOISER, GENERATOR, IMAGES, REAL
from diffrep.training.config import TrainConfig
from diffrep.training.optim import OptimConfig

# At the projections' rate the weights would hardly leave equality in a few hundred steps; at ten times that rate 50
# labels settle on two of twelve.
OPTIM = OptimConfig(lr=2e-3, group_lr={"weights": 3.0})


def mixing_digits() -> Recipe:
    """Four taps at three timesteps, weighed by 50 labels."""
    return Recipe(
        name="mixing_digits",
        about="A learned mix of four taps and three timesteps of a diffusion model of 8x8 digits, by 50 labels.",
        data=DataConfig(source="digits", augment="shift:1", labels=50, labelled_share=1.0),
        method=MixingConfig(
            teacher="runs/denoiser_digits",
            taps=("down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1"),
            timesteps=(0, 100, 400),
            width=64,
            grid=4,
        ),
        optim=OPTIM,
        train=TrainConfig(steps=300, batch_size=50),
        needs=("weights: a diffusion model of digits (diffrep run denoiser_digits --out runs/denoiser_digits)",),
    )


def mixing_cifar10_small() -> Recipe:
    """Four taps at three timesteps of a small diffusion model of CIFAR-10, weighed by 1,000 labels."""
    return Recipe(
        name="mixing_cifar10_small",
        about="A learned mix of four taps and three timesteps of a small diffusion model of CIFAR-10, by 1,000 labels.",
        data=DataConfig(source=REAL, augment="crop_flip:4", labels=1000, labelled_share=1.0),
        method=MixingConfig(
            teacher=GENERATOR,
            taps=("mid_block", "up_blocks.0", "up_blocks.1", "up_blocks.2"),
            timesteps=(10, 50, 200),
            width=128,
            grid=4,
            passes=PassConfig(precision="bf16"),
        ),
        optim=OPTIM,
        train=TrainConfig(steps=250, batch_size=64),
        needs=(DENOISER, IMAGES),
    )


def mixing_debug() -> Recipe:
    """Two steps."""
    base = mixing_digits()
    assert isinstance(base.method, MixingConfig)
    return base.model_copy(
        update={
            "name": "mixing_debug",
            "about": "Two steps of a mix of four taps and three timesteps.",
            "method": base.method.model_copy(update={"teacher": "runs/denoiser_debug"}),
            "train": TrainConfig(steps=2, batch_size=10, log_every=1, checkpoint_every=1),
            "needs": ("weights: diffrep run denoiser_debug --out runs/denoiser_debug",),
        }
    )


RECIPES = (mixing_digits, mixing_cifar10_small, mixing_debug)
