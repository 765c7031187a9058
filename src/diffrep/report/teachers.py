"""The sections about what teaches: what a diffusion model draws, where its knowledge sits, where policies look."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from statistics import fmean

from diffrep.report import levels, pictures
from diffrep.report.numbers import listed
from diffrep.report.page import Block, Notes, Picture, Section, Text
from diffrep.report.values import Entry, Run

EARLY = 300  # timesteps up to here count as little noise


def samples(entries: Sequence[Entry]) -> Section | None:
    """What the diffusion models draw."""
    blocks: list[Block] = []
    for entry in entries:
        found = next((run for run in entry.runs if (run.path / "samples" / "grid.png").is_file()), None)
        if found is not None:
            blocks.append(_sample_picture(entry, found))
    if not blocks:
        return None
    text = (
        "A diffusion model learns to turn noise into images, step by step. Nothing here learns from these drawings; "
        "they show whether the model has understood its images before others learn from it."
    )
    return Section("What the diffusion model draws", [Text(text), *blocks])


def _sample_picture(entry: Entry, run: Run) -> Picture:
    pixels = base64.b64encode((run.path / "samples" / "grid.png").read_bytes()).decode()
    recipe = entry.recipe
    count, source = recipe.get("evaluate", {}).get("samples"), recipe.get("data", {}).get("source", "its data")
    what = f"{count or 'Some'} images drawn by {entry.label} (seed {run.seed}) after {run.step:,} training steps"
    return Picture(
        alt=f"{what}, in a grid. It was trained on: {source}.",
        caption=f"{what}. Not selected.",
        source=f"data:image/png;base64,{pixels}",
    )


Points = dict[str, dict[int, tuple[float, float]]]


def sweep_points(entry: Entry) -> tuple[Points, tuple[float, float] | None]:
    """Per tap and timestep, and for raw pixels: mean and standard deviation over label draws and seeds."""
    found: dict[tuple[str, int | None], list[tuple[float, float]]] = {}
    for result in entry.results():
        for row in result.get("rows", []):
            found.setdefault((row["tap"], row["timestep"]), []).append((row["mean"], row["sd"]))
    taps: Points = {}
    for (tap, timestep), values in found.items():
        if timestep is not None:
            taps.setdefault(tap, {})[timestep] = _pooled(values)
    pixels = next((_pooled(v) for (_, timestep), v in found.items() if timestep is None), None)
    return taps, pixels


def _pooled(values: Sequence[tuple[float, float]]) -> tuple[float, float]:
    mean = fmean(m for m, _ in values)
    return mean, fmean(s**2 + (m - mean) ** 2 for m, s in values) ** 0.5


def best_point(taps: Points) -> tuple[str, int, float]:
    """(tap, timestep, mean) of the highest point."""
    return max(((tap, t, m) for tap, points in taps.items() for t, (m, _) in points.items()), key=lambda p: p[2])


def sweep(entry: Entry, student_taps: Sequence[str] = ()) -> Section | None:
    """What can be read from a diffusion model, place by place and timestep by timestep; or how that was searched."""
    taps, pixels = sweep_points(entry)
    if not taps:
        return levels.search(entry)
    grid = entry.recipe.get("sweep", {})
    labels = f"{grid['labels']:,}" if grid.get("labels") else "all"
    explained = (
        f"Inside the network an image becomes many numbers, its features. Here they are read at {len(taps)} places "
        f"(taps) and after telling the network how noisy to take the image for: the timestep t, 0 for clean. A linear "
        f"probe, the simplest classifier there is, gets {labels} labelled images and has to name the rest. The better "
        f"it does, the more useful the features."
    )
    split = grid.get("split", "test")
    warning = (
        f"Measured on the {split} images: choosing a tap or timestep from this picture and then reporting results on "
        f"the same images would flatter them."
    )
    picture = Picture(
        _sweep_alt(taps, pixels), _sweep_caption(entry, taps, pixels, student_taps), pictures.sweep_chart(taps, pixels)
    )
    blocks = [Text(explained), picture, *levels.level_blocks(entry), Text(warning, "note")]
    return Section("Where the knowledge sits", blocks)


def _sweep_alt(taps: Points, pixels: tuple[float, float] | None) -> str:
    lines = [f"{tap}: " + ", ".join(f"t={t} {m:.1f}" for t, (m, _) in points.items()) for tap, points in taps.items()]
    raw = f" Raw pixels: {pixels[0]:.1f}." if pixels else ""
    return "Linear-probe accuracy in percent against the timestep, one line per tap. " + "; ".join(lines) + "." + raw


def _sweep_caption(entry: Entry, taps: Points, pixels: tuple[float, float] | None, student_taps: Sequence[str]) -> str:
    tap, timestep, mean = best_point(taps)
    said = [f"Best of {sum(map(len, taps.values()))} points: {tap} at t = {timestep}, {mean:.1f} %."]
    if pixels:
        said.append(f"The raw pixels, without any network, give {pixels[0]:.1f} % (dashed).")
    for own in (t for t in student_taps if t in taps):
        _, timestep, mean = best_point({own: taps[own]})
        said.append(f"At {own}, where the students learn from, the best is t = {timestep} ({mean:.1f} %).")
    grid, seeds = entry.recipe.get("sweep", {}), len(entry.results())
    draws = grid.get("draws", 1) if grid.get("labels") else 1  # all labels are one draw
    over = [f"{n} {what}" for n, what in ((draws, "draws of labelled images"), (seeds, "seeds")) if n > 1]
    bands = [f"Bands: one standard deviation over {listed(over)}."] if over else []
    return " ".join([*said, *bands])


def looks(entry: Entry) -> pictures.Looks | None:
    """Mean over seeds of a policy's logged probabilities, at the steps all seeds logged; None without any."""
    logs = [{m["step"]: m["policy_probs"] for m in run.metrics if m.get("policy_probs")} for run in entry.runs]
    logs = [log for log in logs if log]
    steps = sorted(set.intersection(*map(set, logs))) if logs else []
    timesteps = entry.recipe.get("method", {}).get("timestep", {}).get("values", [])
    if not steps or len(logs[0][steps[0]]) != len(timesteps):
        return None
    probs = {s: [fmean(column) for column in zip(*(log[s] for log in logs), strict=True)] for s in steps}
    order = sorted(range(len(timesteps)), key=timesteps.__getitem__)
    return pictures.Looks(
        entry.label, [timesteps[i] for i in order], {s: [p[i] for i in order] for s, p in probs.items()}
    )


