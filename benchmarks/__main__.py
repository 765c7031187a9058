"""``python -m benchmarks [NAME ...]``: one JSON line per measurement, then the table; other rooms keep their rows."""

from __future__ import annotations

import platform
import sys
from pathlib import Path
from typing import Any

from benchmarks import (
    alternation,
    attention,
    augmentation,
    coco_ap,
    distillation_step,
    heatmaps,
    kd_step,
    miou,
    pretraining,
    published_teachers,
    roi_align,
    startup,
    synthesis,
    teacher_pass,
)
from diffrep import _torchvision_compat
from diffrep.files import read_json, write_json
from diffrep.words import table

ROOMS = (
    startup,
    teacher_pass,
    published_teachers,
    augmentation,
    distillation_step,
    synthesis,
    kd_step,
    alternation,
    pretraining,
    attention,
    miou,
    heatmaps,
    coco_ap,
    roi_align,
)
BENCHMARKS = {room.__name__.split(".")[-1]: room for room in ROOMS}
OUT = Path("runs") / "benchmarks.json"


def main(names: list[str]) -> None:
    _torchvision_compat.install()
    found = [entry for name in names or BENCHMARKS for entry in _measured(name)]
    rows = [[e["name"], e["rival"], e["ours"], e["theirs"], f"{e['ratio']:.2f}x", e["unit"]] for e in found]
    print("\n" + table(["ours", "rival", "our cost", "its cost", "ratio", "unit"], rows))


def _measured(name: str) -> list[dict[str, Any]]:
    """One room's rows, written in place of those it had."""
    rows = BENCHMARKS[name].measure()
    known = (read_json(OUT).get("rooms", {}) if OUT.exists() else {}) | {name: rows}
    rooms = {room: known[room] for room in BENCHMARKS if room in known}
    write_json(OUT, {"machine": platform.machine(), "rooms": rooms})
    return rows


main(sys.argv[1:])
