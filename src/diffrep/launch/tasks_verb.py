"""``diffrep evaluate`` as Typer reads it: of images as wholes, or of masks, points and objects with ``--task``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from diffrep.launch.parsing import integers, numbers

Perform = Callable[[dict[str, Any], bool], None]  # arguments of api.evaluate or api.transfer, whether JSON is wanted

_option = typer.Option


def add_evaluate_verb(app: typer.Typer, evaluate_whole: Perform, transfer: Perform) -> None:
    """One verb more."""

    @app.command()
    def evaluate(
        model: Annotated[
            str, typer.Argument(help="A run folder, a .safetensors file beside its config.json, or a timm name.")
        ],
        data: Annotated[list[str], _option(help="Data reference, e.g. digits or cifar10:FOLDER; one for each --task.")],
        task: Annotated[list[str] | None, _option(help="segment, landmark or detect; repeatable.")] = None,
        overrides: Annotated[
            list[str] | None, _option("--set", metavar="A.B=VALUE", help="Of tasks: a setting; TASK.A.B=VALUE of one.")
        ] = None,
        out: Annotated[Path | None, _option(help="Of tasks: the folder of their runs.")] = None,
        dry_run: Annotated[bool, _option("--dry-run", help="Of tasks: say what they would cost, and stop.")] = False,
        labels: Annotated[str | None, _option(help="Label counts for probe and neighbours; default all.")] = None,
        image_size: Annotated[int | None, _option(min=1, help="Resize to this many pixels; default as stored.")] = None,
        knn: Annotated[int, _option(min=1, help="Neighbours.")] = 1,
        seed: Annotated[int, _option(min=0, help="Which draw of labelled images.")] = 0,
        classifier: Annotated[bool, _option(help="Score its own answers: any weights file, timm:NAME, ...")] = False,
        architecture: Annotated[str | None, _option(help="Of a weights file; default told by its keys.")] = None,
        mean: Annotated[str | None, _option(help="R,G,B that a weights file subtracts.")] = None,
        std: Annotated[str | None, _option(help="R,G,B that it then divides by.")] = None,
        allow_code: Annotated[bool, _option("--allow-code", help="Of tasks: allow python:module:factory.")] = False,
        as_json: Annotated[bool, _option("--json", help="Print JSON for programs.")] = False,
    ) -> None:
        """Score a student: linear probe and k-NN of its frozen features, top-1 where it has a classifier.

        With --classifier anybody's: top-1, top-5 and calibration of its own answers.
        With --task its encoder learns each task, by the published settings that fit it; a run of the task is scored.
        Example: diffrep evaluate runs/my_student --data digits --labels 20,50
        Example: diffrep evaluate runs/my_student --task segment --data celebamask-hq:PATH --set train.steps=20000
        """
        look = {"architecture": architecture, "mean": numbers(mean, "--mean"), "std": numbers(std, "--std")}
        whole = {"--labels": labels, "--image-size": image_size, "--classifier": classifier}
        whole |= {"--knn": knn != 1, "--seed": seed != 0}
        of_tasks = {"--set": overrides, "--out": out, "--dry-run": dry_run, "--allow-code": allow_code}
        if task:
            _refuse(whole, "evaluates images as wholes; with --task say data.labels, seed, ... by --set")
            given: dict[str, Any] = {"model": model, "tasks": _pairs(task, data), "overrides": overrides or []}
            return transfer(given | {"out": out, "look": look, "dry_run": dry_run, "allow_code": allow_code}, as_json)
        _refuse(of_tasks, "belongs to --task")
        if any(look.values()) and not classifier:
            raise typer.BadParameter("--architecture, --mean and --std belong to --classifier or --task")
        if len(data) > 1:
            raise typer.BadParameter("--data: one set at a time; several belong to as many --task")
        given = {"model": model, "data": data[0], "labels": tuple(integers(labels, "--labels")) if labels else ()}
        given |= {"knn": knn, "seed": seed, "image_size": image_size, "foreign": look if classifier else None}
        return evaluate_whole(given, as_json)


def _refuse(given: dict[str, Any], why: str) -> None:
    for option, value in given.items():
        if value:
            raise typer.BadParameter(f"{option} {why}")


def _pairs(tasks: list[str], data: list[str]) -> list[tuple[str, str]]:
    if len(tasks) != len(data):
        raise typer.BadParameter(f"{len(tasks)} --task and {len(data)} --data: each task has its own set, in order")
    if len(set(zip(tasks, data, strict=True))) < len(tasks):
        raise typer.BadParameter("--task: the same task on the same set twice")
    return list(zip(tasks, data, strict=True))
