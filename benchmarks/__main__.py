"""``python -m benchmarks [NAME ...]``: one JSON line per measurement, then the table."""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path

from benchmarks import alternation, augmentation, distillation_step, kd_step, startup, synthesis, teacher_pass
from diffrep import _torchvision_compat
from diffrep.words import table

ROOMS = (startup, teacher_pass, augmentation, distillation_step, synthesis, kd_step, alternation)
BENCHMARKS = {room.__name__.split(".")[-1]: room for room in ROOMS}


def main(names: list[str]) -> None:
    _torchvision_compat.install()
    found = [entry for name in names or BENCHMARKS for entry in BENCHMARKS[name].measure()]
    rows = [[e["name"], e["rival"], e["ours"], e["theirs"], f"{e['ratio']:.2f}x", e["unit"]] for e in found]
    print("\n" + table(["ours", "rival", "our cost", "its cost", "ratio", "unit"], rows))
    out = Path("runs") / "benchmarks.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps({"machine": platform.machine(), "measurements": found}, indent=2) + "\n")


main(sys.argv[1:])
