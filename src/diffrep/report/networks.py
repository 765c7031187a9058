"""The networks behind images that are made of tokens: what each learns, and how far it came."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from diffrep.report.numbers import MISSING
from diffrep.report.page import Block, Section, Table, Text
from diffrep.report.scores import score_words, valued
from diffrep.report.values import Entry, builds_on, score_names

KINDS = ("tokenizer", "token_predictor", "addp")
LAST = 3  # logged values whose mean stands in the table: a single step's is noisy
LEARNS = {
    "tokenizer": "to turn an image into a few tokens and back",
    "token_predictor": "to name hidden tokens from the others (MAGE)",
    "addp": "to name hidden tokens from pixels, as the token predictor would",
}
TEXT = (
    "Each network is trained in its turn and then stays as it is: first the tokenizer, then the token predictor on its "
    "tokens, then ADDP, which learns from both. "
)
UNLABELLED = "None of them is shown a label."
PROBE = (
    "ADDP's encoder can be probed like any other network, and its score stands in the table. On digits of 8 pixels no "
    "gain over raw pixels is to be expected: they are so small that raw pixels already tell the classes apart."
)


def networks(entries: Sequence[Entry]) -> Section | None:
    """A row for each network; None where there is none."""
    found = [entry for kind in KINDS for entry in entries if entry.kind == kind]
    if not found:
        return None
    rows = [(entry.label, LEARNS[entry.kind], _reached(entry, entries)) for entry in found]
    caption = f"At the end of training: means over the last {LAST} logged values and the seeds"
    table = Table(caption, ("Network", "learns", "at the end"), rows, True)
    return Section("The networks behind the images", [Text(TEXT + _labels(found)), table, *_probe(found)])


def _labels(found: Sequence[Entry]) -> str:
    """Said only where every finished run says so of itself."""
    results = [result for entry in found for result in entry.results()]
    return UNLABELLED if results and not any(r.get("labels_seen") or r.get("labels_behind") for r in results) else ""


def _probe(found: Sequence[Entry]) -> list[Block]:
    """What not to expect of the encoder, where it was probed on digits."""
    probed = [e for e in found if e.kind == "addp" and score_names([e])]
    is_digits = any(e.recipe.get("data", {}).get("source") == "digits" for e in probed)
    return [Text(PROBE)] if is_digits else []


def _reached(entry: Entry, entries: Sequence[Entry]) -> str:
    said = {"tokenizer": _tokenizer, "token_predictor": _predictor, "addp": _addp}[entry.kind](entry, entries)
    return "; ".join(said) or entry.state() if entry.runs else MISSING


def logged(entry: Entry, key: str) -> float | None:
    """The mean of its last values."""
    values = [[line[key] for line in run.metrics if isinstance(line.get(key), int | float)] for run in entry.runs]
    ends = [fmean(own[-LAST:]) for own in values if own]
    return fmean(ends) if ends else None


def _codes(entry: Entry, entries: Sequence[Entry]) -> int | None:
    """How many codes its tokenizer has."""
    near = [entry, *builds_on(entry, entries)]
    known = [e.recipe["method"].get("network", {}).get("num_codes") for e in near if e.kind == "tokenizer"]
    return int(known[0]) if known and known[0] else None


def _tokenizer(entry: Entry, entries: Sequence[Entry]) -> list[str]:
    error, used, codes = logged(entry, "mse"), entry.values("codes_used"), _codes(entry, entries)
    said = [f"mean squared error {error:.3g} of pixels between 0 and 1"] if error is not None else []
    if used:
        said.append(f"{100 * fmean(used):.0f} % of its {f'{codes:,} ' if codes else ''}codes are in use")
    return said


def _predictor(entry: Entry, entries: Sequence[Entry]) -> list[str]:
    named, codes = logged(entry, "masked_top1"), _codes(entry, entries)
    guess = f" (guessing among {codes:,} codes: {100 / codes:.1f} %)" if codes else ""
    return [f"names {100 * named:.1f} % of hidden tokens{guess}"] if named is not None else []


def _addp(entry: Entry, entries: Sequence[Entry]) -> list[str]:
    loss, codes = logged(entry, "loss"), _codes(entry, entries)
    guess = f" (guessing evenly among {codes:,} codes: {math.log(codes):.2f})" if codes else ""
    said = [f"loss {loss:.2f}{guess}"] if loss is not None else []
    return said + [f"{score_words(n)}: {valued(n, list(entry.score(n).values()))}" for n in score_names([entry])]
