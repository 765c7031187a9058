"""What a command costs before it does anything: CPU seconds of a fresh process, minimum of several."""

from __future__ import annotations

import resource
import subprocess
import sys
from typing import Any

from benchmarks.timing import REPEATS, line

RIVAL = "import diffusers, timm, torch"
COMMANDS = {
    "diffrep --help": ["-m", "diffrep", "--help"],
    "a wrong verb": ["-m", "diffrep", "rnu"],
    "import diffrep": ["-c", "import diffrep"],
    "diffrep recipes": ["-m", "diffrep", "recipes"],
    "a refused recipe": ["-m", "diffrep", "run", "denoiser_digits", "--set", "optm.lr=1"],
}
EAGER = "from diffrep import _torchvision_compat as c; c.install(); import timm; from diffusers import UNet2DModel"


def measure() -> list[dict[str, Any]]:
    """Ours against importing what the package stands on, which an eager package would do."""
    theirs = min(_cpu_seconds(["-c", EAGER]) for _ in range(REPEATS))
    return [
        line(f"start-up: {name}", RIVAL, min(_cpu_seconds(command) for _ in range(REPEATS)), theirs, unit="CPU s")
        for name, command in COMMANDS.items()
    ]


def _cpu_seconds(arguments: list[str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], capture_output=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
