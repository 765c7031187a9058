"""The speed run: a small network that learns CIFAR-10 in eight epochs, and a short one for tests.

Rates, decay, smoothing, augmentation and Muon's constants are the published ones; what they do not say is ``ASSUMED``.
The published loss is a sum over the batch and ours its mean, hence the rates of plain SGD times the batch; Muon's step
does not see the difference.
"""

from __future__ import annotations

from diffrep.data.datasets import DataConfig
from diffrep.evaluation.classify import EvaluateConfig
from diffrep.methods.finetune import FinetuneConfig
from diffrep.models.students import StudentConfig
from diffrep.recipes.base import Published, Recipe
from diffrep.recipes.dmkd_cifar10 import IMAGES, MEAN, REAL, STD
from diffrep.training.config import TrainConfig
from diffrep.training.optim import LrScheduleConfig, OptimConfig

BATCH, EPOCHS, SHOWN = 2_000, 8, 45_000
STEPS = EPOCHS * SHOWN // BATCH
FILTERS, BIASES, HEAD = 0.24, 0.053, 0.67  # rates of Muon, of the biases and of the head, for the summed loss
DECAY = 2e-6  # per image of a batch
STEM_EPOCHS = 3  # in which the bias of the whitening filters learns
ASSUMED = (
    "the network behind the whitening: three groups of widths 64, 256, 256, each a 3x3 convolution, max-pool 2, batch "
    "norm, GELU, 3x3 convolution, batch norm, GELU; then the maximum over places and a head without bias",
    "the vector divided by its width 256 before the head, whose weights start with variance 1",
    "filters start as the identity as far as there are inputs; batch norm has weight 1, momentum 0.4 in torch's words "
    "(0.6 in the source's) and eps 1e-12",
    "momentum 0.85 of SGD; the whitening bias has the rate of the other biases and follows the run's decay until it "
    "stops",
    "the whitening looks at 4,096 training images and does not subtract their mean",
    "test views: shifts by one pixel up and left and down and right, together as much as the image in its place",
    "a tenth of the training images is held out, and an epoch has the other 45,000; the published run trains on 50,000",
)


def classifier_cifar10_fast() -> Recipe:
    """180 steps of 2,000 images."""
    return Recipe(
        name="classifier_cifar10_fast",
        about="A CIFAR-10 classifier of 2.0 M parameters in eight epochs: whitening, Muon, alternating flip.",
        data=DataConfig(source=REAL, augment="alternate_flip:2"),
        method=FinetuneConfig(
            student=StudentConfig(name="fast_cnn", mean=MEAN, std=STD),
            label_smoothing=0.2,
            stem_until=STEM_EPOCHS / EPOCHS,
        ),
        optim=rates(BATCH),
        train=TrainConfig(steps=STEPS, batch_size=BATCH, precision="bf16", log_every=5, checkpoint_every=45),
        evaluate=EvaluateConfig(protocol="classifier", views=6),
        published=Published(
            value=94.0,
            metric="top-1 % with six views, CIFAR-10 test",
            source="Jordan 2024 (arXiv 2404.00498) and its repository: 2.59 s on an A100, 0.29 PFLOP with Muon",
        ),
        assumed=ASSUMED,
        needs=(IMAGES,),
    )


def rates(batch: int) -> OptimConfig:
    return OptimConfig(
        name="muon",
        lr=FILTERS,
        group_lr={"biases": BIASES * batch / FILTERS, "head": HEAD * batch / FILTERS},
        weight_decay=DECAY * batch,
        momentum=0.85,
        filter_momentum=0.6,
        lr_schedule=LrScheduleConfig(name="polynomial", power=1.0),
    )


def classifier_cifar10_fast_debug() -> Recipe:
    """Two steps on digits of 32 pixels, in narrow groups."""
    base = classifier_cifar10_fast()
    student = StudentConfig(name="fast_cnn", options={"widths": [8, 16, 16]}, mean=(0.5,), std=(0.5,))
    return base.model_copy(
        update={
            "name": "classifier_cifar10_fast_debug",
            "about": "Two steps of the fast classifier, on digits.",
            "data": DataConfig(source="digits", image_size=32, augment="alternate_flip:2"),
            "method": base.method.model_copy(update={"student": student, "stem_until": 0.5}),
            "optim": rates(20),
            "train": TrainConfig(steps=2, batch_size=20, precision="bf16", log_every=1, checkpoint_every=1),
            "published": None,
            "assumed": (),
            "needs": (),
        }
    )


RECIPES = (classifier_cifar10_fast, classifier_cifar10_fast_debug)
