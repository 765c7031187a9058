"""ADDP's pretraining as it was published: base for 1600 epochs of ImageNet-1K, large for 800.

Tian et al., ICLR 2024, arXiv 2306.05423; `scripts/base/pretrain_addp_base_1600ep.sh`, `scripts/large/pretrain_addp_
large_800ep.sh` and the defaults of `main_pretrain.py`. Either is weeks of many GPUs. `addp_debug` and `addp_digits` are
the same method where minutes suffice; `addp_generate_*` makes and scores the images that the published number is of.
"""

from __future__ import annotations

from diffrep.assets import ASSETS
from diffrep.data.datasets import DataConfig
from diffrep.data.transforms import MAX_VIEWS
from diffrep.evaluation.classify import EvaluateConfig
from diffrep.methods.addp import ADDPConfig
from diffrep.models.addp_vit import LARGE
from diffrep.models.masked_vit import TransformerConfig
from diffrep.recipes import addp_released
from diffrep.recipes.base import Recipe
from diffrep.recipes.dmkd_rows import HELD_OUT, named
from diffrep.training.config import TrainConfig
from diffrep.training.optim import LrScheduleConfig, OptimConfig

BATCH = 4096
EPOCH = 1_281_167 // BATCH  # updates: what does not fill a batch is dropped
WARMUP, SAVED = 40, 5  # epochs
CROPS = f"resized_crop:{MAX_VIEWS}:0.2:bicubic"
TOKENIZER = "vqgan_jax_strongaug"
NETWORKS = {"base": TransformerConfig(), "large": TransformerConfig(**LARGE)}

ASSUMED = (
    "images are brought to 256 pixels before they are cropped at random; published: cropped as stored",
    "one masked share for all images of an update; published: one for each process, of which the number is not stated",
    "the predictor teaches without dropout; published: with it, after each epoch's call of train(); as published with "
    "--set method.predictor_dropout=official",
    "ids are found in float32; published: in float16",
    "float16's loss scale grows every 2,000 updates; published: every 500",
    "which schedule of generation the published numbers are of, 20 or 256 steps, is not stated",
    HELD_OUT.partition(";")[0] + ", and the number of updates is as published",
)


def pretrained(name: str, size: str, epochs: int) -> Recipe:
    """Every argument of the script; a frozen predictor of the same size teaches."""
    words, key, mage = addp_released.SIZES[size]
    return Recipe(
        name=name,
        about=f"ADDP {words}, {epochs} epochs of ImageNet at 256 pixels; weeks of many GPUs.",
        data=DataConfig(source="imagenet:data/imagenet", image_size=256, augment=CROPS),
        method=ADDPConfig(
            tokenizer=f"weights/{TOKENIZER}.ckpt", token_predictor=f"weights/{mage}.pth", network=NETWORKS[size]
        ),
        optim=OptimConfig(
            base_lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, weight_decay_exclude_1d=True,
            lr_schedule=LrScheduleConfig(warmup_steps=WARMUP * EPOCH, warmup_from_zero=True),
        ),
        train=TrainConfig(
            steps=epochs * EPOCH, batch_size=BATCH, precision="fp16", clip_norm=3.0, checkpoint_every=SAVED * EPOCH
        ),
        evaluate=EvaluateConfig(probe_labels=(10_000,)),
        published=addp_released.published(words, key, "addp", mage),
        assumed=ASSUMED,
        needs=(
            "data: ImageNet-1K in data/imagenet (docs/data.md; its terms: non-commercial research)",
            *(f"weights: {_file(asset)}" for asset in (TOKENIZER, mage)),
        ),
    )  # fmt: skip


def _file(key: str) -> str:
    asset = ASSETS[key]
    return f"weights/{asset.file} of {asset.location}; licence {asset.licence}"


RECIPES = (
    named("addp_pretrain_base_1600ep", pretrained, "base", 1600),
    named("addp_pretrain_large_800ep", pretrained, "large", 800),
)
