"""DM-KD's CIFAR-100 table: five pairs of teacher and student, on drawn images and on real ones.

Its rows of real data repeat FastDFKD's README number for number, so the teachers are taken to be FastDFKD's files
[inferred]. How the DM-KD row's images were drawn is not stated. Of the rivals, CMI stands above DM-KD in four of the
five pairs and is not in the paper's table; DFQ stands above it in the first.
"""

from __future__ import annotations

from diffrep.data.datasets import DataConfig
from diffrep.evaluation.classify import EvaluateConfig
from diffrep.frozen.classifier import ClassifierConfig
from diffrep.frozen.generator import HIGH_FIDELITY, LOW_FIDELITY
from diffrep.methods.dmkd import KdLossConfig
from diffrep.recipes import dmkd_rows as rows
from diffrep.recipes.base import Recipe, Rival, Study
from diffrep.recipes.dmkd_rows import Bench, Course, Lesson
from diffrep.training.config import TrainConfig

# The mean and std that FastDFKD's and DM-KD's code share.
BENCH = Bench("cifar100:data/cifar100", 32, "crop_flip:4", (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))
REAL, REAL_IMAGES = BENCH.test, 50_000
DRAWN = 50_000  # images; the default of the official CIFAR-100 loader, with s = 2 and T = 100
CLASSES = 100
TEST = "CIFAR-100 test"

NETWORKS = {
    "rn34": "resnet34_cifar",
    "rn18": "resnet18_cifar",
    "vgg11": "vgg11_cifar",
    "wrn40_2": "wrn_40_2_cifar",
    "wrn40_1": "wrn_40_1_cifar",
    "wrn16_2": "wrn_16_2_cifar",
    "wrn16_1": "wrn_16_1_cifar",
}
FILES = {"rn34": "resnet34", "vgg11": "vgg11", "wrn40_2": "wrn40_2"}  # of FastDFKD: cifar100_NAME.pth
PAIRS = (
    ("rn34", "rn18"), ("vgg11", "rn18"), ("wrn40_2", "wrn16_1"), ("wrn40_2", "wrn40_1"), ("wrn40_2", "wrn16_2"),
)  # fmt: skip

# Published numbers, top-1 % in the order of PAIRS

DMKD_README = "DM-KD README, CIFAR-100 table"
TEACHER = (78.05, 71.32, 75.83, 75.83, 75.83)
LABELS = (77.10, 77.10, 65.31, 72.19, 73.56)
REAL_KD = (77.87, 75.07, 64.06, 68.58, 70.79)
DMKD = (76.58, 70.83, 56.29, 65.01, 66.89)
NONE = (None,) * 4
RIVALS: dict[str, dict[str, tuple[float | None, ...]]] = {
    DMKD_README: {
        "DeepInv": (61.32, 54.13, 53.77, 61.33, 61.34),
        "DAFL": (74.47, 54.16, 20.88, 42.83, 43.70),
        "DFQ": (77.01, 66.21, 51.27, 54.43, 64.79),
        "FastDFKD (Fast-10)": (74.34, 67.44, 54.02, 63.91, 65.12),
        "One-Image": (74.56, 68.51, 34.62, 52.39, 54.71),
    },
    "FastDFKD README, CIFAR-100 table; not in DM-KD's": {
        "CMI-500": (77.04, 70.56, 57.91, 68.88, 68.75),
        "ZSKT": (67.74, 54.31, 36.66, 53.60, 54.59),
        "Fast-2": (69.76, 62.83, 41.77, 53.15, 57.08),
        "Fast-5": (72.82, 65.28, 52.90, 61.80, 63.83),
    },
    "CMI README, which has other numbers for the same methods": {
        "DFQ": (77.01, 68.32, 54.77, 62.92, 59.01),
        "DAFL": (74.47, 57.29, 22.50, 34.66, 40.00),
        "ZSKT": (67.74, 34.72, 30.15, 29.73, 28.44),
    },
    "NAYER (CVPR 2024), read off its plot, within 0.2": {
        "NAYER, 100 epochs": (*NONE, 70.2),
        "NAYER, 200 epochs": (*NONE, 71.2),
        "NAYER, 300 epochs": (*NONE, 71.7),
        "FastDFKD, 100 epochs": (*NONE, 67.1),
        "FastDFKD, 200 epochs": (*NONE, 68.0),
        "FastDFKD, 300 epochs": (*NONE, 68.3),
        "SpaceshipNet": (*NONE, 69.7),
        "MAD": (*NONE, 64.1),
    },
}

