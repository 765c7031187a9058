"""From one photograph to the class of each pixel: whole or by sliding windows, once or at several sizes and mirrored.

Source: mmseg 0.30's `whole_inference`, `slide_inference` and `aug_test`. As there, logits are brought to the size that
is judged before the best class is taken, and probabilities are averaged where there are several views. Deviation: the
classes of left and right change places in a mirrored view, which they do not there.
Letters: H W of the photograph, h w of what the network sees, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffrep.models.fcn import resized

AT_ONCE = 16  # classes whose logits stand at full size together

Pairs = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class View:
    """One way to show a photograph. size: (h, w); windows: (side, stride) of those it is read by, None = whole."""

    size: tuple[int, int]
    flip: bool = False
    windows: tuple[int, int] | None = None


@torch.no_grad()
def predict(
    network: nn.Module, image: Tensor, size: Sequence[int], views: Sequence[View], mirrored: Pairs = (), patch: int = 1
) -> Tensor:
    """The class of each pixel, ``size`` int64.

    Args:
        network: (1, 3, h, w) in [0, 1] -> logits (1, K, ., .), in eval mode.
        image: (3, H, W) uint8.
        size: height and width of the answer: those of the mask it is judged by.
        views: one or more.
        mirrored: classes that change places in a mirror image.
        patch: the network takes multiples of so many pixels.
    """
    images = image[None].to(torch.float32) / 255
    seen = (_seen(network, images, view, mirrored, patch) for view in views)
    if len(views) == 1:
        return best_class(next(seen)[0], size)
    total = resized(next(seen), size).softmax(1)
    for logits in seen:
        total += resized(logits, size).softmax(1)
    return total[0].argmax(0)


def _seen(network: nn.Module, images: Tensor, view: View, mirrored: Pairs, patch: int) -> Tensor:
    """Logits (1, K, ., .) of one view, turned back."""
    shown = resized(images, view.size)
    shown = shown.flip(3) if view.flip else shown
    logits = slide(network, shown, *view.windows) if view.windows else whole(network, shown, patch)
    return exchanged(logits.flip(3), mirrored) if view.flip else logits


def exchanged(logits: Tensor, mirrored: Pairs) -> Tensor:
    """(B, K, ...) with the classes of each pair in each other's place."""
    order = list(range(logits.shape[1]))
    for one, other in mirrored:
        order[one], order[other] = other, one
    return logits[:, order]


def whole(network: nn.Module, images: Tensor, patch: int = 1) -> Tensor:
    """Logits of whole images (B, 3, h, w); where h and w are no multiples of ``patch`` their edges go on until then."""
    h, w = images.shape[2:]
    if h % patch == w % patch == 0:
        return network(images).float()
    longer = F.pad(images, (0, -w % patch, 0, -h % patch), mode="replicate")
    return resized(network(longer).float(), longer.shape[2:])[:, :, :h, :w]


def slide(network: nn.Module, images: Tensor, window: int, stride: int) -> Tensor:
    """Images (B, 3, h, w) -> the mean of the logits of all windows over a pixel, (B, K, h, w).

    Windows start every ``stride`` pixels; the last ones are moved back until they end with the image.
    """
    h, w = images.shape[2:]
    total, count = None, images.new_zeros(1, 1, h, w)
    for rows in windows(h, window, stride):
        for columns in windows(w, window, stride):
            seen = images[:, :, rows, columns]
            logits = resized(network(seen).float(), seen.shape[2:])
            total = logits.new_zeros(*logits.shape[:2], h, w) if total is None else total
            total[:, :, rows, columns] += logits
            count[:, :, rows, columns] += 1
    assert total is not None
    return total / count


def windows(length: int, window: int, stride: int) -> list[slice]:
    """Along one side; a single one where the side is no longer than a window."""
    count = max(length - window + stride - 1, 0) // stride + 1
    starts = [max(min(k * stride + window, length) - window, 0) for k in range(count)]
    return [slice(start, start + window) for start in starts]


def best_class(logits: Tensor, size: Sequence[int]) -> Tensor:
    """(K, h, w) -> the class of the largest logit at each of ``size`` pixels, a few classes at a time."""
    best = torch.full(tuple(size), -torch.inf, device=logits.device)
    found = torch.zeros(tuple(size), dtype=torch.int64, device=logits.device)
    for first in range(0, len(logits), AT_ONCE):
        value, index = resized(logits[None, first : first + AT_ONCE], size)[0].max(0)
        found, best = torch.where(value > best, index + first, found), torch.maximum(value, best)
    return found
