"""The second road on CIFAR-10, at the size that two cores manage in an hour; a small one for tests.

Steps, rate and temperature are ours, chosen before the run; the test images are read once, for the table.
"""

from __future__ import annotations

from diffrep.data.datasets import DataConfig
from diffrep.evaluation.classify import EvaluateConfig
from diffrep.frozen.classifier import ClassifierConfig
from diffrep.frozen.generator import SamplingConfig
from diffrep.methods.dmkd import DMKDConfig, KdLossConfig
from diffrep.methods.finetune import FinetuneConfig
from diffrep.methods.synthesis import SynthesisConfig
from diffrep.models.students import StudentConfig
from diffrep.recipes.base import Recipe, Stage, Study, SynthesisTask
from diffrep.training.config import TrainConfig
from diffrep.training.optim import LrScheduleConfig, OptimConfig

REAL, SET = "cifar10:data/cifar10", "synthetic:stage:set"
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)  # of CIFAR-10's training images
STUDENT = StudentConfig(name="resnet20_cifar", mean=MEAN, std=STD)
TEACHER = ClassifierConfig(
    reference="weights/resnet56_cifar10.safetensors",
    architecture="resnet56_cifar",
    options={"shortcut": "pad"},
    mean=(0.485, 0.456, 0.406),  # ImageNet's figures, which this network was trained with
    std=(0.229, 0.224, 0.225),
)
GENERATOR = "weights/ddpm_cifar10_small"  # 2.6 M parameters, unconditional: the teacher alone says what is what
DRAWN, STEPS = 5_000, 1_200
IMAGES = "data: CIFAR-10 in data/cifar10 (or below $DIFFREP_DATA)"
DENOISER = "weights: a diffusion model of CIFAR-10 in weights/ddpm_cifar10_small (diffrep run denoiser_cifar10_small)"
NEEDS = (
    IMAGES,
    "weights: weights/resnet56_cifar10.safetensors (github.com/akamaster/pytorch_resnet_cifar10)",
    DENOISER,
)


def dmkd_cifar10_small() -> Study:
    """5,000 images of 20 steps from a small DPM, ResNet-56 to ResNet-20, equal steps for every arm."""
    stages: dict[str, Stage] = {"set": drawn(DRAWN)}
    stages |= {f"{name}_pupil": pupil(source) for name, source in SOURCES.items()} | {"real_labels": labelled(REAL)}
    return Study(
        name="dmkd_cifar10_small",
        about="ResNet-20 taught on 5,000 images that a small diffusion model of CIFAR-10 drew, and its controls.",
        stages=stages,
        arms={
            "real_pupil": "ResNet-20: real images + KD",
            "real_labels": "ResNet-20: real images, labels",
            "set_pupil": "ResNet-20: drawn images + KD",
            "photographs_pupil": "ResNet-20: unrelated photographs + KD",
            "one_image_pupil": "ResNet-20: one photograph + KD",
            "noise_pupil": "ResNet-20: noise + KD",
        },
        headline="top1",
        needs=NEEDS,
    )


CONTROLS = {kind: f"{kind}:{DRAWN}x32" for kind in ("photographs", "one_image", "noise")}
SOURCES = {"set": SET, "real": REAL, **CONTROLS}


def drawn(images: int) -> SynthesisTask:
    """Unlabelled: the generator knows no classes."""
    synthesis = SynthesisConfig(sampling=SamplingConfig(), images=images, block_size=50, shard_size=500)
    return SynthesisTask(name="cifar10_drawn", generator=GENERATOR, synthesis=synthesis)


def pupil(source: str, steps: int = STEPS) -> Recipe:
    """The teacher's answers are the only supervision."""
    method = DMKDConfig(teacher=TEACHER, student=STUDENT, loss=KdLossConfig(kd_temperature=4))
    return _student("cifar10_pupil", source, method, steps)


def labelled(source: str, steps: int = STEPS) -> Recipe:
    return _student("cifar10_labelled", source, FinetuneConfig(student=STUDENT), steps)


def _student(name: str, source: str, method: DMKDConfig | FinetuneConfig, steps: int) -> Recipe:
    return Recipe(
        name=name,
        data=DataConfig(source=source, augment="crop_flip:4"),
        method=method,
        optim=OptimConfig(
            name="sgd", lr=0.1, nesterov=True, weight_decay=5e-4, lr_schedule=LrScheduleConfig(warmup_steps=100)
        ),
        train=TrainConfig(steps=steps, batch_size=64, precision="bf16", checkpoint_every=500),
        evaluate=EvaluateConfig(protocol="classifier", source=REAL),
    )


RECIPES = (dmkd_cifar10_small,)
