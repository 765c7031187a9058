"""RepFusion: distil a diffusion model's features into a student (stage 1)."""

from __future__ import annotations

from typing import Any

from diffrep.data.datasets import DataConfig
from diffrep.evaluation.classify import EvaluateConfig
from diffrep.methods.repfusion import PairConfig, RepFusionConfig, TimestepConfig
from diffrep.models.students import StudentConfig
from diffrep.recipes.base import Recipe
from diffrep.training.config import TrainConfig
from diffrep.training.optim import OptimConfig

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


# One debug twin for each way of comparing that the recipes of recipes/repfusion_rows.py use, and for what goes beyond.


def repfusion_at_debug() -> Recipe:
    """Two steps of attention transfer, whole maps."""
    return _compared("at", "attention transfer", hint_grid=None, standardise="none", kd_weight=1000.0)


def repfusion_rkd_debug() -> Recipe:
    """Two steps of relational distillation."""
    return _compared("rkd", "relations of images", hint_grid=1, standardise="none")


def repfusion_dense_debug() -> Recipe:
    """Two steps of the dense hint of CelebA-HQ's recipes: L1, whole maps, the cleanest timestep."""
    clean = TimestepConfig(select="fixed", values=(0,))
    return _compared("l1", "a dense hint", twin="dense", hint_grid=None, standardise="none", timestep=clean)


def repfusion_crd_debug() -> Recipe:
    """Two steps of contrast with a memory of all images."""
    return _compared("crd", "a memory of all images (CRD)", negatives=64)


def repfusion_pairs_debug() -> Recipe:
    """Two steps with two tap pairs, each bound to a range of timesteps of its own."""
    inner = PairConfig(tap="mid_block", student_tap="layer1")
    ranges = TimestepConfig(select="ranges", values=(0, 100, 400))
    return _compared("l2", "two tap pairs", twin="pairs", more_pairs=(inner,), timestep=ranges, standardise="joint")


def _compared(loss: str, what: str, twin: str | None = None, **changes: Any) -> Recipe:
    base = repfusion_debug()
    method = RepFusionConfig.model_validate(base.method.model_dump() | {"loss": loss, **changes})
    learns = method.timestep.select == "policy"
    return base.model_copy(
        update={
            "name": f"repfusion_{twin or loss}_debug",
            "about": f"Two steps with {what}.",
            "method": method,
            "optim": base.optim if learns else OptimConfig(lr=2e-3),
        }
    )


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
    repfusion_at_debug,
    repfusion_rkd_debug,
    repfusion_dense_debug,
    repfusion_crd_debug,
    repfusion_pairs_debug,
)
