"""timm and diffusers beside a torch for which torchvision's compiled operators were not built."""

import subprocess
import sys

import pytest
import torch

from diffrep import _torchvision_compat as compat

SCRIPT = """
from diffrep import _torchvision_compat as compat

first, second = compat.install(), compat.install()
assert first == second, (first, second)
import timm
import torchvision
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from timm.data import create_transform

assert timm.create_model("resnet18", num_classes=2).fc.out_features == 2
from PIL import Image

assert tuple(create_transform((3, 8, 8))(Image.new("RGB", (20, 10))).shape) == (3, 8, 8)
assert torchvision.transforms.functional.hflip is not None
network = UNet2DModel(sample_size=8, block_out_channels=(8, 16), norm_num_groups=8,
                      down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
pipe = DDPMPipeline(network, DDPMScheduler())
pipe.set_progress_bar_config(disable=True)
assert pipe(num_inference_steps=1, output_type="np").images.shape == (1, 8, 8, 3)
print("needed" if first else "compiled")
"""


def test_timm_and_pipelines_import_and_work():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] in ("needed", "compiled")


@pytest.fixture
def declared(monkeypatch):
    """What install() would declare, with nothing declared yet; the real registry is left alone."""
    made = []

    class Library:
        def __init__(self, namespace, kind):
            made.append(namespace)

        def define(self, signature):
            made.append(signature.partition("(")[0])

    monkeypatch.setattr(torch.library, "Library", Library)
    monkeypatch.setattr(compat, "_libraries", [])
    return made


def test_nothing_is_declared_where_the_operators_are_compiled(declared, monkeypatch):
    monkeypatch.setattr(compat, "compiled_operators_load", lambda: True)
    assert compat.install() is False
    assert declared == []


def test_nothing_is_declared_without_torchvision(declared, monkeypatch):
    monkeypatch.setattr(compat.importlib.util, "find_spec", lambda name: None)
    assert compat.install() is False
    assert declared == []


def test_the_missing_operators_are_declared_once(declared, monkeypatch):
    monkeypatch.setattr(compat, "compiled_operators_load", lambda: False)
    assert compat.install() is True
    assert compat.install() is True
    assert declared == ["torchvision", "nms", "qnms"]


def test_a_library_that_does_not_load_is_said_so(monkeypatch):
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel", lambda name: False)

    def refuse(path):
        raise OSError("undefined symbol")

    monkeypatch.setattr(torch.ops, "load_library", refuse)
    assert compat.compiled_operators_load() is False
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel", lambda name: True)
    assert compat.compiled_operators_load() is True


@pytest.mark.parametrize("name", ["_C.so", "_C_stable.so", "_C.pyd"])
def test_the_compiled_library_is_found_under_each_of_its_names(name, tmp_path, monkeypatch):
    (tmp_path / name).touch()
    (tmp_path / "image.so").touch()
    spec = type("Spec", (), {"submodule_search_locations": [str(tmp_path)]})
    tried = []
    monkeypatch.setattr(compat.importlib.util, "find_spec", lambda _: spec)
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel", lambda _: False)
    monkeypatch.setattr(torch.ops, "load_library", tried.append)
    assert compat.compiled_operators_load() and tried == [str(tmp_path / name)]


# What detection computes with


def corners(count, side, smallest=0.0, seed=0, dtype=torch.float32):
    """(n, 4) boxes within 0..side."""
    points = torch.rand(count, 2, 2, generator=torch.Generator().manual_seed(seed), dtype=dtype) * (side - smallest)
    low, high = points.min(1).values, points.max(1).values
    return torch.cat([low, high + smallest], 1)


def one_by_one(boxes, scores, threshold):
    """The definition of non-maximum suppression, in Python's numbers."""
    order = sorted(range(len(boxes)), key=lambda k: -float(scores[k]))
    kept, told = [], boxes.double().tolist()

    def overlap(a, b):
        sides = [max(0.0, min(a[k + 2], b[k + 2]) - max(a[k], b[k])) for k in (0, 1)]
        areas = [(c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)]
        return sides[0] * sides[1] / (sum(areas) - sides[0] * sides[1])

    for k in order:
        if all(overlap(told[k], told[j]) <= threshold for j in kept):
            kept.append(k)
    return kept


@pytest.mark.parametrize("count", [1, 2, 30, 300])
@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7])
def test_nms_keeps_what_no_better_box_covers(count, threshold):
    boxes = corners(count, 100, smallest=5.0, seed=count, dtype=torch.float64)
    scores = torch.rand(count, generator=torch.Generator().manual_seed(1))
    found = compat.nms(boxes, scores, threshold)
    assert found.dtype == torch.int64 and found.tolist() == one_by_one(boxes, scores, threshold)


