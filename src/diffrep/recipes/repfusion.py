"""RepFusion: distil a diffusion model's features into a student (stage 1)."""

from __future__ import annotations

from typing import Any

from diffrep.data.datasets import DataConfig
from diffrep.evaluation.classify import EvaluateConfig
from diffrep.methods.repfusion import RepFusionConfig, TimestepConfig
from diffrep.models.students import StudentConfig
from diffrep.recipes.base import Recipe
from diffrep.training.optim import OptimConfig
from diffrep.training.trainer import TrainConfig

DIGITS_TIMESTEPS = (0, 25, 50, 100, 200, 300, 400, 600, 800, 950)
CONV = StudentConfig(name="conv_small", options={"in_chans": 1})
MLP = StudentConfig(name="mlp_small", options={"in_chans": 1, "img_size": 8})
GREY_HINT: dict[str, Any] = {"tap": "up_blocks.1", "hint_grid": 2, "standardise": "per_timestep"}


def repfusion_digits_conv() -> Recipe:
    """A small CNN learns from a diffusion model of digits; the policy sees 50 labels."""
    return Recipe(
        name="repfusion_digits_conv",
        about="A diffusion model of 8x8 digits teaches a 56 k-parameter CNN; the policy sees 50 labels.",
        data=DataConfig(source="digits", augment="shift:1", labels=50, labelled_share=0.25),
        method=RepFusionConfig(
            teacher="runs/denoiser_digits",
            student=CONV,
            timestep=TimestepConfig(select="policy", values=DIGITS_TIMESTEPS, entropy_until=1.0),
            **GREY_HINT,
        ),
        optim=OptimConfig(lr=2e-3, group_lr={"policy": 1.5}),
        train=TrainConfig(steps=1200, batch_size=64),
        evaluate=EvaluateConfig(probe_labels=(50, 100)),
        needs=("weights: a diffusion model of digits (diffrep run denoiser_digits --out runs/denoiser_digits)",),
    )


def repfusion_debug() -> Recipe:
    """Two steps with the untrained twin of a run of `denoiser_debug`."""
    needs = "weights: diffrep run denoiser_debug --out runs/denoiser_debug"
    return _two_steps("repfusion_debug", "random:runs/denoiser_debug", "an untrained teacher", needs)


# Tiny networks in the files of the originals, read by the same code as those of gigabytes.
_WRITTEN = "(tests/frozen/official_files.py writes it)"


def repfusion_adm_debug() -> Recipe:
    """Two steps with a guided-diffusion file, at the tap of the paper's Tiny-ImageNet rows."""
    said = "image_size=8&head_width=16&attention_order=new&noise_schedule=cosine"
    teacher, needs = f"runs/tiny_adm.pt?{said}", f"weights: runs/tiny_adm.pt {_WRITTEN}"
    tap = "middle_block.2.out_layers.3"
    return _two_steps("repfusion_adm_debug", teacher, "a guided-diffusion file", needs, tap)


def repfusion_dit_debug() -> Recipe:
    """Two steps with an official DiT file of pixels, at a normalised block."""
    teacher, needs = "runs/tiny_dit.pt?num_heads=2", f"weights: runs/tiny_dit.pt {_WRITTEN}"
    return _two_steps("repfusion_dit_debug", teacher, "a DiT file", needs, "blocks.0")


def _two_steps(name: str, teacher: str, what: str, needs: str, tap: str | None = None) -> Recipe:
    base = repfusion_digits_conv()
    assert isinstance(base.method, RepFusionConfig)
    method = base.method.model_copy(update={"teacher": teacher, "tap": tap or base.method.tap})
    return base.model_copy(
        update={
            "name": name,
            "about": f"Two steps of policy and student with {what}.",
            "method": method,
            "train": TrainConfig(steps=2, batch_size=8, log_every=1, checkpoint_every=1),
            "needs": (needs,),
        }
    )


RECIPES = (
    repfusion_digits_conv,
    repfusion_debug,
    repfusion_adm_debug,
    repfusion_dit_debug,
)
