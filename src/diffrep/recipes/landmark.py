"""Landmarks on WFLW: the configs of the official RepFusion repository's `landmark` folder.

``landmark_wflw_NET`` begins at random (the official baseline; ``--set method.init=RUN`` gives it another start),
``..._distilled`` with what stage 1 taught the same network. Each has a ``_faithful`` twin, which like the official
configs chooses its best network on the test faces. None of the paper's numbers was found in public text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from diffrep.data.datasets import VALIDATION_SHARE, DataConfig
from diffrep.data.landmark_views import LandmarkViews
from diffrep.evaluation.classify import EvaluateConfig
from diffrep.methods.landmark import LandmarkConfig
from diffrep.models.students import StudentConfig
from diffrep.recipes.base import Published, Recipe, Rival, Study
from diffrep.recipes.dmkd_rows import made_by, named
from diffrep.recipes.repfusion_rows import IMAGENET
from diffrep.training.config import TrainConfig
from diffrep.training.optim import LrScheduleConfig, OptimConfig

SOURCE = "wflw:data/wflw"
FACES = 7500  # of the training list
EPOCHS = 60
HELD_OUT = "a tenth of the training faces is held out for selection; the official configs choose on the test faces"
OFFICIAL = "the epoch is chosen on the test faces, as officially: the number is too good by as much"
DATA = "data: WFLW in data/wflw (docs/data.md; non-commercial research)"
README = "mmpose 0.29, model zoo of WFLW"


@dataclass(frozen=True)
class Net:
    """One network of the folder. batch: of all devices together; taught: the recipe of its stage 1."""

    student: str
    batch: int
    taught: str
    fields: dict[str, Any]
    rivals: tuple[tuple[str, float, str], ...]


NETS = {
    "r50": Net(
        "resnet50", 128, "repfusion_celebahq_resnet50", {"head": "deconv"},
        (
            ("ResNet-50, coordinates by smooth L1", 4.88, README),
            ("ResNet-50, coordinates by Wing loss", 4.67, README),
            ("ResNet-50, coordinates by SoftWing loss", 4.44, README),
        ),
    ),
    "hrnet_w18": Net(
        "hrnet_w18", 256, "repfusion_celebahq_hrnet_w18",
        {"head": "concat", "fuse_upsample": "bilinear", "backbone_std": 0.001},
        (
            ("HRNetV2-W18 from ImageNet, its authors", 4.60, "official HRNet repository, WFLW table"),
            ("HRNetV2-W18 from ImageNet, mmpose", 4.06, README),
            ("the same with DARK", 3.98, README),
            ("the same with AdaptiveWing", 4.02, README),
        ),
    ),
}  # fmt: skip


def wflw(name: str, net: str, distilled: bool, faithful: bool) -> Recipe:
    """Adam 2e-3, a tenth after epochs 40 and 55 of 60; 500 steps of warm-up."""
    row, taught = NETS[net], NETS[net].taught + "_faithful" * faithful
    fields = row.fields | ({"init": f"runs/{taught}", "backbone_std": None} if distilled else {})
    before = f"from what {taught} taught it" if distilled else "from scratch, or with --set method.init=RUN"
    needs = (DATA, made_by(taught, "weights")) if distilled else (DATA,)
    return Recipe(
        name=name,
        about=f"98 points of a face by {row.student}, {before}{', as released' * faithful}.",
        data=DataConfig(source=SOURCE),
        method=LandmarkConfig(
            student=StudentConfig(name=row.student, **IMAGENET), select="test" if faithful else "held_out", **fields
        ),
        optim=_optim(),
        train=_train(row.batch, FACES if faithful else round(FACES * (1 - VALIDATION_SHARE))),
        published=Published(
            value=None, metric="NME %, WFLW test", source="ICCV 2023, face tables: not found in public text",
            rivals=tuple(Rival(method=m, value=v, source=s) for m, v, s in row.rivals),
        ),
        assumed=(OFFICIAL if faithful else HELD_OUT,),
        needs=needs,
    )  # fmt: skip


def _optim() -> OptimConfig:
    schedule = LrScheduleConfig(
        name="step", milestones=(40 / EPOCHS, 55 / EPOCHS), warmup_steps=500, warmup_ratio=0.001
    )
    return OptimConfig(name="adam", lr=2e-3, lr_schedule=schedule)


def _train(batch: int, faces: int) -> TrainConfig:
    """As many updates as the published epochs; after each the network is judged, and kept if it is the best."""
    epoch = round(faces / batch)
    return TrainConfig(steps=EPOCHS * epoch, batch_size=batch, checkpoint_every=epoch, log_every=epoch)


def landmark_wflw_r50_debug() -> Recipe:
    """Four faces, which are all of the fixture."""
    small = {"layers": [1, 1, 1, 1], "channels": [8, 16, 32, 64]}
    return Recipe(
        name="landmark_wflw_r50_debug",
        about="Two steps of landmarks on four faces.",
        data=DataConfig(source="wflw:data/fixtures/wflw", only_part="test"),
        method=LandmarkConfig(
            student=StudentConfig(name="resnet50", options=small, **IMAGENET),
            deconv=(16, 16, 16),
            views=LandmarkViews(size=64, sigma=1),
        ),
        optim=_optim(),
        train=TrainConfig(steps=2, batch_size=2, log_every=1, checkpoint_every=1),
        evaluate=EvaluateConfig(samples=2),
        needs=("data: four faces of WFLW in data/fixtures/wflw, in either official layout",),
    )


def _all() -> tuple[Callable[[], Recipe | Study], ...]:
    twins = [(net, start, end) for end in ("", "_faithful") for net in NETS for start in ("", "_distilled")]
    rows = [named(f"landmark_wflw_{net}{start}{end}", wflw, net, bool(start), bool(end)) for net, start, end in twins]
    return (*rows, landmark_wflw_r50_debug)


RECIPES = _all()
