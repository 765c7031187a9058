"""Lets timm, diffusers and torchvision be imported beside a CPU-only torch.

torchvision's Linux wheel is compiled against the CUDA build of torch. Beside a CPU-only torch its operators do not
load, and importing it fails because it registers Python kernels for operators that nobody has declared. Declaring
the two signatures is enough for everything used here (transforms, timm models, diffusers pipelines), which is pure
Python. Where the compiled operators exist, nothing is done.

Detection also computes with two of them, nms and roi_align: :func:`install_detection` puts plain torch in their place.
Letters: N boxes of nms; K boxes of roi_align, C channels, H W a map, P Q cells along y and x.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

_SIGNATURES = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_libraries: list[object] = []  # torch drops a library's declarations when the object dies


def install() -> bool:
    """Declare the missing torchvision operators; call it before importing torchvision, timm or diffusers.

    Returns:
        True where a declaration was needed, False where the compiled operators load (or torchvision is absent).
    """
    if _libraries or importlib.util.find_spec("torchvision") is None or compiled_operators_load():
        return bool(_libraries)
    library = torch.library.Library("torchvision", "DEF")
    for signature in _SIGNATURES.values():
        library.define(signature)
    _libraries.append(library)
    return True


def compiled_operators_load() -> bool:
    """Whether torchvision's compiled library loads into this torch."""
    if all(torch._C._dispatch_has_kernel(f"torchvision::{name}") for name in _SIGNATURES):
        return True
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        return False
    # _C.so until torchvision 0.28, _C_stable.so after it.
    for library in sorted(Path(spec.submodule_search_locations[0]).glob("_C*.*")):
        try:
            torch.ops.load_library(str(library))
        except OSError:
            continue
        return True
    return False


# What detection computes with

_SAMPLES = 2**22  # of a map that roi_align holds at once: 16 MB in float32
_BOXES = 1024  # that nms compares with all others at once


