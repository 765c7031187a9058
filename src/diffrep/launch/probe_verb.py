"""``diffrep probe`` as Typer reads it, and the fields of a ``SweepConfig`` that its options stand for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from diffrep.launch import teacher_options as of
from diffrep.launch.parsing import integers, numbers

Perform = Callable[[dict[str, Any], bool, bool], None]  # arguments of api.probe, --dry-run, --json

FIELDS = ("pool", "noise", "labels", "draws", "split", "control", "search", "budget")

_option = typer.Option


def add_probe_verb(app: typer.Typer, perform: Perform) -> None:
    """One verb more."""

    @app.command()
    def probe(
        teacher: of.Teacher,
        data: Annotated[str, _option(help="Data reference, e.g. digits or cifar10:FOLDER.")],
        taps: Annotated[
            str | None,
            _option(help="Dotted names, comma-separated; all: every block. Default mid_block, to search all."),
        ] = None,
        timesteps: Annotated[str | None, _option(help="0,50,100; without a level: 8 sigmas from 0.02 to 1.")] = None,
        sigmas: Annotated[str | None, _option(help="Instead, 0.05,0.3: noise in units of the image.")] = None,
        snrs: Annotated[str | None, _option(help="Instead: signal-to-noise ratios, 1 / sigma^2.")] = None,
        alpha_bars: Annotated[str | None, _option(help="Instead: shares of signal variance, in (0, 1).")] = None,
        pool: Annotated[int, _option(min=1, help="Cells per side.")] = 1,
        noise: Annotated[str | None, _option(help="forward: noise the image to the level; default clean.")] = None,
        labels: Annotated[int | None, _option(min=1, help="Few: labelled images per draw; default all.")] = None,
        draws: Annotated[int, _option(min=1, help="Of few labels.")] = 5,
        images: Annotated[int | None, _option(min=2, help="Training images, class-balanced; default all.")] = None,
        test_images: Annotated[int | None, _option(min=1, help="Images judged by, class-balanced.")] = None,
        split: Annotated[str, _option(help="Where they come from: test, validation.")] = "test",
        search: Annotated[bool, _option("--search", help="Find the best pair without measuring all.")] = False,
        budget: Annotated[float, _option(help="Of a search: share of the passes of 20 levels.")] = 0.09,
        control: Annotated[bool, _option("--control", help="Also the untrained network, at one level.")] = False,
        seed: Annotated[int, _option(min=0, help="Of labels, images and noise.")] = 0,
        precision: of.Precision = "fp32",
        channels_last: of.ChannelsLast = False,
        compile: of.Compile = False,
        attention: of.Attention = "fused",
        memory_mb: of.MemoryMb = None,
        image_size: Annotated[int | None, _option(min=1, help="Resize to this many pixels.")] = None,
        out: Annotated[Path, _option(help="The folder to write.")] = Path("probe"),
        allow_code: Annotated[bool, _option("--allow-code", help="Allow python:module:factory.")] = False,
        dry_run: Annotated[bool, _option("--dry-run", help="Say what it would cost, and stop.")] = False,
        as_json: Annotated[bool, _option("--json", help="Print JSON for programs.")] = False,
    ) -> None:
        """Where and when to look: linear-probe accuracy of a teacher's features over taps and noise levels.

        The same command goes on after an interruption.

        Example: diffrep probe runs/my_teacher --data digits --taps all --pool 2 --search
        """
        given = dict(locals())
        chosen = {name: given[name] for name in ("teacher", "out", "allow_code", "seed")}
        source = {"source": data, "image_size": image_size}
        perform(chosen | {"data": source, "settings": settings(given)}, dry_run, as_json)


def settings(given: dict[str, Any]) -> dict[str, Any]:
    """The fields of a ``SweepConfig``; only the noise levels that were given."""
    found = {name: given[name] for name in FIELDS} | {"passes": of.pass_values(given)}
    taps = given["taps"] or ("all" if given["search"] else "mid_block")
    found |= {"taps": taps.split(","), "train_images": given["images"], "held_out_images": given["test_images"]}
    if given["timesteps"] is not None:
        found["timesteps"] = integers(given["timesteps"], "--timesteps")
    for name in ("sigmas", "snrs", "alpha_bars"):
        if given[name] is not None:
            found[name] = numbers(given[name], f"--{name.replace('_', '-')}")
    return found


def probe_rows(found: dict[str, Any]) -> Any:
    """What a program gets: a grid's rows, those of the control marked; of a search what it found."""
    if "search" in found:
        return found["search"] | {"best": found["best"], "overrides": found["overrides"]}
    return found["rows"] + [row | {"untrained": True} for row in found["control"]]
