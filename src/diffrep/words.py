"""What the verbs print for people: plain text, no wider than a terminal. Programs read --json instead."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffrep.console import counts, duration
from diffrep.report.scores import unit
from diffrep.report.values import is_score
from diffrep.taps import Tap


def amount(number: float) -> str:
    """``950``, ``12.3 k``, ``4.56 G``: three digits and a letter."""
    for letter in ("", " k", " M", " G", " T", " P"):
        if abs(number) < 1000 or letter == " P":
            return f"{number:.3g}{letter}"
        number /= 1000
    raise AssertionError


def size(count: float) -> str:
    """Bytes: ``49.7 MB``, ``0 B``."""
    text = amount(count)
    return f"{text}B" if " " in text else f"{text} B"


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Columns as wide as their content."""
    text = [[str(cell) for cell in row] for row in [head, *rows]]
    widths = [max(len(row[i]) for row in text) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in text]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def cost(recipe_yaml: str, found: dict[str, Any]) -> str:
    """The resolved recipe, then what it will take."""
    if "multiply_adds" in found:
        return f"{recipe_yaml.rstrip()}\n\n{_estimate(found)}"
    rows = [[name, *_figures(f)] for name, f in found.items()]
    whole = {key: sum(f[key] for f in found.values()) for key in ("images", "multiply_adds", "seconds", "disk_bytes")}
    rows.append(["all, one seed", *_figures(whole)])
    shown = table(["stage", "images", "multiply-adds", "CPU time, about", "disk, about"], rows)
    licences = sorted({licence for f in found.values() for licence in f["licences"].values()})
    memory = f"memory, at least  {size(max(f['memory_bytes'] for f in found.values()))} per process"
    told = [memory, *(f"licence  {licence}" for licence in licences), "nothing was written"]
    return "\n".join([recipe_yaml.rstrip(), "", shown, "", *told])


def _figures(found: dict[str, Any]) -> list[str]:
    numbers = [amount(found["images"]), amount(found["multiply_adds"]), duration(found["seconds"])]
    return [*numbers, f"{size(found['disk_bytes'])}"]


def _estimate(found: dict[str, Any]) -> str:
    return "\n".join(
        [
            f"images seen       {amount(found['images'])}",
            f"multiply-adds     {amount(found['multiply_adds'])} (counted)",
            f"time, about       {duration(found['seconds'])} of CPU (from {_timed(found)} on this machine)",
            f"memory, at least  {size(found['memory_bytes'])}",
            f"disk, about       {size(found['disk_bytes'])}",
            *(f"licence of {what:<8}{licence}" for what, licence in found["licences"].items()),
            "nothing was written",
        ]
    )


def _timed(found: dict[str, Any]) -> str:
    some, whole = found["timed_images"], found["batch_size"]
    steps = "whole steps" if some == whole else f"steps of {some} of {whole} images, as is memory,"
    return f"{steps} in {found['timed_in']}"


def result(found: dict[str, Any]) -> str:
    """A run's scores and budget, or where a study's report is."""
    if found["kind"] == "study":
        return study(found)
    lines = [f"{found['name']}, seed {found['seed']}: {found['steps']} steps, {amount(found['images_seen'])} images, "]
    lines[0] += f"{amount(found['multiply_adds'])} multiply-adds, {found['cpu_seconds']:.1f} CPU s"
    if found["scores"]:
        lines.append(scores(found["scores"], found.get("data", {}).get("test_images")))
    behind = ", ".join(f"{part}: {count}" for part, count in found.get("labels_behind", {}).items())
    lines += [f"labels that it builds on: {behind}"] if behind else []
    lines += [f"note: {note}" for note in found.get("notes", ())]
    return "\n".join([*lines, f"licence: {found['licence']}", f"run folder: {found['run_dir']}"])


def study(found: dict[str, Any]) -> str:
    """The headline table, the report, and what to type next."""
    rows = [[arm, *shown] for arm, shown in found["table"]]
    lines = [table(["arm", *(found["columns"])], rows)] if rows else []
    lines += ["", f"{found['cpu_seconds']:.0f} CPU s in all", f"report: {found['report']}"]
    if found["next_commands"]:
        lines += ["", "next:", *(f"  {command}" for command in found["next_commands"])]
    return "\n".join(lines)


