"""Segmentation: faces as in the official RepFusion repository's `segmentation` folder, scenes as ADDP is compared on.

``segment_celebamask_bisenet_NET`` begins at random (the official baseline; ``--set method.init=RUN`` gives it another
start), ``..._distilled`` with what stage 1 taught the same network. Each has a ``_faithful`` twin, whose mirrored faces
keep left and right as the official ones do; methods/segment.py says what of the release cannot be kept.
ADDP's repository has no code for scenes: its figures stand beside mmseg's MAE recipe, whose settings these are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffrep.data.datasets import DataConfig
from diffrep.data.segment_views import SegmentViews
from diffrep.evaluation.classify import EvaluateConfig
from diffrep.methods.segment import SegmentConfig
from diffrep.models.addp_vit import MEAN, STD
from diffrep.models.students import StudentConfig
from diffrep.recipes.addp_released import SIZES
from diffrep.recipes.base import Published, Recipe, Rival
from diffrep.recipes.dmkd_rows import made_by, named
from diffrep.recipes.repfusion_rows import IMAGENET
from diffrep.training.config import TrainConfig
from diffrep.training.optim import LrScheduleConfig, OptimConfig

# Faces

FACES = "celebamask-hq:data/CelebAMask-HQ"
FACES_NEEDED = "data: CelebAMask-HQ in data/CelebAMask-HQ (docs/data.md; non-commercial research)"
FACES_METRIC = "mIoU %, CelebAMask-HQ test, 19 classes"
FACES_ASSUMED = (
    "the official split of CelebA; the official configs draw another, by no fixed seed, with the same counts",
    "19 classes judged at 512 pixels; the release has a head for 18, and its own evaluation stops at an index error",
    "the last network is judged; which one the paper's number is of is not stated",
)
SWAPPED = "left and right change places in mirrored faces; in the official configs they do not"
NETS = {"r18": "resnet18", "r50": "resnet50"}


def faces(name: str, net: str, distilled: bool, faithful: bool) -> Recipe:
    """SGD 5e-3 for 160,000 steps of 16 faces, falling to 1e-4 with power 0.9 behind 1,000 steps of warm-up."""
    taught = f"repfusion_celebahq_{NETS[net]}" + "_faithful" * faithful
    before = f"from what {taught} taught it" if distilled else "from scratch, or with --set method.init=RUN"
    schedule = LrScheduleConfig(name="polynomial", power=0.9, final=1e-4 / 5e-3, warmup_steps=1000, warmup_ratio=0.1)
    return Recipe(
        name=name,
        about=f"19 parts of a face by BiSeNet on {NETS[net]}, {before}{', as released' * faithful}.",
        data=DataConfig(source=FACES),
        method=SegmentConfig(
            student=StudentConfig(name=NETS[net], **IMAGENET),
            views=SegmentViews(swap_mirrored=not faithful),
            init=f"runs/{taught}" if distilled else None,
        ),
        optim=OptimConfig(name="sgd", lr=5e-3, momentum=0.9, weight_decay=5e-4, lr_schedule=schedule),
        train=TrainConfig(steps=160_000, batch_size=16, checkpoint_every=16_000),
        published=Published(
            value=None, metric=FACES_METRIC, source="ICCV 2023, table of face parsing: not found in public text"
        ),
        assumed=FACES_ASSUMED if faithful else (*FACES_ASSUMED, SWAPPED),
        needs=(FACES_NEEDED, made_by(taught, "weights")) if distilled else (FACES_NEEDED,),
    )


def segment_celebamask_bisenet_ohem() -> Recipe:
    """zllrunning's face parser: only hard pixels count, the heads learn ten times as fast."""
    schedule = LrScheduleConfig(
        name="polynomial", power=0.9, warmup_steps=1000, warmup_ratio=1e-5 / 1e-2, warmup_by_powers=True
    )
    views = SegmentViews(ratios=(0.75, 1.0, 1.25, 1.5, 1.75, 2.0), cat_max_ratio=1.0, colour="jitter")
    return Recipe(
        name="segment_celebamask_bisenet_ohem",
        about="19 parts of a face by BiSeNet on ImageNet's resnet18, from hard pixels alone (zllrunning's recipe).",
        data=DataConfig(source=FACES),
        method=SegmentConfig(
            student=StudentConfig(name="resnet18", **IMAGENET), views=views, init="timm:resnet18.tv_in1k", loss="ohem"
        ),
        optim=OptimConfig(
            name="sgd", lr=1e-2, momentum=0.9, weight_decay=5e-4, group_lr={"head": 10.0}, lr_schedule=schedule
        ),
        train=TrainConfig(steps=80_000, batch_size=16, checkpoint_every=16_000),
        published=Published(value=None, metric=FACES_METRIC, source="not found: the repository prints none"),
        assumed=(
            "training reads the training split; published: all 30,000 faces, those of the test too",
            "BiSeNet with a spatial path; batch 16 is that of one device, and how many there were is not stated",
            "weight decay is of all parameters alike",
            "a picture smaller than the crop is padded; published: enlarged to it",
        ),
        needs=(FACES_NEEDED, "weights: timm's resnet18.tv_in1k from the Hub"),
    )


# Scenes

