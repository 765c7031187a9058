"""The first road on CIFAR-10, at the size that two cores manage: what a diffusion model's features are worth to a
ResNet-20 with 1,000 labels, against every control at one budget.

Each arm but scratch sees the same 30,000 images, in the same order, and then the same 30,000 views of the 1,000
labelled ones; scratch sees those views for both lengths. Rate, batch, hint grid and fine-tuning were chosen on
validation images with one seed, alike for all arms; the test images were read for the table alone. Only the tap and
the fixed timestep come from an earlier look at the first 2,000 test images; the probed timestep has seen the 1,000
labels alone.
"""

from __future__ import annotations

from typing import Any

from diffrep.data.datasets import DataConfig
from diffrep.evaluation.classify import EvaluateConfig
from diffrep.evaluation.sweep import SweepConfig
from diffrep.frozen.classifier import ClassifierConfig
from diffrep.frozen.passes import PassConfig
from diffrep.methods.contrastive import ContrastiveConfig
from diffrep.methods.dmkd import DMKDConfig, KdLossConfig
from diffrep.methods.finetune import FinetuneConfig
from diffrep.methods.repfusion import RepFusionConfig, TimestepConfig
from diffrep.recipes.base import MethodConfig, Ours, Recipe, Stage, Study, SweepTask
from diffrep.recipes.clean_input import clean_input_cifar10_small
from diffrep.recipes.dmkd_cifar10 import DENOISER, GENERATOR, IMAGES, REAL, STUDENT
from diffrep.recipes.mixing import mixing_cifar10_small
from diffrep.training.config import TrainConfig
from diffrep.training.optim import LrScheduleConfig, OptimConfig

TEACHER, TAP = GENERATOR, "up_blocks.1"
LABELS = 1_000
MORE_LABELS = (2_000, 4_000)  # of scratch, to say what a score is worth in labels
BEST = 50
TIMESTEPS = (0, 10, 25, 50, 100, 200, 300, 400, 600, 800)
BATCH, STEPS = 64, 468  # 30,000 images; the same again for fine-tuning
HINT: dict[str, Any] = {
    "student": STUDENT,
    "hint_grid": 4,
    "standardise": "per_timestep",
    "passes": PassConfig(precision="bf16"),
}
ARMS = {
    "scratch": "from scratch, labels only",
    "random": "random teacher",
    "supervised": "supervised teacher, hint",
    "answers": "supervised teacher, KD",
    "contrastive": "self-supervised (SimCLR)",
    "uniform": "uniform t",
    "policy": "learned policy",
    "fixed": f"fixed t = {BEST}",
    "probed": "t that a probe found",
    "clean": "clean-input extractor",
    "mixed": "learned mix",
}


def repfusion_cifar10_small() -> Study:
    """A 2.6 M-parameter diffusion model of CIFAR-10 teaches ResNet-20; 1,000 labels; every control at one budget."""
    stages: dict[str, Stage] = {"scratch": _labelled(2 * STEPS)}
    stages |= {f"scratch_{count}": _labelled(2 * STEPS, labels=count) for count in MORE_LABELS}
    stages |= {"probe": _probe(), "extractor": _extractor(), "mix": _mix()}
    for name, method in _teachings().items():
        stages |= {name: _imitates(method), f"{name}_tuned": _labelled(STEPS, init=name)}
    tuned = {f"{name}_tuned": words for name, words in ARMS.items() if name != "scratch"}
    more = {f"scratch_{count}": f"from scratch, {count:,} labels" for count in MORE_LABELS}
    frozen = {name: f"{words}; frozen" for name, words in ARMS.items() if name != "scratch"}
    return Study(
        name="repfusion_cifar10_small",
        about="ResNet-20 taught by a small diffusion model of CIFAR-10, 1,000 labels, and every control at one budget.",
        seeds=(0, 1, 2),
        stages=stages,
        arms={"scratch": ARMS["scratch"], **more, **tuned, **frozen},
        headline="top1",
        ours=Ours(
            value=53.2,
            spread=0.3,
            seeds=3,
            metric="top-1 % with 1,000 labels, the t that a probe found (scratch: 48.1 ± 1.0)",
            command="make evidence-repfusion; table in docs/results/repfusion.md",
        ),
        needs=(IMAGES, DENOISER),  # and lightly, for the self-supervised arm: the extra selfsup
    )


