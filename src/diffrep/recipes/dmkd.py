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
from diffrep.training.optim import OptimConfig
from diffrep.training.trainer import TrainConfig

REAL = "digits"
STUDENT = StudentConfig(name="conv_small", options={"in_chans": 1, "widths": [16, 32, 32], "pool": 1})  # 14,458
CLASSIFIER = StudentConfig(name="conv_small", options={"in_chans": 1, "widths": [64, 64, 128, 128], "pool": 1})
SHIFTED = {"augment": "shift:1"}
STEPS = 1600  # of every student: with fewer all of them are limited by their training, not by their images
DRAWN = 2200  # images; a tenth is held out
CLEAN = SamplingConfig(sampler="ddim", num_sampling_steps="20")  # guidance 1: the most varied set taught best


def dmkd_digits() -> Study:
    """About three CPU-minutes: generator, classifier, set, student, and what else could have taught it."""
    return Study(
        name="dmkd_digits",
        about="A student of digits that never saw a real image, beside students of everything it could have seen.",
        stages=stages(),
        arms={
            "classifier": "teacher: real labels",
            "real_pupil": "student: real images + KD",
            "real_labels": "student: real images, labels",
            "set_pupil": "student: drawn images + KD",
            "set_labels": "student: drawn images, labels",
            "photographs_pupil": "student: unrelated photographs + KD",
            "one_image_pupil": "student: one photograph + KD",
            "noise_pupil": "student: noise + KD",
        },
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


RECIPES = (dmkd_digits,)
