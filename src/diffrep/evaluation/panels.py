"""Predictions beside the truth, drawn for people: masks, points, boxes. Worst cases first, in a run's samples/.

Letters: H and W pixels of a picture, K points, n objects. Type is as large as a panel is wide, so that it can be read
on a phone that shrinks the panel.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from diffrep.evaluation import palette
from diffrep.files import folder_aside, write_json

INDEX = "predictions.json"
HIGHEST, WIDEST, LEAST = 512, 640, 192  # pixels of one picture; smaller ones are enlarged by a whole factor
GAP = 12
INK, GROUND = (26, 26, 26), (255, 255, 255)
PER_LINE, SMALLEST = 36, 13  # letters that fit beside each other in a panel; pixels of the smallest type
MOST_NAMED = 24  # classes in a legend
TRUTH, FOUND = (86, 180, 233), (230, 159, 0)  # of points: discs and crosses
AROUND, LEAST_ROOM = 0.25, 8.0  # of the face's size, and pixels, shown on each side of its points
LEAST_SCORE = 0.3  # of an object that is drawn
COVER = 0.45  # how much of a picture an object's mask hides


class Objects(Protocol):
    """n objects; predictions have ``scores`` (n,), too.

    boxes: (n, 4) left, top, right, bottom in pixels. labels: (n,) positions in the classes. masks: (n, H, W) bool.
    """

    @property
    def boxes(self) -> Tensor: ...
    @property
    def labels(self) -> Tensor: ...
    @property
    def masks(self) -> Tensor | None: ...


def write_panels(
    samples: Path,
    worst: Sequence[tuple[float, int]],
    draw: Callable[[int], Image.Image],
    metric: str,
    names: Callable[[int], str],
) -> None:
    """``prediction_000.jpg`` ... in this order, and ``predictions.json``: a list of file, name, score and metric.

    Args:
        samples: the folder, replaced as a whole.
        worst: (score, picture), the worst first.
        metric: what the score is called.
    """
    with folder_aside(samples) as folder:
        rows = []
        for place, (score, index) in enumerate(worst):
            file = f"prediction_{place:03d}.jpg"
            (folder / file).write_bytes(_jpeg(draw(index)))
            told = float(score) if math.isfinite(score) else None
            rows.append({"file": file, "name": names(index), "score": told, "metric": metric})
        write_json(folder / INDEX, rows)


def _jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=88, subsampling=0, optimize=True)  # colours of masks keep their edges
    return file.getvalue()


# Masks


def masks(image: Tensor, truth: Tensor, found: Tensor, classes: Sequence[str]) -> Image.Image:
    """Photograph, truth and prediction side by side in one colour table, and the classes that occur.

    Args:
        image: (3, H, W) uint8.
        truth, found: (h, w) positions in ``classes``; any other value is dark.
    """
    size = _shown(image)
    table = np.full((256, 3), palette.IGNORED, dtype=np.uint8)
    table[: len(classes)] = palette.colours(len(classes))
    flat = [Image.fromarray(table[m.cpu().to(torch.int64).numpy()]).resize(size, 0) for m in (truth, found)]
    return _panel(
        [("picture", _photograph(image, size)), ("truth", flat[0]), ("prediction", flat[1])],
        _legend(truth.cpu(), found.cpu(), classes, table),
    )


def _legend(truth: Tensor, found: Tensor, classes: Sequence[str], table: np.ndarray) -> list[tuple[Colour, str]]:
    """Classes of this picture, the largest first, and which of them only one side has."""
    areas = [torch.bincount(m.flatten().to(torch.int64), minlength=256)[: len(classes)] for m in (truth, found)]
    whole = areas[0] / areas[0].sum().clamp(min=1) + areas[1] / areas[1].sum().clamp(min=1)
    present = [k for k in whole.argsort(descending=True, stable=True).tolist() if whole[k] > 0]
    said = [
        (_colour(table[k]), _short(classes[k]) + ("" if areas[1][k] else " (missed)" if areas[0][k] else ""))
        if areas[0][k]
        else (_colour(table[k]), f"{_short(classes[k])} (not there)")
        for k in present[:MOST_NAMED]
    ]
    more = len(present) - MOST_NAMED
    return [*said, (GROUND, f"and {more} more")] if more > 0 else said


# Points


def points(image: Tensor, truth: Tensor, found: Tensor) -> Image.Image:
    """The part of a picture with its points: truth as discs, predictions as crosses, a line between the two.

    Args:
        image: (3, H, W) uint8.
        truth, found: (K, 2) x and y in its pixels.
    """
    truth, found = truth.cpu().to(torch.float64), found.cpu().to(torch.float64)
    left, top, right, bottom = _around(truth, image)
    cut = image[:, top:bottom, left:right]
    factor = min(HIGHEST / cut.shape[1], WIDEST / cut.shape[2])
    size = (max(1, round(factor * cut.shape[2])), max(1, round(factor * cut.shape[1])))
    picture = _photograph(cut, size)
    pen, radius = ImageDraw.Draw(picture), max(2.0, size[1] / 170)
    shift = torch.tensor([left - 0.5, top - 0.5], dtype=torch.float64)  # a pixel's centre has whole coordinates
    pairs = [
        (t, f) for t, f in zip(((truth - shift) * factor).tolist(), ((found - shift) * factor).tolist(), strict=True)
    ]
    for t, f in pairs:
        if all(map(math.isfinite, [*t, *f])):
            pen.line([*t, *f], fill=INK, width=max(3, round(radius)))
            pen.line([*t, *f], fill=GROUND, width=max(1, round(radius / 2)))
    for t, f in pairs:
        _mark(pen, t, radius, True)
        _mark(pen, f, radius + 1, False)
    return _panel([("", picture)], [(TRUTH, "truth (disc)"), (FOUND, "prediction (cross)")])


def _around(truth: Tensor, image: Tensor) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of what is shown: the points that are there, and some room."""
    height, width = image.shape[1:]
    there = truth[truth.isfinite().all(1)]
    if not len(there):
        return 0, 0, width, height
    low, high = there.min(0).values, there.max(0).values
    room = max(LEAST_ROOM, AROUND * float((high - low).max()))
    left, top = (max(0, math.floor(v - room)) for v in low.tolist())
    right, bottom = (math.ceil(v + room) for v in high.tolist())
    left, top = min(left, width - 1), min(top, height - 1)
    return left, top, min(max(right, left + 1), width), min(max(bottom, top + 1), height)