def _teachings() -> dict[str, MethodConfig]:
    """Stage 1 of each arm."""
    clean = TimestepConfig(select="fixed", values=(0,))  # of teachers that know no timestep
    return {
        "random": _hint(_fixed(BEST), teacher=f"random:{TEACHER}"),
        "supervised": _hint(clean, teacher="classifier:stage:scratch", tap="network.layer3"),
        "answers": DMKDConfig(
            teacher=ClassifierConfig(reference="stage:scratch"), student=STUDENT, loss=KdLossConfig(kd_temperature=4)
        ),
        "contrastive": ContrastiveConfig(student=STUDENT),
        "uniform": _hint(TimestepConfig(select="list", values=TIMESTEPS)),
        "policy": _hint(TimestepConfig(select="policy", values=TIMESTEPS, entropy_until=1.0)),
        "fixed": _hint(_fixed(BEST)),
        "probed": _hint(TimestepConfig(select="probed", probe="stage:probe")),
        "clean": _hint(clean, teacher="stage:extractor"),
        "mixed": _hint(clean, teacher="stage:mix", tap="descriptor"),
    }


def _fixed(timestep: int) -> TimestepConfig:
    return TimestepConfig(select="fixed", values=(timestep,))


def _hint(timestep: TimestepConfig, teacher: str = TEACHER, tap: str = TAP) -> RepFusionConfig:
    return RepFusionConfig(teacher=teacher, tap=tap, timestep=timestep, **HINT)


def _imitates(method: MethodConfig) -> Recipe:
    """A quarter of each batch is labelled: the policy reads those labels, and all arms see the same images."""
    views = "none" if method.kind == "contrastive" else "crop_flip:4"  # it makes its own
    return Recipe(
        name="cifar10_imitates",
        data=DataConfig(source=REAL, augment=views, labels=LABELS, labelled_share=0.25),
        method=method,
        optim=OptimConfig(lr=2e-3, weight_decay=1e-4, lr_schedule=LrScheduleConfig(warmup_steps=20)),
        train=TrainConfig(steps=STEPS, batch_size=BATCH, precision="bf16", log_every=18, checkpoint_every=234),
        evaluate=EvaluateConfig(probe_labels=(LABELS,)),
    )


def _labelled(steps: int, labels: int = LABELS, init: str | None = None) -> Recipe:
    return Recipe(
        name="cifar10_labelled",
        data=DataConfig(source=REAL, augment="crop_flip:4", labels=labels, labelled_share=1.0),
        method=FinetuneConfig(student=STUDENT, init=f"stage:{init}" if init else None),
        optim=OptimConfig(lr=1e-3, weight_decay=5e-3, lr_schedule=LrScheduleConfig(warmup_steps=20)),
        train=TrainConfig(steps=steps, batch_size=BATCH, precision="bf16", log_every=18, checkpoint_every=234),
        evaluate=EvaluateConfig(probe_labels=(labels,)),
    )


def _probe() -> SweepTask:
    """The timestep that tells most of the 1,000 labelled images from each other, left out one at a time."""
    sweep = SweepConfig(taps=(TAP,), pool=2, search=True, train_images=LABELS, held_out_images=LABELS)
    return SweepTask(name="cifar10_probe", teacher=TEACHER, data=DataConfig(source=REAL), sweep=sweep)


def _extractor() -> Recipe:
    return clean_input_cifar10_small().model_copy(update={"needs": ()})


def _mix() -> Recipe:
    return mixing_cifar10_small().model_copy(update={"needs": ()})


RECIPES = (repfusion_cifar10_small,)
