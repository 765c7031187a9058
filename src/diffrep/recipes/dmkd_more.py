"""DM-KD's third table, RN-18 to RN-50 on ImageNet-100 and Flowers-102, and a small road for tests.

Of these experiments three numbers each are public. Not found: which hundred classes, how many images, which generator
and prompts drew the flowers. The teachers' 89.6 and 87.9 are too high for training from nothing [inferred]: they
probably began from ImageNet-1K weights, which a recipe cannot begin from yet.
"""

from __future__ import annotations

from dataclasses import replace

from diffrep.frozen.answers import AnswerConfig
from diffrep.frozen.classifier import ClassifierConfig
from diffrep.frozen.generator import HIGH_FIDELITY, LOW_FIDELITY
from diffrep.methods.denoiser import DenoiserConfig
from diffrep.recipes import dmkd_imagenet as imagenet
from diffrep.recipes import dmkd_rows as rows
from diffrep.recipes.base import AnswerTask, Published, Recipe, Study
from diffrep.recipes.denoiser import denoiser_debug
from diffrep.recipes.dmkd_rows import Bench, Course, Lesson

README = "DM-KD README, table of other data sets"
FIDELITIES = {"low": LOW_FIDELITY, "high": HIGH_FIDELITY}
FROM_NOTHING = "training from nothing; the published teacher probably began from ImageNet-1K weights"


def _published(value: float, column: str, test: str, one_image: float | None = None) -> Published:
    others = rows.rivals(README, {"One-Image": (one_image,)}, 0)
    return rows.number(value, test, f"{README}, column {column}", others)


# ImageNet-100

# The list of 100 classes in common use (imagenet100.txt of github.com/HobbitLong/CMC), as ImageNet-1K's class numbers.
IMAGENET100 = (
    15, 45, 54, 57, 64, 74, 90, 99, 119, 120, 122, 131, 137, 151, 155, 157, 158, 166, 167, 169, 176, 180, 209, 211, 222,
    228, 234, 236, 242, 246, 267, 268, 272, 275, 277, 281, 299, 305, 313, 317, 331, 342, 368, 374, 407, 421, 431, 449,
    452, 455, 479, 494, 498, 503, 508, 544, 560, 570, 592, 593, 599, 606, 608, 619, 620, 653, 659, 662, 665, 667, 674,
    682, 703, 708, 717, 724, 748, 758, 765, 766, 772, 775, 796, 798, 830, 854, 857, 858, 872, 876, 882, 904, 908, 936,
    938, 953, 959, 960, 993, 994,
)  # fmt: skip
HUNDRED = replace(imagenet.BENCH, test="imagenet:data/imagenet@data/lists/imagenet100.txt")
HUNDRED_TEST = "validation images of ImageNet-100"
HUNDRED_NEEDED = (
    "data: ImageNet-1K in data/imagenet and a list of 100 WordNet ids in data/lists/imagenet100.txt "
    "(docs/data.md; its terms: non-commercial research)"
)
WHICH_CLASSES = "the list of 100 classes in common use; DM-KD's is not named"


def dmkd_imagenet100_rn50() -> Recipe:
    """The DM-KD column of the row ImageNet-100."""
    return rows.taught(
        "dmkd_imagenet100_rn50", HUNDRED, Lesson(rows.set_of("dmkd_imagenet100_set_low"), 20_000, imagenet.TABLE),
        ClassifierConfig(reference="runs/dmkd_imagenet100_rn18_teacher"), imagenet.student("rn50"), imagenet.LOSS,
        about="DM-KD's row ImageNet-100: rn18 teaches rn50 on drawn images of the hundred classes.",
        published=_published(85.9, "Ours", HUNDRED_TEST, one_image=84.4),
        assumed=(
            "20,000 images, 200 of each class, at s = 2, T = 100",
            "schedule and temperature: as dmkd_imagenet_rn50_200k",
            WHICH_CLASSES, imagenet.VIEWS, rows.HELD_OUT,
        ),
        needs=(
            HUNDRED_NEEDED,
            rows.made_by("dmkd_imagenet100_rn18_teacher", "weights"),
            rows.made_by("dmkd_imagenet100_set_low"),
        ),
    )  # fmt: skip


