"""The sections both pages share: learning curves, costs, licences, machines, settings."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

from diffrep.assets import is_non_commercial
from diffrep.console import duration
from diffrep.report import pictures
from diffrep.report.numbers import MISSING, average, compact, listed, sentence
from diffrep.report.page import Bars, Block, Folded, Picture, Section, Table, Text
from diffrep.report.values import Entry, flat

# The logged numbers that a kind of training is about: key in the log, what the picture calls it.
LOGGED = {
    "denoiser": {"loss": "loss"},
    "repfusion": {"kd_loss": "kd_loss"},
    "dmkd": {"kd_loss": "kd_loss", "agreement": "% agreement"},
    "finetune": {"loss": "loss"},
    "tokenizer": {"mse": "mean squared error"},
    "token_predictor": {"masked_top1": "% of hidden tokens named"},
    "addp": {"loss": "loss"},
    "mae": {"loss": "mean squared error"},
    "clean_input": {"loss": "minus cosine"},
    "mixing": {"loss": "loss"},
    "contrastive": {"loss": "loss"},
    "segment": {"loss": "loss"},
    "landmark": {"loss": "mean squared error"},
    "detect": {"loss": "loss"},
}
SHARES = ("agreement", "masked_top1", "codes_used")  # logged as parts of one, shown in percent
KINDS = {
    "denoiser": "diffusion model",
    "repfusion": "distillation (RepFusion)",
    "dmkd": "distillation of a classifier (DM-KD)",
    "finetune": "fine-tuning",
    "tokenizer": "tokenizer",
    "token_predictor": "token predictor (MAGE)",
    "addp": "ADDP",
    "mae": "masked autoencoder (MAE)",
    "clean_input": "clean-input extractor (CleanDIFT)",
    "mixing": "learned mix of features",
    "contrastive": "self-supervised learning (SimCLR)",
    "segment": "semantic segmentation",
    "landmark": "landmarks",
    "detect": "detection",
    "probe": "probe of a diffusion model",
    "features": "stored features",
    "synthesis": "drawn images",
    "answers": "stored answers of a classifier",
    "generation": "images made of tokens",
}
NO_TRAINING = ("probe", "features", "synthesis", "answers", "generation")  # kinds of stages in which nothing learns
CURVE_WORDS = {
    ("repfusion", "kd_loss"): "How far the students' features are from those they imitate (kd_loss). Curves of "
    "different timesteps have different targets, so a lower one is not a better student.",
    ("dmkd", "kd_loss"): "How far the students' answers are from their teacher's, on the images they learn from "
    "(kd_loss). Curves of different images have different targets, so a lower one is not a better student.",
    ("dmkd", "agreement"): "On how many of the images they learn from the students name what their teacher names, in "
    "percent. To agree on images of nothing is no skill; only the test images tell what it is worth.",
    ("finetune", "loss"): "Cross-entropy on the labelled training images. Near zero means that these images are "
    "learned by heart; only the test images tell what that is worth.",
    ("denoiser", "loss"): "How badly the diffusion model guesses the noise that was added to an image (mean squared "
    "error).",
    ("tokenizer", "mse"): "How far an image is from itself after it was turned into tokens and back (mean squared "
    "error of pixels between 0 and 1).",
    ("token_predictor", "masked_top1"): "How often the token predictor names a hidden token of a training image, the "
    "rest of the tokens in sight. Several tokens often fit one place, so it stays far below 100.",
    ("addp", "loss"): "How far ADDP's guess at the hidden tokens, from pixels, is from what the token predictor says "
    "of them (cross-entropy). It cannot reach zero: the predictor itself is unsure.",
    ("mae", "loss"): "How far the guessed pixels of hidden patches are from the real ones (mean squared error). By "
    "default each patch is brought to mean 0 and deviation 1 first; to guess nothing at all then gives about 1.",
    ("clean_input", "loss"): "How well the extractor gives from a clean image what the diffusion model has of a noised "
    "one: minus the cosine of their features, so -1 is the best there can be.",
    ("mixing", "loss"): "Cross-entropy of the mixed features' classifier on the labelled training images.",
    ("contrastive", "loss"): "How hard it still is to find a view's partner among all views of a batch (NT-Xent).",
    ("segment", "loss"): "Cross-entropy of the pixels' classes on training pictures, auxiliary heads included.",
    ("landmark", "loss"): "How far the heat maps of the points are from those of the truth (mean squared error), on "
    "training pictures. It is small from the start, because nearly all of a heat map is zero.",
    ("detect", "loss"): "The sum of the losses of proposals, boxes, classes and masks on training pictures.",
}


def curve(entry: Entry, key: str) -> pictures.Curve | None:
    """A logged number over the steps, the mean of the seeds that logged it; a share in percent."""
    found: dict[int, list[float]] = {}
    scale = 100 if key in SHARES else 1
    for run in entry.runs:
        for line in run.metrics:
            if isinstance(line.get(key), int | float):
                found.setdefault(line["step"], []).append(scale * line[key])
    steps = sorted(found)
    return pictures.Curve(entry.short, steps, [fmean(found[s]) for s in steps]) if steps else None


def curves(entries: Sequence[Entry]) -> Section | None:
    """Learning curves, a picture per kind of training and logged number, a panel per student."""
    blocks: list[Block] = []
    for kind, key in ((kind, key) for kind, keys in LOGGED.items() for key in keys):
        panels: dict[str, list[pictures.Curve]] = {}
        for entry in entries:
            if entry.kind == kind and (found := curve(entry, key)) is not None:
                panels.setdefault(entry.student or KINDS[kind], []).append(found)
        if panels:
            blocks.append(_curves_picture(kind, key, panels))
    return Section("Learning curves", blocks) if blocks else None


def _curves_picture(kind: str, key: str, panels: Mapping[str, Sequence[pictures.Curve]]) -> Picture:
    unit = LOGGED[kind][key]
    ends = [f"{title} {c.label}: {c.y[0]:.3g} to {c.y[-1]:.3g}" for title, curves in panels.items() for c in curves]
    alt = f"{unit} from the first to the last logged step. {'; '.join(ends)}."
    return Picture(alt, CURVE_WORDS[kind, key], pictures.curves_chart(panels, unit, f"curves-{kind}-{key}"))


def times(entries: Sequence[Entry], total: float | None) -> Section | None:
    """CPU seconds per entry, all seeds together."""
    spent = {entry.label: sum(entry.values("cpu_seconds")) for entry in entries if entry.values("cpu_seconds")}
    if not spent:
        return None
    longest = max(spent.values()) or 1.0
    rows = [(name, 100 * s / longest, f"{s:.1f} s") for name, s in sorted(spent.items(), key=lambda kv: -kv[1])]
    whole = duration(total if total is not None else sum(spent.values()))
    text = (
        f"{whole} of processor time in all, all seeds together. For networks it is the training alone, without "
        f"loading data and scoring; processes side by side finish sooner."
    )
    return Section("Where the time goes", [Text(text), Bars(rows)])


def budget_cells(entry: Entry) -> list[str]:
    """Steps, images seen, multiply-adds, CPU seconds: means over the seeds."""
    added = entry.values("multiply_adds")
    return [
        average(entry.values("steps")),
        average(entry.values("images_seen")),
        compact(fmean(added)) if added else MISSING,
        average(entry.values("cpu_seconds"), "{:.1f}"),
    ]


def labels_text(entry: Entry) -> str:
    """``50: task head, policy``; ``none``. Labels that a generator was given to draw by are named as such."""
    results = entry.results()
    if not results:
        return MISSING
    by_count: dict[int, list[str]] = {}
    for part, count in (results[0].get("labels_seen") or {}).items():
        by_count.setdefault(count, []).append(part)
    is_drawn = str(entry.recipe.get("data", {}).get("source")).startswith("synthetic:")
    kind = " of drawn images" if is_drawn else ""
    return "; ".join(f"{count:,}{kind}: {', '.join(parts)}" for count, parts in by_count.items()) or "none"


def label_counts(entry: Entry) -> str:
    """The same in numbers alone: ``50``; ``1,980 drawn``; ``none``."""
    parts = [part.partition(":")[0].replace(" of drawn images", " drawn") for part in labels_text(entry).split("; ")]
    return "; ".join(parts)


def licences(entries: Sequence[Entry]) -> Section:
    """Of data and weights; a non-commercial one is said first."""
    owners = _gathered(entries, lambda r: r.get("licence"))
    data = _gathered(entries, lambda r: (r.get("data") or {}).get("licence"))
    rows = [("Data", text, grouped(names, entries)) for text, names in data.items()]
    rows += [("Weights", text, grouped(names, entries)) for text, names in owners.items()]
    if not rows:
        return Section("Licences", [Text("No finished run has recorded a licence yet.")])
    closed = [text for text in (*data, *owners) if is_non_commercial(text)]
    said = [Text(f"Non-commercial use only: {listed(closed)}.", "warning")] if closed else []
    free = [] if closed else [Text("None of the licences found here is marked non-commercial.")]
    return Section("Licences", [*said, *free, Table("What may be used how", ("Of", "Licence", "Seen in"), rows, True)])


def _gathered(entries: Sequence[Entry], read: Callable[[dict], object]) -> dict[str, list[str]]:
    """Text -> labels of the entries whose results say it."""
    found: dict[str, list[str]] = {}
    for entry in entries:
        for text in dict.fromkeys(str(t) for r in entry.results() if (t := read(r))):
            found.setdefault(text, []).append(entry.label)
    return found


def environments(found: Sequence[tuple[str, Mapping[str, object]]]) -> list[Block]:
    """Machines and versions, each once, with the runs made there."""
    owners: dict[str, list[str]] = {}
    for label, environment in found:
        if environment:
            owners.setdefault(json.dumps(environment, sort_keys=True), []).append(label)
    blocks: list[Block] = []
    for text, labels in owners.items():
        where = "" if len(owners) == 1 else f" of {listed(list(dict.fromkeys(labels)))}"
        rows = [(key.removeprefix("packages."), value) for key, value in flat(json.loads(text)).items()]
        blocks.append(Table(f"Machine and versions{where}", ("Part", "Value"), rows, True))
    return blocks


def differences(entries: Sequence[Entry]) -> list[Block]:
    """Per kind: the settings in which entries differ, and, folded, those they share."""
    blocks: list[Block] = []
    for kind in dict.fromkeys(entry.kind for entry in entries):
        alike = [(entry.label, flat(entry.recipe)) for entry in entries if entry.kind == kind]
        keys = list(dict.fromkeys(key for _, settings in alike for key in settings))
        shared = [(k, alike[0][1].get(k, "none")) for k in keys if len({s.get(k, "none") for _, s in alike}) == 1]
        rows = [row for k in keys if k not in dict(shared) for row in _by_value(k, alike)]
        if rows:
            blocks.append(
                Table(
                    f"{sentence(KINDS.get(kind, kind))}: where settings differ",
                    ("Setting", "Value", "In"),
                    rows,
                    True,
                )
            )
        name = sentence(KINDS.get(kind, kind))
        title = f"{name}: {'all settings' if len(alike) == 1 else f'settings all {len(alike)} share'} ({len(shared)})"
        blocks.append(Folded(title, [Table(name, ("Setting", "Value"), shared, True)]))
    return blocks


def _by_value(key: str, alike: Sequence[tuple[str, Mapping[str, str]]]) -> list[tuple[str, str, str]]:
    owners: dict[str, list[str]] = {}
    for label, settings in alike:
        owners.setdefault(settings.get(key, "none"), []).append(label)
    return [(key, value, grouped(labels)) for value, labels in owners.items()]


def grouped(labels: Sequence[str], all_: Sequence[Entry] = ()) -> str:
    """Names of entries, the student said once: ``teacher; CNN: untrained · uniform t``; or ``all``."""
    if len(all_) > 1 and {e.label for e in all_ if e.results()} == set(labels):
        return "all"
    by_student: dict[str, list[str]] = {}
    for label in labels:
        student, colon, short = label.partition(":")
        by_student.setdefault(student if colon else "", []).append(short.strip() if colon else label)
    return "; ".join((f"{s}: " if s else "") + " · ".join(names) for s, names in by_student.items())