def test_nms_in_blocks_and_in_chains(monkeypatch):
    """Chains, where each box covers the next one: what is gone covers nothing."""
    left = torch.arange(50.0) * 4
    chain = torch.stack([left, torch.zeros(50), left + 10, torch.ones(50)], 1)
    scores = torch.linspace(1, 0, 50)
    assert compat.nms(chain, scores, 0.4).tolist() == list(range(0, 50, 2))
    boxes, ranks = corners(120, 60, 4.0, seed=3), torch.rand(120, generator=torch.Generator().manual_seed(2))
    whole = compat.nms(boxes, ranks, 0.5)
    for block in (1, 7, 64):
        monkeypatch.setattr(compat, "_BOXES", block)
        assert torch.equal(compat.nms(boxes, ranks, 0.5), whole)


def test_nms_at_the_edges():
    none = compat.nms(torch.zeros(0, 4), torch.zeros(0), 0.5)
    assert none.shape == (0,) and none.dtype == torch.int64
    twins = torch.tensor([[0.0, 0, 2, 2]]).repeat(3, 1)
    assert compat.nms(twins, torch.tensor([0.5, 0.9, 0.9]), 0.5).tolist() == [1]
    assert compat.nms(twins, torch.tensor([0.5, 0.9, 0.7]), 1.0).tolist() == [1, 2, 0]  # "more than" the threshold
    flat = torch.tensor([[1.0, 1, 1, 3], [1, 1, 1, 3]])
    assert compat.nms(flat, torch.tensor([0.1, 0.2]), 0.5).tolist() == [1, 0]  # no area, no overlap
    assert compat.nms(twins.half(), torch.tensor([0.5, 0.9, 0.9]).half(), 0.5).tolist() == [1]


@pytest.fixture(scope="module")
def built_in():
    """torchvision's own Python roi_align, as it is before it is compiled."""
    import importlib
    import inspect

    compat.install_detection()
    module = importlib.import_module("torchvision.ops.roi_align")
    return inspect.unwrap(module._roi_align)


ALIGN = [(s, r, a) for s in ((7, 7), (3, 5), (1, 1)) for r in (2, 1, 0, -1, 3) for a in (False, True)]


@pytest.mark.parametrize("size, sampling, aligned", ALIGN)
def test_roi_align_is_torchvisions_inside_the_map(built_in, size, sampling, aligned):
    maps = torch.rand(3, 4, 20, 28, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    boxes = 1 + corners(12, 37, 1.5, seed=5, dtype=torch.float64)
    rois = torch.cat([torch.arange(12).remainder(3)[:, None].double(), boxes], 1)
    expected = built_in(maps, rois, 0.5, *size, sampling, aligned)
    torch.testing.assert_close(compat.roi_align(maps, rois, size, 0.5, sampling, aligned), expected, rtol=0, atol=1e-14)
    listed = [boxes[rois[:, 0] == k] for k in range(3)]
    order = torch.cat([(rois[:, 0] == k).nonzero()[:, 0] for k in range(3)])
    assert torch.equal(
        compat.roi_align(maps, listed, size, 0.5, sampling, aligned),
        compat.roi_align(maps, rois[order], size, 0.5, sampling, aligned),
    )


def test_roi_align_of_a_plane_is_the_plane():
    """Bilinear reading of a x + b y + c is exact, so each cell is its value at the cell's middle."""
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(20.0), indexing="ij")
    plane = (2 * (x + 0.5) - 3 * (y + 0.5) + 1).double()[None, None]
    found = compat.roi_align(plane, torch.tensor([[0.0, 4, 2, 12, 10]]).double(), 4, 1.0, 0, True)[0, 0]
    cells = torch.arange(4).double() * 2 + 1
    torch.testing.assert_close(found, 2 * (4 + cells)[None, :] - 3 * (2 + cells)[:, None] + 1)


def test_roi_align_is_0_outside_the_map_and_clamped_at_its_edge():
    ones = torch.ones(1, 2, 6, 8)
    outside = torch.tensor([[0.0, 20, 20, 30, 30], [0, -40, -40, -20, -20], [0, 2, 30, 6, 40]])
    assert not compat.roi_align(ones, outside, 3, 1.0, 2, True).any()
    touching = compat.roi_align(ones, torch.tensor([[0.0, 6, 0, 10, 6]]), (1, 4), 1.0, 1, False)
    assert touching[0, 0, 0].tolist() == [1, 1, 0, 0]  # samples at 6.5, 7.5, 8.5, 9.5 of columns 0..7
    edge = torch.arange(8.0).view(1, 1, 1, 8)
    assert compat.roi_align(edge, torch.tensor([[0.0, 7.4, 0, 7.9, 1]]), 1, 1.0, 1, True)[0, 0, 0, 0] == 7  # at 7.15
    assert compat.roi_align(edge, torch.tensor([[0.0, 0, 0, 0.2, 1]]), 1, 1.0, 1, True)[0, 0, 0, 0] == 0  # at -0.4


