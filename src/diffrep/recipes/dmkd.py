"""The second road on digits: a classifier teaches a student on images that a diffusion model drew.

docs/results/dmkd.md has the measured tables. Sampling steps, guidance and the temperature were taken from earlier
trials; the test images were read for the tables alone.
"""

from __future__ import annotations

from diffrep.data.datasets import DataConfig
from diffrep.evaluation.classify import EvaluateConfig
from diffrep.frozen.answers import AnswerConfig
from diffrep.frozen.classifier import ClassifierConfig
from diffrep.frozen.generator import SamplingConfig
from diffrep.methods.dmkd import DMKDConfig, KdLossConfig
from diffrep.methods.finetune import FinetuneConfig
from diffrep.methods.synthesis import SynthesisConfig
from diffrep.models.students import StudentConfig
from diffrep.recipes.base import AnswerTask, Recipe, Stage, Study, SynthesisTask
from diffrep.recipes.denoiser import denoiser_digits_conditional
from diffrep.training.config import TrainConfig
from diffrep.training.optim import OptimConfig

REAL = "digits"
STUDENT = StudentConfig(name="conv_small", options={"in_chans": 1, "widths": [16, 32, 32], "pool": 1})  # 14,458
CLASSIFIER = StudentConfig(name="conv_small", options={"in_chans": 1, "widths": [64, 64, 128, 128], "pool": 1})
SHIFTED = {"augment": "shift:1"}
STEPS = 1600  # of every student: with fewer all of them are limited by their training, not by their images
DRAWN = 2200  # images; a tenth is held out
CLEAN = SamplingConfig(sampler="ddim", num_sampling_steps="20")  # guidance 1: the most varied set taught best


ARMS = {
    "classifier": "teacher: real images, labels",
    "real_pupil": "student: real images + KD",
    "real_labels": "student: real images, labels",
    "set_pupil": "student: drawn images + KD",
    "set_labels": "student: drawn images, labels",
    "photographs_pupil": "student: unrelated photographs + KD",
    "one_image_pupil": "student: one photograph + KD",
    "noise_pupil": "student: noise + KD",
}


def dmkd_digits() -> Study:
    """About three CPU-minutes: generator, classifier, set, student, and what else could have taught it."""
    return Study(
        name="dmkd_digits",
        about="A student of digits that never saw a real image, beside students of everything it could have seen.",
        stages=stages(),
        arms=ARMS,
        headline="top1",
    )


def classifier(steps: int = 600, student: StudentConfig = CLASSIFIER) -> Recipe:
    """The teacher: 260,682 parameters, all 1,078 labels."""
    return Recipe(
        name="digits_classifier",
        about="A classifier of digits, to teach with.",
        data=DataConfig(source=REAL, **SHIFTED),
        method=FinetuneConfig(student=student),
        optim=OptimConfig(lr=3e-3, weight_decay=5e-3),
        train=TrainConfig(steps=steps, batch_size=64),
        evaluate=EvaluateConfig(protocol="classifier"),
    )


def drawn(generator: str, sampling: SamplingConfig, images: int = DRAWN) -> SynthesisTask:
    """A labelled set, classes in turn."""
    synthesis = SynthesisConfig(sampling=sampling, images=images, block_size=100, shard_size=1000)
    return SynthesisTask(name="digits_drawn", generator=generator, synthesis=synthesis)


def answers(source: str, teacher: str = "stage:classifier") -> AnswerTask:
    """The classifier's logits for every image and shift, computed once for all students."""
    return AnswerTask(
        name="digits_answers",
        teacher=ClassifierConfig(reference=teacher),
        data=DataConfig(source=source, **SHIFTED),
        answers=AnswerConfig(dtype="float32"),
    )


def pupil(source: str, stored: str | None, teacher: str = "stage:classifier", steps: int = STEPS) -> Recipe:
    """A student of what the classifier says of ``source``; no label is read."""
    method = DMKDConfig(
        teacher=ClassifierConfig(reference=teacher),
        student=STUDENT,
        loss=KdLossConfig(kd_temperature=4),
        answers=stored,
    )
    return _student("digits_pupil", source, method, steps)


def labelled(source: str, steps: int = STEPS) -> Recipe:
    """The same student from the labels of ``source``; no teacher is asked."""
    return _student("digits_labelled", source, FinetuneConfig(student=STUDENT), steps)


def _student(name: str, source: str, method: DMKDConfig | FinetuneConfig, steps: int) -> Recipe:
    return Recipe(
        name=name,
        data=DataConfig(source=source, **SHIFTED),
        method=method,
        optim=OptimConfig(lr=3e-3),
        train=TrainConfig(steps=steps, batch_size=64, checkpoint_every=400),
        evaluate=EvaluateConfig(protocol="classifier", source=REAL),
    )


