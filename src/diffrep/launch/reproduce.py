"""``diffrep reproduce``: a published score again, from the released files to a table "published, ours".

Looked for, here or below $DIFFREP_DATA:

weights/addp-vit-base-16/      what ``diffrep convert`` makes of the released file; else
weights/addp-vit-base-16.pth   that file, converted into the folder beside it
data/imagenet-val256/          what ``diffrep data prepare imagenet-val256`` makes

Written: a folder as ``diffrep generate`` writes it, and ``reproduced.json`` in it, last.
No hash of the released files is known; the sizes of files and networks are checked, and the networks' own hashes kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffrep.assets import ASSETS, Asset
from diffrep.console import duration
from diffrep.errors import UserError, nearest
from diffrep.files import located, read_json, write_json
from diffrep.frozen.token_files import convert
from diffrep.frozen.tokens import CARD, WEIGHTS, held
from diffrep.launch import ranks
from diffrep.launch.generate import IMAGES, SETTINGS
from diffrep.models.addp_vit import LARGE, ADDPVitConfig

FOUND = "reproduced.json"
NAMES = {"addp-base": "addp-vit-base-16", "addp-large": "addp-vit-large-16"}  # keys of ASSETS
NETWORKS = {"addp-vit-base-16": ADDPVitConfig(), "addp-vit-large-16": ADDPVitConfig(**LARGE)}
TOKENIZER = 4 * 54_515_587  # bytes of the released tokenizer's values
SCHEDULES = {20: "cosine", 256: "linear"}  # of the released scripts, by their steps
REFERENCE = "data/imagenet-val256"
PROTOCOL, ENTIRE = "inception-val", 50_000  # of the published scores
UNSTATED = "which of the two schedules, 20 or 256 steps, the published numbers are of is not stated"


@dataclass(frozen=True)
class Plan:
    """What will be made and scored.

    model:   a folder of networks, or a file that is converted first.
    unlike:  why these are not the released networks, "" where they look like them.
    judging: the fields of a ``ScoreConfig``.
    cost:    what generation will take, where that was asked for.
    """

    name: str
    model: Path
    reference: str
    out: Path
    steps: int
    images: int
    unlike: str
    judging: dict[str, Any]
    cost: dict[str, Any] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, Any]:
        """The fields of a ``GenerationConfig``; the number of steps follows, and is smaller where tokens are fewer."""
        return {"alternation": {"schedule": SCHEDULES[self.steps]}}

    @property
    def seeds(self) -> range:
        return range(self.images)

    @property
    def folder(self) -> Path:
        """Of the networks, converted or still to be."""
        return self.model if self.model.is_dir() else self.model.with_suffix("")

    @property
    def png(self) -> str:
        """The images that are scored: all of the folder, also those of an earlier command that asked for more."""
        return f"folder:{self.out / IMAGES}"

    def lines(self) -> list[str]:
        """For a terminal, before anything is made."""
        converted = "" if self.folder.exists() else f", to be converted into {self.folder}"
        told = [
            f"{self.name}: {self.images:,} images, {self.steps} steps or as many as there are tokens "
            f"({SCHEDULES[self.steps]})",
            f"networks   {self.model}{converted}{self.unlike and f' ({self.unlike})'}",
            f"reference  {self.reference}",
        ]
        if self.cost:
            took, disk = duration(self.cost["seconds"]), self.cost["disk_bytes"] / 1e6
            told.append(f"time       about {took} of one worker, scores apart (from one block on this machine)")
            told.append(f"disk       about {disk:,.1f} MB for images")
        return [*told, "nothing was written"]

    def to_json(self) -> dict[str, Any]:
        """The same as plain values."""
        names = ("name", "reference", "steps", "images", "unlike", "cost")
        return {name: getattr(self, name) for name in names} | {"model": str(self.model), "out": str(self.out)}


# Finding and checking


def planned(
    name: str,
    out: str | Path | None = None,
    steps: int = 20,
    images: int = ENTIRE,
    model: str | None = None,
    reference: str | None = None,
    inception: str | None = None,
    features: str | None = None,
) -> Plan:
    """Find the files and check their sizes; nothing is written.

    Args:
        name: a key of :data:`NAMES`. out: default ``runs/NAME-stepsN``. steps: a key of :data:`SCHEDULES`.
        model: networks, or an official file, in place of those in ``weights/``.
        reference: images, or statistics, in place of ``data/imagenet-val256``.
        inception: file of Inception's weights. features: a classifier to compare by in its place.

    Raises:
        UserError: an unknown name, other steps, files that are missing or of another size.
    """
    if name not in NAMES:
        raise UserError(f"reproduce '{name}': no such network was released; {nearest(name, NAMES)}")
    if steps not in SCHEDULES:
        raise UserError(f"--steps {steps}: the released scripts take 20 (cosine) or 256 (linear)")
    if images < 2:
        raise UserError(f"--images {images}: a score needs 2 at least, the published ones are of {ENTIRE:,}")
    asset = ASSETS[NAMES[name]]
    networks = _networks(asset, model)
    _refuse_absent([*_absent_networks(asset, networks), *_absent_reference(reference)])
    assert networks is not None
    unlike = _unlike(networks, asset)
    if unlike and model is None:
        raise UserError(f"{networks}: {unlike}; get it anew ({asset.location}), or name other networks with --model")
    judge = {"reference": features} if features else None
    judging = {"inception": inception, "features": judge}
    target = Path(out) if out else Path("runs") / f"{name}-steps{steps}"
    return Plan(name, networks, reference or f"folder:{REFERENCE}", target, steps, images, unlike, judging)


def _networks(asset: Asset, model: str | None) -> Path | None:
    if model is not None and not located(model).exists():
        raise UserError(
            f"--model {model} does not exist; valid: a folder of diffrep convert or a run, an official file"
        )
    named = [model] if model else [f"weights/{asset.key}", f"weights/{asset.key}.pth"]
    return next((place for place in map(located, named) if place.exists()), None)


def _absent_networks(asset: Asset, found: Path | None) -> list[str]:
    if found is not None:
        return []
    return [f"{asset.key}.pth of {asset.location} as weights/{asset.key}.pth (licence {asset.licence})"]


def _absent_reference(given: str | None) -> list[str]:
    if given is not None or (located(REFERENCE) / "manifest.json").is_file():
        return []
    return [f"the reference: diffrep data prepare imagenet-val256 IMAGENET {REFERENCE}"]


def _refuse_absent(absent: Sequence[str]) -> None:
    if absent:
        raise UserError(f"missing, here and below $DIFFREP_DATA: {'; and '.join(absent)}")


def _unlike(place: Path, asset: Asset) -> str:
    """In what a file or folder differs in size from the released one, "" where it does not."""
    if place.is_file():
        least, most = asset.size
        met = place.stat().st_size
        told = f"{least:,}" if least == most else f"{least:,} to {most:,}"
        return "" if least <= met <= most else f"it has {met:,} bytes, the released file {told}"
    return _unlike_folder(held(place), NETWORKS[asset.key])


def _unlike_folder(places: Mapping[str, Path], wanted: ADDPVitConfig) -> str:
    for kind, words in (("addp", "ADDP network"), ("tokenizer", "tokenizer")):
        if kind not in places or not (places[kind] / WEIGHTS).is_file():
            return f"it holds no {words}"
    if read_json(places["addp"] / CARD).get("config") != wanted.model_dump(mode="json"):
        return f"its ADDP network has not the released size (width {wanted.embed_dim}, depth {wanted.depth})"
    spare = (places["tokenizer"] / WEIGHTS).stat().st_size - TOKENIZER
    return "" if 0 <= spare < 1_000_000 else "its tokenizer has not the released size"


def converted(plan: Plan) -> str:
    """The folder of the networks, made of the official file where it is not there yet.

    Raises:
        UserError: it is not there, and torchrun's processes would make it all at once; or what ``convert`` refuses.
    """
    if not plan.folder.exists():
        if ranks.world() > 1:
            first = f"diffrep convert {plan.model} --out {plan.folder}"
            raise UserError(f"{plan.model} is converted by one process, not by all of torchrun: first {first}")
        convert(str(plan.model), plan.folder)
    return str(plan.folder)


# The end


@dataclass(frozen=True)
class Reproduced:
    """Published numbers and ours.

    made:   what ``generated.json`` says.
    scores: a ``Scores``, each of which knows its protocol.
    """

    plan: Plan
    made: dict[str, Any]
    scores: Any

    def rows(self) -> list[dict[str, Any]]:
        """One for each score. published: None where nothing was, or of other networks, or by another protocol."""
        return [self._row(score) for score in self.scores.scores]

    def _row(self, score: Any) -> dict[str, Any]:
        is_theirs = not self.plan.unlike and score.protocol.name == PROTOCOL
        published = ASSETS[NAMES[self.plan.name]].scores.get(score.name) if is_theirs else None
        return {"published": published, **score.to_json()}

    def lines(self) -> list[str]:
        """For a terminal: no number without its protocol and N."""
        head = ("score", "published", "ours", "protocol", "N")
        told = [line for line in self.scores.lines() if line.startswith(("reference", "features", "note"))]
        steps = len(self.made["masked"]) - 1
        about = f"{self.plan.name}: {self.made['name']}, {SCHEDULES[self.plan.steps]}, {steps} steps"
        licences = " / ".join(dict.fromkeys(self.made["licences"].values()))
        return [
            about, "", *_columns([head, *map(_cells, self.rows())]), "",
            *told, *(f"note: {note}" for note in self._notes()),
            f"licence, that of the networks: {licences}", f"folder: {self.plan.out}",
        ]  # fmt: skip

    def _notes(self) -> list[str]:
        if self.plan.unlike:
            return [f"not the released networks ({self.plan.unlike}): the published numbers are not theirs"]
        if not any(row["published"] for row in self.rows()):
            return [f"published numbers are of {PROTOCOL}: none of these can be held against them"]
        return [UNSTATED]

    def to_json(self) -> dict[str, Any]:
        """All of it as plain values."""
        networks = read_json(self.plan.out / SETTINGS)["model"]
        told = [*self.scores.said, *self._notes()]
        return self.plan.to_json() | {"networks": networks, "scores": self.rows(), "said": told}

    def kept(self) -> Reproduced:
        """Written into the folder of the images."""
        write_json(self.plan.out / FOUND, self.to_json())
        return self


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    spread = f" ± {row['spread']:.2g}" if row["spread"] is not None else ""
    protocol = row["protocol"]
    against = f"{protocol['reference_images']:,}" if protocol["reference_images"] else "statistics"
    published = "-" if row["published"] is None else f"{row['published']}"
    count = f"{protocol['images']:,} against {against}"
    return row["name"], published, f"{row['value']:.5g}{spread}", protocol["name"], count


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
