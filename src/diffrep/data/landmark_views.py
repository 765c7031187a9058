"""How a face is brought before the network: cut out by centre and scale, in training mirrored, turned and scaled.

Source: mmpose 0.29, `TopDownRandomFlip`, `TopDownGetRandomScaleRotation`, `TopDownAffine`, as RepFusion configures
them. The crop is OpenCV's `warpAffine` with bilinear sampling and black outside, without its rounding of positions to
1/32 pixel.
Letters: K points, H and W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from diffrep.config import Config
from diffrep.data.dense import DenseSet
from diffrep.data.wflw import UNIT, Face


class LandmarkViews(Config):
    """Crops of faces; defaults are the published ones."""

    size: int = Field(256, ge=8)  # side of a crop, pixels
    padding: float = Field(1.25, gt=0)  # on the side of the box around the points
    target: Literal["msra", "unbiased", "udp"] = "msra"  # of the heatmaps; udp also measures crops from pixel centres
    sigma: int = Field(2, ge=1)  # of the Gaussians, in cells of a heatmap
    flip: float = Field(0.5, ge=0, le=1)  # share of mirror images
    scale_jitter: float = Field(0.25, ge=0, lt=1)  # deviation of the factor on the scale, which stays within one
    rotation: float = Field(30.0, ge=0)  # deviation of the angle in degrees, which stays within two
    rotation_share: float = Field(0.6, ge=0, le=1)  # share of crops that are turned


class LandmarkTraining:
    """What training sees of a face: the crop, and the points in it."""

    def __init__(self, config: LandmarkViews, images: DenseSet) -> None:
        self.config, self.mirrored = config, images.mirrored

    def __call__(self, image: Tensor, truth: Face, rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """-> (3, size, size) uint8, {"points": (K, 2) float32 in pixels of the crop, "visible": (K,) bool}."""
        c = self.config
        flips, turns = torch.rand(2, generator=rng).tolist()
        growth, turn = torch.randn(2, generator=rng).tolist()
        if flips < c.flip:
            image, truth = image.flip(-1), mirror(truth, image.shape[-1], self.mirrored)
        factor = 1 + c.scale_jitter * max(-1.0, min(1.0, growth))
        angle = c.rotation * max(-2.0, min(2.0, turn)) if turns < c.rotation_share else 0.0
        view, matrix = crop(c, image, truth, factor, angle)
        return view, {"points": transformed(truth.points, matrix).float(), "visible": truth.visible}

    def collate(self, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {key: torch.stack([target[key] for target in targets]) for key in targets[0]}


def crop(
    config: LandmarkViews, image: Tensor, face: Face, factor: float = 1.0, angle: float = 0.0
) -> tuple[Tensor, Tensor]:
    """A face cut out of (3, H, W) uint8: (3, size, size) uint8, and the (2, 3) matrix that led there."""
    size = (config.size, config.size)
    matrix = crop_matrix(face.center, factor * padded_scale(config, face), size, angle, config.target == "udp")
    return warp(image, matrix, size), matrix


def padded_scale(config: LandmarkViews, face: Face) -> float:
    """The side of what is cut out, in units of 200 pixels."""
    return face.scale * config.padding


def crop_matrix(
    center: Tensor, scale: float, size: tuple[int, int], angle: float = 0.0, from_centres: bool = False
) -> Tensor:
    """Pixels of the image -> pixels of the crop, (2, 3) float64: ``scale`` x 200 pixels become its width.

    Args:
        size: width and height of the crop.
        angle: in degrees, by which the picture turns against the clock.
        from_centres: lengths are measured from the first pixel's centre to the last one's, one less than their number
            (UDP); so the crop's middle is a pixel's centre or lies right between two.
    """
    width, height = (side - from_centres for side in size)
    zoom = width / (scale * UNIT)
    cos, sin = zoom * math.cos(math.radians(angle)), zoom * math.sin(math.radians(angle))
    turn = torch.tensor([[cos, sin], [-sin, cos]], dtype=torch.float64)
    middle = torch.tensor([width / 2, height / 2], dtype=torch.float64)
    return torch.cat([turn, (middle - turn @ center.double())[:, None]], 1)


def transformed(points: Tensor, matrix: Tensor) -> Tensor:
    """(..., 2) points by a (2, 3) matrix, float64."""
    return points.double() @ matrix[:, :2].T + matrix[:, 2]


def warp(image: Tensor, matrix: Tensor, size: tuple[int, int]) -> Tensor:
    """(C, H, W) uint8 by a (2, 3) matrix -> (C, height, width) uint8, bilinear, 0 outside; size: width, height."""
    width, height = size
    back = torch.linalg.inv(matrix[:, :2])
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    places = (torch.stack([x, y], -1) - matrix[:, 2]) @ back.T  # (height, width, 2) in pixels of the image
    low = places.amin((0, 1)).floor().long().clamp(min=0)
    high = places.amax((0, 1)).floor().long() + 2
    seen = image[:, low[1] : max(high[1], 0), low[0] : max(high[0], 0)]  # what the crop can reach
    if not seen.numel():
        return image.new_zeros(len(image), height, width)
    sides = torch.tensor([seen.shape[2], seen.shape[1]])
    grid = ((places - low) * 2 + 1) / sides - 1
    found = F.grid_sample(seen[None].float(), grid[None].float(), padding_mode="zeros", align_corners=False)
    return found[0].round().clamp(0, 255).to(torch.uint8)


def mirror(face: Face, width: int, pairs: Sequence[tuple[int, int]]) -> Face:
    """The face in the mirror image of a picture ``width`` pixels wide: x -> width - 1 - x, pairs exchanged."""
    order = exchanged(len(face.points), pairs)
    flipped = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    shift = torch.tensor([width - 1.0, 0.0], dtype=torch.float64)
    points, center = face.points[order] * flipped + shift, face.center * flipped + shift
    return replace(face, points=points, visible=face.visible[order], center=center)


def exchanged(count: int, pairs: Sequence[tuple[int, int]]) -> list[int]:
    """Which point stands in each one's place in a mirror image; of pairs that overlap the later one counts."""
    order = list(range(count))
    for left, right in pairs:
        order[left], order[right] = right, left
    return order