def install_detection() -> bool:
    """:func:`install`, and nms and roi_align in plain torch where torchvision's own do not load.

    torchvision asks for its library before it asks for an operator, so the functions themselves are replaced, where
    its detection code looks for them. Its own Python roi_align is compiled at the first call (a minute), holds all
    samples at once, and does not answer 0 outside the map as the compiled kernels do.

    Returns:
        True where the functions were replaced.
    """
    install()
    import torchvision
    from torchvision.models.detection import roi_heads
    from torchvision.ops import boxes, poolers

    if torchvision.extension._has_ops():
        return False
    for place in (torchvision.ops, boxes):
        place.nms = nms
    for place in (torchvision.ops, poolers, roi_heads):
        place.roi_align = roi_align
    return True


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Which boxes stay, (M,) int64, best first: each that overlaps no better one that stays by more than the threshold.

    Args:
        boxes: (N, 4) x0 y0 x1 y1.
        scores: (N,); of equal ones the first is the better.
    """
    order = scores.argsort(descending=True, stable=True)
    ranked, stays = boxes[order].to(_exact(boxes)), torch.ones_like(order, dtype=torch.bool)
    for start in range(0, len(order), _BOXES):
        overlaps = _iou(ranked[start : start + _BOXES], ranked[start:]) > iou_threshold  # (b, N - start)
        stop = start + len(overlaps)
        among = overlaps[:, : len(overlaps)].triu(1)
        stays[start:stop] = kept = _undisturbed(stays[start:stop], among)
        stays[stop:] &= ~overlaps[kept, len(overlaps) :].any(0)
    return order[stays]


def _undisturbed(candidates: Tensor, overlaps: Tensor) -> Tensor:
    """(b,) bool: candidates that no earlier one that stays overlaps, (b, b) bool.

    After round k at least the first k are settled, and rounds without change end it.
    """
    stays = candidates
    while True:
        now = candidates & ~overlaps[stays].any(0)
        if torch.equal(now, stays):
            return stays
        stays = now


def _iou(a: Tensor, b: Tensor) -> Tensor:
    """(n, m): intersection over union of boxes (n, 4) and (m, 4); not a number where both are empty."""
    sides = (torch.minimum(a[:, None, 2:], b[:, 2:]) - torch.maximum(a[:, None, :2], b[:, :2])).clamp(min=0)
    common, areas = sides.prod(2), [(boxes[:, 2:] - boxes[:, :2]).prod(1) for boxes in (a, b)]
    return common / (areas[0][:, None] + areas[1] - common)


def roi_align(
    input: Tensor, boxes: Tensor | list[Tensor], output_size: int | tuple[int, int], spatial_scale: float = 1.0,
    sampling_ratio: int = -1, aligned: bool = False,
) -> Tensor:  # fmt: skip
    """Boxes of maps as P x Q cells, each the mean of samples on a regular grid; torchvision's words and numbers.

    Args:
        input: (N, C, H, W).
        boxes: (K, 5) number of the map and x0 y0 x1 y1, or for each map (k, 4).
        spatial_scale: pixels of the map per unit of a box.
        sampling_ratio: samples per cell and side; 0 or less: as many as a cell has pixels, rounded up.
        aligned: centres of pixels lie at .5, and boxes may be smaller than a pixel.

    Returns:
        (K, C, P, Q). Samples more than a pixel outside the map are 0. Source: He et al. 2017 (Mask R-CNN), section 3.
    """
    cells = (output_size, output_size) if isinstance(output_size, int) else (output_size[0], output_size[1])
    if not isinstance(boxes, Tensor):
        boxes = torch.cat([F.pad(of_map, (1, 0), value=number) for number, of_map in enumerate(boxes)])
    maps = input.to(_exact(input))
    corners = boxes[:, 1:].to(maps) * spatial_scale - 0.5 * aligned
    starts, sizes = corners[:, [1, 0]], corners[:, [3, 2]] - corners[:, [1, 0]]  # (K, 2): y, x
    sizes = sizes if aligned else sizes.clamp(min=1)
    counts = (sizes / sizes.new_tensor(cells)).ceil() if sampling_ratio <= 0 else torch.full_like(sizes, sampling_ratio)
    found, rows = [maps.new_zeros(0, maps.shape[1], *cells)], [torch.zeros(0, dtype=torch.int64, device=maps.device)]
    for number, samples, alike in _alike(torch.cat([boxes[:, :1].to(maps), counts], 1).long(), cells, maps.shape[1]):
        ys, xs = (
            starts[alike, axis, None] + sizes[alike, axis, None] * _fractions(cells[axis] * samples[axis], maps)
            for axis in (0, 1)
        )
        found.append(_read(maps[number], ys, xs, cells))
        rows.append(alike)
    out = maps.new_zeros(len(boxes), *found[0].shape[1:]).index_copy(0, torch.cat(rows), torch.cat(found))
    return out.to(input.dtype)


def _exact(values: Tensor) -> torch.dtype:
    return torch.promote_types(values.dtype, torch.float32)


def _alike(keys: Tensor, cells: tuple[int, int], channels: int) -> Iterator[tuple[int, tuple[int, int], Tensor]]:
    """Boxes of one map with as many samples per cell, in blocks that take bounded memory.

    Args:
        keys: (K, 3) int64, number of the map, samples along y and x.

    Yields:
        number of the map, samples, rows of ``keys``; an empty box has no samples and does not come.
    """
    for number, along_y, along_x in keys[(keys[:, 1:] > 0).all(1)].unique(dim=0).tolist():
        rows = (keys == keys.new_tensor([number, along_y, along_x])).all(1).nonzero()[:, 0]
        block = _SAMPLES // (channels * cells[0] * along_y * cells[1] * along_x)
        for some in rows.split(max(1, block)):
            yield number, (along_y, along_x), some


def _fractions(count: int, like: Tensor) -> Tensor:
    """(count,): the middles of equal parts of a box."""
    return (torch.arange(count, device=like.device, dtype=like.dtype) + 0.5) / count


def _read(of: Tensor, ys: Tensor, xs: Tensor, cells: tuple[int, int]) -> Tensor:
    """(k, C, P, Q): means over the samples of a cell of a map (C, H, W) at (k, P a) rows and (k, Q b) columns."""
    height, width = of.shape[1:]
    inside = [(at >= -1) & (at <= side) for at, side in ((ys, height), (xs, width))]
    # grid_sample counts from -1 to 1 over the whole picture; "border" is the clamping of the kernels.
    y, x = (2 * ys + 1) / height - 1, (2 * xs + 1) / width - 1
    grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), 3).flatten(0, 1)  # (k P a, Q b, 2)
    values = F.grid_sample(of[None], grid[None], padding_mode="border", align_corners=False)[0]
    values = values.unflatten(1, (len(ys), -1)) * (inside[0][:, :, None] & inside[1][:, None, :])  # (C, k, P a, Q b)
    return values.unflatten(3, (cells[1], -1)).unflatten(2, (cells[0], -1)).mean((3, 5)).transpose(0, 1)