POLICY = (
    "A policy is a small network that picks, for each image, the timestep whose features the student should imitate. "
    "It is rewarded when a small classifier can name the image from those features. It begins without a preference; a "
    "bonus for trying everything fades while it learns."
)


def policies(entries: Sequence[Entry], sweep_entry: Entry | None = None) -> Section | None:
    """Where learned policies look, over time."""
    found = [(entry, one) for entry in entries if (one := looks(entry)) is not None]
    if not found:
        return None
    caption = (
        "Left: the average probability of each timestep while training goes on, darker is more. Right: the last "
        "value logged."
    )
    chart = pictures.policy_chart([one for _, one in found])
    said = [(entry.label, look_sentence(entry, one, sweep_entry)) for entry, one in found]
    alt = " ".join(f"{label}: {sentence}" for label, sentence in said)
    return Section("Where the policy looks", [Text(POLICY), Picture(alt, caption, chart), Notes(said)])


def early_mass(probs: Sequence[float], timesteps: Sequence[int]) -> float:
    """Percent of the probability on t <= EARLY."""
    return 100 * sum(p for p, t in zip(probs, timesteps, strict=True) if t <= EARLY)


def look_sentence(entry: Entry, one: pictures.Looks, sweep_entry: Entry | None) -> str:
    """Mass on small t at the end, against no preference; where it peaks, against the sweep's best."""
    final = one.probs[max(one.probs)]
    peak = max(range(len(final)), key=final.__getitem__)
    even = 100 * sum(t <= EARLY for t in one.timesteps) / len(one.timesteps)
    text = (
        f"at the end {early_mass(final, one.timesteps):.0f} % of its choices fall on t ≤ {EARLY} (no "
        f"preference would give {even:.0f} %); most often t = {one.timesteps[peak]} ({100 * final[peak]:.0f} %)."
    )
    tap, taps = entry.recipe.get("method", {}).get("tap"), sweep_points(sweep_entry)[0] if sweep_entry else {}
    if tap in taps:
        _, best, mean = best_point({tap: taps[tap]})
        text += f" The sweep's best at the same tap is t = {best} ({mean:.1f} %)."
    return text
