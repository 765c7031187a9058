"""Points as heatmaps: heads that draw one map per point, the maps they should draw, and reading points off maps.

Source: mmpose 0.29 as RepFusion's `landmark` folder uses it: `TopdownHeatmapSimpleHead`, `TopDownGenerateTarget`,
`JointsMSELoss`, `keypoints_from_heatmaps`, `flip_back`. Encodings and decodings: MSRA (Xiao et al. 2018), DARK (Zhang
et al. 2020, here "unbiased"), UDP (Huang et al. 2020), "megvii" (Li et al. 2019).
Deviation: where UDP finds no peak above 0, the official code reads beyond the map, so that the answer hangs on which
map stands before it in the batch; here the point stays at cell (-1, -1), as in all other decodings.
Letters: B pictures, K points, C H W of maps, h w of heatmaps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Encoding = Literal["msra", "unbiased", "udp"]
Decoding = Literal["none", "default", "unbiased", "megvii", "udp"]
UNIT = 200  # pixels: a scale of 1
REACH = 3  # deviations that a Gaussian is drawn to
KERNEL = 11  # cells of the blur before a refined decoding
KERNEL_STD = 2.0  # OpenCV's for that size: 0.3 ((11 - 1) / 2 - 1) + 0.8
QUARTER = 0.25  # of a cell, towards the larger neighbour
HEAD_STD = 0.001  # of a fresh head's filters


# Heads


class DeconvHead(nn.Module):
    """The last map by transposed convolutions, each twice the size, to heatmaps: maps -> (B, K, h, w)."""

    def __init__(
        self, width: int, num_points: int, widths: Sequence[int] = (256, 256, 256), kernels: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for after, kernel in zip(widths, kernels or [4] * len(widths), strict=True):
            padding, more = (kernel - 1) // 2, kernel % 2
            layers += [nn.ConvTranspose2d(width, after, kernel, 2, padding, more, bias=False), nn.BatchNorm2d(after)]
            layers.append(nn.ReLU(inplace=True))
            width = after
        self.deconv_layers = nn.Sequential(*layers)
        self.final_layer = nn.Conv2d(width, num_points, 1)
        begin(self)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        return self.final_layer(self.deconv_layers(maps[-1]))


class ConcatHead(nn.Module):
    """All maps at the size of the first, side by side, to heatmaps (HRNetV2): maps -> (B, K, H, W)."""

    def __init__(self, widths: Sequence[int], num_points: int) -> None:
        super().__init__()
        width = sum(widths)
        mix = nn.Conv2d(width, width, 1)
        self.final_layer = nn.Sequential(
            mix, nn.BatchNorm2d(width), nn.ReLU(inplace=True), nn.Conv2d(width, num_points, 1)
        )
        begin(self)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        size = maps[0].shape[-2:]
        alike = [maps[0], *(F.interpolate(x, size, mode="bilinear", align_corners=False) for x in maps[1:])]
        return self.final_layer(torch.cat(alike, 1))


def begin(module: nn.Module, std: float = HEAD_STD) -> None:
    """Filters normal with ``std``, biases 0: how mmpose begins its heads, and an HRNet without weights."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.normal_(layer.weight, std=std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


