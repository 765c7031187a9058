"""Images that a study made and scored: the sentence about them, what the score looks at, and the images themselves."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from diffrep.report.card_pictures import sheet
from diffrep.report.generated import TOLD, drawn, film_strip, is_coarse
from diffrep.report.page import Block, Folded, Picture, Section, Text
from diffrep.report.reading import read_object
from diffrep.report.scores import average_of, best, measure, score_words, valued
from diffrep.report.sets import contact_sheet
from diffrep.report.values import Entry, Run, references, role

COLUMNS, ROWS = 10, 2  # of an arm's first images
OTHERS = {"at_once": "drawn all at once, every token for itself", "predictor": "by MAGE's token predictor alone"}
TEXT = "What the score is a number of, to look at: the first images of each arm, not selected."

Found = tuple[Entry, Run, dict[str, Any]]  # with what generated.json says


# The sentence


def made_headline(scored: Sequence[Entry], name: str, entries: Sequence[Entry]) -> list[Block]:
    """How far the images are from real ones, those of ADDP first, and which are nearest."""
    hero = next((arm for arm in scored if role(arm, entries) == "alternation"), best(scored, name))
    whose = "that ADDP makes by turning tokens into pixels and back"
    deed = whose if role(hero, entries) == "alternation" else f"of “{hero.label}”"
    seeds = len(hero.score(name))
    over = f" (mean of {seeds} seeds ± standard deviation)" if seeds > 1 else ""
    far = f"are at a {score_words(name)} of" if measure(name).is_low_better else f"reach, by {score_words(name)},"
    said = f"Images {deed} {far} {_value(hero, name)}{over} from {_real(hero)}{_in_what(hero)}"
    others = [_other(arm, name, entries) for arm in _ordered(scored, entries) if arm is not hero]
    return [Text(f"{'; '.join([said, *others])}.{_nearest(scored, name)}", "lead")]


def _value(arm: Entry, name: str) -> str:
    return valued(name, list(arm.score(name).values()))


def _ordered(arms: Sequence[Entry], entries: Sequence[Entry]) -> list[Entry]:
    order = list(OTHERS)
    return sorted(arms, key=lambda arm: order.index(r) if (r := role(arm, entries)) in order else len(order))


def _other(arm: Entry, name: str, entries: Sequence[Entry]) -> str:
    who = OTHERS.get(role(arm, entries), f"“{arm.label}”")
    return f"{who}, {_value(arm, name)}" if role(arm, entries) in OTHERS else f"{who} {_value(arm, name)}"


def _real(arm: Entry) -> str:
    reference = arm.recipe.get("reference")
    return f"the real images of {reference}" if reference else "real images"


def _in_what(arm: Entry) -> str:
    """``(in the features of classifier-s0; lower is better)``: no distance without its space."""
    features, colon, _ = str(_protocol(arm).get("features", "")).partition("'s pooled")
    space = f"in the features of the classifier “{features}”" if colon else f"in {features}" if features else ""
    return f" ({space})" if space else ""


def _nearest(scored: Sequence[Entry], name: str) -> str:
    """Which arm is best, as far as the numbers go."""
    if len(scored) < 2:
        return ""
    first = best(scored, name)
    one = " on one seed" if len(first.score(name)) == 1 else " on average"
    return f" Nearest to the real ones{one}: “{first.label}”." if measure(name).is_low_better else ""


# What the score looks at


def _protocol(arm: Entry) -> dict[str, Any]:
    """Of its first score; empty where none is recorded."""
    return next((p for result in arm.results() for p in _protocols(result)), {})


def _protocols(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = (result.get("protocol") or {}).get("scores") or []
    return [score["protocol"] for score in found if isinstance(score.get("protocol"), dict)]


def judged_in(arms: Sequence[Entry], entries: Sequence[Entry]) -> str:
    """For a caption: whose features, and how many images on both sides."""
    said = dict.fromkeys(_space(arm, entries) for arm in arms if _protocol(arm))
    return " ".join(said) + " " if said else ""


def _space(arm: Entry, entries: Sequence[Entry]) -> str:
    found = _protocol(arm)
    count, real = found.get("images", 0), found.get("reference_images")
    against = f"{real:,} images" if real else "stored statistics"
    of = f"{count:,} images of each arm against {against} of {found.get('reference')}"
    return f"Judged in {found.get('features')}: {of}.{_skill(arm, entries)}"


def _skill(arm: Entry, entries: Sequence[Entry]) -> str:
    """How well the classifier behind the features does its own task."""
    named = references((arm.recipe.get("score") or {}).get("features") or {})
    scores = [v for e in entries if e.name in named for v in e.score("top1").values()]
    return f" That classifier names {average_of('top1', scores)} of real test images correctly." if scores else ""


def warnings(arms: Sequence[Entry]) -> list[Block]:
    """What the scoring itself said of its numbers."""
    said = [line for arm in arms for r in arm.results() for line in (r.get("protocol") or {}).get("said", [])]
    return [Text(f"Said by the scoring: {line}", "note") for line in dict.fromkeys(said)]


# The images


def made_images(entries: Sequence[Entry], everything: Sequence[Entry] = ()) -> Section | None:
    """The first images of each arm, then the walk of one of them; None where nothing was made."""
    found = [one for entry in entries if (one := _finished(entry))]
    if not found:
        return None
    walked = next((one for one in found if role(one[0], everything) == "alternation"), found[0])
    mended = [block for _, run, known in found for block in _mended(run, known)]
    blocks = [*_first_images(found), *_all_images(found), *_walk(*walked), *mended, *_copies(found)]
    return Section("The images that were made", [Text(TEXT), *blocks]) if blocks else None


def _finished(entry: Entry) -> Found | None:
    """The first seed whose images are all there."""
    runs = entry.runs if entry.kind == "generation" else ()
    return next(((entry, run, found) for run in runs if (found := read_object(run.path / "generated.json"))), None)


def _first_images(found: Sequence[Found]) -> list[Block]:
    """A strip per arm, below each other, so that single images stay large on a phone."""
    strips = [(entry, known, strip) for entry, run, known in found if (strip := _strip(run.path, known))]
    if not strips:
        return []
    size = Image.open(io.BytesIO(strips[0][2])).size
    coarse = is_coarse(strips[0][1])
    rows = [(_titled(entry), _data(strip)) for entry, _, strip in strips]
    picture = sheet(rows, COLUMNS, COLUMNS * size[1] / size[0], coarse)
    shown = min(COLUMNS * ROWS, *(len(known["seeds"]) for _, known, _ in strips))
    what = f"The first {shown} images of each arm"
    return [
        Picture(
            f"{what}. {'; '.join(title for title, _ in rows)}.",
            f"{what}, every pixel a square." if coarse else f"{what}.",
            picture,
        )
    ]


def _titled(entry: Entry) -> str:
    """An arm's name with the score it is judged by."""
    name = next((n for n in ("frechet", "fid") if entry.score(n)), None)
    return f"{entry.label}, {score_words(name)} {_value(entry, name)}" if name else entry.label


