"""ADDP's encoder on ImageNet-1k: both official fine-tunings, and the linear probe that the official code lacks.

Tian et al., ICLR 2024, arXiv 2306.05423; `scripts/{base,large}/finetune_addp_*.sh` and the defaults of `main_finetune`.
The encoder comes from a released file or from a pretraining of one's own (``method.init``). Neighbours need no
training: any of these with ``train.steps=0`` and ``evaluate.protocol=features`` scores the encoder as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

from diffrep.data.datasets import DataConfig
from diffrep.data.timm_views import TimmConfig
from diffrep.data.transforms import MAX_VIEWS
from diffrep.evaluation.classify import EvaluateConfig
from diffrep.methods.finetune import FinetuneConfig
from diffrep.models.addp_vit import MEAN, STD
from diffrep.models.students import StudentConfig
from diffrep.recipes.addp import addp_debug
from diffrep.recipes.addp_released import SIZES
from diffrep.recipes.base import Published, Recipe, Rival, Study
from diffrep.training.config import TrainConfig
from diffrep.training.optim import LrScheduleConfig, OptimConfig

IMAGES = 1_281_167  # of ImageNet-1k's training part
MIN_LR = 1e-6
METRIC = "top-1 %, ImageNet-1k validation"
README = "ADDP README, table of fine-tuning"
VIEWS = TimmConfig(rand_augment="rand-m9-mstd0.5-inc1", erasing=0.25, mixup=0.8, cutmix=1.0)
ASSUMED = (
    "images are brought to 256 pixels before they are cropped at random; published: cropped as stored, bicubic",
    "which epoch the published number is of, the last or the best, is not stated: the last",
    "one draw of all that is random per row and step; published: per process",
)
DATA = "data: ImageNet-1k in data/imagenet (docs/data.md; its terms: non-commercial research)"


@dataclass(frozen=True)
class Script:
    """One official script: what it sets, and what it reaches."""

    size: str  # of SIZES
    epochs: int
    warmup: int  # epochs
    base_lr: float
    layer_decay: float
    drop_path: float
    top1: float
    rivals: tuple[tuple[str, float, str], ...]


BASE = Script(
    "base", 100, 20, 1e-3, 0.65, 0.1, 83.9,
    (("MAGE ViT-B", 82.5, "MAGE README"), ("MAE ViT-B (224 pixels)", 83.664, "MAE's FINETUNE page")),
)  # fmt: skip
LARGE = Script(
    "large", 50, 5, 2.5e-4, 0.8, 0.2, 85.9,
    (("MAGE ViT-L", 83.9, "MAGE README"), ("MAE ViT-L (224 pixels)", 85.952, "MAE's FINETUNE page")),
)  # fmt: skip


def addp_finetune_base() -> Recipe:
    """finetune_addp_base_100ep: every argument of the script, and the parser's defaults behind it."""
    return _finetuned("addp_finetune_base", BASE)


def addp_finetune_large() -> Recipe:
    """finetune_addp_large_50ep: half the epochs, a lower rate that falls less from block to block."""
    return _finetuned("addp_finetune_large", LARGE)


def _finetuned(name: str, script: Script) -> Recipe:
    words, key, _ = SIZES[script.size]
    optim, train = _course(
        script.epochs, script.warmup, batch_size=1024, base_lr=script.base_lr, min_lr=MIN_LR, weight_decay=0.05,
        weight_decay_exclude_1d=True, layer_decay=script.layer_decay,
    )  # fmt: skip
    rivals = tuple(Rival(method=who, value=value, source=source) for who, value, source in script.rivals)
    return Recipe(
        name=name,
        about=f"The released ADDP {words} encoder learns ImageNet-1k for {script.epochs} epochs.",
        data=_data(),
        method=FinetuneConfig(
            student=vit(script.size), init=f"weights/{key}", tokenizer_norm=False, pooling="avg",
            drop_path=script.drop_path, head_std=2e-5, label_smoothing=0.1, augment=VIEWS,
        ),
        optim=optim,
        train=train,
        evaluate=EvaluateConfig(protocol="classifier"),
        published=Published(value=script.top1, metric=METRIC, source=f"{README}, {words}", rivals=rivals),
        assumed=ASSUMED,
        needs=(_weights(key), DATA),
    )  # fmt: skip


