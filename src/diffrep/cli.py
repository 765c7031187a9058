"""The command line: parses, calls :mod:`diffrep.api`, prints. Nothing heavy is imported before a verb runs.

Exit codes: 0 done; 1 our fault; 2 the user's input; 3 the run cannot go on; 130 interrupted, after a checkpoint.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from diffrep import __version__
from diffrep.data.assets_verb import add_assets_verbs
from diffrep.errors import DiffrepError
from diffrep.evaluation.options import score_verb
from diffrep.launch.export_verb import add_export_verb
from diffrep.launch.features_verb import add_features_verb
from diffrep.launch.generate_verb import add_generate_verb
from diffrep.launch.options import synthesize_verb, with_partition
from diffrep.launch.parsing import integers as _integers
from diffrep.launch.parsing import numbers as _numbers
from diffrep.launch.probe_verb import add_probe_verb, probe_rows
from diffrep.launch.reproduce_verb import add_reproduce_verb
from diffrep.launch.tasks_verb import add_evaluate_verb
from diffrep.launch.token_verbs import add_token_verbs

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Diffusion models as teachers: of features, of data, of one representation.",
    epilog="Start with: diffrep run quickstart. Every verb has an example: diffrep VERB --help.",
)
data_app = typer.Typer(no_args_is_help=True, help="Check and prepare data sets.")
app.add_typer(data_app, name="data")

Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=VALUE", help="Change a setting; repeatable.")
]
Out = Annotated[Path | None, typer.Option(help="The folder to write.")]
AllowCode = Annotated[bool, typer.Option("--allow-code", help="Allow python:module:factory, which runs foreign code.")]
ImageSize = Annotated[int | None, typer.Option(min=1, help="Resize to this many pixels; default as stored.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what it would do and cost, and stop.")]


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="A shipped name (diffrep recipes) or a YAML / JSON file.")],
    overrides: Overrides = None,
    out: Out = None,
    seeds: Annotated[str | None, typer.Option(help="Of a study: 0,1,2.")] = None,
    jobs: Annotated[int | None, typer.Option(help="Of a study: processes side by side; default one per core.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Of a single run.")] = 1,
    record: Annotated[
        Path | None, typer.Option(help="Of a study: folder of evidence; recorded arms are skipped.")
    ] = None,
    slurm: Annotated[str | None, typer.Option(metavar="[PARTITION]", help="Of a single run: as a Slurm job.")] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Of the Slurm job.")] = 1,
    tasks: Annotated[int, typer.Option(min=1, help="Processes of a node: its GPUs.")] = 1,
    dry_run: DryRun = False,
    allow_code: AllowCode = False,
    as_json: AsJson = False,
) -> None:
    """Run a recipe or a study; the same command goes on after an interruption.

    Example: diffrep run denoiser_digits --set train.steps=300 --out runs/my_teacher
    """
    _one_thread(threads)
    from diffrep import api, words

    if dry_run:
        cost = api.dry_run(recipe, overrides or [], allow_code)
        return _print(
            json.dumps(cost, indent=2) if as_json else words.cost(api.show(recipe, overrides or [], allow_code), cost)
        )
    chosen = _integers(seeds, "--seeds") if seeds else None
    if slurm is not None:
        from diffrep.launch.slurm_training import train_on_slurm
        from diffrep.recipes.loading import load

        if chosen or jobs or record:
            raise typer.BadParameter("--seeds, --jobs and --record are of a study, --slurm of a single run")
        task = load(recipe, overrides or [], allow_code)
        out = out or api.default_run_dir(task)
        said = ["run", recipe, *(f"--set={o}" for o in overrides or []), f"--out={out}", f"--threads={threads}"]
        train_on_slurm(task, [*said, *["--allow-code"] * allow_code], out, slurm, nodes, tasks)
    result = api.run(recipe, overrides or [], out, chosen, jobs, threads, record, allow_code, say=_say)
    if not result:
        return  # a process of torchrun that does not write
    _print(json.dumps(result, indent=2) if as_json else words.result(result))


@app.command()
def recipes(as_json: AsJson = False) -> None:
    """The ledger: every shipped recipe with its published number, ours, and what it needs.

    Example: diffrep recipes
    """
    from diffrep import api, words

    rows = api.recipes()
    _print(json.dumps(rows, indent=2) if as_json else words.ledger(rows))


@app.command()
def show(recipe: str, overrides: Overrides = None, allow_code: AllowCode = False) -> None:
    """Print the resolved recipe as YAML, ready to be edited and run.

    Example: diffrep show repfusion_digits_conv > mine.yaml
    """
    from diffrep import api

    _print(api.show(recipe, overrides or [], allow_code).rstrip())


def _features(given: dict[str, Any], as_json: bool) -> None:
    _one_thread(1)
    from diffrep import api, words

    result = api.features(**given)
    _print(json.dumps(result, indent=2) if as_json else words.features(result, given["out"]))


def _list_taps(teacher: str, allow_code: bool) -> None:
    _one_thread(1)
    from diffrep import api, words

    _print(words.taps(api.load_teacher(teacher, allow_code).taps()))


add_features_verb(app, _features, _list_taps)


def _probe(given: dict[str, Any], dry_run: bool, as_json: bool) -> None:
    _one_thread(1)
    from diffrep import api, words

    found = api.probe(**given, dry_run=dry_run, say=lambda plan: _say(words.probe_begins(plan)))
    if dry_run:
        return _show("probe_cost", found, as_json)
    _print(json.dumps(probe_rows(found), indent=2) if as_json else words.probe(found))


add_probe_verb(app, _probe)


def _synthesize(given: dict[str, Any]) -> None:
    _one_thread(1)
    from diffrep import api, words
    from diffrep.launch.options import checked, synthesis_values

    generator, out, manifest, seed = checked(given)
    if given["dry_run"]:
        cost = api.synthesis_cost(generator, synthesis_values(**given), seed, given["allow_code"])
        return _print(json.dumps(cost, indent=2) if given["as_json"] else words.synthesis_cost(cost))
    how = {name: given[name] for name in ("jobs", "ray", "slurm", "allow_code")}
    how["say"] = lambda found: _say(words.synthesis_begins(found))
    if manifest:
        result = api.regenerate(manifest, out, generator, **how)
    else:
        result = api.synthesize(generator, synthesis_values(**given), out, seed, **how)
    if result:  # the other processes of torchrun say nothing
        _print(json.dumps(result, indent=2) if given["as_json"] else words.synthesis(result))


app.command()(synthesize_verb(_synthesize))


def _perform(verb: str, given: dict[str, Any], as_json: bool) -> None:
    _one_thread(1)
    from diffrep import api

    if found := getattr(api, verb)(**given):  # the other processes of torchrun say nothing
        _show(verb, found, as_json)


def _show(verb: str, found: Any, as_json: bool) -> None:
    from diffrep import words

    _print(json.dumps(found, indent=2) if as_json else getattr(words, verb)(found))


add_token_verbs(app, _perform)
add_generate_verb(app, _perform)


def _evaluate(given: dict[str, Any], as_json: bool) -> None:
    _one_thread(1)
    from diffrep import api, words

    scores = api.evaluate(**given)
    _print(json.dumps(scores, indent=2) if as_json else words.scores(scores))


def _transfer(given: dict[str, Any], as_json: bool) -> None:
    _one_thread(1)
    from diffrep import api, words

    def told(one: dict[str, Any]) -> str:
        if "cost" in one:
            return words.cost(one["recipe"], one["cost"])
        if "result" in one:
            return words.result(one["result"])
        return words.scores(one["scores"]) if "scores" in one else "a finished run: it would only be scored"

    def say(one: dict[str, Any]) -> None:
        if not as_json and one.get("result", True):  # the other processes of torchrun say nothing
            _print(f"{one['task']} on {one['data']}\n{told(one)}\n")

    found = api.transfer(**given, say=say)
    if as_json:
        _print(json.dumps(found, indent=2))


add_evaluate_verb(app, _evaluate, _transfer)


def _reported(verb: str, given: dict[str, Any], as_json: bool) -> None:
    _one_thread(1)
    from diffrep import api

    if found := getattr(api, verb)(**given):  # the other processes of torchrun say nothing
        _report(found, as_json)


app.command()(score_verb(lambda given, as_json: _reported("score", given, as_json)))
add_reproduce_verb(app, _reported)
add_export_verb(app, _reported)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, or one study.")],
    out: Annotated[Path, typer.Option(help="The HTML file to write.")] = Path("report.html"),
) -> None:
    """One HTML page that compares runs; opens offline, readable on a phone.

    Example: diffrep report runs/A runs/B --out report.html
    """
    from diffrep import api

    _print(str(api.report(runs, out)))


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """What this machine can do: device, precision, compiler, data, weights; what would be slow, and why.

    Example: diffrep doctor
    """
    from diffrep.doctor import examine, lines

    found = examine()
    _print(json.dumps(found, indent=2) if as_json else "\n".join(lines(found)))


add_assets_verbs(app, _show)


@data_app.command("check")
def data_check(name: str, path: Path, as_json: AsJson = False) -> None:
    """Count images and classes, print the hash, name what is missing.

    NAME: celebahq, cifar10, cifar100, dmkd, flowers102, folder, imagenet, parquet, tiny-imagenet; of masks, points and
    objects: ade20k, celebamask-hq, coco, wflw.

    Example: diffrep data check cifar10 cifar-10-python.tar.gz
    """
    from diffrep.data.prepare import check

    _report(check(name, path), as_json)


@data_app.command("prepare")
def data_prepare(name: str, path: Path, out: Path, as_json: AsJson = False) -> None:
    """Bring an official archive or a folder into a form that loads fast; writes OUT whole or not at all.

    NAME: as for diffrep data check; or imagenet-val256, the reference set of scores, which goes on where it stopped.
    PATH: an archive, a folder, or of coco and wflw the folder of the archives; celebamask-hq: PATH@LABEL_ORDER.

    Example: diffrep data prepare cifar10 cifar-10-python.tar.gz data/cifar10
    """
    from diffrep.data.prepare import prepare

    _report(prepare(name, path, out), as_json)


@data_app.command("card")
def data_card(
    images: Annotated[str, typer.Argument(metavar="SET", help="The folder of a synthetic set, or a data reference.")],
    teacher: Annotated[str | None, typer.Option(help="A classifier: run folder, weights file, timm:NAME, ...")] = None,
    architecture: Annotated[str | None, typer.Option(help="Of a weights file; default what its keys tell.")] = None,
    mean: Annotated[str | None, typer.Option(help="The teacher's, where its reference has none: 0.5,0.5,0.5")] = None,
    std: Annotated[str | None, typer.Option(help="As --mean.")] = None,
    real: Annotated[str | None, typer.Option(help="Real images to hold it against, e.g. digits.")] = None,
    image_size: ImageSize = None,
    out: Annotated[Path, typer.Option(help="The HTML file to write.")] = Path("card.html"),
    allow_code: AllowCode = False,
    as_json: AsJson = False,
) -> None:
    """One HTML page about a set: what it is, what a teacher says, whom it repeats, how far it is from real images.

    Example: diffrep data card runs/my_set --teacher runs/my_classifier --real digits --out card.html
    """
    _one_thread(1)
    from diffrep import api
    from diffrep.report.card_words import lines

    look: dict[str, Any] = {"architecture": architecture}
    look |= {"mean": _numbers(mean, "--mean"), "std": _numbers(std, "--std")}
    judge = {"reference": teacher} | {k: v for k, v in look.items() if v} if teacher else None
    if judge is None and any(look.values()):
        raise typer.BadParameter("--architecture, --mean and --std belong to a --teacher; name one")
    found = api.card(images, judge, real, image_size, out, allow_code)
    _print(json.dumps(found, indent=2) if as_json else "\n".join(lines(found, out)))


def _report(found: Any, as_json: bool) -> None:
    _print(json.dumps(found.to_json(), indent=2) if as_json else "\n".join(found.lines()))
    if not getattr(found, "is_complete", True):
        raise typer.Exit(2)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback where something goes wrong.")] = False,
) -> None:
    if version:
        _print(__version__)
        raise typer.Exit


def _one_thread(threads: int) -> None:
    """Before torch is imported: idle OpenMP threads spin, and two processes then starve each other."""
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[variable] = str(threads)


def _print(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # the reader of our output has gone; typer would make an error of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    """The console script: every failure is one line and an exit code of its own."""
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does: what lies aside is removed
    try:
        code = app(with_partition(arguments), prog_name="diffrep", standalone_mode=False)
    except Exception as error:
        if debug:
            raise
        sys.exit(_failed(error))
    except KeyboardInterrupt:
        code = 130
    if code == 130:  # Typer makes this of an interrupt, too
        _say("interrupted")
    sys.exit(code if isinstance(code, int) else 0)


def _failed(error: Exception) -> int:
    """Print one line for ``error`` and return its exit code."""
    if isinstance(error, DiffrepError):
        _say(f"diffrep: {' '.join(str(error).split())}")
        return error.exit_code
    if hasattr(error, "format_message"):  # what the parser of the command line raises
        _say(f"diffrep: {' '.join(error.format_message().split())} (diffrep --help)")
        return 2
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        _say("diffrep: out of memory; try a smaller train.micro_batch_size or batch_size; the same command goes on")
        return 3
    _say(
        f"diffrep: a fault of ours: {type(error).__name__}: {' '.join(str(error).split())[:300]} (--debug shows where)"
    )
    return 1