def _strip(folder: Path, known: Mapping[str, Any]) -> bytes | None:
    """Its first images in rows; None where the files are not at hand."""
    seeds = known["seeds"][: COLUMNS * ROWS]
    try:
        files = [(folder / "images" / f"seed-{seed:06d}.png").read_bytes() for seed in seeds]
        return contact_sheet([files[k::COLUMNS] for k in range(min(COLUMNS, len(files)))])
    except (OSError, ValueError, Image.DecompressionBombError):
        return None


def _data(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _all_images(found: Sequence[Found]) -> list[Block]:
    """The contact sheets of the folders, behind a line."""
    sheets = [
        Picture(
            f"{entry.label}: the first {min(64, len(known['seeds']))} images (seed {run.seed}).",
            f"{entry.label}: the first {min(64, len(known['seeds']))} images, row by row. Not selected.",
            drawn(run.path / "grid.png", known),
        )
        for entry, run, known in found
        if (run.path / "grid.png").is_file()
    ]
    return [Folded("More images of each arm", sheets)] if sheets else []


def _walk(entry: Entry, run: Run, known: Mapping[str, Any]) -> list[Block]:
    """The pixels between the steps, of one arm."""
    if not (run.path / "film.png").is_file() or not known.get("filmed"):
        return []
    strip = film_strip(run.path, known)
    about = f"The pixels between the steps of “{entry.label}”. "
    picture = Picture(about + strip.alt, about + strip.caption, strip.svg)
    return [Text(f"How they come about: {TOLD[known['by']]}"), picture]


def _mended(run: Run, known: Mapping[str, Any]) -> list[Block]:
    """Test images with a hole, before and after."""
    if not (run.path / "mended.png").is_file():
        return []
    rows = "Above: test images. In the middle: the same with a hole. Below: what the network puts there"
    told = f"{rows}, from the tokens that are still visible; around the hole it is the tokenizer's copy."
    return [Picture(f"Repair. {rows}.", told, drawn(run.path / "mended.png", known))]


def _copies(found: Sequence[Found]) -> list[Block]:
    """What the way through tokens costs."""
    held = [run.result["held_out"] for _, run, _ in found if run.result and "held_out" in run.result]
    return [
        Text(
            f"What tokens lose: a classifier names {one['copies_read']:.1f} % of {one['images']:,} test images after "
            f"the tokenizer has turned them into tokens and back, and {one['originals_read']:.1f} % as they are."
        )
        for one in held
    ]