def numbers(found: dict[str, Any]) -> list[tuple[str, float]]:
    """The scores that a line holds: not those by class, subset or size, which result.json and the report have."""
    return [(name, value) for name, value in found.items() if isinstance(value, float) and is_score(name)]


def scores(found: dict[str, Any], pictures: int | None = None) -> str:
    """Numbers in a line; pictures: how many they are of, where ``test_images`` does not say so."""
    shown = ", ".join(f"{name} {value:.2f}{unit(name)}" for name, value in numbers(found))
    return f"{shown} (of {found.get('test_images', pictures)} test images)"


def ledger(rows: Sequence[dict[str, Any]]) -> str:
    """One row per recipe; what stands below is what the columns cannot hold."""
    ours = [r["ours"].replace(" seeds)", ")") for r in rows]  # the heading says of what the number in brackets is
    cells = [[r["name"], r["kind"], r["status"], r["published"], own] for r, own in zip(rows, ours, strict=True)]
    recipes: dict[str, list[str]] = {}  # those that a note is true of
    for row in rows:
        for note in row["notes"]:
            recipes.setdefault(note, []).append(row["name"])
    notes = [
        f"{', '.join(names[:2])}{f' and {len(names) - 2} more' * (len(names) > 2)}: {n}" for n, names in recipes.items()
    ]
    return "\n".join([table(["recipe", "kind", "status", "published", "ours (seeds)"], cells), "", *notes])


def taps(found: Sequence[Tap]) -> str:
    rows = [[t.name, "x".join(map(str, t.shape)), t.stride if t.stride else "-"] for t in found]
    return table(["tap", "shape", "stride"], rows)


def features(found: dict[str, Any], out: Path) -> str:
    shapes = ", ".join(f"{tap} {'x'.join(map(str, shape))}" for tap, shape in found["shapes"].items())
    return f"{out}: {shapes}; {amount(found['images_seen'])} passes, {found['cpu_seconds']:.1f} CPU s"


def synthesis(found: dict[str, Any]) -> str:
    """A finished set."""
    counts = sorted(set(found["counts"].values()))
    each = f"{len(found['counts'])} classes of {counts[0]}" + (f" to {counts[-1]}" if len(counts) > 1 else "")
    made = f"{amount(found['network_calls'])} network calls, {amount(found['multiply_adds'])} multiply-adds"
    return "\n".join(
        [
            f"{found['images']} images, {each if '-1' not in found['counts'] else 'no classes'}; {made}",
            f"content hash: {found['content_hash']}" + (", equal" if found.get("equal") else ""),
            f"licence, that of {found['generator']}: {found['licence']}",
            f"set: {found['out']}, a data source as synthetic:{found['out']}",
        ]
    )


def synthesis_begins(found: dict[str, Any]) -> str:
    """Said before the first image."""
    made = f"{amount(found['network_calls'])} network calls, {amount(found['multiply_adds'])} multiply-adds"
    return f"to make: {found['images']} of {found['all']} images, {made}; licence: {found['licence']}"


def synthesis_cost(found: dict[str, Any]) -> str:
    """Of a dry run."""
    return "\n".join(
        [
            f"images          {found['images']} in {found['shards']} shards",
            f"network calls   {amount(found['network_calls'])}",
            f"multiply-adds   {amount(found['multiply_adds'])} (counted)",
            f"time, about     {duration(found['seconds'])} of one worker (from one block on this machine)",
            f"disk, about     {size(found['disk_bytes'])} (from that block)",
            f"licence         {found['licences']['generator']}",
            "nothing was written",
        ]
    )


def probe(found: dict[str, Any]) -> str:
    """A grid's rows or a search's rungs, the best pair, and how to go on with it."""
    lines = _searched(found["search"]) if "search" in found else _swept(found)
    best = found["best"]
    words = " ".join(f"--set '{word}'" if "[" in word else f"--set {word}" for word in found["overrides"])
    return "\n".join(
        [
            *lines,
            f"best: {best['tap']} at {_level_words(best)}: {best['mean']:.1f} %",
            f"for a recipe: {words}",
            f"as a file, under a line 'base: RECIPE': {found['out']}/best.yaml",
        ]
    )


