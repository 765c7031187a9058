"""The options of ``diffrep synthesize``, and the fields of a ``SynthesisConfig`` that they stand for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from diffrep.errors import UserError

# Options that are fields of the sampling under another name, and options that are fields themselves.
SAMPLING = {name: name for name in ("fidelity", "sampler", "eta", "guided_channels")} | {"steps": "num_sampling_steps"}
PLAIN = ("images", "noise", "block_size", "shard_size", "image_format", "prompt")

_option = typer.Option


def synthesize_verb(perform: Callable[[dict[str, Any]], None]) -> Callable[..., None]:
    """The command as Typer reads it; ``perform`` gets all options by name, None where one was not given."""

    def synthesize(
        generator: Annotated[str | None, typer.Argument(help="Run folder, diffusers folder, Hub id.")] = None,
        out: Annotated[Path | None, _option(metavar="SET", help="The folder to write.")] = None,
        images: Annotated[int | None, _option(help="Spread evenly over the classes.")] = None,
        class_counts: Annotated[str | None, _option(help="Instead: images of each class, 100,50,20.")] = None,
        classes: Annotated[str | None, _option(help="The generator's ids, 3,5; default all.")] = None,
        class_names: Annotated[str | None, _option(metavar="A,B|@FILE", help="Their names.")] = None,
        prompt: Annotated[str | None, _option(help="Of a text-to-image generator: 'a photo of a {}'.")] = None,
        sampler: Annotated[str | None, _option(help="ddim (default), ddpm, dpmsolver++, unipc, heun.")] = None,
        steps: Annotated[str | None, _option(help="Denoising steps: N (20), a,b,c or ddimN.")] = None,
        eta: Annotated[float | None, _option(help="Of ddim: 0 (default) to 1.")] = None,
        guidance: Annotated[str | None, _option(help="Scale, 1 (default) = off; 1:3 = drawn for each image.")] = None,
        guided_channels: Annotated[int | None, _option(help="The first ones only; official DiT: 3 of 4.")] = None,
        guidance_interval: Annotated[str | None, _option(metavar="LOW:HIGH", help="Guide at these sigma only.")] = None,
        fidelity: Annotated[str | None, _option(help="The paper's settings: low, high.")] = None,
        noise: Annotated[
            str | None, _option(help="own (default) or shared by all classes, as the official script.")
        ] = None,
        margin: Annotated[
            str | None, _option(metavar="TEACHER:0.2", help="Draw again what a classifier doubts.")
        ] = None,
        block_size: Annotated[int | None, _option(help="Images computed together (50); part of the bytes.")] = None,
        shard_size: Annotated[int | None, _option(help="Images per file (1000).")] = None,
        image_format: Annotated[str | None, _option("--format", help="png (default) or webp, lossless.")] = None,
        seed: Annotated[int | None, _option(help="Of all noise; default 0.")] = None,
        jobs: Annotated[int | None, _option(help="Processes on this machine; with --slurm, jobs.")] = None,
        ray: Annotated[str | None, _option(metavar="auto|local|ADDRESS", help="Make shards as Ray tasks.")] = None,
        slurm: Annotated[str | None, _option(metavar="[PARTITION]", help="Make shards as Slurm jobs.")] = None,
        manifest: Annotated[Path | None, _option("--from", metavar="MANIFEST", help="Make this set again.")] = None,
        dry_run: Annotated[bool, _option("--dry-run", help="Say what it would cost, and stop.")] = False,
        allow_code: Annotated[bool, _option("--allow-code", help="Allow python:module:factory.")] = False,
        as_json: Annotated[bool, _option("--json", help="Print JSON for programs.")] = False,
    ) -> None:
        """Draw a labelled set of images with a diffusion model; the same command goes on after an interruption.

        Example: diffrep synthesize runs/my_generator --out my_set --images 5000 --steps 20 --jobs 2
        """
        perform(dict(locals()))

    return synthesize


def with_partition(arguments: Sequence[str]) -> list[str]:
    """``--slurm`` may stand alone; Typer knows no option whose value may be left out."""
    found = list(arguments)
    for place, word in enumerate(found):
        if word == "--slurm" and (place + 1 == len(found) or found[place + 1].startswith("-")):
            found[place] = "--slurm="
    return found


def checked(given: dict[str, Any]) -> tuple[Any, Any, Any, int]:
    """Generator, folder, manifest and seed, once it was seen that the command is complete.

    Raises:
        UserError: what is missing, or what the manifest knows already.
    """
    if given["manifest"] is not None:
        if given["dry_run"]:
            raise UserError("--from makes a set as its manifest says: leave out --dry-run")
        if synthesis_values(**given) or given["seed"] is not None:
            raise UserError("--from takes all settings from the manifest: leave out those of the command line")
    elif given["generator"] is None:
        raise UserError("which GENERATOR? a run folder, a diffusers folder or a Hub id (diffrep synthesize --help)")
    if given["out"] is None and not given["dry_run"]:
        raise UserError("--out is missing: the folder to write")
    return given["generator"], given["out"], given["manifest"], given["seed"] or 0


def synthesis_values(**given: Any) -> dict[str, Any]:
    """The fields of a ``SynthesisConfig`` that were asked for.

    Raises:
        UserError: an option that is not written as it should be; whether the values fit is the config's to say.
    """
    values = {name: given[name] for name in PLAIN if given.get(name) is not None}
    for name, option in (("class_counts", "--class-counts"), ("classes", "--classes")):
        if given.get(name) is not None:
            values[name] = _list(given[name], int, option)
    if given.get("class_names") is not None:
        values["class_names"] = _names(given["class_names"])
    if given.get("margin") is not None:
        values["margin"] = _margin(given["margin"])
    sampling = _sampling(given)
    return values | ({"sampling": sampling} if sampling else {})


def _sampling(given: dict[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {field: given[name] for name, field in SAMPLING.items() if given.get(name) is not None}
    if given.get("guidance") is not None:
        values["guidance_scale"] = _range(given["guidance"], "--guidance")
    if given.get("guidance_interval") is not None:
        values["guidance_interval"] = _range(given["guidance_interval"], "--guidance-interval")
    return values


def _range(text: str, option: str) -> float | list[float]:
    """``1.5`` or ``1:3``."""
    values = _list(text, float, option, ":")
    if len(values) > 2 or (option == "--guidance-interval" and len(values) != 2):
        form = "LOW:HIGH" if option == "--guidance-interval" else "one number or LOW:HIGH"
        raise UserError(f"{option} '{text}': the form is {form}")
    return values if len(values) == 2 else values[0]


def _list(text: str, kind: type, option: str, between: str = ",") -> list[Any]:
    try:
        return [kind(part) for part in text.split(between)]
    except ValueError:
        raise UserError(f"{option} '{text}': numbers with '{between}' between them are needed") from None


def _names(text: str) -> list[str]:
    """``a,b,c``, or ``@FILE`` with a name per line."""
    if not text.startswith("@"):
        return [name.strip() for name in text.split(",")]
    try:
        lines = Path(text[1:]).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--class-names {text}: cannot be read ({error})") from None
    return [line.strip() for line in lines if line.strip()]


def _margin(text: str) -> dict[str, Any]:
    """``TEACHER:0.2``; a teacher's own reference may hold colons."""
    teacher, _, share = text.rpartition(":")
    try:
        found = float(share)
    except ValueError:
        teacher = ""
    if not teacher:
        raise UserError(f"--margin '{text}': the form is TEACHER:MARGIN, e.g. runs/my_classifier:0.2")
    return {"teacher": {"reference": teacher}, "margin": found}
