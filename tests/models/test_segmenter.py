"""Whole and sliding predictions, at several sizes and mirrored: pytest tests/models/test_segmenter.py"""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from toy_masks import Reader, blocks, shown

from diffrep.models.segmenter import View, best_class, exchanged, predict, slide, whole, windows


class Local(nn.Module):
    """A convolution that sees three pixels around: near a window's edge it answers otherwise than inside."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.conv = nn.Conv2d(3, 5, 7, padding=3)

    def forward(self, images):
        return self.conv(images)


@given(st.integers(1, 90), st.integers(1, 40), st.integers(1, 40))
def test_windows_cover_a_side_and_end_with_it(length, window, stride):
    stride = min(stride, window)
    found = windows(length, window, stride)
    covered = [k for part in found for k in range(*part.indices(length))]
    assert set(covered) == set(range(length)) and found[-1].stop >= length
    assert all(part.start >= 0 and part.stop - part.start == window for part in found)
    assert [part.start for part in found[:-1]] == [k * stride for k in range(len(found) - 1)]
    assert len(found) == 1 or found[-1].stop == length


def test_windows_as_officially():
    """683 pixels beside 512: the second window starts at 171, and there is no third."""
    assert windows(512, 512, 256) == [slice(0, 512)]
    assert windows(683, 512, 256) == [slice(0, 512), slice(171, 683)]
    assert [part.start for part in windows(1100, 512, 256)] == [0, 256, 512, 588]


@torch.no_grad()
def test_logits_of_windows_are_averaged_by_hand():
    network, image = Local(), torch.rand(1, 3, 11, 17, generator=torch.Generator().manual_seed(0))
    total, count = torch.zeros(1, 5, 11, 17), torch.zeros(11, 17)
    for top in (0, 3):
        for left in (0, 6, 9):
            total[:, :, top : top + 8, left : left + 8] += network(image[:, :, top : top + 8, left : left + 8])
            count[top : top + 8, left : left + 8] += 1
    torch.testing.assert_close(slide(network, image, 8, 6), total / count)
    assert count.max() > 1 and not torch.allclose(slide(network, image, 8, 6), network(image), atol=1e-3)


@torch.no_grad()
def test_one_window_is_the_whole():
    network, image = Local(), torch.rand(1, 3, 11, 17)
    assert torch.equal(slide(network, image, 17, 4), network(image))


@torch.no_grad()
def test_whole_patches_only():
    """16 x 24 pixels are shown of 11 x 17; what lies beyond goes on as the edge, and is cut off again."""
    network, image = Local(), torch.rand(1, 3, 11, 17)
    found = whole(network, image, 8)
    longer = torch.cat([image, image[:, :, -1:].expand(-1, -1, 5, -1)], 2)
    longer = torch.cat([longer, longer[..., -1:].expand(-1, -1, -1, 7)], 3)
    assert longer.shape[2:] == (16, 24) and torch.equal(found, network(longer)[:, :, :11, :17])
    assert torch.equal(whole(network, image), network(image))


@given(st.integers(1, 50), st.integers(0, 10**6))
def test_the_best_class_is_that_of_all_classes_at_once(num_classes, seed):
    logits = torch.randn(num_classes, 4, 6, generator=torch.Generator().manual_seed(seed))
    wanted = F.interpolate(logits[None], (9, 7), mode="bilinear", align_corners=False)[0].argmax(0)
    assert torch.equal(best_class(logits, (9, 7)), wanted)


def picture(mask):
    return torch.from_numpy(shown(mask)).permute(2, 0, 1).contiguous()


def test_a_perfect_network_is_perfect_at_the_masks_size():
    mask = blocks()
    found = predict(Reader(), picture(mask), (32, 32), [View((32, 32))])
    assert found.dtype == torch.int64 and torch.equal(found, mask.long())
    smaller = predict(Reader(), picture(mask), (16, 16), [View((32, 32))])
    assert smaller.shape == (16, 16) and torch.equal(smaller, mask.long()[::2, ::2])


class Sided(nn.Module):
    """Says "left" of the left half of whatever it sees, "right" of the right."""

    def forward(self, images):
        left = torch.zeros(1, 4, *images.shape[2:])
        middle = images.shape[3] // 2
        left[:, 1, :, :middle], left[:, 2, :, middle:] = 3.0, 3.0
        return left


@pytest.mark.parametrize("windows", [None, (8, 4)])
def test_mirrored_views_exchange_pairs(windows):
    """A network that only knows sides agrees with its mirrored self, where pairs are exchanged; else it is torn."""
    image, views = torch.zeros(3, 8, 8, dtype=torch.uint8), [View((8, 8), flip, windows) for flip in (False, True)]
    once = predict(Sided(), image, (8, 8), views[:1])
    assert once[:, :4].eq(1).all() and once[:, 4:].eq(2).all()
    assert torch.equal(predict(Sided(), image, (8, 8), views, ((1, 2),)), once)
    assert torch.equal(predict(Sided(), image, (8, 8), views[1:], ((1, 2),)), once)
    assert torch.equal(predict(Sided(), image, (8, 8), views[1:]), once.flip(1))


def test_probabilities_are_averaged_not_logits():
    class Torn(nn.Module):
        """Very sure of class 0 in one size, a little of class 1 in the other two."""

        def forward(self, images):
            sure = torch.tensor([60.0, 0.0]) if images.shape[2] == 8 else torch.tensor([0.0, 3.0])
            return sure.view(1, 2, 1, 1).expand(1, 2, 2, 2)

    views = [View((size, size)) for size in (8, 12, 16)]
    assert predict(Torn(), torch.zeros(3, 8, 8, dtype=torch.uint8), (5, 5), views).eq(1).all()


def test_exchanged():
    logits = torch.arange(4.0).view(1, 4, 1, 1)
    assert exchanged(logits, ((1, 2),)).flatten().tolist() == [0, 2, 1, 3]
    assert exchanged(exchanged(logits, ((0, 3), (1, 2))), ((0, 3), (1, 2))).equal(logits)
