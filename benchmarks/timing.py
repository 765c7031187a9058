"""How things are timed here: process CPU time, one thread, the minimum of several repeats, rivals taken in turn."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import torch

REPEATS = 4


def rivals(ours: Callable[[], Any], theirs: Callable[[], Any], repeats: int = REPEATS) -> tuple[float, float]:
    """CPU seconds of both, warmed up once, then in turn, so that a drifting machine touches both alike."""
    torch.set_num_threads(1)
    ours(), theirs()
    times = [(cpu_seconds(ours), cpu_seconds(theirs)) for _ in range(repeats)]
    return min(t[0] for t in times), min(t[1] for t in times)


def cpu_seconds(run: Callable[[], Any]) -> float:
    """Of this process, for one run."""
    began = time.process_time()
    run()
    return time.process_time() - began


def line(name: str, rival: str, ours: float, theirs: float, **more: Any) -> dict[str, Any]:
    """Print one measurement as a JSON line, and return it. ``ratio``: how many times the rival's cost is ours."""
    entry = {
        "name": name,
        "rival": rival,
        "ours": round(ours, 4),
        "theirs": round(theirs, 4),
        "ratio": round(theirs / ours, 3),
    }
    print(json.dumps(entry | more), flush=True)
    return entry | more