SET = "synthetic:stage:set"
CONTROLS = {"noise": f"noise:{DRAWN}x8", "photographs": f"photographs:{DRAWN}x8", "one_image": f"one_image:{DRAWN}x8"}


def stages() -> dict[str, Stage]:
    """The main road and its controls."""
    found: dict[str, Stage] = {
        "generator": denoiser_digits_conditional(),
        "classifier": classifier(),
        "set": drawn("stage:generator", CLEAN),
        "real_labels": labelled(REAL),
        "set_labels": labelled(SET),
    }
    for name, source in {"set": SET, "real": REAL, **CONTROLS}.items():
        found[f"{name}_answers"] = answers(source)
        found[f"{name}_pupil"] = pupil(source, f"stage:{name}_answers")
    return found


# Sweeps: two claims of the paper, and what a cheaper sampler costs

CALLS = 22_000  # network calls that each cell of the guidance x steps table may spend on its set
EQUAL = 1_100  # images of every set where samplers or teachers are compared
SAMPLERS = {
    "ddim_5": SamplingConfig(sampler="ddim", num_sampling_steps="5"),
    "ddim_10": SamplingConfig(sampler="ddim", num_sampling_steps="10"),
    "ddim_20": CLEAN,
    "dpmsolver_10": SamplingConfig(sampler="dpmsolver++", num_sampling_steps="10"),
    "unipc_10": SamplingConfig(sampler="unipc", num_sampling_steps="10"),
    "heun_5": SamplingConfig(sampler="heun", num_sampling_steps="5"),
    "ddpm_20": SamplingConfig(sampler="ddpm", num_sampling_steps="20"),
    "ddpm_100": SamplingConfig(sampler="ddpm", num_sampling_steps="100"),
    "paper": SamplingConfig(sampler="ddpm", num_sampling_steps="100", guidance_scale=2.0),  # its low fidelity
}
SMALL = StudentConfig(name="conv_small", options={"in_chans": 1, "widths": [16, 32, 32], "pool": 1})
TEACHERS = {"weak": (60, SMALL), "fair": (150, SMALL), "strong": (600, CLASSIFIER)}  # steps, network


def dmkd_digits_sweeps() -> Study:
    """Guidance x steps at equal compute, samplers at equal images, teachers of different strength."""
    found: dict[str, Stage] = {"generator": denoiser_digits_conditional()}
    arms = {}
    for name, (steps, network) in TEACHERS.items():
        found[f"teacher_{name}"] = classifier(steps, network)
        arms[f"teacher_{name}"] = f"teacher: {name}, {steps} steps"
    for scale in (1, 2, 4):
        for steps in (5, 20, 100):
            name, calls = f"s{scale}_t{steps}", steps * (1 if scale == 1 else 2)
            sampling = SamplingConfig(guidance_scale=float(scale), num_sampling_steps=str(steps))
            found |= _cell(name, sampling, CALLS // calls, "strong")
            arms[f"{name}_pupil"] = f"student, equal compute: s = {scale}, T = {steps}"
    for name, sampling in SAMPLERS.items():
        found |= _cell(name, sampling, EQUAL, "strong")
        how = f"{sampling.sampler}, {sampling.num_sampling_steps} steps"
        arms[f"{name}_pupil"] = f"student, {EQUAL} images: {how}{', s = 2' if sampling.is_guided else ''}"
    for name in ("weak", "fair"):
        found[f"by_{name}_answers"] = answers("synthetic:stage:ddim_20_set", f"stage:teacher_{name}")
        found[f"by_{name}_pupil"] = pupil(
            "synthetic:stage:ddim_20_set", f"stage:by_{name}_answers", f"stage:teacher_{name}"
        )
        arms[f"by_{name}_pupil"] = f"student, {EQUAL} images: ddim, 20 steps, {name} teacher"
    return Study(
        name="dmkd_digits_sweeps",
        about="Which guidance, how many steps, which sampler, which teacher: sets of digits drawn in every way.",
        stages=found,
        arms=arms,
        headline="top1",
        seeds=(0, 1, 2, 3, 4),
    )


def _cell(name: str, sampling: SamplingConfig, images: int, teacher: str) -> dict[str, Stage]:
    """A set, what the teacher says of it, and the student that learns from that."""
    source, by = f"synthetic:stage:{name}_set", f"stage:teacher_{teacher}"
    return {
        f"{name}_set": drawn("stage:generator", sampling, images),
        f"{name}_answers": answers(source, by),
        f"{name}_pupil": pupil(source, f"stage:{name}_answers", by),
    }


RECIPES = (dmkd_digits, dmkd_digits_sweeps)
