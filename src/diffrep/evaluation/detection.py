"""Scores of boxes and masks: COCO's average precision, by faster-coco-eval or, where that is not there, pycocotools.

Twelve numbers each: AP over IoU .50 to .95, at .50, at .75, of small, medium and large objects; AR with 1, 10 and 100
detections, of small, medium and large objects. Sizes are areas below 32^2, to 96^2 and above, in pixels.
Letters: n detections of a picture, H and W its pixels, M side of a predicted mask, K classes.
"""

from __future__ import annotations

import contextlib
import heapq
import importlib
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from diffrep.data import rle
from diffrep.data.coco import Objects, scoring_library
from diffrep.data.dense import DenseSet
from diffrep.data.detect_views import DetectViews, test_view
from diffrep.errors import UserError
from diffrep.evaluation import panels

STATS = (
    "ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large",
    "ar_1", "ar_10", "ar_100", "ar_small", "ar_medium", "ar_large",
)  # fmt: skip
KINDS = {"box": "bbox", "mask": "segm"}  # our word -> COCO's
BATCH = 4  # pictures that the network sees together
SHOWN = 0.3  # least score of a detection that counts in the score of one picture


@dataclass(frozen=True)
class Precision:
    """What the COCO tools say, in [0, 1]; -1 where nothing was to be found.

    stats: (12,) float64 in the order of ``STATS``; by_category: (K,) AP, ascending category ids.
    """

    stats: np.ndarray
    by_category: np.ndarray


def average_precision(truth: dict[str, Any], detections: Sequence[dict[str, Any]], kind: str) -> Precision:
    """AP of detections against a truth, both in COCO's words.

    Args:
        truth: images, annotations (segmentation needed for masks), categories.
        detections: image_id, category_id, score; and bbox, or segmentation as run lengths, whichever is judged.
        kind: "bbox" or "segm".

    Raises:
        UserError: no package that scores.
    """
    library = scoring_library()
    module = importlib.import_module(library)
    drawn_by = "segmentation" if kind == "bbox" else "bbox"  # areas come from what is judged
    results = [{k: v for k, v in found.items() if k != drawn_by} for found in detections]
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints as it goes
        real = _indexed(module, truth)
        found = real.loadRes(results) if results else _indexed(module, truth | {"annotations": []})
        judge = _judge(library)(real, found, kind)
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    precision = judge.eval["precision"][:, :, :, 0, -1]  # (10 IoUs, 101 recalls, K)
    by_category = [of[of > -1].mean() if (of > -1).any() else -1.0 for of in np.moveaxis(precision, 2, 0)]
    return Precision(np.asarray(judge.stats[:12], dtype=np.float64), np.asarray(by_category))


def _judge(library: str) -> Any:
    if library == "faster_coco_eval":
        return importlib.import_module(library).COCOeval_faster
    return importlib.import_module("pycocotools.cocoeval").COCOeval


def _indexed(module: Any, content: dict[str, Any]) -> Any:
    kind = module.COCO if hasattr(module, "COCO") else importlib.import_module("pycocotools.coco").COCO
    index = kind()
    index.dataset = {"info": {}, **content, "annotations": [dict(a) for a in content["annotations"]]}
    index.createIndex()
    return index


# Of a method


class Detector(Protocol):
    """What is scored; found: images (B, 3, S, S) in [0, 1] and the pictures' sizes -> what is in them."""

    config: Any

    def found(self, images: Tensor, sizes: list[tuple[int, int]]) -> list[dict[str, Tensor]]: ...


@dataclass(frozen=True)
class Detections:
    """What was found in one picture, best first, in its own pixels; on the CPU.

    boxes: (n, 4) float32; labels: (n,) int64; scores: (n,) float32; masks: (n, H, W) bool.
    """

    boxes: Tensor
    labels: Tensor
    scores: Tensor
    masks: Tensor


@dataclass(frozen=True)
class _Truth:
    """An :class:`Objects` as it is drawn."""

    boxes: Tensor
    labels: Tensor
    masks: Tensor


