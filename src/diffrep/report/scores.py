"""What a score is called, what it means, its unit, and which way it is better."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from diffrep.report.numbers import SPACE, listed, shown
from diffrep.report.values import Entry


@dataclass(frozen=True)
class Measure:
    """Unit and direction of a score. is_share: of test images, so that their number alone says how sure it is."""

    is_percent: bool = True
    is_low_better: bool = False
    is_share: bool = True
    digits: int = 1


DISTANCE = Measure(is_percent=False, is_low_better=True, is_share=False)
FINE = Measure(is_percent=False, is_low_better=True, is_share=False, digits=4)
PART = Measure(is_percent=False, is_share=False, digits=3)  # of one, as torch-fidelity says it
PLAIN = Measure(is_percent=False, is_share=False)
OVERLAP = Measure(is_share=False)  # percent, of pixels, points or objects
MISS = Measure(is_low_better=True, is_share=False, digits=2)
OF_OVERLAP = (
    *("miou", "miou_parts", "pixel_accuracy", "mean_accuracy", "mean_dice", "challenge_score", "auc10"),
    *("box_ap", "box_ap50", "box_ap75", "mask_ap", "mask_ap50", "mask_ap75"),
)
MEASURES = {
    "ece": Measure(is_low_better=True, is_share=False),
    "frechet": DISTANCE,
    "kernel": FINE,
    "fid": DISTANCE,
    "kid": FINE,
    "is": PLAIN,
    "precision": PART,
    "recall": PART,
    "psnr": PLAIN,
    "test_perplexity": PLAIN,
    "test_codes_used": Measure(is_share=False),
    **dict.fromkeys(OF_OVERLAP, OVERLAP),
    "nme": MISS,
    "fr10": MISS,
}

COUNTED = {"linear_probe": "linear probe", "knn": "k-NN"}  # names that end in a number of labels
WORDS = {
    "top1": "top-1",
    "top1_six_views": "top-1 over six views",
    "top5": "top-5",
    "agreement": "agreement with the teacher",
    "ece": "calibration error",
    "best_top1": "top-1 of the held-out choice",
    "frechet": "Frechet distance",
    "kernel": "kernel distance",
    "fid": "FID in torch-fidelity's Inception",
    "kid": "KID in torch-fidelity's Inception",
    "is": "Inception score",
    "psnr": "PSNR of its copies",
    "test_codes_used": "codes that test images use",
    "test_perplexity": "perplexity of those codes",
    "miou": "mIoU",
    "miou_parts": "mIoU without background",
    "mean_accuracy": "mean class accuracy",
    "mean_dice": "mean Dice",
    "nme": "NME",
    "fr10": "failure rate",
    "auc10": "AUC",
    "box_ap": "box AP",
    "box_ap50": "box AP50",
    "box_ap75": "box AP75",
    "mask_ap": "mask AP",
    "mask_ap50": "mask AP50",
    "mask_ap75": "mask AP75",
}
MEANING = {
    "linear_probe": "Linear probe: the network is frozen and the simplest classifier learns from its output.",
    "knn": "k-NN: the class of the most similar labelled image.",
    "top1": "Top-1: the network's own last layer names the image.",
    "top1_six_views": (
        "Top-1 over six views: its answers to the image, to two shifts of it by a pixel and to their mirror images are "
        "averaged first."
    ),
    "top5": "Top-5: the right name is among its first five.",
    "agreement": "Agreement: how often it gives the name that its teacher gives, right or wrong.",
    "ece": "Calibration error: how far the certainty it claims is from how often it is right; lower is better.",
    "best_top1": (
        "Top-1 of the held-out choice: of the checkpoint that agreed best with the teacher on images held out from "
        "those the student learned from (drawn ones, if it learned from drawn ones); no label is read to choose it."
    ),
    "frechet": (
        "Frechet distance: a classifier looks at all images made and at real ones; how far the mean and the spread of "
        "what it sees in the ones are from those of the others. Zero would be no difference; lower is better, and only "
        "values by the same classifier and the same number of images compare."
    ),
    "kernel": (
        "Kernel distance: the same question without assuming that the features are normally distributed; lower is "
        "better."
    ),
    "fid": "FID: the Frechet distance in the features of torch-fidelity's Inception; lower is better.",
    "kid": "KID: the kernel distance in the same features; lower is better.",
    "is": "Inception score: how sure Inception is of each image, and how different its answers are; higher is better.",
    "precision": "Precision: the part of made images that lie among real ones.",
    "recall": "Recall: the part of real images that lie among those made.",
    "psnr": (
        "PSNR: ten times the logarithm of one over the mean squared error of the copies, in decibels; higher is better."
    ),
    "test_codes_used": "Codes that test images use: of the codebook, those that stand for some part of some image.",
    "test_perplexity": "Perplexity: how many codes, all used alike, would be as hard to guess.",
    "miou": (
        "mIoU: of a class, the pixels that truth and prediction share, by those that one of them has, over all test "
        "pictures; the mean over classes."
    ),
    "miou_parts": "mIoU without background: the same over the other classes.",
    "pixel_accuracy": "Pixel accuracy: the share of pixels with the right class.",
    "mean_accuracy": "Mean class accuracy: the share of each class's pixels that are found; the mean over classes.",
    "nme": (
        "NME: the mean distance of a point from the truth, in parts of a length that every picture has (in WFLW "
        "between the outer eye corners); lower is better."
    ),
    "fr10": "Failure rate: pictures whose own NME is above 0.10 (10 %); lower is better.",
    "auc10": "AUC: the share of pictures below an NME, averaged over all NMEs from 0 to 0.10.",
    "box_ap": (
        "Box AP: the area below precision against recall, a box being right when it overlaps the true one by 0.50, "
        "0.55, ... 0.95; the mean over these and over classes, as COCO has it. AP50: 0.50 is enough."
    ),
    "mask_ap": "Mask AP: the same, masks overlapping.",
}


def measure(name: str) -> Measure:
    """Of any score; those that are not listed are percentages of test images."""
    return MEASURES.get(name, Measure())


def printed(name: str, values: Sequence[float]) -> str:
    """``91.3 ± 0.8 (5)``, with as many digits as the score deserves."""
    return shown(values, measure(name).digits)


def valued(name: str, values: Sequence[float]) -> str:
    """``98.1 ± 0.3 %`` or ``8.9``: with its unit, without the number of seeds."""
    return printed(name, values).partition(" (")[0] + unit(name) if values else "not known yet"


def average_of(name: str, values: Sequence[float]) -> str:
    """The mean alone, with its unit."""
    return valued(name, [fmean(values)] if values else [])


def unit(name: str) -> str:
    """What stands behind its number."""
    return f"{SPACE}%" if measure(name).is_percent else ""


def unit_words(names: Sequence[str]) -> str:
    """What is said behind the word scores: `` in percent``, or which way plain numbers are better."""
    plain = [name for name in names if not measure(name).is_percent]
    if not plain:
        return " in percent"
    plain_alone = ", lower is better" if all(measure(name).is_low_better for name in plain) else ""
    return plain_alone if len(plain) == len(names) else f" in percent, but {listed([score_words(n) for n in plain])}"


def score_words(name: str) -> str:
    """``linear_probe_50`` -> ``linear probe, 50 labels``."""
    head, _, count = name.rpartition("_")
    if head in COUNTED and count.isdigit():
        return f"{COUNTED[head]}, {int(count):,} labels"
    return WORDS.get(name, name.replace("_", " "))


def short_words(name: str) -> str:
    """The same without the number of labels."""
    return score_words(name).partition(",")[0]


def axis_words(name: str) -> str:
    """What stands under the axis of a chart."""
    kind = measure(name)
    if not kind.is_share:
        better = ", lower is better" if kind.is_low_better else ", higher is better"
        return f"{score_words(name)}{' in %' if kind.is_percent else ''}{better}"
    return f"% {'alike' if name == 'agreement' else 'correct'}, {score_words(name)}"


def meanings(names: Iterable[str]) -> str:
    """A sentence for each kind of score."""
    kinds = dict.fromkeys(n.rpartition("_")[0] if labels_in(n) else n for n in names)
    return " ".join(MEANING[kind] for kind in kinds if kind in MEANING)


def labels_in(name: str) -> int | None:
    """How many labels a score's name says it was fitted with."""
    count = name.rpartition("_")[2]
    return int(count) if count.isdigit() else None


def best(entries: Iterable[Entry], name: str) -> Entry:
    """The one with the best mean; all of them have the score."""
    return (min if measure(name).is_low_better else max)(entries, key=lambda entry: entry.mean(name))
