"""The pictures of a data card: images with words beside them, and two distributions, as SVG with its text kept as text.

Drawn 440 units wide on white like all charts (see pictures.py). Images are data addresses of PNG files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from markupsafe import Markup

from diffrep.report.pictures import COLOURS, GREY, INK, PALE, WIDTH

FONT = "Helvetica, Arial, 'Liberation Sans', 'DejaVu Sans', sans-serif"
LABEL = 64  # units left of a row of the contact sheet, at most
LETTER = 6.3  # units that a letter of 11.5 takes, about


def sheet(rows: Sequence[tuple[str, str]], columns: int, aspect: float, is_coarse: bool) -> Markup:
    """(class, strip of images) each, one below the other. aspect: height of an image by its width."""
    widest = max(len(name) for name, _ in rows) * LETTER + 6
    is_long = widest > LABEL  # then names stand above their row
    left = 0 if is_long or not rows[0][0] else widest
    tall, head = (WIDTH - left) / columns * aspect, 16 if is_long else 0
    drawn = []
    for number, (name, strip) in enumerate(rows):
        top = number * (tall + head + 4)
        drawn.append(_image(strip, left, top + head, WIDTH - left, tall, is_coarse))
        drawn.append(_text(_cut(name, WIDTH), 2, top + (11.5 if is_long else tall / 2 + 4)))
    return _svg(drawn, len(rows) * (tall + head + 4))


def gallery(cells: Sequence[tuple[str, Sequence[str]]], aspect: float, is_coarse: bool, columns: int = 5) -> Markup:
    """(image, lines below it) each."""
    wide = WIDTH / columns
    tall = (wide - 16) * aspect
    step = tall + 14 * max(len(lines) for _, lines in cells) + 14
    drawn = []
    for number, (png, lines) in enumerate(cells):
        left, top = number % columns * wide, number // columns * step
        drawn.append(_image(png, left + 8, top, wide - 16, tall, is_coarse))
        middle = left + wide / 2
        drawn += [_text(_cut(t, wide), middle, top + tall + 13 + 14 * k, "middle") for k, t in enumerate(lines)]
    return _svg(drawn, -(-len(cells) // columns) * step)


def pairs(cells: Sequence[tuple[str, str, str]], aspect: float, is_coarse: bool, columns: int = 2) -> Markup:
    """(image, its neighbour, words below them) each."""
    wide = WIDTH / columns
    side = (wide - 28) / 2
    step = side * aspect + 30
    drawn = []
    for number, (first, second, words) in enumerate(cells):
        left, top = number % columns * wide + 12, number // columns * step
        drawn.append(_image(first, left, top, side, side * aspect, is_coarse))
        drawn.append(_image(second, left + side + 4, top, side, side * aspect, is_coarse))
        drawn.append(_text(_cut(words, wide - 16), left, top + side * aspect + 14))
    return _svg(drawn, -(-len(cells) // columns) * step)


def distributions(curves: Mapping[str, Sequence[float]], threshold: float, unit: str) -> Markup:
    """How much of each sample lies nearer than a distance. curves: name -> its quantiles, evenly spaced, 0 to 100 %."""
    left, top, wide, tall = 38, 8, WIDTH - 50, 190
    found = [v for values in curves.values() for v in values[: -len(values) // 20] if v > 0] or [1.0]
    start, end = max(0.8 * min(found), threshold / 10), 1.02 * max(found)  # the last 5 % would flatten the rest

    def x(value: float) -> float:
        share = math.log(max(value, start) / start) / math.log(end / start)
        return left + wide * min(share, 1.0)

    def y(percent: float) -> float:
        return top + tall * (1 - percent / 100)

    drawn = []
    for percent in (0, 25, 50, 75, 100):
        drawn.append(_line([(left, y(percent)), (left + wide, y(percent))], PALE, 0.7))
        drawn.append(_text(f"{percent} %" if percent else "0", left - 5, y(percent) + 4, "end", GREY))
    for tick in _ticks(start, end):
        drawn.append(_text(f"{tick:g}", x(tick), top + tall + 16, "middle", GREY))
    drawn.append(_line([(x(threshold), y(0)), (x(threshold), y(100))], INK, 1.2, "4 3"))
    for number, (name, values) in enumerate(curves.items()):
        points = [(x(v), y(100 * k / (len(values) - 1))) for k, v in enumerate(values) if v <= end]
        drawn.append(_line(points, COLOURS[number], 2.0, "7 3" if number else ""))
        low = top + tall + 52 + 17 * number
        drawn.append(_line([(left, low - 4), (left + 28, low - 4)], COLOURS[number], 2.0, "7 3" if number else ""))
        drawn.append(_text(_cut(name, wide - 40), left + 36, low))
    drawn.append(_text(unit, left + wide / 2, top + tall + 33, "middle"))
    low = top + tall + 52 + 17 * len(curves)
    drawn.append(_line([(left, low - 4), (left + 28, low - 4)], INK, 1.2, "4 3"))
    drawn.append(_text("too near: left of this line", left + 36, low))
    return _svg(drawn, low + 8)


def _ticks(start: float, end: float) -> list[float]:
    """1, 2 and 5 times powers of ten, fewer where they would crowd."""
    powers = range(math.floor(math.log10(start)), math.ceil(math.log10(end)) + 1)
    steps = (1, 2, 5) if end < 200 * start else (1,)
    return [step * 10.0**power for power in powers for step in steps if start <= step * 10.0**power <= end]


def _svg(parts: Sequence[Markup], height: float) -> Markup:
    opening = Markup(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {} {:.1f}" font-family="{}" font-size="11.5">'
    )
    return opening.format(WIDTH, height, FONT) + Markup("\n").join(parts) + Markup("</svg>")


def _image(address: str, x: float, y: float, width: float, height: float, is_coarse: bool) -> Markup:
    """is_coarse: so few pixels that each is shown as a square instead of being smoothed away."""
    place = Markup('<image href="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" style="image-rendering:{}"/>')
    return place.format(address, x, y, width, height, "pixelated" if is_coarse else "auto")


def _text(words: str, x: float, y: float, anchor: str = "start", colour: str = INK) -> Markup:
    place = Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}" fill="{}">{}</text>')
    return place.format(x, y, anchor, colour, words)


def _line(points: Sequence[tuple[float, float]], colour: str, width: float, dash: str = "") -> Markup:
    where = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    place = Markup('<polyline points="{}" fill="none" stroke="{}" stroke-width="{}" stroke-dasharray="{}"/>')
    return place.format(where, colour, width, dash or "none")


def _cut(words: str, wide: float) -> str:
    fitting = int(wide / LETTER)
    return words if len(words) <= fitting else words[: fitting - 1] + "…"
