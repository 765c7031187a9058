"""The page beside generated images: what was repaired, the images, the walk to them, and what made them.

Reads the folder that ``diffrep generate`` wrote, and nothing else.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup
from PIL import Image

from diffrep.assets import is_non_commercial
from diffrep.console import counts
from diffrep.files import read_json, write_atomic
from diffrep.report.card_pictures import gallery, sheet
from diffrep.report.page import Block, Folded, Page, Picture, Section, Table, Text, render
from diffrep.report.values import flat

PAGE = "index.html"
COARSE = 40  # pixels a side up to which an image is shown as squares
WIDEST = 1280  # pixels of a picture inside the page; the file beside it has all
REPAIRS = 3  # in a row: before, what was painted anew, after
FOOTER = "Made by diffrep generate from the folder alone. One file; it loads nothing from the network."
WORDS = {"addp": "ADDP", "predictor": "MAGE's token predictor"}

Found = Mapping[str, Any]  # generated.json


def write_page(folder: Path) -> Path:
    """Write ``index.html``; returns it."""
    found, settings = read_json(folder / "generated.json"), read_json(folder / "settings.json")
    write_atomic(folder / PAGE, render(generated_page(folder, found, settings)))
    return folder / PAGE


def generated_page(folder: Path, found: Found, settings: Mapping[str, Any]) -> Page:
    """All sections; only a repair has a before and an after."""
    height, width = found["image_size"]
    words = f"{_count(found['images'])} of {width}x{height} pixels by {WORDS[found['by']]}, {_seeds(found['seeds'])}."
    sections = [
        Section("", _opening(found)),
        Section("Before and after", _repairs(folder, found)) if found["repair"] else None,
        Section("The images", _grid(folder, found)),
        Section("How they came about", _film(folder, found)),
        Section("What made them", _facts(found, settings)),
    ]
    return Page(f"Images of {found['name']}", words, [s for s in sections if s and s.blocks], FOOTER)


def _opening(found: Found) -> list[Block]:
    licences = dict.fromkeys(found["licences"].values())
    closed = [text for text in licences if is_non_commercial(text)]
    warning: list[Block] = [Text(f"Non-commercial use only: {'; '.join(closed)}.", "warning")] if closed else []
    same = len(licences) == 1
    told = next(iter(licences)) if same else "; ".join(f"{who}: {text}" for who, text in found["licences"].items())
    return [*warning, Text(f"Licence, that of the networks: {told}.")]


def _count(images: int) -> str:
    return "1 image" if images == 1 else f"{images:,} images"


def _seeds(seeds: Sequence[int]) -> str:
    """``seed 7``, ``seeds 0 to 15``, ``seeds 3, 7, 9``."""
    if len(seeds) == 1:
        return f"seed {seeds[0]}"
    if list(seeds) == list(range(seeds[0], seeds[0] + len(seeds))):
        return f"seeds {seeds[0]} to {seeds[-1]}"
    return f"seeds {', '.join(map(str, seeds[:8]))}{' and more' if len(seeds) > 8 else ''}"


# Pictures


def address(path: Path) -> tuple[str, float]:
    """A picture file as a data address, no wider than a page needs, and its height by its width."""
    content = path.read_bytes()
    with Image.open(io.BytesIO(content)) as image:
        width, height = image.size
        if width > WIDEST and path.suffix == ".png":
            small, file = image.convert("RGB"), io.BytesIO()
            small.resize((WIDEST, round(height * WIDEST / width)), Image.Resampling.LANCZOS).save(file, "PNG")
            content = file.getvalue()
    kind = path.suffix.removeprefix(".").replace("jpg", "jpeg")
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}", height / width


def drawn(path: Path, found: Found) -> Markup:
    """One picture as wide as the text."""
    data, aspect = address(path)
    return sheet([("", data)], 1, aspect, is_coarse(found))


def is_coarse(found: Found) -> bool:
    return max(found["image_size"]) <= COARSE


def _grid(folder: Path, found: Found) -> list[Block]:
    shown = found["seeds"][:64]
    caption = f"{_seeds(shown).capitalize()}, row by row. Not selected. The files are images/seed-*.png, lossless."
    return [Picture(f"{_count(len(shown))}, {_seeds(shown)}.", caption, drawn(folder / "grid.png", found))]


def _repairs(folder: Path, found: Found) -> list[Block]:
    height, width = found["image_size"]
    painted, tokens = found["masked"][0], found["tokens"]
    before, _ = address(folder / "before.png")
    cells: list[tuple[str, Sequence[str]]] = []
    for seed in found["filmed"][:REPAIRS]:
        start, _ = address(folder / "steps" / f"seed-{seed:06d}-masked.png")
        after, _ = address(folder / "images" / f"seed-{seed:06d}.png")
        cells += [(before, ["before"]), (start, [f"{painted} of {tokens} tokens anew"]), (after, [f"seed {seed}"])]
    around = "The image's own pixels were put back around it." if found["repair"]["paste"] else AROUND
    alt = (
        f"Before, what is painted anew ({painted} of {tokens} tokens), and after: {_seeds(found['filmed'][:REPAIRS])}."
    )
    return [
        Picture(alt, f"In blue, what is painted anew. {around}", gallery(cells, height / width, is_coarse(found), 3))
    ]


AROUND = (
    "What surrounds it is the image as the tokenizer decodes it, not its own pixels (--paste puts those back). "
    "Every token that holds a pixel to be painted is painted whole."
)


def _film(folder: Path, found: Found) -> list[Block]:
    moving = Picture(
        f"The same as an animation of {_seeds(found['filmed'])}.", "film.gif", drawn(folder / "film.gif", found)
    )
    return [Text(TOLD[found["by"]]), film_strip(folder, found), Folded("As an animation", [moving])]


def film_strip(folder: Path, found: Found) -> Picture:
    """The walk of the first images, step by step."""
    first = "The first picture is the image itself. " if found["repair"] else ""
    caption = f"From left to right: after a step, what is decoded; below, the tokens still open in blue. {first}"
    caption += f"{_count(len(found['filmed']))}, {_seeds(found['filmed'])}."
    alt = f"Film strip of {_seeds(found['filmed'])}: tokens still masked, step by step: {counts(found['masked'])}."
    return Picture(alt, caption, drawn(folder / "film.png", found))


TOLD = {
    "addp": "ADDP goes to and fro between tokens and pixels: it looks at the decoded image, draws a token for every "
    "open place, keeps those it is surest of, and decodes again. Places still open are decoded from what is expected "
    "there, which is why they are blurred.",
    "predictor": "MAGE looks at tokens alone. The pictures on the way are decoded for this page: the network never "
    "sees them.",
}


# What made them


def _facts(found: Found, settings: Mapping[str, Any]) -> list[Block]:
    walk = settings["alternation"]
    rows = [
        ("Network", found["name"]),
        ("Steps", f"{walk['steps']}, {walk['schedule']}"),
        ("Tokens still masked", counts(found["masked"])),
        ("Choice temperature", f"{walk['choice_temperature']:g}, {walk['temperature_strategy']}"),
        ("Top-p", f"{walk['top_p']:g}"),
        ("Last token", "revealed" if walk["finish"] or found["by"] == "predictor" else "stays soft (official)"),
        ("Precision", settings.get("precision", "float32")),
        ("To 8 bits", {"truncate": "cut off (official)", "nearest": "rounded"}[settings["rounding"]]),
        *((f"Licence of the {part}", text) for part, text in found["licences"].items()),
    ]
    hashes = [(f"Weights: {part}", value) for part, value in settings["model"].items()]
    every = list(flat({"settings": settings, "environment": found["environment"]}).items())
    return [
        Table("How the images were made", ("Fact", "Value"), rows, True),
        Folded("Hashes, SHA-256", [Table("Hashes, SHA-256", ("Of", "Value"), hashes, True)]),
        Folded(f"All settings ({len(every)})", [Table("Settings", ("Setting", "Value"), every, True)]),
    ]
