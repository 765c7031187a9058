"""Charts as small SVG with their text kept as text: white ground, colours that colour-blind readers can tell apart.

All are drawn 440 units wide with type of 11 to 13 units, so that they can be read on a phone without zooming.
"""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from statistics import fmean, stdev
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

WIDTH = 440  # SVG units
INK, GREY, PALE = "#1a1a1a", "#555555", "#dddddd"
# Okabe and Ito's palette, yellow left out: it cannot be seen on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
DASHES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)))
MARKERS = "osD^vP"
STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "axes.formatter.use_mathtext": False,
    "font.family": "sans-serif",
    "font.sans-serif": ["Helvetica", "Arial", "Liberation Sans", "DejaVu Sans"],
    "font.size": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": PALE,
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "legend.fontsize": 11.5,
    "path.simplify_threshold": 0.3,
}


@dataclass(frozen=True)
class Dots:
    """One row of the arms chart. group: the student; marked: drawn in the second colour, as a diamond."""

    group: str
    label: str
    values: Sequence[float]
    marked: bool = False
    digits: int = 1  # of the mean beside it


@dataclass(frozen=True)
class Curve:
    label: str
    x: Sequence[float]
    y: Sequence[float]


@contextmanager
def _style(name: str) -> Iterator[None]:
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # the reader's fonts count, not ours
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        yield


def _figure(height: float) -> Figure:
    return Figure(figsize=(WIDTH / 72, height / 72), dpi=72)


