"""``diffrep generate`` as Typer reads it, and the fields of a ``GenerationConfig`` that its options stand for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from diffrep.errors import UserError
from diffrep.launch.parsing import integers

Perform = Callable[[str, dict[str, Any], bool], None]  # name of a verb, its arguments, whether JSON is wanted

WALK = ("steps", "schedule", "choice_temperature", "temperature_strategy", "top_p", "finish")
REGION = ("mask", "box", "ratio", "outside", "paste")
IMAGES, REPAIRS = 16, 4  # where nobody says how many

_option = typer.Option


def add_generate_verb(app: typer.Typer, perform: Perform) -> None:
    """One verb more."""

    @app.command()
    def generate(
        model: Annotated[str, typer.Argument(help="Folder with addp/ and tokenizer/ (a run), or an official .pth.")],
        out: Annotated[Path | None, _option(metavar="FOLDER", help="The folder to write.")] = None,
        images: Annotated[int | None, _option(help="How many; default 16, of a repair 4.")] = None,
        seed: Annotated[int | None, _option(help="Of the first image, default 0; the others count on.")] = None,
        seeds: Annotated[str | None, _option(help="Instead: 3,7,9.")] = None,
        by: Annotated[str | None, _option("--with", help="addp (default); predictor: MAGE, tokens alone.")] = None,
        steps: Annotated[int | None, _option(help="Default 20, linear 256, never more than tokens.")] = None,
        schedule: Annotated[str | None, _option(help="What is still masked: cosine (default), linear.")] = None,
        choice_temperature: Annotated[float | None, _option(help="Noise in what is kept; default 6.")] = None,
        temperature_strategy: Annotated[str | None, _option(help="dynamic (default) falls to 0; static.")] = None,
        top_p: Annotated[float | None, _option(help="Draw ids of this mass only; default 1.")] = None,
        finish: Annotated[
            bool, _option("--finish", help="Reveal the last token too; official: one stays soft.")
        ] = False,
        precision: Annotated[str | None, _option(help="Of the networks: float32 (default), bfloat16.")] = None,
        rounding: Annotated[str | None, _option(help="To 8 bits: truncate (default, official), nearest.")] = None,
        image: Annotated[
            str | None, _option(metavar="FILE", help="Repair this image: with one of the next three.")
        ] = None,
        mask: Annotated[str | None, _option(metavar="FILE", help="White is painted anew; of the image's size.")] = None,
        box: Annotated[str | None, _option(metavar="X0,Y0,X1,Y1", help="These pixels are painted anew.")] = None,
        ratio: Annotated[float | None, _option(help="This share of the tokens, others for each seed.")] = None,
        outside: Annotated[bool, _option("--outside", help="What lies outside mask or box is painted.")] = False,
        paste: Annotated[bool, _option("--paste", help="Put the image's own pixels back around it.")] = False,
        block_size: Annotated[int | None, _option(help="Images computed together: 1, on a GPU 16.")] = None,
        jobs: Annotated[int | None, _option(help="Processes on this machine.")] = None,
        ray: Annotated[str | None, _option(metavar="auto|local|ADDRESS", help="Make images as Ray tasks.")] = None,
        dry_run: Annotated[bool, _option("--dry-run", help="Say what it would cost, and stop.")] = False,
        as_json: Annotated[bool, _option("--json", help="Print JSON for programs.")] = False,
    ) -> None:
        """Make images with ADDP, from nothing or from parts of one; the same command goes on after an interruption.

        Example: diffrep generate addp_base --out faces --image photo.png --box 64,64,192,192
        """
        given = dict(locals())
        task = {"model": model, "settings": settings(given), "seeds": wanted_seeds(images, seed, seeds, image)}
        if dry_run:
            return perform("generation_cost", task, as_json)
        if out is None:
            raise UserError("--out is missing: the folder to write")
        perform("generate", task | {"out": out, "jobs": jobs, "ray": ray}, as_json)


def settings(given: dict[str, Any]) -> dict[str, Any]:
    """The fields of a ``GenerationConfig`` that were asked for.

    Raises:
        UserError: a box of other than four numbers, a region without an image.
    """
    found = {name: given[name] for name in ("by", "rounding", "precision", "block_size") if given[name] is not None}
    walk = _set(given, WALK)
    return found | ({"alternation": walk} if walk else {}) | _repair(given)


def _set(given: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """What was given; a flag that was not is False."""
    return {name: given[name] for name in names if given[name] is not None and given[name] is not False}


def _repair(given: dict[str, Any]) -> dict[str, Any]:
    region = _set(given, REGION)
    if given["image"] is None:
        if region:
            raise UserError(f"--{next(iter(region))} says what of an image is painted anew: name it with --image")
        return {}
    if "box" in region:
        region["box"] = integers(region["box"], "--box")
        if len(region["box"]) != 4:
            raise UserError(f"--box {given['box']}: four numbers are needed, X0,Y0,X1,Y1")
    return {"repair": {"image": given["image"], **region}}


def wanted_seeds(images: int | None, seed: int | None, seeds: str | None, image: str | None) -> range | list[int]:
    """Which images: S .. S + N - 1, or a list.

    Raises:
        UserError: both, or none at all.
    """
    if seeds is not None:
        if images is not None or seed is not None:
            raise UserError("--seeds names every image: leave out --images and --seed")
        return integers(seeds, "--seeds")
    count = (IMAGES if image is None else REPAIRS) if images is None else images
    if count < 1:
        raise UserError(f"--images {count}: at least 1")
    return range(seed or 0, (seed or 0) + count)
