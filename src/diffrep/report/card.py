"""The data card: one page by which a person can trust a set of synthetic images, or see why not.

Shows the plain values of ``diffrep.evaluation.card``, and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffrep.assets import is_non_commercial
from diffrep.console import duration
from diffrep.files import write_atomic
from diffrep.report import card_pictures
from diffrep.report.card_words import (
    alarms,
    doubts,
    equal_to_training,
    equal_within,
    far,
    findings,
    labels_found,
    verdict,
)
from diffrep.report.numbers import MISSING, compact, listed
from diffrep.report.page import Bars, Block, Folded, Notes, Page, Picture, Section, Table, Text, render
from diffrep.report.values import flat

MANY = 30  # classes; more than that are told in a folded table
COARSE = 40  # pixels a side up to which an image is shown as squares
FOOTER = "Made by diffrep data card from the images themselves. One file; it loads nothing from the network."

Found = Mapping[str, Any]


def write_card(found: Found, out: Path) -> Path:
    """Write the page; returns ``out``."""
    write_atomic(Path(out), render(card_page(found)))
    return Path(out)


def card_page(found: Found) -> Page:
    """All sections that the numbers allow."""
    about = found["set"]
    sections = [
        Section("", _opening(found)),
        Section("Some of the images", _sheet(found)),
        Section("How it was made", _facts(found)),
        Section("Images per class", _counts(about)) if about["counts"] else None,
        Section("What the teacher says", _opinion(found)) if found["opinion"] else None,
        Section("Does it repeat itself?", _within(found)),
        Section("Does it repeat the real images?", _against(found)) if found["real"] else None,
        Section("How far from real images?", _frechet(found["frechet"])) if found["frechet"] else None,
        Section("What this page cannot tell", [Text(LIMITS)]),
    ]
    classes = f" of {len(about['classes'])} classes" if about["counts"] else ""
    size = f"{about['image_size'][0]}x{about['image_size'][1]} pixels"
    words = f"{about['images']:,} images{classes}, {size}. Licence: {about['licence']}."
    return Page(f"Data card: {about['name']}", words, [s for s in sections if s and s.blocks], FOOTER)


LIMITS = (
    "A copy that is shifted, mirrored or recoloured is far away in pixels; only features can find it, as far as the "
    "teacher looks through such changes. A teacher agrees most with images that are easy for it. A Frechet distance "
    "compares two averages and two spreads, nothing else. None of this replaces looking at the images, or a student's "
    "score on real ones."
)


def _opening(found: Found) -> list[Block]:
    blocks: list[Block] = [Text(line, "warning") for line in found["said"]]
    licences = {"the set": found["set"], "the teacher": found["teacher"], "the real images": found["real"]}
    closed = [f"{who}: {of['licence']}" for who, of in licences.items() if of and is_non_commercial(of["licence"])]
    if closed:
        blocks.append(Text(f"Non-commercial use only ({'; '.join(closed)}).", "warning"))
    blocks += [Text(line, "warning") for line in alarms(found)]
    return [*blocks, Notes(findings(found))]


def _shape(found: Found) -> tuple[float, bool]:
    height, width = found["set"]["image_size"]
    return height / width, max(height, width) <= COARSE


def _sheet(found: Found) -> list[Block]:
    sheet, (aspect, is_coarse) = found["sheet"], _shape(found)
    rows = [(row["name"], row["png"]) for row in sheet["rows"]]
    some = f"{len(rows)} of {sheet['classes']}" if len(rows) < sheet["classes"] else "all"
    rule = f"A row per class ({some}), " if sheet["classes"] else "Images "
    caption = f"{rule}evenly spread from the first image to the last. Not selected."
    names = f": {', '.join(name for name, _ in rows)}" if sheet["classes"] else ""
    alt = f"Contact sheet of {found['set']['name']}, {len(rows)} rows of up to {sheet['columns']} images{names}."
    return [Picture(alt, caption, card_pictures.sheet(rows, sheet["columns"], aspect, is_coarse))]


def _facts(found: Found) -> list[Block]:
    made, about = found["made"], found["set"]
    rows = [("Reference", about["reference"]), *(_manifest_rows(made) if made else []), ("Licence", about["licence"])]
    for name in ("teacher", "real"):
        rows += _other_rows(name, found[name]) if found[name] else []
    told = Text("This set has no manifest: who made it, and how, is not recorded.", "note")
    table = Table("The set and what it was held against", ("Fact", "Value"), rows, True)
    hashes = Table("Hashes, SHA-256", ("Of", "Value"), _hashes(found), True)
    settings = list(flat({k: made[k] for k in ("settings", "environment") if k in made}).items()) if made else []
    folded = [Folded(f"All settings ({len(settings)})", [Table("Settings", ("Setting", "Value"), settings, True)])]
    return [*([] if made else [told]), table, Folded("Hashes", [hashes]), *(folded if settings else [])]


def _manifest_rows(made: Mapping[str, Any]) -> list[tuple[str, str]]:
    generator = made.get("generator", {})
    sampling = made.get("settings", {}).get("synthesis", {}).get("sampling", {})
    guidance = f"scale {sampling.get('guidance_scale', 'unknown')}"
    for key, words in (("guided_channels", "channels"), ("guidance_interval", "only for sigma in")):
        guidance += f", {words} {sampling[key]}" if sampling.get(key) else ""
    behind = [f"{part}: {count:,}" for part, count in generator.get("labels_seen", {}).items()]
    return [
        ("Generator", str(generator.get("name", "unknown"))),
        ("Real labels behind it", ", ".join(behind) or "none recorded"),
        ("Sampler", f"{sampling.get('sampler', 'unknown')}, {sampling.get('num_sampling_steps', 'unknown')} steps"),
        ("Guidance", guidance),
        ("Network calls per image", str(made.get("calls_per_image", "unknown"))),
        ("Cost", _cost(made["cost"])),
        ("Content hash", f"{made['content_hash'][:16]}…"),
    ]


def _hashes(found: Found) -> list[tuple[str, str]]:
    made, teacher, real = found["made"] or {}, found["teacher"] or {}, found["real"] or {}
    rows = [
        ("The set's settings and shards", made.get("content_hash")),
        ("The set's pixels and labels", found["set"]["pixels_sha256"]),
        ("The generator's weights", made.get("generator", {}).get("sha256")),
        ("The teacher's weights", teacher.get("sha256")),
        ("The real training images", real.get("fingerprint")),
    ]
    return [(what, value) for what, value in rows if value]


def _cost(cost: Mapping[str, Any] | None) -> str:
    if not cost:
        return "not recorded"
    calls, added = cost["network_calls"], cost["multiply_adds"]
    return f"{duration(cost['cpu_seconds'])} of CPU, {calls:,} network calls, {compact(added)} multiply-adds"


def _other_rows(name: str, of: Mapping[str, Any]) -> list[tuple[str, str]]:
    if name == "real":
        split = f"{of['train_images']:,} training and {of['held_out_images']:,} {of['held_out_split']} images"
        return [("Real images", f"{of['reference']}: {split}; {of['licence']}")]
    seen = listed([f"{count:,} ({part})" for part, count in of["labels_seen"].items()]) or "unknown"
    judge = f"{of['name']}: {of['num_classes']:,} classes, {of['pooled']:,} pooled features; {of['licence']}"
    return [("Teacher", judge), ("Labels the teacher saw", seen)]


def _counts(about: Mapping[str, Any]) -> list[Block]:
    names, counts = about["classes"], about["counts"]
    most, least, empty = max(counts), min(counts), sum(not c for c in counts)
    spread = f"{most:,} of each class" if most == least else f"Between {least:,} and {most:,} of a class"
    said = [Text(f"{spread}.{f' {empty} classes have no image.' if empty else ''}")]
    if about["without_label"]:
        said.append(Text(f"{about['without_label']:,} images have no label.", "warning"))
    table = Table("Images per class", ("class", "images"), [(n, f"{c:,}") for n, c in zip(names, counts, strict=True)])
    if len(names) > MANY:
        return [*said, Folded(f"All {len(names)} classes", [table])]
    bars = Bars([(n, 100 * c / most, f"{c:,}") for n, c in zip(names, counts, strict=True)])
    return [*said, bars, Folded("As a table", [table])]


def _opinion(found: Found) -> list[Block]:
    opinion, teacher = found["opinion"], found["teacher"]["name"]
    blocks: list[Block] = [Text(f"{text}", "lead") for _, text in labels_found(found)]
    if opinion["rows"]:
        blocks.append(Text(WORDS.format(teacher=teacher)))
        table = Table(f"What {teacher} says, class by class", OPINION, [_judged(row) for row in _ordered(opinion)])
        blocks.append(Folded(f"All {len(opinion['rows'])} classes", [table]) if len(opinion["rows"]) > MANY else table)
    return [*blocks, _doubted(found)]


WORDS = (
    "Agreement: how often {teacher} gives the class that was asked for. Sure: the probability of its own answer, right "
    "or wrong. Margin: the probability of the asked class less that of the next best, from \u22121 to 1. Real: how "
    "often it is right about held-out real images. Perfect agreement is no praise: sets of few, easy images have it."
)
OPINION = ("class", "images", "agree %", "sure %", "margin", "real %")


def _ordered(opinion: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """All classes together first."""
    real = opinion["real"]
    return [opinion["all"] | {"class": "all", "real": real and real["agreement"]}, *opinion["rows"]]


def _judged(row: Mapping[str, Any]) -> list[str]:
    numbers = [(row["agreement"], ".1f"), (row["confidence"], ".1f"), (row["margin"], ".2f"), (row.get("real"), ".1f")]
    cells = [MISSING if value is None else format(value, form).replace("-", "\u2212") for value, form in numbers]
    return [row["class"], f"{row['images']:,}", *cells]


def _doubted(found: Found) -> Block:
    doubted, (aspect, is_coarse) = found["opinion"]["doubted"], _shape(found)
    cells = [
        (
            d["png"],
            [*([f"asked {d['asked']}"] if d["asked"] else []), f"said {d['said']}", f"{d['confidence']:.0f} % sure"],
        )
        for d in doubted
    ]
    has_margin = doubted[0]["margin"] is not None
    by = "smallest margin: the teacher sees another class, or cannot decide" if has_margin else "smallest confidence"
    caption = f"The {len(doubted)} images of the {by}."
    alt = "; ".join(f"{d['image']}: {', '.join(words)}" for d, (_, words) in zip(doubted, cells, strict=True))
    return Picture(f"Doubted images. {alt}.", caption, card_pictures.gallery(cells, aspect, is_coarse))


def _within(found: Found) -> list[Block]:
    blocks: list[Block] = [Text(equal_within(found), "lead")]
    for space in found["spaces"]:
        within = space["within"]
        if near := within.get("equal"):
            rule = f"one in a hundred of {near['real_images']:,} real training images lies nearer than "
            rule += f"{far(near['threshold'], space)} to another of them; of {near['images']:,} images of the set "
            share = f"{near['count']:,} do, {near['share']:.1f} %: {verdict(near)}."
            blocks.append(Text(f"In {space['name']}: {rule}{share}"))
        if within["pairs"]:
            blocks.append(_pairs(found, space, within["pairs"], "The nearest pairs within the set"))
    return blocks


def _against(found: Found) -> list[Block]:
    blocks: list[Block] = [Text(equal_to_training(found), "lead")]
    blocks.append(Text(RULE.format(split=found["real"]["held_out_split"], real=found["real"]["reference"])))
    for number, space in enumerate(found["spaces"]):
        near = space["against"]
        where = (
            f"In {space['name']}: {near['count']:,} of {near['images']:,} images, {near['share']:.1f} %, lie nearer "
        )
        where += f"than {far(near['threshold'], space)} to a training image"
        noise = f"chance gives 1 %, give or take {2 * near['noise']:.1f}"
        blocks.append(Text(f"{where}; {noise}: {verdict(near)}."))
        blocks.append(_distances(found, space, number))
        blocks.append(_pairs(found, space, near["pairs"], "Each with the training image nearest to it"))
    return blocks


RULE = (
    "Every image of the set is held against all training images of {real}. What counts as too near, real images say: "
    "the distance that only one in a hundred unseen real images ({split} split) stays below. A generator that copies "
    "puts more than one in a hundred of its images there."
)


def _distances(found: Found, space: Mapping[str, Any], number: int) -> Picture:
    near = space["against"]
    names = {
        "drawn": f"the set, {near['images']:,} images",
        "held_out": f"unseen real images, {near['real_images']:,}",
    }
    curves = {names[key]: values for key, values in near["quantiles"].items()}
    svg = card_pictures.distributions(curves, near["threshold"], f"{space['unit']} to the nearest training image")
    middles = [f"{name}: half lie nearer than {far(v[len(v) // 2], space)}" for name, v in curves.items()]
    alt = f"{'; '.join(middles)}; the line stands at {far(near['threshold'], space)}."
    text = f"How many images lie nearer than a distance, in {space['name']}. The curve of a set that copies begins "
    text += "further left. The axis is logarithmic; what is nearer than its left end is drawn there."
    return Picture(alt, text, svg)


def _pairs(found: Found, space: Mapping[str, Any], pairs: Sequence[Mapping[str, Any]], title: str) -> Picture:
    aspect, is_coarse = _shape(found)
    cells = [(*pair["png"], far(pair["distance"], space)) for pair in pairs]
    alt = "; ".join(f"{a} and {b}: {far(p['distance'], space)}" for p in pairs for a, b in [p["images"]])
    caption = f"{title}, in {space['name']}; below them their distance."
    return Picture(f"{title}. {alt}.", caption, card_pictures.pairs(cells, aspect, is_coarse))


def _frechet(frechet: Mapping[str, Any]) -> list[Block]:
    warnings: list[Block] = [Text(line, "warning") for line in doubts(frechet)]
    rows = [
        (row["what"], f"{row['images']:,}", f"{row['value']:.3g}{'' if row['is_reliable'] else ' (too few images)'}")
        for row in frechet["rows"]
    ]
    caption = f"{frechet['name']} ({frechet['width']:,} of them)"
    return [Text(DISTANCE), *warnings, Table(caption, ("between", "N of each", "distance"), rows)]


DISTANCE = (
    "Zero is equal; only numbers of one teacher and about one N can be compared, never with an FID in a paper. Both "
    "sides have the same number of images of every class. The floors say what real images have among themselves: two "
    "halves of those the teacher learned from, and held-out ones it never saw."
)
