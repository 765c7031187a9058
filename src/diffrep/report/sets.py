"""The images that a diffusion model drew for others to learn from: what they look like, how they came about."""

from __future__ import annotations

import base64
import io
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from diffrep.report.numbers import MISSING, listed
from diffrep.report.page import Block, Folded, Notes, Picture, Section, Table, Text
from diffrep.report.reading import read_object
from diffrep.report.values import Entry, Run

COLUMNS, ROWS = 10, 4  # classes shown, images of each
TILE = 56  # pixels of a side; larger images are shrunk
NO_LABEL = -1  # of a generator that knows no classes
FOLD = 3  # pictures of more sets wait behind a line
TEXT = (
    "These are the images that students of drawn images learn from. Where the generator was asked for a class, that "
    "class is the label of what it drew, whatever can be seen."
)


def drawn_sets(entries: Sequence[Entry]) -> Section | None:
    """A contact sheet and the facts of every finished set; None where there is none."""
    found = [(entry, run, manifest) for entry in entries if (run := _run(entry)) and (manifest := _manifest(run))]
    if not found:
        return None
    rows = ROWS if len(found) == 1 else 2
    pictures = [picture for entry, run, manifest in found if (picture := _picture(entry, run, manifest, rows))]
    shown: list[Block] = list(pictures)
    if len(pictures) > FOLD:
        shown = [Folded(f"What each of the {len(pictures)} sets looks like", pictures)]
    return Section("What the set looks like", [Text(TEXT), *shown, _facts_block(found)])


def _run(entry: Entry) -> Run | None:
    """The first seed whose set is finished: the manifest is written last."""
    whole = (run for run in entry.runs if (run.path / "manifest.json").is_file())
    return next(whole, None) if entry.kind == "synthesis" else None


def _manifest(run: Run) -> dict[str, Any] | None:
    return read_object(run.path / "manifest.json")


def _facts_block(found: Sequence[tuple[Entry, Run, Mapping[str, Any]]]) -> Block:
    """A list for one set, a row each for several."""
    rows = [(entry.label, _facts(entry, run, manifest)) for entry, run, manifest in found]
    if len(rows) == 1:
        return Notes(list(rows[0][1].items()))
    head = ["", *rows[0][1]]
    return Table("How they were made", head, [[label, *facts.values()] for label, facts in rows])


def _facts(entry: Entry, run: Run, manifest: Mapping[str, Any]) -> dict[str, str]:
    sampling = run.recipe.get("synthesis", {}).get("sampling", {})
    cost = read_object(run.path / "cost.json") or {}
    guidance = sampling.get("guidance_scale")
    seeds = f" (seed {run.seed})" if entry.num_seeds > 1 else ""
    return {
        "images": _number(manifest.get("images")),
        "sampler": str(sampling.get("sampler", MISSING)),
        "sampling steps": str(sampling.get("num_sampling_steps", MISSING)),
        "guidance": f"{guidance:g}{' (off)' if guidance == 1 else ''}" if guidance is not None else MISSING,
        "network calls per image": _number(manifest.get("calls_per_image")),
        "CPU seconds": _number(cost.get("cpu_seconds")),
        f"content hash{seeds}": str(manifest.get("content_hash", MISSING))[:12],
        "licence": str((manifest.get("generator") or {}).get("licence", MISSING)),
    }


def _number(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.1f}"
    return f"{value:,}" if isinstance(value, int) else MISSING


def _picture(entry: Entry, run: Run, manifest: Mapping[str, Any], rows: int) -> Picture | None:
    """The first images of up to ten classes, a column each; None where the shards are not at hand."""
    labels = sorted(map(int, manifest.get("counts") or {}))
    chosen = labels[:: max(1, -(-len(labels) // COLUMNS))]
    has_classes = labels != [NO_LABEL]
    try:
        found = first_images(run.path, chosen, rows if has_classes else rows * COLUMNS)
        columns = list(found.values()) if has_classes else [found[NO_LABEL][i::COLUMNS] for i in range(COLUMNS)]
        sheet = contact_sheet(columns)
    except (OSError, tarfile.TarError, ValueError, Image.DecompressionBombError):
        return None
    if sheet is None:
        return None
    names = dict(enumerate(manifest.get("classes") or ()))
    shown = listed([str(names.get(label, label)) for label in chosen])
    which = f"{len(chosen)} of {len(labels)} classes" if len(chosen) < len(labels) else "each class"
    of = f" of {which}, a column for each: {shown}" if has_classes else f", {sum(map(len, columns))} in all"
    what = f"{entry.label} (seed {run.seed}): the first images{of}. Not selected for this page."
    return Picture(what, what, source=f"data:image/png;base64,{base64.b64encode(sheet).decode()}")


def first_images(folder: Path, labels: Sequence[int], count: int) -> dict[int, list[bytes]]:
    """Label -> image files of its first ``count`` samples, as far as the shards of ``folder`` hold them."""
    found: dict[int, list[bytes]] = {label: [] for label in labels}
    for label, content in _samples(folder, set(labels)):
        if len(found[label]) < count:
            found[label].append(content)
        if all(len(images) == count for images in found.values()):
            break
    return found


def _samples(folder: Path, labels: set[int]) -> Iterator[tuple[int, bytes]]:
    """(label, image file) of the samples with one of ``labels``, in order. A label stands before its image."""
    for shard in sorted(folder.glob("shard-*.tar")):
        with tarfile.open(shard) as tar:
            label_of: dict[str, int] = {}
            for member in tar:
                key, _, extension = member.name.partition(".")
                if extension == "cls":
                    label_of[key] = int(_content(tar, member))
                elif extension in ("png", "webp") and (label := label_of.get(key, NO_LABEL)) in labels:
                    yield label, _content(tar, member)


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    return file.read() if file else b""


def contact_sheet(columns: Sequence[Sequence[bytes]]) -> bytes | None:
    """Image files, a column of each sequence, as one PNG on white; None without any."""
    tiles = [[_tile(content) for content in column] for column in columns]
    sides = [max(tile.size) for column in tiles for tile in column]
    if not sides:
        return None
    gap = 1 if max(sides) < 24 else 2
    step = max(sides) + gap
    sheet = Image.new("RGB", (step * len(tiles) - gap, step * max(map(len, tiles)) - gap), "white")
    for x, column in enumerate(tiles):
        for y, tile in enumerate(column):
            sheet.paste(tile, (x * step, y * step))
    file = io.BytesIO()
    sheet.save(file, "PNG", optimize=True)
    return file.getvalue()


def _tile(content: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(content)).convert("RGB")
    image.thumbnail((TILE, TILE))
    return image
