"""Where and when to look: a probe's heat map over taps and noise levels, its control, and what a search tried."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from diffrep.report import pictures
from diffrep.report.numbers import listed
from diffrep.report.page import Block, Picture, Section, Table, Text
from diffrep.report.values import Entry

Row = Mapping[str, Any]
FEWEST = 2  # noise levels that make a map


def level_blocks(entry: Entry) -> list[Block]:
    """The heat map of a grid, the untrained network beside it, and how far the label-free score is to be trusted."""
    rows = [row for result in entry.results() for row in result.get("rows", []) if row.get("sigma") is not None]
    control = [row for result in entry.results() for row in result.get("control") or []]
    found = [heat_map(rows, "levels", "linear-probe accuracy"), *_control(rows, control), _label_free(entry)]
    return [block for block in found if block is not None]


def heat_map(rows: Sequence[Row], name: str, what: str) -> Picture | None:
    """Means over the seeds; None where there is one level only, or some cell was not measured."""
    levels = sorted({(row["sigma"], row["timestep"]) for row in rows})
    cells: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        cells.setdefault((row["tap"], row["timestep"]), []).append(row["mean"])
    taps = list(dict.fromkeys(row["tap"] for row in rows))
    if len(levels) < FEWEST or len(cells) < len(taps) * len(levels):
        return None
    grid = {tap: [fmean(cells[tap, timestep]) for _, timestep in levels] for tap in taps}
    tap, place = max(((t, k) for t in taps for k in range(len(levels))), key=lambda at: grid[at[0]][at[1]])
    sigma, timestep = levels[place]
    best = f"{tap} at sigma {sigma:.3g} (t = {timestep}), {grid[tap][place]:.1f} %"
    caption = (
        f"{what.capitalize()} by tap and noise level, darker is better; framed: {best}. Sigma is the noise in units of "
        "the image, sqrt((1 - alpha-bar) / alpha-bar), and compares between models; t counts in this model's schedule."
    )
    lines = [
        f"{tap}: " + ", ".join(f"sigma {s:.3g} {v:.1f}" for (s, _), v in zip(levels, values, strict=True))
        for tap, values in grid.items()
    ]
    alt = f"Heat map of {what} in percent over taps and noise levels. {'; '.join(lines)}. Highest: {best}."
    return Picture(alt, caption, pictures.levels_chart(grid, levels, name))


def _control(rows: Sequence[Row], control: Sequence[Row]) -> list[Block]:
    """Trained against untrained at the level where both were read."""
    pairs = []
    for row in control:
        ours = [r["mean"] for r in rows if (r["tap"], r["timestep"]) == (row["tap"], row["timestep"])]
        if ours:
            pairs.append([row["tap"], f"{fmean(ours):.1f}", f"{row['mean']:.1f}", f"{fmean(ours) - row['mean']:+.1f}"])
    if not pairs:
        return []
    caption = f"The same network before training, at sigma {control[0]['sigma']:.3g} (t = {control[0]['timestep']})"
    return [Table(f"{caption}; percent", ("tap", "trained", "untrained", "difference"), pairs)]


def _label_free(entry: Entry) -> Text | None:
    """Honest about what the score without labels is worth."""
    found = [
        r["label_free"] for r in entry.results() if (r.get("label_free") or {}).get("rank_correlation") is not None
    ]
    if not found:
        return None
    first = found[0]
    within = [f"{tap} {rho:+.2f}" for tap, rho in first["within_tap"].items() if rho is not None]
    inside = f" Within a tap, over the noise levels: {listed(within)}." if within else ""
    chosen = first["chosen"]
    text = (
        f"Without labels one would look for features that fall into clusters (between-cluster over within-cluster "
        f"variance under k-means). Here its ranks correlate with those of accuracy by "
        f"{fmean(f['rank_correlation'] for f in found):+.2f} over all points (1: the same order, 0: none)."
        f"{inside} Alone it would have taken {chosen['tap']} at t = {chosen['timestep']}: {chosen['mean']:.1f} %."
    )
    return Text(text, "note")


def search(entry: Entry) -> Section | None:
    """What a search tried, what it took, what it found."""
    found = next((result for result in entry.results() if "search" in result), None)
    if found is None:
        return None
    tried, best = found["search"], found["best"]
    head = ("images", "noise levels", "taps", "leading", "sigma", "t", "accuracy")
    rows = [_rung(rung) for rung in tried["rungs"] if rung["rows"]]
    share = f"{100 * tried['share_of_grid']:.1f} %"
    text = (
        f"A search for the tap and noise level worth reading took {tried['passes']:,} passes, {share} of a grid of "
        f"20 noise levels: every tap at every level on few images, then fewer levels on more, then between them. It "
        f"found {best['tap']} at sigma {best['sigma']:.3g} (t = {best['timestep']}). Scores are by leaving out one "
        f"training image at a time; test images took no part, so results on them are not flattered."
    )
    first = heat_map(
        tried["rungs"][0]["rows"], "search", f"left-out accuracy on the first {tried['rungs'][0]['images']:,} images"
    )
    control = [f"{row['tap']} {row['mean']:.1f} %" for row in tried["control"]]
    blocks: list[Block | None] = [
        Text(text),
        *(Text(f"Note: {note}.", "warning") for note in tried["notes"]),
        Table("Rung by rung, percent correct of left-out images", head, rows),
        first,
        Text(f"The untrained network at that level: {listed(control)}.", "note") if control else None,
    ]
    return Section("Where to look, by search", [block for block in blocks if block is not None])


def _rung(rung: Mapping[str, Any]) -> list[str]:
    rows = rung["rows"]
    top = max(rows, key=lambda row: row["mean"])
    counts = [len({row[key] for row in rows}) for key in ("timestep", "tap")]
    where = [top["tap"], f"{top['sigma']:.3g}", str(top["timestep"]), f"{top['mean']:.1f}"]
    return [f"{rung['images']:,}", *map(str, counts), *where]
