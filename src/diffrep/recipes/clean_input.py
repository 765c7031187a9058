"""Clean-input extractors: a diffusion model made to read images without noise and without a timestep to choose."""

from __future__ import annotations

from diffrep.data.datasets import DataConfig
from diffrep.frozen.passes import PassConfig
from diffrep.methods.clean_input import CleanInputConfig
from diffrep.recipes.base import Recipe
from diffrep.recipes.dmkd_cifar10 import DENOISER, GENERATOR, IMAGES, REAL
from diffrep.training.config import TrainConfig
from diffrep.training.optim import LrScheduleConfig, OptimConfig

# The published rate, warm-up and batch (Adam 1e-5 after 2,000 steps, 8 images) are for Stable Diffusion.
ASSUMED = ("rate, warm-up, batch, heads' sizes, and a rate of its own for the timestep: the network is small",)
OPTIM = OptimConfig(
    name="adam",
    lr=1e-4,
    group_lr={"time": 1000, "heads": 10},
    lr_schedule=LrScheduleConfig(name="constant", warmup_steps=50),
)


def clean_input_digits() -> Recipe:
    """The digits' diffusion model, read without noise from here on."""
    return Recipe(
        name="clean_input_digits",
        about="A copy of a digits' diffusion model learns to give its features from clean images, at no timestep.",
        data=DataConfig(source="digits", augment="shift:1"),
        method=CleanInputConfig(
            teacher="runs/denoiser_digits",
            taps=("mid_block", "up_blocks.0", "up_blocks.1"),
            time_width=64,
            mapping_hidden=128,
        ),
        optim=OPTIM,
        train=TrainConfig(steps=400, batch_size=32),
        assumed=ASSUMED,
        needs=("weights: a diffusion model of digits (diffrep run denoiser_digits --out runs/denoiser_digits)",),
    )


def clean_input_cifar10_small() -> Recipe:
    """The small CIFAR-10 network, around the tap that its probe prefers."""
    return Recipe(
        name="clean_input_cifar10_small",
        about="A copy of a small CIFAR-10 diffusion model learns to give its features from clean images.",
        data=DataConfig(source=REAL, augment="crop_flip:4"),
        method=CleanInputConfig(
            teacher=GENERATOR,
            taps=("up_blocks.0", "up_blocks.1", "up_blocks.2"),
            passes=PassConfig(precision="bf16"),
        ),
        optim=OPTIM,
        train=TrainConfig(steps=300, batch_size=32, precision="bf16"),
        assumed=ASSUMED,
        needs=(DENOISER, IMAGES),
    )


def clean_input_debug() -> Recipe:
    """Two steps with the untrained twin of a run of `denoiser_debug`."""
    base = clean_input_digits()
    assert isinstance(base.method, CleanInputConfig)
    small = {"teacher": "random:runs/denoiser_debug", "time_width": 8, "mapping_hidden": 16}
    return base.model_copy(
        update={
            "name": "clean_input_debug",
            "about": "Two steps of an untrained network's copy towards reading clean images.",
            "method": base.method.model_copy(update=small),
            "train": TrainConfig(steps=2, batch_size=8, log_every=1, checkpoint_every=1),
            "needs": ("weights: diffrep run denoiser_debug --out runs/denoiser_debug",),
        }
    )


RECIPES = (clean_input_digits, clean_input_cifar10_small, clean_input_debug)