def _level_words(row: dict[str, Any]) -> str:
    return f"t = {row['timestep']} (sigma {row['sigma']:.3g}, SNR {row['snr']:.3g}, alpha-bar {row['alpha_bar']:.4g})"


def _swept(found: dict[str, Any]) -> list[str]:
    rows = found["rows"] + [row | {"tap": f"{row['tap']}, untrained"} for row in found["control"]]
    kept, images = found["label_free"], found["images"]
    lines = [table(["tap", "t", "sigma", "SNR", "alpha-bar", "accuracy %", "label-free"], list(map(_cells, rows))), ""]
    chosen, rank = kept["chosen"], kept["rank_correlation"]
    if rank is not None:
        lines.append(
            f"label-free score: rank correlation with accuracy {rank:+.2f}; alone it would take {chosen['tap']} at "
            f"t = {chosen['timestep']}: {chosen['mean']:.1f} %"
        )
    share = min(max(found["best"]["mean"] / 100, 0.0), 1.0)
    error = 100 * (share * (1 - share) / images["held_out"]) ** 0.5
    return [*lines, f"{images['held_out']} images judged: a score is sure to about ± {error:.1f} points"]


def _cells(row: dict[str, Any]) -> list[str]:
    spread = f" ± {row['sd']:.1f}" if row["sd"] else ""
    numbers = [f"{row['mean']:.1f}{spread}", f"{row['label_free']:.2f}"]
    if row["timestep"] is None:
        return [row["tap"], "-", "-", "-", "-", *numbers]
    level = [row["timestep"], f"{row['sigma']:.3g}", f"{row['snr']:.3g}", f"{row['alpha_bar']:.4g}"]
    return [row["tap"], *map(str, level), *numbers]


def _searched(found: dict[str, Any]) -> list[str]:
    rows = []
    for rung in found["rungs"]:
        top = max(rung["rows"], key=lambda row: row["mean"], default=None)
        taps, levels = ({row[key] for row in rung["rows"]} for key in ("tap", "timestep"))
        where = [top["tap"], top["timestep"], f"{top['sigma']:.3g}", f"{top['mean']:.1f}"] if top else ["-"] * 4
        rows.append([rung["images"], len(levels), len(taps), *where])
    head = ["images", "levels", "taps", "leads", "t", "sigma", "left-out accuracy %"]
    took = f"{found['passes']} passes of at most {found['planned_passes']}"
    share = f"{100 * found['share_of_grid']:.1f} % of a grid of 20 noise levels ({found['grid_passes']})"
    control = [f"untrained, {row['tap']}: {row['mean']:.1f} %" for row in found["control"]]
    return [table(head, rows), "", f"{took}: {share}", *control, *(f"note: {note}" for note in found["notes"])]


def probe_begins(found: dict[str, Any]) -> str:
    """Said before the first image."""
    share = f", {100 * found['share_of_grid']:.1f} % of a grid of 20 noise levels" if found["search"] else ""
    most = "at most " if found["search"] else ""
    return f"{most}{found['passes']} passes{share}: {found['levels']} noise levels, {found['taps']} taps"


def probe_cost(found: dict[str, Any]) -> str:
    """Of a dry run."""
    return "\n".join(
        [
            f"passes            {probe_begins(found)}",
            f"images            {found['train_images']} to learn from, {found['held_out_images']} to judge by",
            f"multiply-adds     {amount(found['multiply_adds'])} (counted)",
            f"time, about       {duration(found['seconds'])} of CPU for the passes (from one block on this machine)",
            f"memory, at least  {size(found['memory_bytes'])}",
            f"licence           {found['licences']['weights']}",
            "nothing was written",
        ]
    )


