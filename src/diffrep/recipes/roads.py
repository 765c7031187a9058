"""The three roads combined on digits: one student network, 50 labels, and 66,200 student images in every arm.

What one road makes another uses: ADDP's encoder teaches features (RepFusion's stage 1 without a diffusion model), its
images are a classroom (DM-KD), and a student of RepFusion goes on with DM-KD. Each road alone stands beside them.
Neither generator saw a label, so its images have no class: the student reads a teacher's soft answers alone, and
balance is not claimed. Two classifiers teach: one of the same 50 labels, and one of all 1,078, whose students are no
few-label students; the report says so for each arm.

ADDP's encoder is read behind its last block: a probe with 50 labels told validation images apart alike behind each of
the four (81 %; from pixels 81 %, seed 0). The test images were read for the table alone.
"""

from __future__ import annotations

from diffrep.data.datasets import DataConfig
from diffrep.evaluation.classify import EvaluateConfig
from diffrep.frozen.classifier import ClassifierConfig
from diffrep.methods.dmkd import DMKDConfig, KdLossConfig
from diffrep.methods.finetune import FinetuneConfig
from diffrep.methods.repfusion import RepFusionConfig
from diffrep.models.students import StudentConfig
from diffrep.models.vit_students import vit_student
from diffrep.recipes import addp, dmkd, quickstart
from diffrep.recipes.base import GenerationTask, Recipe, Stage, Study
from diffrep.recipes.repfusion import CONV
from diffrep.training.config import TrainConfig
from diffrep.training.optim import OptimConfig

LABELS, SHIFTED = quickstart.LABELS, quickstart.SHIFTED
FIRST, SECOND = 800, quickstart.FINETUNE_STEPS  # steps of 64 images, then of 50
ALONE = (FIRST * 64 + SECOND * 50) // 50  # steps of 50 where there is one stage: as many images
TAP = "network.blocks.3"  # of ADDP's four blocks
MADE = dmkd.DRAWN  # images of each classroom; a tenth is held out
SOURCES = {"real": dmkd.REAL, "drawn": "synthetic:stage:drawn", "addp": "generated:stage:made"}
TEACHERS = {"few": "stage:classifier_few", "all": "stage:classifier"}  # 50 labels, 1,078 labels

ARMS = {
    "scratch": "50 labels alone",
    "conv_finetune": "RepFusion: policy, then tuned",
    "conv_finetune_best": f"RepFusion: best t = {quickstart.BEST}, then tuned",
    "untrained_hint_tuned": "untrained ADDP encoder's features, then tuned",
    "addp_hint_tuned": "ADDP encoder's features, then tuned",
    "addp_tuned": "ADDP's encoder itself (a ViT), tuned",
    "classifier_few": "teacher of 50 labels (wider network)",
    "few_real": "DM-KD: real images, teacher of 50 labels",
    "few_drawn": "DM-KD: drawn images, teacher of 50 labels",
    "few_addp": "DM-KD: ADDP's images, teacher of 50 labels",
    "few_drawn_on": "RepFusion, then DM-KD: drawn images, 50",
    "few_addp_on": "RepFusion, then DM-KD: ADDP's images, 50",
    "classifier": "teacher of all labels (wider network)",
    "all_real": "DM-KD: real images, teacher of all labels",
    "all_drawn": "DM-KD: drawn images, teacher of all labels",
    "all_addp": "DM-KD: ADDP's images, teacher of all labels",
    "all_drawn_on": "RepFusion, then DM-KD: drawn images, all",
    "all_addp_on": "RepFusion, then DM-KD: ADDP's images, all",
    # First stages as they are, for a linear probe.
    "conv_policy": "RepFusion: policy; frozen",
    "conv_best": f"RepFusion: best t = {quickstart.BEST}; frozen",
    "untrained_hint": "untrained ADDP encoder's features; frozen",
    "addp_hint": "ADDP encoder's features; frozen",
    "addp": "ADDP's encoder itself (a ViT); frozen",
}


def roads_digits() -> Study:
    """About six CPU-minutes a seed: both generators, both classifiers, and every student."""
    return Study(
        name="roads_digits",
        about="What the three roads give each other on digits: features, images and a start, for one student network.",
        stages=_stages(),
        arms=ARMS,
        headline="top1",
        next_commands=("diffrep run roads_digits --seeds 0,1,2,3,4",),
    )


def roads_digits_debug() -> Study:
    """The same stages with hardly any steps, for tests."""
    stages = {name: quickstart.shortened(stage) for name, stage in _stages().items()}
    stages["made"] = stages["made"].model_copy(update={"images": 20})  # of fewer none would be held out
    about = "The stages of roads_digits, two steps each."
    return roads_digits().model_copy(update={"name": "roads_digits_debug", "about": about, "stages": stages})


