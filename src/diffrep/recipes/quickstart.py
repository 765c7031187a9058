"""Three roads as one study: a diffusion model of digits teaches two small networks what it sees, another draws the set
on which a classifier teaches a third, and ADDP makes digits of tokens; with every control beside them.

docs/results/quickstart.md has the measured table. How the hint is standardised and which share of a policy's batch is
labelled were chosen on the validation images; the test images were read for the table alone.
"""

from __future__ import annotations

from typing import Any, Literal

from diffrep.data.datasets import DataConfig
from diffrep.evaluation.classify import EvaluateConfig
from diffrep.evaluation.sweep import SweepConfig
from diffrep.frozen.features import FeatureConfig
from diffrep.frozen.generator import SamplingConfig
from diffrep.methods.finetune import FinetuneConfig
from diffrep.methods.repfusion import RepFusionConfig, TimestepConfig
from diffrep.models.students import StudentConfig
from diffrep.recipes import addp, dmkd
from diffrep.recipes.base import FeatureTask, Ours, Recipe, Study, SweepTask
from diffrep.recipes.denoiser import denoiser_digits
from diffrep.recipes.repfusion import CONV, DIGITS_TIMESTEPS, GREY_HINT, MLP
from diffrep.training.config import TrainConfig
from diffrep.training.optim import OptimConfig

LABELS = 50  # of 1,078 training images; whatever uses labels sees these and no other
BEST, WORST = 100, 950  # named before the run, from earlier trials; the sweep in the report shows whether they fit
SHIFTED = DataConfig(source="digits", augment="shift:1")
Standardise = Literal["joint", "per_timestep"]


# Of the second road all but the costlier controls (diffrep run dmkd_digits has them).
SECOND_ROAD = {
    name: stage for name, stage in dmkd.stages().items() if not name.startswith(("photo", "one_image", "set_l"))
}


def quickstart() -> Study:
    """About nine CPU-minutes: train the teacher, sweep it, distil, fine-tune; draw a set, learn from it; make digits of
    tokens; compare.
    """
    return Study(
        name="quickstart",
        about="Diffusion on 8x8 digits: models that teach features, that draw data, and that do both with tokens.",
        stages={
            "teacher": denoiser_digits(),
            "sweep": _sweep(),
            "hints": _hints("stage:teacher", DIGITS_TIMESTEPS),
            "random_hints": _hints("random:stage:teacher", (BEST,)),
            **_students("conv", CONV, steps=800),
            **_students("mlp", MLP, steps=800),
            **SECOND_ROAD,
            **addp.stages(),
        },
        arms={
            "conv_untrained": "CNN: untrained",
            "conv_random": "CNN: random teacher",
            "conv_worst": f"CNN: worst t = {WORST}",
            "conv_uniform_joint": "CNN: uniform t, standardised jointly",
            "conv_uniform": "CNN: uniform t",
            "conv_policy": "CNN: learned policy",
            "conv_best": f"CNN: best t = {BEST}",
            "mlp_untrained": "MLP: untrained",
            "mlp_random": "MLP: random teacher",
            "mlp_worst": f"MLP: worst t = {WORST}",
            "mlp_uniform_joint": "MLP: uniform t, standardised jointly",
            "mlp_uniform": "MLP: uniform t",
            "mlp_policy": "MLP: learned policy",
            "mlp_best": f"MLP: best t = {BEST}",
            "conv_scratch": "CNN: from scratch, labels only",
            "conv_finetune": "CNN: policy, then fine-tuned",
            "conv_finetune_best": f"CNN: best t = {BEST}, then fine-tuned",
            "mlp_scratch": "MLP: from scratch, labels only",
            "mlp_finetune": "MLP: policy, then fine-tuned",
            "mlp_finetune_best": f"MLP: best t = {BEST}, then fine-tuned",
            **{name: words for name, words in dmkd.ARMS.items() if name in SECOND_ROAD},
            **addp.ARMS,
        },
        headline=f"linear_probe_{LABELS}",
        ours=Ours(
            value=90.8,
            spread=1.3,
            seeds=5,
            metric=f"CNN with a learned policy, linear probe with {LABELS} labels, % (untrained: 83.6 ± 1.8)",
            command="make evidence; table in docs/results/quickstart.md",
        ),
        next_commands=(
            "diffrep show quickstart > mine.yaml && diffrep run mine.yaml --set sweep.sweep.pool=1",
            "diffrep run quickstart --seeds 0,1,2,3,4",
            "diffrep recipes",
        ),
    )


def quickstart_debug() -> Study:
    """The same stages with hardly any steps, for tests."""
    study = quickstart()
    stages = {name: shortened(stage) for name, stage in study.stages.items()}
    return study.model_copy(
        update={
            "name": "quickstart_debug",
            "about": "The quickstart's stages, two steps each.",
            "stages": stages,
            "ours": None,
        }
    )