SCENES = "ade20k:data/ADEChallengeData2016"
SCENES_NEEDED = "data: ADE20k in data/ADEChallengeData2016 (docs/data.md; non-commercial research)"
SCENES_METRIC = "mIoU %, ADE20k validation"
SCENES_ASSUMED = (
    "every setting: ADDP's code has none for this task; they are those of mmseg's MAE recipe",
    "the MAE recipe's layer scale and its tables of relative positions, both without effect at first, are left out",
    "one size, as `views.test_ratios` says; which way ADDP's number was taken is not stated",
    "weight decay spares the table of positions; mmseg's code names it otherwise and so does not",
)
MMSEG = "mmsegmentation, configs/mae"
# size -> mIoU, layer decay, drop path, rivals, what else is assumed
SCALES: dict[str, tuple[float, float, float, dict[str, float], tuple[str, ...]]] = {
    "base": (
        48.1, 0.65, 0.1,
        {"MAE ViT-B, one size": 48.13, "MAE ViT-B, six sizes and mirrored": 48.70}, (),
    ),
    "large": (
        54.3, 0.8, 0.2,
        {}, ("maps behind blocks 7, 11, 15 and 23; layer decay 0.8 and drop path 0.2, as ADDP fine-tunes ViT-L",
         "heads 1024 channels wide, as the encoder is; ViT-B's are 768"),
    ),
}  # fmt: skip


def scenes(name: str, size: str) -> Recipe:
    """AdamW 1e-4 for 160,000 steps of 16 crops, falling in a line behind 1,500 steps of warm-up."""
    words, key, _ = SIZES[size]
    miou, layer_decay, drop_path, rivals, assumed = SCALES[size]
    options = {"img_size": 512, "drop_path_rate": drop_path}
    schedule = LrScheduleConfig(name="polynomial", power=1.0, warmup_steps=1500, warmup_ratio=1e-6)
    return Recipe(
        name=name,
        about=f"150 classes of a scene by UperNet on the released ADDP {words} encoder.",
        data=DataConfig(source=SCENES),
        method=SegmentConfig(
            student=StudentConfig(name=f"vit_{size}_patch16_224", options=options, mean=MEAN, std=STD),
            views=SegmentViews(base=(2048, 512), crop=512, test="slide", window=512, stride=256),
            init=f"weights/{key}", head="upernet",
        ),
        optim=OptimConfig(
            name="adamw", lr=1e-4, weight_decay=0.05, weight_decay_exclude_1d=True, layer_decay=layer_decay,
            lr_schedule=schedule,
        ),
        train=TrainConfig(steps=160_000, batch_size=16, precision="fp16", checkpoint_every=16_000),
        published=Published(
            value=miou, metric=SCENES_METRIC, source=f"ADDP README, {words}; one size or several is not stated",
            rivals=tuple(Rival(method=who, value=value, source=MMSEG) for who, value in rivals.items()),
        ),
        assumed=(*SCENES_ASSUMED, *assumed),
        needs=(SCENES_NEEDED, f"weights: {key}.pth of the model page Changyao/ADDP in weights/{key}"),
    )  # fmt: skip


# At the size of a test

TINY = {
    "train": TrainConfig(steps=2, batch_size=2, log_every=1, checkpoint_every=1),
    "evaluate": EvaluateConfig(samples=2),
    "published": None,
    "assumed": (),
}


def segment_celebamask_bisenet_r18_debug() -> Recipe:
    """Two steps on two drawn faces of 64 pixels."""
    base = faces("segment_celebamask_bisenet_r18_debug", "r18", False, False)
    tiny = StudentConfig(name="resnet10t", options={"stem_width": 8, "channels": [8, 16, 32, 64]}, **IMAGENET)
    return _tiny(base, "Two steps of BiSeNet on drawn faces.", "celebamask-hq:data/fixtures/celebamask_hq", tiny)


def segment_ade20k_upernet_debug() -> Recipe:
    """Two steps on three photographs, which are their own test."""
    base = scenes("segment_ade20k_upernet_debug", "base")
    options = {"img_size": 64, "embed_dim": 16, "depth": 4, "num_heads": 2, "drop_path_rate": 0.1}
    tiny = StudentConfig(name="vit_base_patch16_224", options=options, mean=MEAN, std=STD)
    views = {"base": (256, 64), "window": 64, "stride": 32}
    fields = {"init": None, "width": 16, "side_width": 8}
    source = "ade20k:data/fixtures/ade20k"
    return _tiny(base, "Two steps of UperNet on a tiny ViT.", source, tiny, views, fields, only_part="test")


def _tiny(
    base: Recipe,
    about: str,
    source: str,
    student: StudentConfig,
    views: dict[str, Any] | None = None,
    fields: dict[str, Any] | None = None,
    **data: Any,
) -> Recipe:
    assert isinstance(base.method, SegmentConfig)
    seen = base.method.views.model_copy(update={"base": (64, 64), "crop": 64} | (views or {}))
    method = base.method.model_copy(update={"student": student, "views": seen} | (fields or {}))
    changed = {"about": about, "data": DataConfig(source=source, **data), "method": method}
    needs = (f"data: the fixtures in {source.partition(':')[2]}, below $DIFFREP_DATA",)
    return base.model_copy(update=TINY | changed | {"needs": needs})


def _all() -> tuple[Callable[[], Recipe], ...]:
    made: list[Callable[[], Recipe]] = []
    for faithful, suffix in ((False, ""), (True, "_faithful")):
        for net in NETS:
            for distilled, start in ((False, ""), (True, "_distilled")):
                name = f"segment_celebamask_bisenet_{net}{start}{suffix}"
                made.append(named(name, faces, net, distilled, faithful))  # type: ignore[arg-type]
    for size, letter in (("base", "b"), ("large", "l")):
        made.append(named(f"segment_ade20k_upernet_vit_{letter}", scenes, size))  # type: ignore[arg-type]
    return (
        *made,
        segment_celebamask_bisenet_ohem,
        segment_celebamask_bisenet_r18_debug,
        segment_ade20k_upernet_debug,
    )


RECIPES = _all()