def test_roi_align_gradient():
    maps = torch.randn(2, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    rois = torch.tensor([[0, 0.3, 0.4, 4.1, 3.2], [1, 1.0, 1.0, 9.0, 4.9], [1, -1.0, 0.0, 2.0, 2.0]]).double()
    for sampling in (0, 2):
        assert torch.autograd.gradcheck(lambda m, s=sampling: compat.roi_align(m, rois, 2, 1.0, s, True), maps)


def test_roi_align_in_blocks_is_the_same(monkeypatch):
    maps, rois = torch.randn(1, 3, 20, 20), torch.cat([torch.zeros(40, 1), corners(40, 18, 1.0)], 1)
    whole = compat.roi_align(maps, rois, 3, 1.0, 0, True)
    monkeypatch.setattr(compat, "_SAMPLES", 200)
    torch.testing.assert_close(compat.roi_align(maps, rois, 3, 1.0, 0, True), whole, rtol=0, atol=1e-6)


def test_roi_align_holds_no_more_than_a_block():
    from diffrep.counting import peak_bytes

    maps, rois = torch.randn(1, 64, 50, 50), torch.cat([torch.zeros(600, 1), corners(600, 48, 2.0)], 1)
    block, out = 4 * compat._SAMPLES, 4 * 600 * 64 * 7 * 7
    assert 4 * (block + out) < 4 * 600 * 64 * 28 * 28  # what all samples together would take
    assert peak_bytes(lambda: compat.roi_align(maps, rois, 7, 1.0, 4, True)) < 4 * block + 4 * out


def test_roi_align_at_the_edges():
    maps = torch.randn(2, 3, 8, 8)
    assert compat.roi_align(maps, torch.zeros(0, 5), 7).shape == (0, 3, 7, 7)
    assert compat.roi_align(maps, [torch.zeros(0, 4)] * 2, 7).shape == (0, 3, 7, 7)
    assert not compat.roi_align(maps, torch.tensor([[0.0, 3, 3, 3, 3]]), 2, 1.0, 0, True).any()  # no samples
    half = compat.roi_align(maps.half(), torch.tensor([[1.0, 1, 1, 6, 6]]).half(), 2)
    assert half.dtype == torch.float16
    torch.testing.assert_close(
        half.float(), compat.roi_align(maps, torch.tensor([[1.0, 1, 1, 6, 6]]), 2), rtol=0, atol=1e-2
    )


DETECTION = """
import sys
import diffrep
import diffrep.methods.detect
from diffrep import _torchvision_compat as compat
assert "torchvision" not in sys.modules, "torchvision is imported at the door of detection, not with it"
replaced = compat.install_detection()
assert replaced == compat.install_detection()
import torch
import torchvision
from torchvision.models.detection import roi_heads
from torchvision.ops import boxes, poolers
assert replaced == (not torchvision.extension._has_ops())
own = [f is compat.nms for f in (torchvision.ops.nms, boxes.nms)]
own += [f is compat.roi_align for f in (torchvision.ops.roi_align, poolers.roi_align, roi_heads.roi_align)]
assert own == [replaced] * 5, own
two = torch.tensor([[0.0, 0, 4, 4], [0, 0, 4, 4.1]])
assert torchvision.ops.batched_nms(two, torch.tensor([0.1, 0.2]), torch.tensor([0, 0]), 0.5).tolist() == [1]
assert torchvision.ops.batched_nms(two, torch.tensor([0.1, 0.2]), torch.tensor([0, 1]), 0.5).tolist() == [1, 0]
assert torchvision.ops.roi_align(torch.ones(1, 1, 4, 4), [two[:1]], 2).tolist() == [[[[1, 1], [1, 1]]]]
print("replaced" if replaced else "compiled")
"""


def test_the_operators_of_detection_are_replaced_only_where_they_are_missing():
    done = subprocess.run([sys.executable, "-c", DETECTION], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] in ("replaced", "compiled")


def test_compiled_operators_stay(monkeypatch):
    compat.install_detection()
    import torchvision

    monkeypatch.setattr(torchvision.extension, "_has_ops", lambda: True)
    monkeypatch.setattr(torchvision.ops, "nms", "theirs")
    assert compat.install_detection() is False and torchvision.ops.nms == "theirs"
