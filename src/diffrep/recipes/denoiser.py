"""Diffusion models of one's own images, to teach with or to draw from."""

from __future__ import annotations

from diffrep.data.datasets import DataConfig
from diffrep.evaluation.classify import EvaluateConfig
from diffrep.methods.denoiser import DenoiserConfig
from diffrep.recipes.base import Recipe
from diffrep.training.config import TrainConfig
from diffrep.training.optim import LrScheduleConfig, OptimConfig


def denoiser_digits() -> Recipe:
    """8-pixel digits, unconditional: no label touches it, so what it teaches is clean of labels. About 50 CPU s."""
    return Recipe(
        name="denoiser_digits",
        about="A 0.63 M-parameter diffusion model of 8x8 digits, without labels.",
        data=DataConfig(source="digits"),
        method=DenoiserConfig(in_channels=1),
        optim=OptimConfig(
            lr=1e-3, weight_decay=1e-4, lr_schedule=LrScheduleConfig(warmup_steps=50, hold=0.5, final=0.05)
        ),
        train=TrainConfig(steps=600, batch_size=64, clip_norm=1.0, ema_decay=0.995),
    )


def denoiser_digits_conditional() -> Recipe:
    """The same with the class as condition and a null class, to draw labelled digits."""
    base = denoiser_digits()
    return base.model_copy(
        update={
            "name": "denoiser_digits_conditional",
            "about": "A class-conditional diffusion model of 8x8 digits, to draw labelled images from.",
            "method": DenoiserConfig(in_channels=1, conditional=True),
            "train": base.train.model_copy(update={"steps": 900}),
        }
    )


def denoiser_cifar10_small() -> Recipe:
    """CIFAR-10 on two cores in about an hour: the settings of a 2.6 M-parameter network that is known to work."""
    return Recipe(
        name="denoiser_cifar10_small",
        about="A 2.6 M-parameter diffusion model of CIFAR-10, about an hour on two cores.",
        data=DataConfig(source="cifar10:data/cifar10", augment="flip"),
        method=DenoiserConfig(block_out_channels=(32, 32, 64, 128), mid_attention=True, attention_head_dim=32),
        optim=OptimConfig(
            lr=6e-4,
            betas=(0.9, 0.99),
            weight_decay=1e-4,
            lr_schedule=LrScheduleConfig(warmup_steps=300, hold=0.4, final=0.02),
        ),
        train=TrainConfig(steps=7500, batch_size=64, clip_norm=1.0, ema_decay=0.9995, precision="bf16"),
        needs=("data: CIFAR-10 in data/cifar10 (diffrep data prepare cifar10 ARCHIVE data/cifar10)",),
    )


def denoiser_debug() -> Recipe:
    """A few seconds: for tests, and to see what a run folder holds."""
    base = denoiser_digits()
    return base.model_copy(
        update={
            "name": "denoiser_debug",
            "about": "Two steps of a tiny diffusion model: what a run folder holds.",
            "method": DenoiserConfig(in_channels=1, block_out_channels=(8, 16)),
            "train": TrainConfig(steps=2, batch_size=8, log_every=1, checkpoint_every=1, ema_decay=0.9),
            "evaluate": EvaluateConfig(samples=4, num_sampling_steps="2"),
        }
    )


RECIPES = (denoiser_digits, denoiser_digits_conditional, denoiser_cifar10_small, denoiser_debug)