# Schedules

STUDENT = Course(240, 128, 0.1, 5e-4, (150, 180, 210))  # defaults of the official parser
SCRATCH = Course(200, 256, 0.1, 1e-4, (120, 150, 180), gamma=0.2)  # FastDFKD's train_scratch
VANILLA = Course(200, 128, 0.1, 1e-4, (120, 150, 180))  # FastDFKD's vanilla_kd
REPDISTILLER = Course(240, 64, 0.05, 5e-4, (150, 180, 210))

# RepDistiller's README, of other teachers of the same kind and real images: student {method: number}
REPDISTILLER_README = "RepDistiller README, its own teacher, 240 epochs"
REAL_RIVALS = {
    "wrn16_2": {"KD, softening 4": 74.92, "CRD": 75.48, "labels": 73.26},
    "wrn40_1": {"KD, softening 4": 73.54, "CRD": 74.14, "labels": 71.98},
}

DATA_NEEDED = "data: CIFAR-100 in data/cifar100 (diffrep data prepare cifar100 ARCHIVE data/cifar100)"
TEACHERS_NEEDED = (
    "weights: FastDFKD's teachers in weights/fastdfkd (266 MB, no licence file; the README of "
    "github.com/zju-vipa/Fast-Datafree links them)"
)
README_COMMAND = "schedule of the command in FastDFKD's README, which shows it for CIFAR-10"


def teacher(name: str) -> ClassifierConfig:
    return BENCH.teacher(f"weights/fastdfkd/cifar100_{FILES[name]}.pth", NETWORKS[name], CLASSES)


def from_drawn(name: str, column: int) -> Recipe:
    """The DM-KD row: the student sees drawn images alone, and no label."""
    taught_by, student = PAIRS[column]
    found = tuple(rival for source, table in RIVALS.items() for rival in rows.rivals(source, table, column))
    return rows.taught(
        name, BENCH, Lesson(rows.set_of("dmkd_cifar100_set_low"), DRAWN, STUDENT), teacher(taught_by),
        BENCH.student(NETWORKS[student]), KdLossConfig(kd_temperature=4, kd_weight=0.9),
        about=f"DM-KD's row: {taught_by} teaches {student} on {DRAWN:,} drawn images of ImageNet's classes.",
        published=rows.number(DMKD[column], TEST, f"{DMKD_README}, row DM-KD", found),
        assumed=(
            "the set: 50K images of all 1,000 classes at s = 2, T = 100, the CIFAR-100 loader's default; the parser's "
            "is 400K at s = 4",
            "optimiser, epochs, temperature 4 and KD weight 0.9: the parser's defaults; no CIFAR script was released",
            rows.HELD_OUT,
        ),
        needs=(DATA_NEEDED, TEACHERS_NEEDED, rows.made_by("dmkd_cifar100_set_low")),
    )  # fmt: skip


def from_real(name: str, column: int) -> Recipe:
    """The row KD: the same pair on CIFAR-100's own images. FastDFKD's baseline is a weak one: softening 1."""
    taught_by, student = PAIRS[column]
    found = REAL_RIVALS.get(student, {}).items()
    stronger = tuple(Rival(method=method, value=value, source=REPDISTILLER_README) for method, value in found)
    return rows.taught(
        name, BENCH, Lesson(REAL, REAL_IMAGES, VANILLA), teacher(taught_by), BENCH.student(NETWORKS[student]),
        KdLossConfig(kd_temperature=1, label_weight=0.1),
        about=f"DM-KD's row KD: {taught_by} teaches {student} on the real images.",
        published=rows.number(REAL_KD[column], TEST, f"{DMKD_README}, row KD", stronger),
        assumed=(f"{README_COMMAND}: softening 1, labels weighted 0.1", rows.HELD_OUT),
        needs=(DATA_NEEDED, TEACHERS_NEEDED),
    )  # fmt: skip