class Landmarker(nn.Module):
    """images (B, 3, H, W) in [0, 1] -> heatmaps (B, K, h, w); the parts have mmpose's names."""

    def __init__(self, backbone: nn.Module, keypoint_head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.keypoint_head = backbone, keypoint_head

    def forward(self, images: Tensor) -> Tensor:
        return self.keypoint_head(self.backbone(images))


# What they should draw


def targets(
    points: Tensor, visible: Tensor, image_size: tuple[int, int], size: tuple[int, int], encoding: Encoding, sigma: int
) -> tuple[Tensor, Tensor]:
    """Gaussians of height 1 around points.

    msra: around the nearest cell. unbiased: around the point itself, over the whole map. udp: around the point, within
    reach of the nearest cell, positions measured from the first pixel's centre to the last one's.

    Args:
        points: (B, K, 2) in pixels of the crop; visible: (B, K), 0 or False where a point has no part.
        image_size, size: width and height of crop and heatmap.

    Returns:
        (B, K, h, w) float32 in [0, 1], and weights (B, K, 1) float32: 0 where nothing of a Gaussian is on the map.
    """
    sides = torch.tensor(size, device=points.device)
    udp = int(encoding == "udp")
    stride = (torch.tensor(image_size, device=points.device) - udp).double() / (sides - udp)
    place = points.double() / stride  # (B, K, 2) in cells
    cell = place if encoding == "unbiased" else (place + 0.5).trunc()
    out = (cell - REACH * sigma >= sides) | (cell + REACH * sigma + 1 < 0)
    weight = visible.double() * ~out.any(-1)
    middle = cell if encoding == "msra" else place
    reach = None if encoding == "unbiased" else REACH * sigma
    x, y = (_bell(middle[..., k], cell[..., k], size[k], sigma, reach) for k in (0, 1))
    drawn = y[..., :, None] * x[..., None, :] * (weight > 0.5)[..., None, None]
    return drawn.float(), weight[..., None].float()


def _bell(middle: Tensor, cell: Tensor, side: int, sigma: int, reach: int | None) -> Tensor:
    """exp(-(x - middle)^2 / 2 sigma^2) at x = 0..side-1, (B, K, side); 0 further than ``reach`` from ``cell``."""
    x = torch.arange(side, device=middle.device)
    bell = (-((x - middle[..., None]) ** 2) / (2 * sigma**2)).exp()
    return bell if reach is None else bell * ((x - cell[..., None]).abs() <= reach)


def joints_mse(heatmaps: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Mean square over everything; points of weight (B, K, 1) 0 count as met. Source: `JointsMSELoss`."""
    return ((heatmaps - target).float() * weight[..., None]).square().mean()


# Reading points off maps


def decode(heatmaps: Tensor, center: Tensor, scale: Tensor, how: Decoding) -> tuple[Tensor, Tensor]:
    """Where each heatmap's peak lies in the image.

    Args:
        heatmaps: (B, K, h, w). center: (B, 2) pixels. scale: (B, 2) or (B, 1), of the crop in units of 200 pixels.

    Returns:
        (B, K, 2) float64 pixels, and the peaks' heights (B, K). A map without a value above 0 gives cell (-1, -1).
    """
    cells, peaks = cells_of(heatmaps.float(), how)
    size = scale.double() * UNIT  # (B, 2)
    sides = torch.tensor(heatmaps.shape[:1:-1], device=heatmaps.device) - int(how == "udp")  # (w, h)
    points = cells * (size / sides)[:, None] + (center.double() - size / 2)[:, None]
    return points, peaks


def cells_of(heatmaps: Tensor, how: Decoding) -> tuple[Tensor, Tensor]:
    """The same in cells of the heatmap: (B, K, 2) float64 x and y, and (B, K)."""
    maps = _blurred_to_peak(heatmaps) if how == "megvii" else heatmaps
    cells, peaks = _peaks(maps)
    if how in ("default", "megvii"):
        cells = _towards_larger(maps, cells, 0.5 if how == "megvii" else 0.0)
    if how == "unbiased":
        cells = _by_newton(_blurred_to_peak(maps), cells)
    if how == "udp":
        cells = _by_udp(_blur(maps, "reflect"), cells)
    return cells, peaks / 255 + 0.5 if how == "megvii" else peaks


def _peaks(maps: Tensor) -> tuple[Tensor, Tensor]:
    """The first largest cell of each map, (B, K, 2) float64 (-1 where nothing is above 0), and its value (B, K)."""
    values, flat = maps.flatten(2).max(-1)
    width = maps.shape[-1]
    cells = torch.stack([flat % width, flat // width], -1).double()
    return torch.where(values[..., None] > 0, cells, -1.0), values


def _at(maps: Tensor, cells: Tensor, dx: int, dy: int) -> Tensor:
    """Values (B, K) beside the cells; beyond the edge, those of the edge."""
    height, width = maps.shape[-2:]
    x, y = (cells[..., 0].long() + dx).clamp(0, width - 1), (cells[..., 1].long() + dy).clamp(0, height - 1)
    return maps.flatten(2).gather(2, (y * width + x)[..., None])[..., 0].double()


def _inside(maps: Tensor, cells: Tensor, margin: int) -> Tensor:
    """(B, K, 1) bool: cells that have neighbours enough, as the official code asks (it leaves cell 1 out, too)."""
    sides = torch.tensor(maps.shape[:1:-1], device=maps.device)  # (w, h)
    return ((cells > 1) & (cells < sides - margin)).all(-1, keepdim=True)


Read = Callable[[int, int], Tensor]  # steps in x and in y from each cell -> values (B, K) there


def _slope(at: Read) -> Tensor:
    """Differences between the neighbours in x and in y, (B, K, 2)."""
    return torch.stack([at(1, 0) - at(-1, 0), at(0, 1) - at(0, -1)], -1)


def _towards_larger(maps: Tensor, cells: Tensor, shift: float) -> Tensor:
    slope = _slope(partial(_at, maps, cells))
    return cells + _inside(maps, cells, 1) * (QUARTER * slope.sign() + shift)


def _by_newton(maps: Tensor, cells: Tensor) -> Tensor:
    """One Newton step on the logarithm, second derivatives over two cells. Source: DARK, eq. 5 to 9."""

    def at(dx: int, dy: int) -> Tensor:
        return _at(maps, cells, dx, dy).clamp(min=1e-10).log()

    here = at(0, 0)
    xx, yy = 0.25 * (at(2, 0) - 2 * here + at(-2, 0)), 0.25 * (at(0, 2) - 2 * here + at(0, -2))
    xy = 0.25 * (at(1, 1) - at(1, -1) - at(-1, 1) + at(-1, -1))
    return cells - torch.where(_inside(maps, cells, 2), _solved(xx, yy, xy, 0.5 * _slope(at)), 0.0)


def _by_udp(maps: Tensor, cells: Tensor) -> Tensor:
    """One Newton step on the logarithm, second derivatives over one cell. Source: `post_dark_udp`."""

    def at(dx: int, dy: int) -> Tensor:
        return _at(maps, cells, dx, dy).clamp(1e-3, 50.0).log()

    here, right, left, below, above = at(0, 0), at(1, 0), at(-1, 0), at(0, 1), at(0, -1)
    eps = torch.finfo(torch.float32).eps
    xx, yy = right - 2 * here + left + eps, below - 2 * here + above + eps
    xy = 0.5 * (at(1, 1) + at(-1, -1) - right - below + 2 * here - left - above)
    return cells - _solved(xx, yy, xy, 0.5 * _slope(at))


def _solved(xx: Tensor, yy: Tensor, xy: Tensor, slope: Tensor) -> Tensor:
    """The symmetric 2x2 matrices' solutions for ``slope``, (B, K, 2); 0 where there is none."""
    determinant = (xx * yy - xy**2)[..., None]
    x, y = slope.unbind(-1)
    step = torch.stack([yy * x - xy * y, xx * y - xy * x], -1) / determinant
    return torch.where(determinant != 0, step, 0.0)


def _blur(maps: Tensor, border: str) -> Tensor:
    """A Gaussian over 11 x 11 cells, as two products of matrices: many times faster than a convolution of one channel.

    border: what lies beyond the edge, "constant" (0) or "reflect".
    """
    rows, columns = (_blurring(side, border).to(maps) for side in maps.shape[2:])
    return rows.T @ (maps @ columns)


def _blurring(side: int, border: str) -> Tensor:
    """(side, side): row i is what the blur makes of cell i alone."""
    x = torch.arange(KERNEL, dtype=torch.float64) - KERNEL // 2
    bell = (-(x**2) / (2 * KERNEL_STD**2)).exp()
    alone = F.pad(torch.eye(side, dtype=torch.float64)[:, None], [KERNEL // 2] * 2, mode=border)
    return F.conv1d(alone, (bell / bell.sum())[None, None])[:, 0]


def _blurred_to_peak(maps: Tensor) -> Tensor:
    """Blurred, at its old maximum."""
    blurred = _blur(maps, "constant")
    return blurred * (maps.amax((2, 3), keepdim=True) / blurred.amax((2, 3), keepdim=True))


# Mirror images


def flipped_back(heatmaps: Tensor, order: Sequence[int], shift: bool = False) -> Tensor:
    """The heatmaps (B, K, h, w) of a mirror image as those of the picture; order: which point stands in whose place.

    shift: one cell to the right, column 0 kept: pixels of a picture and its mirror image meet between two cells.
    """
    back = heatmaps[:, list(order)].flip(-1)
    return torch.cat([back[..., :1], back[..., :-1]], -1) if shift else back
