"""DM-KD's ImageNet-1K table and the one script that was released.

The table's head says "T:RN-50/18"; that the DM-KD rows have the RN-18 is inferred from the script and from the claim
that weak teachers teach better. Amount and length go together in it: 200 epochs of 1.28M images are nine times as many
steps as 200 epochs of 140K, so the rows say little about amount alone. At equal amount (140K) FastDFKD's RN-50 stands
above DM-KD's. The official code has no RN-50 under the name its table needs.
"""

from __future__ import annotations

from diffrep.data.transforms import MAX_VIEWS
from diffrep.frozen.classifier import ClassifierConfig
from diffrep.frozen.generator import HIGH_FIDELITY, LOW_FIDELITY
from diffrep.methods.dmkd import KdLossConfig
from diffrep.models.students import StudentConfig
from diffrep.recipes import dmkd_rows as rows
from diffrep.recipes.base import Recipe, Study
from diffrep.recipes.dmkd_rows import Bench, Course, Lesson

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BENCH = Bench("imagenet:data/imagenet", 224, f"resized_crop:{MAX_VIEWS}", MEAN, STD)
TEST = "ImageNet-1K validation"
TEACHER = ClassifierConfig(reference="torchvision:resnet18")
LOSS = KdLossConfig(kd_temperature=10)
SCRIPT = Course(100, 256, 0.1, 1e-4, (30, 60, 90))
TABLE = Course(200, 256, 0.1, 1e-4, (60, 120, 180))
NETWORKS = {"rn50": "resnet50", "rn18": "resnet18"}

# Published numbers, top-1 % in the order of NETWORKS

README = "DM-KD README, ImageNet-1K table"
AMOUNTS = {"140k": 140_000, "200k": 200_000, "1280k": 1_280_000}
DMKD = {"140k": (66.74, 60.10), "200k": (68.63, 61.61), "1280k": (72.43, 68.25)}
RIVALS: dict[str, dict[str, tuple[float | None, ...]]] = {
    README: {
        "Places365+KD (1.8M real, 200 epochs)": (55.74, 45.53),
        "BigGAN (215K, 90 epochs)": (64.00, None),
        "DeepInv (140K, 90 epochs)": (68.00, None),
        "FastDFKD (140K, 200 epochs)": (68.61, 53.45),
        "One-Image (1.28M, 200 epochs)": (66.20, None),
    },
    "FastDFKD README, ImageNet table, teacher RN-50; not in DM-KD's": {
        "Generative DFD (300 h of synthesis)": (69.75, 54.66),
        "real images and labels": (75.45, 68.45),
    },
    "Azizi et al. 2023, labels of a fine-tuned Imagen, no teacher": {
        "256 pixels": (64.96, None),
        "1024 pixels": (69.24, None),
        "real images and labels": (73.59, None),
    },
}

NEEDED = (
    "data: ImageNet's validation images in data/imagenet (docs/data.md; its terms: non-commercial research)",
    "weights: torchvision's ResNet-18, fetched by torchvision at the first use (BSD-3)",
)
VIEWS = (
    "images are brought to 224 pixels before they are cropped at random, and scored whole; published: 256 pixels, "
    "cropped to 224 in training and around the centre in scoring"
)


def from_drawn(name: str, network: str, amount: str) -> Recipe:
    """A DM-KD row: as many steps as 200 epochs of the published amount."""
    column = list(NETWORKS).index(network)
    found = tuple(rival for source, table in RIVALS.items() for rival in rows.rivals(source, table, column))
    source = SETS[amount]
    return rows.taught(
        name, BENCH, Lesson(rows.set_of(source), AMOUNTS[amount], TABLE), TEACHER, student(network), LOSS,
        about=f"DM-KD's row: rn18 teaches {network} on {amount} drawn images.",
        published=rows.number(DMKD[amount][column], TEST, f"{README}, row DM-KD, {amount}", found),
        assumed=(
            "the teacher is the RN-18: the table's head names two",
            "rate, decay, batch 256, temperature 10: the script's, which runs 100 epochs",
            "the rate falls after epochs 60, 120 and 180",
            VIEWS,
            rows.HELD_OUT,
        ),
        needs=(*NEEDED, rows.made_by(source)),
    )  # fmt: skip


def dmkd_imagenet_rn18_script() -> Recipe:
    """`scripts/imagenet_distill.sh` as it was released, on the list it names."""
    lesson = Lesson("dmkd:data/dmkd/s2_st100_200k.txt", AMOUNTS["200k"], SCRIPT)
    return rows.taught(
        "dmkd_imagenet_rn18_script", BENCH, lesson, TEACHER, student("rn18"), LOSS,
        about="The released script: rn18 teaches rn18 on the released 200K images, 100 epochs.",
        published=rows.number(None, TEST, "not found: the README's tables are of 200 epochs"),
        assumed=(VIEWS, rows.HELD_OUT),
        needs=(
            *NEEDED,
            "data: the released low-fidelity set with its list in data/dmkd (links in the README of "
            "github.com/zhengli97/DM-KD); or your own: --set data.source=synthetic:FOLDER",
        ),
    )  # fmt: skip


def student(network: str) -> StudentConfig:
    """As the official code initialises it: timm would start the last norm of each block at 0."""
    return BENCH.student(NETWORKS[network], zero_init_last=False)


SETS = {
    "140k": "dmkd_imagenet_set_low_140k",
    "200k": "dmkd_imagenet_set_low",
    "1280k": "dmkd_imagenet_set_low_1280k",
}


def drawn(name: str, fidelity: str, amount: str = "200k", noise: str = "own") -> Study:
    """A set over all classes; one seed, so a smaller one is the beginning of a larger one."""
    sampling = {"low": LOW_FIDELITY, "high": HIGH_FIDELITY}[fidelity]
    shared = rows.shared_noise(noise)
    about = f"{amount} images by DiT-XL/2, {fidelity} fidelity{shared}."
    return rows.drawn(name, about, rows.DIT, sampling, AMOUNTS[amount], needs=(rows.DIT_NEEDED,), noise=noise)


RECIPES = (
    *(rows.named(f"dmkd_imagenet_{n}_{a}", from_drawn, n, a) for n in NETWORKS for a in AMOUNTS),
    dmkd_imagenet_rn18_script,
    *(rows.named(name, drawn, "low", amount) for amount, name in SETS.items()),
    rows.named("dmkd_imagenet_set_high", drawn, "high"),
    rows.named("dmkd_imagenet_set_low_faithful", drawn, "low", "200k", "shared"),
    rows.named("dmkd_imagenet_set_high_faithful", drawn, "high", "200k", "shared"),
)