def _svg(figure: Figure, name: str) -> Markup:
    """The figure as an ``<svg>`` element whose ids begin with ``name``, so that several share a page."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'<g id="[a-z_0-9]+">', "<g>", text)  # matplotlib's own names, alike in all figures
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    text = re.sub(r' width="[\d.]+pt"| height="[\d.]+pt"', "", text, count=2)
    return Markup(re.sub(r"\n\s*", "\n", text))


def standalone(svg: Markup, title: str, alt: str) -> str:
    """The same picture as a file of its own, with words for those who cannot see it."""
    size = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
    width, height = (float(n) for n in size.groups()) if size else (WIDTH, WIDTH)
    opening = f'<svg role="img" width="{width * 1.5:.0f}" height="{height * 1.5:.0f}"'
    body = str(svg).replace("<svg", opening, 1)
    end = body.index(">") + 1
    words = f"<title>{escape(title)}</title>\n<desc>{escape(alt)}</desc>"
    return f'<?xml version="1.0" encoding="utf-8"?>\n{body[:end]}\n{words}{body[end:]}\n'


def arms_chart(rows: Sequence[Dots], unit: str, name: str = "arms") -> Markup:
    """A row per arm: small dots below for seeds, a large one for their mean, a bar for their standard deviation."""
    groups = list(dict.fromkeys(row.group for row in rows))
    lines = [line for g in groups for line in ([g] if g else []) + [r for r in rows if r.group == g]]
    left = min(205.0, 14 + 6.1 * max(len(_cut(row.label)) for row in rows))
    height = 21 * len(lines) + 50
    with _style(name):
        figure = _figure(height)
        bottom, width, tall = 42 / height, (WIDTH - left - 50) / WIDTH, (height - 48) / height
        axes = figure.add_axes((left / WIDTH, bottom, width, tall))
        for y, line in enumerate(lines):
            _heading(axes, y, line, left) if isinstance(line, str) else _dots(axes, y, line)
        _score_axis(axes, [v for row in rows for v in row.values], unit)
        axes.set(ylim=(len(lines) - 0.4, -0.6), yticks=[y for y, n in enumerate(lines) if not isinstance(n, str)])
        axes.set_yticklabels([_cut(line.label) for line in lines if not isinstance(line, str)], color=INK)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        return _svg(figure, name)


def _cut(label: str, length: int = 32) -> str:
    return label if len(label) <= length else label[: length - 1] + "…"


def _heading(axes: Axes, y: int, text: str, left: float) -> None:
    axes.annotate(
        _cut(text), (0, y), (-left + 4, 0), ("axes fraction", "data"), "offset points", weight="bold", va="center"
    )


def _dots(axes: Axes, y: int, row: Dots) -> None:
    colour = COLOURS[1] if row.marked else COLOURS[0]
    beside: dict[str, Any] = {"va": "center", "xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
    if not row.values:
        axes.annotate("to come", (1, y), (8, 0), color=GREY, **beside)
        return
    mean = fmean(row.values)
    if len(row.values) > 1:
        axes.errorbar(mean, y, xerr=stdev(row.values), color=colour, capsize=3, linewidth=1.6)
        axes.plot(row.values, [y + 0.3] * len(row.values), "o", color=colour, markersize=3, markeredgewidth=0)
    axes.plot(mean, y, "D" if row.marked else "o", color=colour, markersize=8, markeredgecolor="white")
    axes.annotate(f"{mean:.{row.digits}f}", (1, y), (8, 0), color=INK, **beside)


def _score_axis(axes: Axes, values: Sequence[float], unit: str) -> None:
    if values:
        margin = max(min(1.0, 0.05 * max(values)), 0.06 * (max(values) - min(values))) or 1.0
        axes.set_xlim(min(values) - margin, max(values) + margin)
    axes.set_xlabel(unit)


def sweep_chart(taps: Mapping[str, Mapping[int, tuple[float, float]]], pixels: tuple[float, float] | None) -> Markup:
    """Accuracy against the timestep, a line and a band per tap. taps: tap -> timestep -> (mean, sd)."""
    timesteps = sorted({t for points in taps.values() for t in points})
    place = {t: i for i, t in enumerate(timesteps)}
    legend = 18 * -(-(len(taps) + bool(pixels)) // 3)
    height = 284 + legend
    with _style("sweep"):
        figure = _figure(height)
        axes = figure.add_axes((0.12, (legend + 54) / height, 0.85, 220 / height))
        for number, (tap, points) in enumerate(taps.items()):
            x, mean = [place[t] for t in points], [m for m, _ in points.values()]
            low, high = [m - s for m, s in points.values()], [m + s for m, s in points.values()]
            colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
            axes.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
            axes.plot(x, mean, color=colour, marker=marker, markersize=5, label=_cut(tap))
        if pixels:
            axes.axhline(pixels[0], color=INK, linestyle=(0, (5, 3)), label="raw pixels")
            axes.axhspan(pixels[0] - pixels[1], pixels[0] + pixels[1], color=INK, alpha=0.06, linewidth=0)
        _listed(axes, timesteps)
        axes.set(xlabel=f"timestep t of the diffusion model {LISTED}", ylabel="% correct")
        figure.legend(loc="lower center", ncols=3, columnspacing=1.2, handlelength=2.2)
        return _svg(figure, "sweep")


def levels_chart(taps: Mapping[str, Sequence[float]], levels: Sequence[tuple[float, int]], name: str) -> Markup:
    """A heat map: a row per tap, a column per noise level (sigma, t); the highest cell is framed.

    Numbers stand in the cells while ten columns leave them room.
    """
    left = min(150.0, 14 + 6.1 * max(len(_cut(tap, 22)) for tap in taps))
    height = 24 * len(taps) + 52
    grid = list(taps.values())
    with _style(name):
        figure = _figure(height)
        box = (left / WIDTH, 46 / height, (WIDTH - left - 8) / WIDTH, 24 * len(taps) / height)
        axes = figure.add_axes(box)
        axes.imshow(grid, aspect="auto", cmap="Blues", interpolation="nearest")
        low, high = min(map(min, grid)), max(map(max, grid))
        if len(levels) <= 10:
            for y, row in enumerate(grid):
                for x, value in enumerate(row):
                    colour = "white" if value > low + 0.55 * (high - low) else INK
                    axes.annotate(f"{value:.1f}", (x, y), ha="center", va="center", size=11, color=colour)
        y, x = max(((y, x) for y in range(len(grid)) for x in range(len(levels))), key=lambda at: grid[at[0]][at[1]])
        frame = matplotlib.patches.Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor=COLOURS[1], linewidth=2.5)
        axes.add_patch(frame)
        kept = range(0, len(levels), -(-len(levels) // 10))
        axes.set_xticks(list(kept), [f"{levels[i][0]:.2g}\n{levels[i][1]}" for i in kept])
        axes.set_yticks(range(len(taps)), [_cut(tap, 22) for tap in taps], color=INK)
        axes.tick_params(length=0)
        axes.grid(False)
        axes.set_xlabel("noise level: sigma above, timestep t below")
        return _svg(figure, name)


LISTED = "(listed values, evenly spaced)"


def _listed(axes: Axes, values: Sequence[float]) -> None:
    """Ticks for values that stand side by side whatever their distance."""
    kept = range(0, len(values), -(-len(values) // 11))
    axes.set_xticks(list(kept), [f"{values[i]:g}" for i in kept])


def settings_chart(
    lines: Mapping[str, Mapping[float, Sequence[float]]],
    level: tuple[str, float] | None,
    axis: tuple[str, str],
    name: str,
) -> Markup:
    """A score against a setting. lines: label -> value of the setting -> scores of its seeds; axis: their words.

    Points are means, bars standard deviations; ``level`` is another arm's mean, drawn as a dashed line.
    """
    place = {x: i for i, x in enumerate(sorted({x for points in lines.values() for x in points}))}
    with _style(name):
        figure = _figure(320)
        axes = figure.add_axes((0.12, 0.28, 0.85, 0.69))
        for number, (label, points) in enumerate(lines.items()):
            x, mean = [place[v] for v in sorted(points)], [fmean(points[v]) for v in sorted(points)]
            sd = [stdev(points[v]) if len(points[v]) > 1 else 0.0 for v in sorted(points)]
            look = _look(number) | {"marker": MARKERS[number % len(MARKERS)], "markersize": 5}
            axes.errorbar(x, mean, yerr=sd if any(sd) else None, capsize=3, label=_cut(label), **look)
        if level:
            axes.axhline(level[1], color=INK, linestyle=(0, (5, 3)), label=_cut(level[0]))
        _listed(axes, list(place))
        axes.set(xlabel=f"{axis[0]} {LISTED}", ylabel=axis[1], xlim=(-0.3, len(place) - 0.7))
        if len(lines) > 1 or level:
            figure.legend(loc="lower center", ncols=2, columnspacing=1.2, handlelength=2.6)
        return _svg(figure, name)


@dataclass(frozen=True)
class Looks:
    """Where one policy looked. probs: step -> probability of each of ``timesteps``."""

    label: str
    timesteps: Sequence[int]
    probs: Mapping[int, Sequence[float]]


def policy_chart(looks: Sequence[Looks], name: str = "policy") -> Markup:
    """Per policy a heat map over the steps, and beside it where it ended."""
    tall, head, foot = 200, 30, 44
    height = len(looks) * (tall + head + foot)
    with _style(name):
        figure = _figure(height)
        for number, one in enumerate(looks):
            top = height - number * (tall + head + foot) - head
            box = (top - tall) / height, tall / height
            figure.text(10 / WIDTH, (top + 10) / height, _cut(one.label, 50), weight="bold")
            _heat(figure.add_axes((52 / WIDTH, box[0], 230 / WIDTH, box[1])), one)
            _ended(figure.add_axes((292 / WIDTH, box[0], 100 / WIDTH, box[1])), one)
        return _svg(figure, name)


def _heat(axes: Axes, looks: Looks) -> None:
    steps = list(looks.probs)
    grid = [[looks.probs[s][i] for s in steps] for i in range(len(looks.timesteps))]
    extent = (steps[0], max(steps[-1], steps[0] + 1), -0.5, len(grid) - 0.5)
    darkest = max(max(map(max, grid)), 2 / len(grid))  # no preference at all is half-way, not darkest
    shown = axes.imshow(grid, aspect="auto", origin="lower", cmap="Blues", extent=extent, interpolation="nearest")
    shown.set_clim(0, darkest)
    axes.set(xlabel="training step", ylabel="timestep t")
    every = -(-len(grid) // 12)
    axes.set_yticks(range(0, len(grid), every), [str(t) for t in looks.timesteps[::every]])
    axes.grid(False)


def _ended(axes: Axes, looks: Looks) -> None:
    final = looks.probs[list(looks.probs)[-1]]
    axes.barh(range(len(final)), final, color=COLOURS[0], height=0.75)
    for y, share in enumerate(final):
        axes.annotate(f"{100 * share:.0f} %", (share, y), (4, 0), textcoords="offset points", va="center", size=11)
    axes.set(ylim=(-0.5, len(final) - 0.5), xlim=(0, max(final) * 1.05), yticks=[], xticks=[], xlabel="at the end")
    axes.grid(False)


@dataclass(frozen=True)
class Chosen:
    """Which timesteps a run chose. shares: percent of training -> share of each equal part of 0..end."""

    label: str
    end: int
    shares: Mapping[float, Sequence[float]]


def chosen_chart(found: Sequence[Chosen], name: str) -> Markup:
    """A heat map each, one below the other: training from left to right, timesteps upwards."""
    tall, head, foot = 120, 26, 42
    height = len(found) * (tall + head + foot)
    with _style(name):
        figure = _figure(height)
        for number, one in enumerate(found):
            bottom = height - (number + 1) * (tall + head + foot) + foot
            axes = figure.add_axes((54 / WIDTH, bottom / height, (WIDTH - 72) / WIDTH, tall / height))
            figure.text(10 / WIDTH, (bottom + tall + 9) / height, _cut(one.label, 50), weight="bold")
            grid = [list(row) for row in zip(*one.shares.values(), strict=True)]
            extent = (0, max(one.shares), 0, one.end)
            axes.imshow(
                grid, aspect="auto", origin="lower", cmap="Blues", extent=extent, interpolation="nearest", vmin=0
            )
            axes.set(xlabel="training done, %", ylabel="timestep t", xlim=(0, 100))
            axes.grid(False)
        return _svg(figure, name)


def curves_chart(panels: Mapping[str, Sequence[Curve]], unit: str, name: str) -> Markup:
    """A panel per student, one below the other; a curve of the same label has the same colour in all of them.

    Where values lie far apart the axis is logarithmic, unless ``unit`` begins with %.
    """
    labels = list(dict.fromkeys(curve.label for curves in panels.values() for curve in curves))
    rows = -(-len(labels) // 2)
    tall, head, foot, legend = 170, 26, 38, 18 * rows + 10
    height = len(panels) * (tall + head + foot) + legend
    with _style(name):
        figure = _figure(height)
        for number, (title, curves) in enumerate(panels.items()):
            bottom = height - (number + 1) * (tall + head + foot) + foot
            axes = figure.add_axes((54 / WIDTH, bottom / height, (WIDTH - 66) / WIDTH, tall / height))
            figure.text(10 / WIDTH, (bottom + tall + 9) / height, _cut(title, 50), weight="bold")
            _curves(axes, curves, labels, unit)
        handles = [matplotlib.lines.Line2D([], [], label=_cut(n, 30), **_look(labels.index(n))) for n in labels]
        figure.legend(handles=handles, loc="lower center", ncols=2, columnspacing=1.2, handlelength=2.6)
        return _svg(figure, name)


def _look(number: int) -> dict[str, Any]:
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": DASHES[number // len(COLOURS) % len(DASHES)]}


def _curves(axes: Axes, curves: Sequence[Curve], labels: Sequence[str], unit: str) -> None:
    for curve in curves:
        single: dict[str, Any] = {"marker": "o"} if len(curve.x) == 1 else {}
        axes.plot(curve.x, curve.y, **_look(labels.index(curve.label)), **single)
    values = [v for curve in curves for v in curve.y]
    if not unit.startswith("%") and values and min(values) > 0 and max(values) > 5 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set(xlabel="training step", ylabel=unit)
