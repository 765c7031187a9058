"""Masks as COCO stores them: run lengths, plain or as text, and polygons.

Pixels are counted down the columns, and runs begin with those outside. Polygons are filled to the pixel as the COCO
tools fill them, because their evaluation and everything published rest on that fill.
Source: the COCO tools' mask format (Lin et al. 2014, "Microsoft COCO").
Letters: H and W pixels.
"""

from __future__ import annotations

from typing import Any

import numpy as np

FINER = 5  # steps per pixel in which an outline is walked
FAR = 10  # sides of the picture; a polygon that reaches beyond is a fault, and would take for ever to walk
Outline = Any  # [[x0, y0, x1, y1, ...], ...], {"counts": [..] or text, "size": [H, W]}


def mask_of(outline: Outline, height: int, width: int) -> np.ndarray:
    """(H, W) bool.

    Raises:
        ValueError: neither polygons nor run lengths of H x W pixels; in words.
    """
    if isinstance(outline, dict):
        return _of_runs(outline, height, width)
    if not isinstance(outline, list) or not outline:
        raise ValueError("neither polygons nor run lengths")
    first, *others = [_filled(_corners(polygon, height, width), height, width) for polygon in outline]
    for other in others:
        first |= other
    return first


def runs_of(mask: np.ndarray) -> dict[str, Any]:
    """The plain run lengths of a mask (H, W) bool."""
    flat = np.asarray(mask, dtype=bool).ravel(order="F")
    changes = np.flatnonzero(np.diff(flat, prepend=False))
    return {"size": list(mask.shape), "counts": np.diff(changes, prepend=0, append=flat.size).tolist()}


def packed(outline: Outline, height: int, width: int) -> Outline:
    """The same outline with its polygons as arrays, after a look at everything that :func:`mask_of` would refuse.

    Raises:
        ValueError: as there.
    """
    if isinstance(outline, dict):
        _counts(outline, height, width)
        return outline
    if not isinstance(outline, list) or not outline:
        raise ValueError("neither polygons nor run lengths")
    return [_corners(polygon, height, width).ravel() for polygon in outline]


def as_json(outline: Outline) -> Outline:
    """The outline in plain lists and text, as the COCO tools take it."""
    if isinstance(outline, list):
        return [np.asarray(polygon).tolist() for polygon in outline]
    counts = outline["counts"]
    return outline | {"counts": counts.decode() if isinstance(counts, bytes) else counts}


def _corners(polygon: Any, height: int, width: int) -> np.ndarray:
    """(n, 2): x, y."""
    try:
        flat = np.asarray(polygon, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError("a polygon is a list of numbers x0, y0, x1, y1, ...") from None
    if flat.ndim != 1 or flat.size % 2 or flat.size < 6 or not np.isfinite(flat).all():
        raise ValueError(f"a polygon is three points or more, x0, y0, x1, y1, ...; found {flat.size} numbers")
    if np.abs(flat).max() > FAR * max(height, width):
        raise ValueError(f"a polygon reaches {np.abs(flat).max():g}, and the picture is {height}x{width}")
    return flat.reshape(-1, 2)


def _of_runs(outline: dict[str, Any], height: int, width: int) -> np.ndarray:
    counts = _counts(outline, height, width)
    flat = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
    return flat.reshape(height, width, order="F")


def _counts(outline: dict[str, Any], height: int, width: int) -> np.ndarray:
    """(runs,) int64, adding up to H W."""
    told, size = outline.get("counts"), outline.get("size")
    if size != [height, width]:
        raise ValueError(f"run lengths of {size} pixels; the picture has [{height}, {width}]")
    try:
        counts = _from_text(told) if isinstance(told, str | bytes) else np.asarray(told, dtype=np.int64)
    except (TypeError, ValueError, OverflowError):
        raise ValueError("run lengths are whole numbers, or the text that the COCO tools write") from None
    if counts.ndim != 1 or (counts < 0).any() or counts.sum() != height * width:
        raise ValueError(f"run lengths add up to {counts.sum()}; the picture has {height * width} pixels")
    return counts


def _from_text(text: str | bytes) -> np.ndarray:
    """Six bits a character from "0" on: five of a number, low ones first, and whether it goes on.

    The numbers have a sign; from the fourth on each is the difference to the one two places before.
    """
    codes = np.frombuffer(text.encode() if isinstance(text, str) else text, dtype=np.uint8).astype(np.int64) - 48
    if codes.size and (codes.min() < 0 or codes.max() > 63 or codes[-1] & 32):
        raise ValueError
    starts = np.flatnonzero(np.concatenate([[True], (codes & 32) == 0])[: codes.size])
    place = 5 * (np.arange(codes.size) - np.repeat(starts, np.diff(starts, append=codes.size)))
    if codes.size and place.max() > 55:
        raise ValueError
    values = np.add.reduceat((codes & 31) << place, starts) if codes.size else codes
    last = np.append(starts[1:], codes.size) - 1
    values -= np.where(codes[last] & 16, np.int64(1) << (place[last] + 5), 0) if codes.size else 0
    for parity in (1, 2):  # two running sums side by side; the very first number stands alone
        values[parity::2] = values[parity::2].cumsum()
    return values


def _filled(corners: np.ndarray, height: int, width: int) -> np.ndarray:
    """(H, W) bool: the inside of one polygon, (n, 2) x and y.

    The outline is walked in fifths of a pixel; wherever it passes the middle of a column, the pixels of that column
    from there on change sides.
    """
    x, y = _walked((FINER * corners + 0.5).astype(np.int64))
    passes = np.flatnonzero(np.diff(x))
    column = (np.minimum(x[passes], x[passes + 1]) + 0.5) / FINER - 0.5
    row = np.ceil(((np.minimum(y[passes], y[passes + 1]) + 0.5) / FINER - 0.5).clip(0, height)).astype(np.int64)
    seen = (column == np.floor(column)) & (column >= 0) & (column <= width - 1)
    mask = np.zeros((width, height), dtype=bool)  # columns lie one behind the other, as they are counted
    if seen.any():
        columns = column[seen].astype(np.int64)
        first, last = columns.min(), columns.max() + 1
        turns = np.zeros((last - first) * height + 1, dtype=bool)
        np.logical_xor.at(turns, (columns - first) * height + row[seen], True)
        mask[first:last] = np.logical_xor.accumulate(turns)[:-1].reshape(-1, height)
    return mask.T


def _walked(corners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whole-numbered points along the closed outline, one per step in the longer direction of each edge.

    An edge is walked from its lower end, so that it is the same from both of its sides, and told in order.
    """
    after = np.roll(corners, -1, axis=0)
    steep = abs(after - corners)[:, 1] > abs(after - corners)[:, 0]
    start, stop = (np.where(steep[:, None], ends[:, ::-1], ends) for ends in (corners, after))  # longer direction first
    turned = (start[:, 0] > stop[:, 0])[:, None]
    low, high = np.where(turned, stop, start), np.where(turned, start, stop)
    steps = high[:, 0] - low[:, 0]
    edge = np.repeat(np.arange(len(corners)), steps + 1)
    step = np.arange(len(edge)) - np.repeat(np.cumsum(steps + 1) - steps - 1, steps + 1)
    step = np.where(turned[edge, 0], steps[edge] - step, step)
    slope = (high[:, 1] - low[:, 1]) / np.maximum(1, steps)
    along, across = low[edge, 0] + step, (low[edge, 1] + slope[edge] * step + 0.5).astype(np.int64)
    return np.where(steep[edge], across, along), np.where(steep[edge], along, across)