def detection_scores(
    method: Detector, images: DenseSet, device: torch.device, samples: Path | None = None, count: int = 0
) -> dict[str, Any]:
    """AP and AR of boxes and masks over a split, in percent; the ``count`` worst pictures are drawn into ``samples``.

    Raises:
        UserError: a split without any object.
    """
    truths = [images.truth(k) for k in range(len(images))]
    if not any((~truth.crowd).any() for truth in truths):
        raise UserError(f"{images.name}: the {images.split} split has no object, so AP has no meaning")
    pictures, categories = _picture_ids(truths), images.facts.get("category_ids", [*range(len(images.classes))])
    results: list[dict[str, Any]] = []
    worst: list[tuple[float, int]] = []  # a heap of (minus the F1 of one picture, minus its position)
    for k, found in look(method, images, range(len(images)), device):
        results += coco_results(found, pictures[k], categories)
        heapq.heappush(worst, (-f1(found, truths[k]), -k))
        if len(worst) > count:
            heapq.heappop(worst)
    if samples is not None and worst:

        def drawn(k: int) -> Image.Image:
            (_, found), real = next(look(method, images, [k], device)), truths[k]
            shown = _Truth(real.boxes, real.labels, real.masks())
            return panels.objects(images[k][0], shown, found, images.classes)

        panels.write_panels(samples, sorted((-s, -k) for s, k in worst), drawn, "F1 %", images.image_name)
    truth = coco_truth(truths, pictures, categories, images.classes)
    return summary({word: average_precision(truth, results, kind) for word, kind in KINDS.items()}, images.classes)


def summary(found: dict[str, Precision], classes: Sequence[str]) -> dict[str, Any]:
    """All numbers by name, box_ap, mask_ap50, ..., in percent to three digits; None where nothing was to be found."""
    numbers = {
        f"{word}_{name}": _percent(value)
        for word, precision in found.items()
        for name, value in zip(STATS, precision.stats, strict=True)
    }
    of_classes = {
        name: {f"{word}_ap": _percent(precision.by_category[k]) for word, precision in found.items()}
        for k, name in enumerate(classes)
    }
    return numbers | {"classes": of_classes}


def _percent(share: float) -> float | None:
    return None if share < 0 else round(100 * float(share), 3)


def _picture_ids(truths: Sequence[Objects]) -> list[int]:
    """The official ids, by whose order ties between scores are broken; positions where they are not one each."""
    ids = [truth.picture for truth in truths]
    return ids if len(set(ids)) == len(ids) else [*range(len(ids))]


def coco_truth(
    truths: Sequence[Objects], pictures: Sequence[int], categories: Sequence[int], classes: Sequence[str]
) -> dict[str, Any]:
    """The truth in COCO's words.

    Args:
        pictures: id of each picture. categories: id of each label.
    """
    images = [{"id": i, "height": t.size[0], "width": t.size[1]} for i, t in zip(pictures, truths, strict=True)]
    annotations = [
        {
            "image_id": picture, "category_id": categories[int(truth.labels[row])], "bbox": _xywh(truth.boxes)[row],
            "area": float(truth.area[row]), "iscrowd": int(truth.crowd[row]),
            "segmentation": rle.as_json(truth.outlines[row]),
        }
        for picture, truth in zip(pictures, truths, strict=True)
        for row in range(len(truth))
    ]  # fmt: skip
    for number, annotation in enumerate(annotations, start=1):
        annotation["id"] = number
    named = [{"id": number, "name": name} for number, name in zip(categories, classes, strict=True)]
    return {"images": images, "annotations": annotations, "categories": named}


def coco_results(found: Detections, picture: int, categories: Sequence[int]) -> list[dict[str, Any]]:
    """The detections of one picture in COCO's words."""
    library = "faster_coco_eval.core" if scoring_library() == "faster_coco_eval" else "pycocotools"
    stacked = np.asfortranarray(found.masks.permute(1, 2, 0).to(torch.uint8).numpy())
    runs = importlib.import_module(f"{library}.mask").encode(stacked) if len(found.boxes) else []
    boxes, scores = _xywh(found.boxes), found.scores.double().tolist()
    return [
        {"image_id": picture, "category_id": categories[label], "score": score, "bbox": box, "segmentation": run}
        for label, score, box, run in zip(found.labels.tolist(), scores, boxes, runs, strict=True)
    ]