def _stages() -> dict[str, Stage]:
    first = quickstart.quickstart().stages
    known = ("teacher", "hints", "conv_policy", "conv_best", "conv_finetune", "conv_finetune_best")
    return {
        **{name: first[name] for name in known},
        **{name: stage for name, stage in addp.stages().items() if name in NETWORKS},
        "untrained": _as_it_began(),
        **_classrooms(),
        "scratch": _tuned(CONV, ALONE, None),
        **_feature_students(),
        "addp_tuned": _tuned(_vit(), SECOND, "addp"),
        **_pupils(),
    }


NETWORKS = ("tokenizer", "token_predictor", "addp", "classifier")


def _as_it_began() -> Recipe:
    """The control of ADDP's encoder: no step was done."""
    network = addp.stages()["addp"]
    assert isinstance(network, Recipe)
    return network.model_copy(update={"name": "addp_untrained", "train": network.train.model_copy(update={"steps": 0})})


# ADDP's encoder as a teacher of features


def _feature_students() -> dict[str, Stage]:
    found: dict[str, Stage] = {}
    for name in ("untrained", "addp"):
        found[f"{name}_hint"] = _imitates(f"stage:{name}")
        found[f"{name}_hint_tuned"] = _tuned(CONV, SECOND, f"{name}_hint")
    return found


def _imitates(teacher: str) -> Recipe:
    """As the students of a fixed timestep, with an encoder in the diffusion model's place."""
    like = quickstart.quickstart().stages["conv_best"]
    assert isinstance(like, Recipe) and isinstance(like.method, RepFusionConfig)
    method = like.method.model_copy(update={"teacher": teacher, "tap": TAP, "features": None})
    return like.model_copy(update={"name": "conv_imitates_encoder", "method": method})


def _tuned(student: StudentConfig, steps: int, init: str | None) -> Recipe:
    """The 50 labels; a student that begins with a run learns its head first, and then gently, as in the quickstart."""
    like = quickstart.quickstart().stages["conv_finetune" if init else "conv_scratch"]
    assert isinstance(like, Recipe) and isinstance(like.method, FinetuneConfig)
    method = like.method.model_copy(update={"student": student, "init": f"stage:{init}" if init else None})
    return like.model_copy(update={"method": method, "train": like.train.model_copy(update={"steps": steps})})


def _vit() -> StudentConfig:
    """ADDP's encoder as timm's ViT, norm behind the embeddings included."""
    return vit_student(8, 2, addp.ENCODER, pre_norm=True)


# Images as a classroom


def _classrooms() -> dict[str, Stage]:
    """Images of both generators, which saw no label, and what both teachers say of every view of all three sets."""
    few = dmkd.classifier()
    found: dict[str, Stage] = {
        "classifier_few": few.model_copy(
            update={"data": few.data.model_copy(update={"labels": LABELS, "labelled_share": 1.0})}
        ),
        "drawn": dmkd.drawn("stage:teacher", dmkd.CLEAN),
        "made": GenerationTask(
            name="digits_made", model="stage:addp", alternation=addp.WALK, block_size=100, images=MADE
        ),
    }
    for by, teacher in TEACHERS.items():
        found |= {f"{by}_{of}_answers": dmkd.answers(source, teacher) for of, source in SOURCES.items()}
    return found


def _pupils() -> dict[str, Stage]:
    """DM-KD alone on every set, and as the second stage of a student of RepFusion."""
    found: dict[str, Stage] = {}
    for by in TEACHERS:
        for of in SOURCES:
            found[f"{by}_{of}"] = _pupil(by, of, ALONE, None)
            if of != "real":
                found[f"{by}_{of}_on"] = _pupil(by, of, SECOND, "stage:conv_policy")
    return found


def _pupil(by: str, of: str, steps: int, init: str | None) -> Recipe:
    """No label is read here; those behind the teacher are in the report."""
    method = DMKDConfig(
        teacher=ClassifierConfig(reference=TEACHERS[by]),
        student=CONV,
        init=init,
        loss=KdLossConfig(kd_temperature=4),
        answers=f"stage:{by}_{of}_answers",
    )
    return Recipe(
        name="digits_roads_pupil",
        data=DataConfig(source=SOURCES[of], augment=SHIFTED.augment),
        method=method,
        optim=OptimConfig(lr=1e-3 if init else 3e-3),
        train=TrainConfig(steps=steps, batch_size=50),
        evaluate=EvaluateConfig(protocol="classifier", source=dmkd.REAL),
    )


RECIPES = (roads_digits, roads_digits_debug)
