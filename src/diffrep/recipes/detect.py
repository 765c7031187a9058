"""Detection on COCO with ViTDet: the recipes that ADDP's and MAE's figures belong to."""

from __future__ import annotations

from diffrep.data.datasets import DataConfig
from diffrep.data.detect_views import DetectViews
from diffrep.evaluation.classify import EvaluateConfig
from diffrep.methods.detect import DetectConfig
from diffrep.models.mask_rcnn import HeadConfig
from diffrep.models.students import StudentConfig
from diffrep.recipes.base import Published, Recipe, Rival
from diffrep.training.config import TrainConfig
from diffrep.training.optim import LrScheduleConfig, OptimConfig

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
STEPS = 184_375  # 100 epochs of 118,000 pictures
ASSUMED = (
    "ADDP's own settings on COCO are in no public file: all are detectron2's ViTDet, which its figures stand beside",
)


def _optim(layer_decay: float) -> OptimConfig:
    schedule = LrScheduleConfig(
        name="step", milestones=(163_889 / STEPS, 177_546 / STEPS), warmup_steps=250, warmup_ratio=0.001
    )
    return OptimConfig(
        lr=1e-4, weight_decay=0.1, weight_decay_exclude_norms=True, layer_decay=layer_decay, lr_schedule=schedule
    )


def _recipe(size: str, student: StudentConfig, layer_decay: float, published: Published) -> Recipe:
    return Recipe(
        name=f"detect_coco_vitdet_{size[-1].lower()}",
        about=f"Boxes and masks on COCO: Mask R-CNN on {size} (ViTDet), 100 epochs at 1024 pixels, from method.init.",
        data=DataConfig(source="coco:data/coco"),
        method=DetectConfig(student=student),
        optim=_optim(layer_decay),
        train=TrainConfig(steps=STEPS, batch_size=64, precision="fp16", log_every=100, checkpoint_every=5000),
        published=published,
        assumed=ASSUMED,
        needs=("data: COCO 2017 at data/coco",),
    )


def detect_coco_vitdet_b() -> Recipe:
    """ViT-B; ``method.init`` names an ADDP or MAE encoder, else it starts from scratch."""
    student = StudentConfig(
        name="vit_base_patch16_224", options={"img_size": 256, "drop_path_rate": 0.1}, mean=MEAN, std=STD
    )
    rival = Rival(method="MAE, 1600 epochs, detectron2", value=51.6, source="detectron2 projects/ViTDet, README")
    published = Published(
        value=51.7, metric="box AP, COCO val2017", source="ADDP README, ViT-B; mask AP not printed", rivals=(rival,)
    )
    return _recipe("ViT-B", student, 0.7, published)


def detect_coco_vitdet_l() -> Recipe:
    """ViT-L."""
    student = StudentConfig(
        name="vit_large_patch16_224", options={"img_size": 256, "drop_path_rate": 0.4}, mean=MEAN, std=STD
    )
    rival = Rival(method="MAE, 1600 epochs, detectron2", value=55.5, source="detectron2 projects/ViTDet, README")
    published = Published(
        value=54.6, metric="box AP, COCO val2017", source="ADDP README, ViT-L; mask AP not printed", rivals=(rival,)
    )
    return _recipe("ViT-L", student, 0.8, published)


def detect_coco_vitdet_debug() -> Recipe:
    """Two steps at 64 pixels, on four pictures."""
    tiny = {"img_size": 32, "embed_dim": 16, "depth": 2, "num_heads": 2}
    heads = HeadConfig(
        channels=8, box_width=16, num_convs=1, anchors=(4, 8, 16, 32, 64), candidates=(50, 50), proposals=20,
        regions=16, detections=5, score=0.0,
    )  # fmt: skip
    return Recipe(
        name="detect_coco_vitdet_debug",
        about="Two steps of ViTDet on four pictures.",
        data=DataConfig(source="coco:data/fixtures/coco", only_part="test"),
        method=DetectConfig(
            student=StudentConfig(name="vit_tiny_patch16_224", options=tiny, mean=MEAN, std=STD),
            views=DetectViews(size=64, scale=(0.8, 1.5)), window=2, global_blocks=(1,), heads=heads,
        ),
        optim=OptimConfig(lr=1e-3, weight_decay=0.1, weight_decay_exclude_norms=True, layer_decay=0.7),
        train=TrainConfig(steps=2, batch_size=2, log_every=1, checkpoint_every=1),
        evaluate=EvaluateConfig(samples=2),
        needs=("data: data/fixtures/coco below $DIFFREP_DATA",),
    )  # fmt: skip


RECIPES = (detect_coco_vitdet_b, detect_coco_vitdet_l, detect_coco_vitdet_debug)