def _xywh(boxes: Tensor) -> list[list[float]]:
    boxes = boxes.double()
    return torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).tolist()


# What is found


def look(
    method: Detector, images: DenseSet, chosen: Sequence[int], device: torch.device
) -> Iterator[tuple[int, Detections]]:
    """The network's answer to each picture, a few at a time."""
    views: DetectViews = method.config.views
    padding = torch.tensor(method.config.student.mean).expand(3)
    for start in range(0, len(chosen), BATCH):
        some = chosen[start : start + BATCH]
        shown = [test_view(images[k][0], views.size, padding) for k in some]
        answers = method.found(torch.stack([image for image, _ in shown]).to(device), [size for _, size in shown])
        for k, (_, size), answer in zip(some, shown, answers, strict=True):
            yield k, in_picture(answer, size, images.truth(k).size)


def in_picture(found: dict[str, Tensor], seen: tuple[int, int], size: tuple[int, int]) -> Detections:
    """A network's answer, which saw the picture (h, w) large, in the pixels of the picture itself (H, W)."""
    factors = [size[1] / seen[1], size[0] / seen[0]] * 2
    boxes = found["boxes"].float() * found["boxes"].new_tensor(factors)
    masks = pasted(found["masks"], boxes, *size)
    return Detections(boxes.cpu(), found["labels"].cpu(), found["scores"].float().cpu(), masks.cpu())


def pasted(masks: Tensor, boxes: Tensor, height: int, width: int) -> Tensor:
    """(n, H, W) bool: masks (n, M, M) in [0, 1], stretched to their boxes (n, 4), where they are at least a half.

    Pixels have their centres at .5. Towards its edge a mask fades to 0, so that no pixel outside a box is set.
    Source: detectron2's `paste_masks_in_image`.
    """
    found = torch.zeros(len(masks), height, width, dtype=torch.bool, device=masks.device)
    for mask, into, (left, top, right, bottom) in zip(masks, found, boxes.double().tolist(), strict=True):
        columns, rows = _whole(left, right, width), _whole(top, bottom, height)
        x, y = (
            2 * (torch.arange(along.start, along.stop, device=masks.device) + 0.5 - start) / (stop - start) - 1
            for along, start, stop in ((columns, left, right), (rows, top, bottom))
        )
        if len(x) and len(y):
            grid = torch.stack(torch.broadcast_tensors(x[None, :], y[:, None]), 2).to(mask)
            into[rows, columns] = F.grid_sample(mask[None, None], grid[None], align_corners=False)[0, 0] >= 0.5
    return found


def _whole(start: float, stop: float, most: int) -> slice:
    """The pixels that lie at least partly between two places."""
    return slice(min(max(0, math.floor(start)), most), min(max(0, math.ceil(stop)), most))


def f1(found: Detections, truth: Objects) -> float:
    """Of one picture, in percent: objects met by a detection of their class with IoU .5, each by one, the surest first.

    Detections below a score of ``SHOWN`` and crowds do not count; 100 where there is nothing on both sides.
    """
    kept = found.scores >= SHOWN
    boxes, labels = found.boxes[kept].double(), found.labels[kept]
    real = truth.boxes[~truth.crowd]
    overlaps = _iou(boxes, real) * (labels[:, None] == truth.labels[~truth.crowd])
    met = 0
    for row in range(len(boxes)):
        best = int(overlaps[row].argmax()) if len(real) else 0
        if len(real) and overlaps[row, best] >= 0.5:
            met, overlaps[:, best] = met + 1, 0
    total = len(boxes) + len(real)
    return 200 * met / total if total else 100.0


def _iou(a: Tensor, b: Tensor) -> Tensor:
    """(n, m) of boxes (n, 4) and (m, 4)."""
    sides = (torch.minimum(a[:, None, 2:], b[:, 2:]) - torch.maximum(a[:, None, :2], b[:, :2])).clamp(min=0)
    common, areas = sides.prod(2), [(of[:, 2:] - of[:, :2]).prod(1) for of in (a, b)]
    return common / (areas[0][:, None] + areas[1] - common).clamp(min=1e-9)
