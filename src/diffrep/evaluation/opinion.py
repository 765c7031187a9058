"""What a teacher says to the images of a set: whether it sees the class that was asked for, and how sure it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffrep.evaluation.survey import Survey
from diffrep.evaluation.thumbnails import thumbnails

DOUBTED = 10  # images shown


def opinion(drawn: Survey, held_out: Survey | None, names: Sequence[str]) -> dict[str, Any] | None:
    """Confidence and, where the labels are classes that the teacher knows, agreement and margin, class by class."""
    if not len(drawn.said):
        return None
    is_judged = not bool(drawn.margin.isnan().all())
    rows = [_judged(drawn, k) for k in range(len(drawn.images.classes))] if is_judged else []
    if held_out is not None and not bool(held_out.margin.isnan().all()):
        rows = [row | {"real": _judged(held_out, k)["agreement"]} for k, row in enumerate(rows)]
    return {
        "all": _judged(drawn),
        "real": None if held_out is None else _judged(held_out),
        "confidence": 100 * float(drawn.confidence.mean()),
        "rows": rows,
        "doubted": _doubted(drawn, is_judged, names),
    }


def _judged(seen: Survey, label: int | None = None) -> dict[str, Any]:
    """Percentages and the mean margin, of one class or of all labelled images; None of no image."""
    rows = ~seen.margin.isnan() & (seen.labels == label if label is not None else seen.labels >= 0)
    name = None if label is None else seen.images.classes[label]
    if not bool(rows.any()):
        return {"class": name, "images": 0, "agreement": None, "confidence": None, "margin": None}
    return {
        "class": name,
        "images": int(rows.sum()),
        "agreement": 100 * float((seen.said == seen.labels)[rows].float().mean()),
        "confidence": 100 * float(seen.confidence[rows].mean()),
        "margin": float(seen.margin[rows].mean()),
    }


def _doubted(drawn: Survey, is_judged: bool, image_names: Sequence[str]) -> list[dict[str, Any]]:
    """The images with the smallest margin; without labels, those of the smallest confidence."""
    worst = (drawn.margin.nan_to_num(2) if is_judged else drawn.confidence).argsort(stable=True)[:DOUBTED].tolist()
    pictures, names = thumbnails(drawn.images, worst), drawn.images.classes
    return [
        {
            "png": png,
            "image": image_names[i],
            "asked": names[drawn.labels[i]] if drawn.labels[i] >= 0 else None,
            "said": names[drawn.said[i]] if is_judged else f"its class {int(drawn.said[i])}",
            "confidence": 100 * float(drawn.confidence[i]),
            "margin": float(drawn.margin[i]) if is_judged else None,
        }
        for i, png in zip(worst, pictures, strict=True)
    ]