def addp_linear_probe_base() -> Recipe:
    """MAE's protocol (`main_linprobe`): 90 epochs of a linear layer behind BatchNorm, by LARS, the trunk frozen."""
    key = SIZES["base"][1]
    optim, train = _course(90, 10, batch_size=16_384, base_lr=0.1, min_lr=0, name="lars", momentum=0.9)
    rivals = (("MAGE ViT-B", 74.7, "MAGE README"), ("MAE ViT-B (224 pixels)", 67.8, "second-hand, 1600 epochs"))
    return Recipe(
        name="addp_linear_probe_base",
        about="The released ADDP ViT-B encoder, frozen, under a linear layer that learns ImageNet-1k (MAE's protocol).",
        data=_data(),
        method=FinetuneConfig(
            student=vit("base"), init=f"weights/{key}", tokenizer_norm=True, pooling="avg", head_std=0.01,
            head_first=1.0, head_norm=True,
        ),
        optim=optim,
        train=train.model_copy(update={"micro_batch_size": 512}),
        evaluate=EvaluateConfig(protocol="classifier"),
        published=Published(
            value=None,
            metric=METRIC + ", linear probe",
            source="not found: neither paper's page nor README has one",
            rivals=tuple(Rival(method=who, value=value, source=source) for who, value, source in rivals),
        ),
        assumed=(
            "the whole protocol: the official code has no linear probe; every argument is that of MAE's",
            "the mean of the patch features is read, as in ADDP's fine-tuning; MAE reads the class token",
            "the norm behind the embeddings is kept: a frozen trunk cannot learn to do without it",
            "statistics of BatchNorm are of 512 images, as of one device of MAE's 32",
            ASSUMED[0],
        ),
        needs=(_weights(key), DATA),
    )  # fmt: skip


def vit(size: str) -> StudentConfig:
    """timm's ViT with patches of 16 at 256 pixels; images normalised as the encoder saw them."""
    return StudentConfig(name=f"vit_{size}_patch16_224", options={"img_size": 256}, mean=MEAN, std=STD)


def _data() -> DataConfig:
    return DataConfig(source="imagenet:data/imagenet", image_size=256, augment=f"resized_crop:{MAX_VIEWS}:bicubic")


def _course(
    epochs: int, warmup: int, *, batch_size: int, base_lr: float, min_lr: float, **optim: float | str | bool
) -> tuple[OptimConfig, TrainConfig]:
    """Epochs as steps, the last incomplete batch of each dropped; the rate from 0 up, then down a cosine."""
    per_epoch = IMAGES // batch_size
    schedule = LrScheduleConfig(
        warmup_steps=warmup * per_epoch, warmup_from_zero=True, final=min_lr / (base_lr * batch_size / 256)
    )
    train = TrainConfig(
        steps=epochs * per_epoch, batch_size=batch_size, precision="fp16", checkpoint_every=per_epoch
    )  # fmt: skip
    return OptimConfig.model_validate({"base_lr": base_lr, "lr_schedule": schedule, **optim}), train


def _weights(key: str) -> str:
    return f"weights: {key}.pth of the model page Changyao/ADDP in weights/{key} (diffrep convert {key}.pth --out ...)"


def addp_finetune_debug() -> Study:
    """Two steps of everything: the encoder of two steps of pretraining, fine-tuned and probed."""
    before = addp_debug()
    stages = {name: before.stages[name] for name in ("tokenizer", "token_predictor", "addp")}
    options = {"img_size": 8, "patch_size": 2, "embed_dim": 16, "depth": 1, "num_heads": 4}
    tiny = StudentConfig(name="vit_base_patch16_224", options=options, mean=MEAN, std=STD)
    finetuned, probed = addp_finetune_base(), addp_linear_probe_base()
    changes = {"student": tiny, "init": "stage:addp", "tokenizer_norm": True}
    schedule = {"lr_schedule": LrScheduleConfig(warmup_steps=1, warmup_from_zero=True)}
    for name, recipe in (("finetuned", finetuned), ("probed", probed)):
        stages[name] = recipe.model_copy(
            update={
                "name": f"addp_{name}_debug",
                "about": f"Two steps: ADDP's encoder {name}.",
                "data": DataConfig(source="digits", augment="shift:1"),
                "method": recipe.method.model_copy(update=changes),
                "optim": recipe.optim.model_copy(update=schedule),
                "train": TrainConfig(steps=2, batch_size=8, log_every=1, checkpoint_every=1),
                "evaluate": EvaluateConfig(probe_labels=(50,)),
                "published": None,
                "assumed": (),
                "needs": (),
            }
        )
    return Study(
        name="addp_finetune_debug",
        about="Two steps of ADDP's three networks, then of fine-tuning and of a linear probe of the encoder.",
        stages=stages,
        arms={"finetuned": "ADDP: fine-tuned", "probed": "ADDP: linear probe", "addp": "ADDP: frozen encoder"},
        headline="linear_probe_50",
    )


RECIPES = (addp_finetune_base, addp_finetune_large, addp_linear_probe_base, addp_finetune_debug)
