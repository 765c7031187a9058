"""Judging detections: AP of boxes and masks by our door, against the library behind it alone, and against pycocotools.

From masks: ours begins with tensors, the library alone with the same masks as arrays, which it packs into run lengths.
From lists: both are given truth and results in COCO's words, packed already. All have to agree.
"""

from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np
import torch

from benchmarks.timing import line, rivals
from diffrep.data.coco import Objects
from diffrep.evaluation.detection import Detections, average_precision, coco_results, coco_truth
from diffrep.randomness import stream

PICTURES, CLASSES, OBJECTS, FOUND = 60, 10, 8, 50
HEIGHT, WIDTH = 240, 320
UNIT = f"CPU s, {PICTURES} pictures of {HEIGHT}x{WIDTH}, {FOUND} detections each, boxes and masks"


def measure() -> list[dict[str, Any]]:
    """What our door costs, and what the faster library saves."""
    import faster_coco_eval
    from faster_coco_eval.core import mask
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truths, found = _pictures()
    truth, results = _told(truths, found)
    arrays = [np.asfortranarray(f.masks.permute(1, 2, 0).to(torch.uint8).numpy()) for f in found]

    def ours(given: tuple[Any, Any] | None = None) -> list[float]:
        told = given or _told(truths, found)
        return [float(average_precision(*told, kind).stats[0]) for kind in ("bbox", "segm")]

    def library(coco: Any, judge: Any) -> list[float]:
        return [_library(coco, judge, truth, results, kind) for kind in ("bbox", "segm")]

    def from_lists() -> list[float]:
        return library(faster_coco_eval.COCO, faster_coco_eval.COCOeval_faster)

    def from_masks() -> list[float]:
        packed = [run for array in arrays for run in mask.encode(array)]
        assert all(run == result["segmentation"] for run, result in zip(packed, results, strict=True))
        return from_lists()

    def slower() -> list[float]:
        return library(COCO, COCOeval)

    assert max(abs(a - b) for a, b in zip(ours() + ours(), from_lists() + slower(), strict=True)) < 1e-12
    known = truth, results
    return [
        line("AP from masks", "faster-coco-eval alone", *rivals(ours, from_masks), unit=UNIT),
        line("AP from lists", "faster-coco-eval alone", *rivals(lambda: ours(known), from_lists), unit=UNIT),
        line("AP from lists", "pycocotools alone", *rivals(lambda: ours(known), slower, repeats=2), unit=UNIT),
    ]


def _pictures() -> tuple[list[Objects], list[Detections]]:
    """Ellipses, and detections that are those, moved and grown by a little, and as many that are nowhere."""
    rng, truths, found = stream(0, "bench/coco_ap"), [], []
    for picture in range(PICTURES):
        place = torch.rand(FOUND, 4, generator=rng) * torch.tensor([WIDTH - 40, HEIGHT - 40, 60, 60])
        labels = torch.randint(CLASSES, (FOUND,), generator=rng)
        truths.append(Objects.from_masks(_ellipses(place[:OBJECTS]), labels[:OBJECTS], picture))
        moved = place + 4 * torch.randn(FOUND, 4, generator=rng)
        masks = _ellipses(moved)
        boxes = Objects.from_masks(masks, labels).boxes.float()
        found.append(Detections(boxes, labels, torch.rand(FOUND, generator=rng), masks))
    return truths, found


def _ellipses(place: torch.Tensor) -> torch.Tensor:
    """(n, H, W) bool from left, top, width and height."""
    y, x = torch.meshgrid(torch.arange(HEIGHT), torch.arange(WIDTH), indexing="ij")
    middle, radius = place[:, :2] + 20, 10 + place[:, 2:].abs() / 2
    across, down = (
        (pixel[None] - middle[:, k, None, None]) / radius[:, k, None, None] for k, pixel in enumerate((x, y))
    )
    return across.square() + down.square() <= 1


def _told(truths: list[Objects], found: list[Detections]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    ids, pictures = list(range(1, 1 + CLASSES)), list(range(PICTURES))
    results = [row for k, of_picture in enumerate(found) for row in coco_results(of_picture, k, ids)]
    return coco_truth(truths, pictures, ids, [str(k) for k in ids]), results


def _library(coco: Any, judge: Any, truth: dict[str, Any], results: list[dict[str, Any]], kind: str) -> float:
    with contextlib.redirect_stdout(io.StringIO()):
        real = coco()
        real.dataset = {"info": {}, **truth, "annotations": [dict(a) for a in truth["annotations"]]}
        real.createIndex()
        drawn_by = "segmentation" if kind == "bbox" else "bbox"
        guess = real.loadRes([{k: v for k, v in r.items() if k != drawn_by} for r in results])
        run = judge(real, guess, kind)
        run.evaluate()
        run.accumulate()
        run.summarize()
    return float(run.stats[0])
