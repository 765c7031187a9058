"""The network that did best on held-out images, kept beside the last one. What is held out is the method's business."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffrep.files import folder_aside, read_json, write_json
from diffrep.methods.base import Method

BEST = "best"


def offer(run_dir: Path, step: int, method: Method) -> None:
    """Keep ``method``'s export in ``best/`` if its held-out score beats the one there."""
    score = method.held_out_score()
    if score is None or score <= (known(run_dir) or {"score": float("-inf")})["score"]:
        return
    with folder_aside(run_dir / BEST) as aside:
        method.export(aside)
        write_json(aside / "best.json", {"step": step, "score": score})


def known(run_dir: Path) -> dict[str, Any] | None:
    """The step and score of what is kept; None where no method asked for it."""
    note = run_dir / BEST / "best.json"
    return read_json(note) if note.exists() else None