def dmkd_imagenet100_rn18_teacher() -> Recipe:
    """Its teacher, from the labels of the hundred classes."""
    lesson = Lesson(HUNDRED.test, 128_117, imagenet.SCRIPT)  # a tenth of ImageNet-1K's images
    return rows.labelled(
        "dmkd_imagenet100_rn18_teacher", HUNDRED, lesson, imagenet.student("rn18"),
        about="rn18 from ImageNet-100's labels.",
        published=_published(89.6, "Teacher", HUNDRED_TEST),
        assumed=(f"the whole schedule, and {FROM_NOTHING}", WHICH_CLASSES, imagenet.VIEWS, rows.HELD_OUT),
        needs=(HUNDRED_NEEDED,),
    )  # fmt: skip


def hundred(name: str, fidelity: str, noise: str = "own") -> Study:
    """The set of the hundred classes; label k is the k-th of the sorted ids, as imagenet:FOLDER@LIST counts."""
    shared = rows.shared_noise(noise)
    about = f"20,000 images of ImageNet-100's classes by DiT-XL/2, {fidelity} fidelity{shared}."
    return rows.drawn(
        name, about, rows.DIT, FIDELITIES[fidelity], 20_000, needs=(rows.DIT_NEEDED,),
        assumed=("200 images of each class", WHICH_CLASSES), classes=IMAGENET100, noise=noise,
    )  # fmt: skip


# Flowers-102

FLOWERS = replace(imagenet.BENCH, test="flowers102:data/flowers-102")
FLOWERS_TEST = "Flowers-102 test"
FLOWERS_NEEDED = "data: Flowers-102 in data/flowers-102 (docs/data.md)"
# The authors number the classes 1 to 102; the names, in that order, are those in common use.
FLOWER_NAMES = tuple(
    """pink primrose, hard-leaved pocket orchid, canterbury bells, sweet pea, english marigold, tiger lily, moon orchid,
    bird of paradise, monkshood, globe thistle, snapdragon, colt's foot, king protea, spear thistle, yellow iris,
    globe-flower, purple coneflower, peruvian lily, balloon flower, giant white arum lily, fire lily, pincushion flower,
    fritillary, red ginger, grape hyacinth, corn poppy, prince of wales feathers, stemless gentian, artichoke,
    sweet william, carnation, garden phlox, love in the mist, mexican aster, alpine sea holly, ruby-lipped cattleya,
    cape flower, great masterwort, siam tulip, lenten rose, barbeton daisy, daffodil, sword lily, poinsettia,
    bolero deep blue, wallflower, marigold, buttercup, oxeye daisy, common dandelion, petunia, wild pansy, primula,
    sunflower, pelargonium, bishop of llandaff, gaura, geranium, orange dahlia, pink-yellow dahlia, cautleya spicata,
    japanese anemone, black-eyed susan, silverbush, californian poppy, osteospermum, spring crocus, bearded iris,
    windflower, tree poppy, gazania, azalea, water lily, rose, thorn apple, morning glory, passion flower, lotus,
    toad lily, anthurium, frangipani, clematis, hibiscus, columbine, desert-rose, tree mallow, magnolia, cyclamen,
    watercress, canna lily, hippeastrum, bee balm, ball moss, foxglove, bougainvillea, camellia, mallow,
    mexican petunia, bromelia, blanket flower, trumpet creeper, blackberry lily""".replace("\n    ", " ").split(", ")
)
PROMPTED = 20_400  # images, 200 of each class
TEXT = "weights/diffusers/stable-diffusion"
TEXT_NEEDED = f"weights: a text-to-image pipeline of diffusers in {TEXT}; the paper names Stable Diffusion, not which"


def flowers(name: str, study: str, images: int, assumed: str) -> Recipe:
    """The DM-KD column of the row Flowers-102."""
    return rows.taught(
        name, FLOWERS, Lesson(rows.set_of(study), images, imagenet.TABLE),
        ClassifierConfig(reference="runs/dmkd_flowers102_rn18_teacher"), imagenet.student("rn50"), imagenet.LOSS,
        about=f"DM-KD's row Flowers-102: rn18 teaches rn50 on the images of {study}.",
        published=_published(85.4, "Ours", FLOWERS_TEST, one_image=81.5),
        assumed=(assumed, "schedule and temperature: as dmkd_imagenet_rn50_200k", imagenet.VIEWS, rows.HELD_OUT),
        needs=(FLOWERS_NEEDED, rows.made_by("dmkd_flowers102_rn18_teacher", "weights"), rows.made_by(study)),
    )  # fmt: skip