def shortened(stage: Any) -> Any:
    """The stage with next to nothing to do."""
    if stage.kind == "recipe":
        steps = min(2, stage.train.steps)
        return stage.model_copy(update={"train": stage.train.model_copy(update={"steps": steps, "log_every": 1})})
    if stage.kind == "synthesis":
        few = stage.synthesis.model_copy(update={"images": 20, "sampling": SamplingConfig(num_sampling_steps="2")})
        return stage.model_copy(update={"synthesis": few})
    if stage.kind == "generation":
        few = stage.alternation.model_copy(update={"steps": 1})
        return stage.model_copy(update={"alternation": few, "images": 4, "block_size": 4})
    if stage.kind == "probe":
        return stage.model_copy(update={"sweep": stage.sweep.model_copy(update={"timesteps": (BEST,), "draws": 1})})
    return stage


def _sweep() -> SweepTask:
    taps = ("down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1")
    # One draw, the same labels that all arms see: even this picture, which decides nothing, uses no other.
    grid = SweepConfig(taps=taps, timesteps=DIGITS_TIMESTEPS, pool=2, labels=LABELS, draws=1)
    return SweepTask(name="sweep", teacher="stage:teacher", data=DataConfig(source="digits"), sweep=grid)


def _hints(teacher: str, timesteps: tuple[int, ...]) -> FeatureTask:
    """The teacher's answers for every image, shift and timestep, computed once for all arms."""
    kept = FeatureConfig(taps=(GREY_HINT["tap"],), timesteps=timesteps, pool=GREY_HINT["hint_grid"], dtype="float32")
    return FeatureTask(name="hints", teacher=teacher, data=SHIFTED, features=kept)


def _students(prefix: str, student: StudentConfig, steps: int) -> dict[str, Recipe]:
    every = TimestepConfig(select="list", values=DIGITS_TIMESTEPS)
    policy = TimestepConfig(select="policy", values=DIGITS_TIMESTEPS, entropy_until=1.0)
    arms = {
        "untrained": _untrained(prefix, student),
        "random": _distil(prefix, student, steps, _fixed(BEST), hints="random_hints"),
        "worst": _distil(prefix, student, steps, _fixed(WORST)),
        "uniform_joint": _distil(prefix, student, steps, every, standardise="joint"),
        "uniform": _distil(prefix, student, steps, every),
        "policy": _distil(prefix, student, steps, policy),
        "best": _distil(prefix, student, steps, _fixed(BEST)),
        "scratch": _finetune(prefix, student, steps + FINETUNE_STEPS, None),
        "finetune": _finetune(prefix, student, FINETUNE_STEPS, "policy"),
        "finetune_best": _finetune(prefix, student, FINETUNE_STEPS, "best"),
    }
    return {f"{prefix}_{name}": recipe for name, recipe in arms.items()}


FINETUNE_STEPS = 300


def _fixed(timestep: int) -> TimestepConfig:
    return TimestepConfig(select="fixed", values=(timestep,))


def _distil(
    prefix: str,
    student: StudentConfig,
    steps: int,
    timestep: TimestepConfig,
    hints: str = "hints",
    standardise: Standardise = "per_timestep",
) -> Recipe:
    learns = timestep.select == "policy"
    return Recipe(
        name=f"{prefix}_distil",
        data=SHIFTED.model_copy(update={"labels": LABELS, "labelled_share": 0.25 if learns else None}),
        method=RepFusionConfig(
            teacher="stage:teacher",
            student=student,
            timestep=timestep,
            features=f"stage:{hints}",
            **{**GREY_HINT, "standardise": standardise},
        ),
        optim=OptimConfig(lr=2e-3, group_lr={"policy": 1.5} if learns else {}),
        train=TrainConfig(steps=steps, batch_size=64, log_every=25),
        evaluate=EvaluateConfig(probe_labels=(LABELS,)),
    )


def _finetune(prefix: str, student: StudentConfig, steps: int, init: str | None) -> Recipe:
    """Labels only, with the same shifts; from scratch it gets both stages' steps."""
    return Recipe(
        name=f"{prefix}_finetune",
        data=SHIFTED.model_copy(update={"labels": LABELS, "labelled_share": 1.0}),
        method=FinetuneConfig(
            student=student, init=f"stage:{prefix}_{init}" if init else None, head_first=1 / 3 if init else 0.0
        ),
        # Head first at 30 times the rate, then everything gently: a full rate would wash stage 1 out again.
        optim=OptimConfig(lr=3e-4 if init else 1e-3, group_lr={"head": 30} if init else {}, weight_decay=5e-3),
        train=TrainConfig(steps=steps, batch_size=50, log_every=25),
        evaluate=EvaluateConfig(probe_labels=(LABELS,)),
    )


def _untrained(prefix: str, student: StudentConfig) -> Recipe:
    """The control below all others: the network as it was initialised."""
    return _distil(prefix, student, 0, _fixed(BEST)).model_copy(update={"name": f"{prefix}_untrained"})


RECIPES = (quickstart, quickstart_debug)
