"""From run folders to one HTML file, or to the chart that a README shows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from diffrep.errors import UserError
from diffrep.files import write_atomic
from diffrep.report import pictures
from diffrep.report.arms import arm_rows, arms_alt
from diffrep.report.compare import compare_page
from diffrep.report.page import render
from diffrep.report.reading import read_folder
from diffrep.report.scores import axis_words
from diffrep.report.study import study_page
from diffrep.report.values import Study
from diffrep.report.worth import Valuer


def write_report(runs: Sequence[Path], out: Path, valuer: Valuer | None = None) -> Path:
    """One self-contained HTML page: a study's own, or a comparison of several folders.

    Args:
        runs: one study folder, or run folders (a study among several brings its arms).
        out: the file to write.
        valuer: what a comparison asks for the worth of scores in labels; a study's result holds its own.

    Returns:
        ``out``.

    Raises:
        UserError: a folder holds no run, or one of its files is damaged; nothing is written.
    """
    found = [read_folder(Path(run)) for run in runs]
    if not found:
        raise UserError("report needs at least one run folder")
    first = found[0]
    page = study_page(first) if len(found) == 1 and isinstance(first, Study) else compare_page(found, valuer)
    write_atomic(Path(out), render(page))
    return Path(out)


def write_figure(study_dir: Path, out_svg: Path) -> Path:
    """The arms chart of a study as an SVG file of its own, on white: the arms that its own score judges.

    Raises:
        UserError: the folder holds no study, or none of its arms has a score.
    """
    study = read_folder(Path(study_dir))
    name = study.metric() if isinstance(study, Study) else None
    if not isinstance(study, Study) or name is None:
        raise UserError(f"{study_dir} holds no study with scores; the arms chart needs one")
    judged = study.contests()[0]
    svg = pictures.arms_chart(arm_rows(judged), axis_words(name))
    write_atomic(Path(out_svg), pictures.standalone(svg, f"{study.name}: scores of all arms", arms_alt(judged)))
    return Path(out_svg)