def from_labels(
    name: str, network: str, value: float, source: str, course: Course, assumed: tuple[str, ...] = ()
) -> Recipe:
    """A network of the table trained on labels: a student's baseline, or a teacher made anew."""
    return rows.labelled(
        name, BENCH, Lesson(REAL, REAL_IMAGES, course), BENCH.student(NETWORKS[network]),
        about=f"{network} from CIFAR-100's labels.",
        published=rows.number(value, TEST, source),
        assumed=(*assumed, rows.HELD_OUT),
        needs=(DATA_NEEDED,),
    )  # fmt: skip


def drawn(name: str, fidelity: str, noise: str) -> Study:
    """What the students see: images of ImageNet's classes, which the loader shrinks to 32 pixels once."""
    sampling = {"low": LOW_FIDELITY, "high": HIGH_FIDELITY}[fidelity]
    shared = rows.shared_noise(noise)
    return rows.drawn(
        name, f"{DRAWN:,} images of 1,000 classes by DiT-XL/2, {fidelity} fidelity{shared}.", rows.DIT, sampling, DRAWN,
        needs=(rows.DIT_NEEDED,), assumed=("50 images of each class, as many as CIFAR-100 has in all",), noise=noise,
    )  # fmt: skip


def dmkd_cifar100_debug() -> Recipe:
    """Two steps of the DM-KD row's twin on digits of 32 pixels, with an untrained teacher."""
    real = from_drawn("dmkd_cifar100_debug", 0)
    twin = BENCH.teacher("random:timm:resnet8_cifar", "", 10).model_copy(update={"architecture": None})
    method = real.method.model_copy(update={"teacher": twin, "student": BENCH.student("resnet8_cifar")})
    return real.model_copy(
        update={
            "about": "Two steps of a tiny student under an untrained teacher.",
            "data": DataConfig(source="digits", image_size=32, augment=BENCH.augment),
            "method": method,
            "train": TrainConfig(steps=2, batch_size=8, log_every=1, checkpoint_every=1),
            "evaluate": EvaluateConfig(protocol="classifier"),
            "published": None,
            "assumed": (),
            "needs": (),
        }
    )


def _students() -> dict[str, float]:
    """Each student of the table once, with its number."""
    return dict(zip((student for _, student in PAIRS), LABELS, strict=True))


def _teachers() -> dict[str, float]:
    return dict(zip((teacher for teacher, _ in PAIRS), TEACHER, strict=True))


FASTDFKD = (SCRATCH, (README_COMMAND,))
RECIPES = (
    *(rows.named(f"dmkd_cifar100_{t}_{s}", from_drawn, i) for i, (t, s) in enumerate(PAIRS)),
    *(rows.named(f"dmkd_cifar100_{t}_{s}_real", from_real, i) for i, (t, s) in enumerate(PAIRS)),
    *(
        rows.named(f"dmkd_cifar100_{s}_labels", from_labels, s, value, f"{DMKD_README}, row Student", *FASTDFKD)
        for s, value in _students().items()
    ),
    *(
        rows.named(f"dmkd_cifar100_{t}_teacher", from_labels, t, value, f"{DMKD_README}, row Teacher", *FASTDFKD)
        for t, value in _teachers().items()
    ),
    rows.named(
        "dmkd_cifar100_wrn40_2_repdistiller", from_labels, "wrn40_2", 75.61, "RepDistiller README", REPDISTILLER
    ),
    rows.named("dmkd_cifar100_set_low", drawn, "low", "own"),
    rows.named("dmkd_cifar100_set_high", drawn, "high", "own"),
    rows.named("dmkd_cifar100_set_low_faithful", drawn, "low", "shared"),
    rows.named("dmkd_cifar100_set_high_faithful", drawn, "high", "shared"),
    dmkd_cifar100_debug,
)  # fmt: skip