def _mark(pen: ImageDraw.ImageDraw, at: Sequence[float], radius: float, is_truth: bool) -> None:
    if not all(map(math.isfinite, at)):
        return
    (x, y), r = at, radius
    if is_truth:
        pen.ellipse([x - r, y - r, x + r, y + r], fill=TRUTH, outline=INK)
    else:
        for colour, width in ((INK, 4), (FOUND, 2)):
            pen.line([x - r, y - r, x + r, y + r], fill=colour, width=width)
            pen.line([x - r, y + r, x + r, y - r], fill=colour, width=width)


# Objects


def objects(image: Tensor, truth: Objects, found: Objects, classes: Sequence[str]) -> Image.Image:
    """Boxes and translucent masks with their classes: truth left, predictions of a score that counts right.

    Args:
        image: (3, H, W) uint8.
    """
    size, table = _shown(image), palette.colours(max(1, len(classes)))
    scores = getattr(found, "scores", None)
    chosen = torch.arange(len(found.boxes)) if scores is None else (scores.cpu() >= LEAST_SCORE).nonzero()[:, 0]
    if scores is not None:
        chosen = chosen[scores.cpu()[chosen].argsort(stable=True)]  # the surest on top
    left = _with_objects(image, size, truth, torch.arange(len(truth.boxes)), classes, table)
    right = _with_objects(image, size, found, chosen, classes, table)
    hidden = len(found.boxes) - len(chosen)
    told = [(GROUND, f"{hidden} of {len(found.boxes)} predictions with a score below {LEAST_SCORE:.0%} not drawn")]
    return _panel([(f"truth: {len(truth.boxes)}", left), (f"prediction: {len(chosen)}", right)], told if hidden else [])


def _with_objects(
    image: Tensor, size: tuple[int, int], drawn: Objects, chosen: Tensor, classes: Sequence[str], table: np.ndarray
) -> Image.Image:
    pixels = np.asarray(_photograph(image, size)).astype(np.float32)
    cover = drawn.masks
    for k in chosen.tolist() if cover is not None else []:
        assert cover is not None
        inside = np.asarray(Image.fromarray(cover[k].cpu().to(torch.uint8).numpy()).resize(size, 0)) > 0
        pixels[inside] += COVER * (table[int(drawn.labels[k])] - pixels[inside])
    picture = Image.fromarray(pixels.round().astype(np.uint8))
    pen, font = ImageDraw.Draw(picture), _font(2 * size[0])
    scores = getattr(drawn, "scores", None)
    ratio = torch.tensor([size[0] / image.shape[2], size[1] / image.shape[1]] * 2)
    for k in chosen.tolist():
        label = int(drawn.labels[k])
        said = _short(classes[label]) + (f" {float(scores[k]):.0%}" if scores is not None else "")
        _boxed(
            pen, (drawn.boxes[k].cpu().to(torch.float32) * ratio).tolist(), _colour(table[label]), said, font, size[0]
        )
    return picture