def dmkd_flowers102_rn18_teacher() -> Recipe:
    """Its teacher, from the 1,020 labels of the official training part."""
    course = Course(200, 64, 0.01, 1e-4, (60, 120, 180))
    return rows.labelled(
        "dmkd_flowers102_rn18_teacher", FLOWERS, Lesson(FLOWERS.test, 1_020, course), imagenet.student("rn18"),
        about="rn18 from Flowers-102's labels.",
        published=_published(87.9, "Teacher", FLOWERS_TEST),
        assumed=(f"the whole schedule, and {FROM_NOTHING}; expect far less of 1,020 images", imagenet.VIEWS),
        needs=(FLOWERS_NEEDED,),
    )  # fmt: skip


def prompted(name: str, fidelity: str) -> Study:
    """One prompt for each flower; the pipeline guides all its channels in its own way."""
    return rows.drawn(
        name, f"{PROMPTED:,} flowers by a text-to-image model, {fidelity} fidelity.", TEXT,
        FIDELITIES[fidelity].model_copy(update={"guided_channels": None}), PROMPTED, needs=(TEXT_NEEDED,),
        assumed=("generator, prompt and amount; scale and steps are the paper's for DiT",),
        class_names=FLOWER_NAMES, prompt="a photo of a {}, a kind of flower",
    )  # fmt: skip


# For tests

SMALL = {"in_chans": 1, "widths": [4, 8], "pool": 1}
DIGITS = Bench("digits", 8, "shift:1", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
TWO_STEPS = Course(2, 8, 0.1, 1e-4, (1,))


def dmkd_set_debug() -> Study:
    """The whole road in a few seconds: a generator, a classifier, 20 images, answers, a student."""
    sampling = LOW_FIDELITY.model_copy(update={"num_sampling_steps": "2", "guided_channels": 1})
    student, lesson = DIGITS.student("conv_small", **SMALL), Lesson("synthetic:stage:set", 8, TWO_STEPS)
    judge = ClassifierConfig(reference="stage:classifier")
    pupil = rows.taught("debug_pupil", DIGITS, lesson, judge, student, imagenet.LOSS)
    answers = AnswerTask(
        name="debug_answers", teacher=judge, data=pupil.data, answers=AnswerConfig(dtype="float32", block_size=8)
    )
    classifier = rows.labelled("debug_classifier", DIGITS, replace(lesson, source=DIGITS.test), student)
    stored = pupil.method.model_copy(update={"answers": "stage:answers"})
    return Study(
        name="dmkd_set_debug",
        about="A few steps of the second road: generator, classifier, 20 drawn digits, a student.",
        stages={
            "generator": denoiser_debug().model_copy(
                update={"method": DenoiserConfig(in_channels=1, block_out_channels=(8, 16), conditional=True)}
            ),
            "classifier": classifier,
            "set": rows.drawing("debug_set", "stage:generator", sampling, 20, block_size=10, shard_size=10),
            "answers": answers,
            "pupil": pupil.model_copy(update={"method": stored}),
        },
        arms={"classifier": "teacher: real images, labels", "pupil": "student: drawn images + KD"},
        headline="top1",
    )


RECIPES = (
    dmkd_imagenet100_rn50,
    dmkd_imagenet100_rn18_teacher,
    rows.named("dmkd_imagenet100_set_low", hundred, "low"),
    rows.named("dmkd_imagenet100_set_high", hundred, "high"),
    rows.named("dmkd_imagenet100_set_low_faithful", hundred, "low", "shared"),
    rows.named("dmkd_imagenet100_set_high_faithful", hundred, "high", "shared"),
    rows.named(
        "dmkd_flowers102_rn50", flowers, "dmkd_imagenet_set_low", 200_000,
        "the 200K images of ImageNet's classes, which name hardly any of the flowers",
    ),
    rows.named(
        "dmkd_flowers102_rn50_prompt", flowers, "dmkd_flowers102_set_low", PROMPTED,
        "20,400 images of a text-to-image model, one prompt for each flower",
    ),
    dmkd_flowers102_rn18_teacher,
    rows.named("dmkd_flowers102_set_low", prompted, "low"),
    rows.named("dmkd_flowers102_set_high", prompted, "high"),
    dmkd_set_debug,
)  # fmt: skip