def assets(found: Sequence[dict[str, Any]]) -> str:
    """One table, the licences in full below it."""
    licences = list(dict.fromkeys(row["licence"] for row in found))
    rows = [
        [r["key"], r["purpose"], _asset_size(r), f"[{licences.index(r['licence']) + 1}]", r["state"], r["path"]]
        for r in found
    ]
    told = [f"[{number}] {licence}" for number, licence in enumerate(licences, 1)]
    return "\n".join([table(["key", "for", "size", "licence", "state", "belongs at"], rows), "", *told])


def _asset_size(row: dict[str, Any]) -> str:
    if row["size"]:
        return size(row["size"][0])
    return f"{amount(row['parameters'])} parameters" if row["parameters"] else "-"


def fetch(found: dict[str, Any]) -> str:
    """One asset that is here now."""
    what = "fetched" if found["fetched"] else "there already"
    return f"{found['key']}: {what}: {found['path']} ({found['hash']})\nlicence: {found['licence']}"


def convert(found: dict[str, Any]) -> str:
    """What each part of an official file is, and what stands there besides."""
    rows = [
        [kind, part["released_as"] or "another size", amount(part["parameters"]), part["tensors"], part["size"]]
        for kind, part in found["parts"].items()
    ]
    lines = [table(["part", "released as", "values", "tensors", "size"], rows), ""]
    told = {
        f"aliases: {found['aliases']} tensors that the file holds twice": "tokenizer" if found["aliases"] else "",
        f"unused, read by nothing: {len(found['unused'])}": ", ".join(found["unused"]),
        f"note: {len(found['filled'])} unused tables were not there and were filled": ", ".join(found["filled"]),
    }
    lines += [f"{what} ({which})" for what, which in told.items() if which]
    lines += [f"note: {found['note']}"] if "note" in found else []
    return "\n".join([*lines, f"licence: {found['licence']}", f"written: {found['out']}"])


def tokenize(found: dict[str, Any]) -> str:
    """Ids, codebook and error of one image or many."""
    size, grid = ("x".join(map(str, found[key])) for key in ("image_size", "grid"))
    psnr = "no error" if found["psnr"] is None else f"PSNR {found['psnr']:.2f} dB"
    many = f"{found['images']} images, the last of" if found["images"] > 1 else "1 image of"
    used = f"{found['codes_used']} of {found['codes']} ({100 * found['share_used']:.1f} %)"
    lines = [
        f"{many} {size} pixels: {grid} ids ({found['tokenizer']})",
        f"codes used: {used}, perplexity {found['perplexity']:.1f}",
        f"reconstruction: MSE {found['mse']:.6f}, {psnr}" + (" of the mean" if found["images"] > 1 else ""),
        f"licence: {found['licence']}",
    ]
    return "\n".join(lines + ([f"written: {found['out']}"] if found["out"] else []))


def generate(found: dict[str, Any]) -> str:
    """A folder of generated images."""
    height, width = found["image_size"]
    there = found["images"] - found["made"]
    made = f"{found['images']} images of {width}x{height} pixels" + (
        f", {there} of them there already" if there else ""
    )
    steps = f"{len(found['masked']) - 1} steps, tokens masked: {counts(found['masked'])}"
    licences = " / ".join(dict.fromkeys(found["licences"].values()))
    return "\n".join(
        [
            f"{made}; {found['name']}, {steps}",
            f"licence, that of the networks: {licences}",
            f"folder: {found['out']}; page: {found['out']}/index.html",
        ]
    )


def generation_cost(found: dict[str, Any]) -> str:
    """Of a dry run."""
    parts = [[part, amount(n["calls"]), amount(n["multiply_adds"])] for part, n in found["parts"].items()]
    parts.append(["all", "", amount(found["multiply_adds"])])
    licences = " / ".join(dict.fromkeys(found["licences"].values()))
    return "\n".join(
        [
            table(["part", "calls", "multiply-adds (counted)"], parts),
            "",
            f"images            {found['images']}, each in {found['steps']} steps, {found['block_size']} at once",
            f"time, about       {duration(found['seconds'])} of one worker (from one block on this machine)",
            f"memory, at least  {size(found['memory_bytes'])} per process",
            f"disk, about       {size(found['disk_bytes'])} (from that block)",
            f"licence           {licences}",
            "nothing was written",
        ]
    )