def _boxed(pen: ImageDraw.ImageDraw, box: Sequence[float], colour: Colour, said: str, font: Font, width: int) -> None:
    wide = font.getlength(said) + 6
    x, y = max(0.0, min(box[0], width - wide)), max(0.0, box[1] - font.size - 4)
    pen.rectangle([box[0], box[1], max(box[0], box[2]), max(box[1], box[3])], outline=colour, width=3)
    pen.rectangle([x, y, x + wide, y + font.size + 4], fill=colour)
    is_light = np.dot(colour, (0.299, 0.587, 0.114)) > 140
    pen.text((x + 3, y + 1), said, fill=INK if is_light else GROUND, font=font)


# What all panels share

Colour = tuple[int, int, int]
Font = ImageFont.FreeTypeFont


def _shown(image: Tensor) -> tuple[int, int]:
    """Width and height at which a picture is drawn."""
    height, width = image.shape[1:]
    factor = min(1.0, HIGHEST / height, WIDEST / width)
    if factor == 1.0:
        factor = max(1, min(LEAST // height, WIDEST // width))
    return max(1, round(factor * width)), max(1, round(factor * height))


def _photograph(image: Tensor, size: tuple[int, int]) -> Image.Image:
    """Shrunk smoothly; of pictures that are a few pixels large, every pixel stays a square."""
    whole = Image.fromarray(np.ascontiguousarray(image.cpu().permute(1, 2, 0).numpy()))
    squares = whole.height < LEAST // 2 and size[1] > whole.height
    return whole.resize(size, Image.Resampling.NEAREST if squares else Image.Resampling.LANCZOS)


def _panel(pictures: Sequence[tuple[str, Image.Image]], legend: Sequence[tuple[Colour, str]]) -> Image.Image:
    """Titled pictures of one height side by side, and a legend below."""
    width = sum(p.width for _, p in pictures) + GAP * (len(pictures) - 1)
    font, high = _font(width), pictures[0][1].height
    line = round(1.5 * font.size)
    head = line if any(title for title, _ in pictures) else 0
    lines = _broken(legend, font, width)
    panel = Image.new("RGB", (width, head + high + line * len(lines) + (GAP if lines else 0)), GROUND)
    pen, x = ImageDraw.Draw(panel), 0
    for title, picture in pictures:
        pen.text((x, 0), title, fill=INK, font=font)
        panel.paste(picture, (x, head))
        x += picture.width + GAP
    for row, entries in enumerate(lines):
        _legend_line(pen, entries, head + high + GAP + line * row, font)
    return panel


def _legend_line(pen: ImageDraw.ImageDraw, entries: Sequence[tuple[Colour, str]], y: int, font: Font) -> None:
    x, side = 0.0, font.size
    for colour, text in entries:
        if colour != GROUND:
            pen.rectangle([x, y + 1, x + side - 2, y + side - 1], fill=colour, outline=INK)
        pen.text((x + (1.3 * side if colour != GROUND else 0), y - 1), text, fill=INK, font=font)
        x += _entry_width(colour, text, font)


def _entry_width(colour: Colour, text: str, font: Font) -> float:
    return (2.1 if colour != GROUND else 0.8) * font.size + font.getlength(text)


def _broken(legend: Sequence[tuple[Colour, str]], font: Font, width: int) -> list[list[tuple[Colour, str]]]:
    """The legend in lines that fit."""
    lines: list[list[tuple[Colour, str]]] = []
    room = 0.0
    for entry in legend:
        needed = _entry_width(*entry, font)
        if needed > room or not lines:
            lines.append([])
            room = float(width) + 0.8 * font.size
        lines[-1].append(entry)
        room -= needed
    return lines


def _font(width: int) -> Font:
    found = ImageFont.load_default(max(SMALLEST, round(width / PER_LINE)))
    assert isinstance(found, ImageFont.FreeTypeFont)  # Pillow's wheels carry FreeType
    return found


def _colour(row: np.ndarray) -> Colour:
    return int(row[0]), int(row[1]), int(row[2])


def _short(name: str) -> str:
    """The first of several names, not too long."""
    first = name.replace(";", ",").split(",")[0].strip()
    return first if len(first) <= 18 else first[:17] + "..."
