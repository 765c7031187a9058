"""Detection on COCO with ViTDet: the recipes that ADDP's and MAE's figures belong to."""

from __future__ import annotations

from diffrep.data.datasets import DataConfig
from diffrep.data.detect_views import DetectViews
from diffrep.evaluation.classify import EvaluateConfig
from diffrep.methods.detect import DetectConfig
from diffrep.models.addp_vit import MEAN, STD
from diffrep.models.mask_rcnn import HeadConfig
from diffrep.models.students import StudentConfig
from diffrep.recipes.addp_released import SIZES
from diffrep.recipes.base import Published, Recipe, Rival
from diffrep.training.config import TrainConfig
from diffrep.training.optim import LrScheduleConfig, OptimConfig

STEPS = 184_375  # 100 epochs of 118,000 pictures
DETECTRON2 = "detectron2, projects/ViTDet"
NEEDED = "data: COCO 2017 in data/coco (docs/data.md; pictures under Flickr's terms)"
ASSUMED = ("every setting: ADDP's code has none for this task; they are those of detectron2's ViTDet",)
# size -> box AP, layer decay, drop path, box AP of MAE with detectron2
SCALES = {"base": (51.7, 0.7, 0.1, 51.6), "large": (54.6, 0.8, 0.4, 55.5)}


def objects(name: str, size: str) -> Recipe:
    """AdamW 1e-4 for 184,375 steps of 64 pictures at 1024 pixels, a tenth of the rate behind 8/9 and 26/27 of them."""
    words, key, _ = SIZES[size]
    box_ap, layer_decay, drop_path, mae = SCALES[size]
    options = {"img_size": 256, "drop_path_rate": drop_path}
    milestones = (163_889 / STEPS, 177_546 / STEPS)
    schedule = LrScheduleConfig(name="step", milestones=milestones, warmup_steps=250, warmup_ratio=0.001)
    return Recipe(
        name=name,
        about=f"Boxes and masks of 80 classes by ViTDet on the released ADDP {words} encoder.",
        data=DataConfig(source="coco:data/coco"),
        method=DetectConfig(
            student=StudentConfig(name=f"vit_{size}_patch16_224", options=options, mean=MEAN, std=STD),
            init=f"weights/{key}",
        ),
        optim=OptimConfig(
            name="adamw", lr=1e-4, weight_decay=0.1, weight_decay_exclude_norms=True, layer_decay=layer_decay,
            lr_schedule=schedule,
        ),
        train=TrainConfig(steps=STEPS, batch_size=64, precision="fp16", checkpoint_every=5_000),
        published=Published(
            value=box_ap, metric="box AP %, COCO val2017", source=f"ADDP README, {words}; mask AP is not printed",
            rivals=(Rival(method=f"MAE {words}, ViTDet", value=mae, source=DETECTRON2),),
        ),
        assumed=ASSUMED,
        needs=(NEEDED, f"weights: {key}.pth of the model page Changyao/ADDP in weights/{key}"),
    )  # fmt: skip


def detect_coco_vitdet_b() -> Recipe:
    """ViT-B."""
    return objects("detect_coco_vitdet_b", "base")


def detect_coco_vitdet_l() -> Recipe:
    """ViT-L."""
    return objects("detect_coco_vitdet_l", "large")


def detect_coco_vitdet_debug() -> Recipe:
    """Two steps on four photographs of 64 pixels, which are their own test."""
    tiny = {"img_size": 32, "embed_dim": 16, "depth": 2, "num_heads": 2}
    heads = HeadConfig(
        channels=8, box_width=16, num_convs=1, anchors=(4, 8, 16, 32, 64), candidates=(50, 50), proposals=20,
        regions=16, detections=5, score=0.0,
    )  # fmt: skip
    return Recipe(
        name="detect_coco_vitdet_debug",
        about="Two steps of ViTDet on a tiny ViT.",
        data=DataConfig(source="coco:data/fixtures/coco", only_part="test"),
        method=DetectConfig(
            student=StudentConfig(name="vit_tiny_patch16_224", options=tiny, mean=MEAN, std=STD),
            views=DetectViews(size=64, scale=(0.8, 1.5)), window=2, global_blocks=(1,), heads=heads,
        ),
        optim=OptimConfig(lr=1e-3, weight_decay=0.1, weight_decay_exclude_norms=True, layer_decay=0.7),
        train=TrainConfig(steps=2, batch_size=2, log_every=1, checkpoint_every=1),
        evaluate=EvaluateConfig(samples=2),
        needs=("data: four photographs of COCO in data/fixtures/coco, in the official layout",),
    )  # fmt: skip


RECIPES = (detect_coco_vitdet_b, detect_coco_vitdet_l, detect_coco_vitdet_debug)
