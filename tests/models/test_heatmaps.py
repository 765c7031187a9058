"""Heads, targets and decodings against mmpose 0.29: pytest tests/models/test_heatmaps.py"""

import pytest
import torch
from torch import nn

from diffrep.data.landmark_views import exchanged
from diffrep.models.heatmaps import (
    ConcatHead,
    DeconvHead,
    Landmarker,
    begin,
    cells_of,
    decode,
    flipped_back,
    joints_mse,
    targets,
)

ENCODINGS = ("msra", "unbiased", "udp")
DECODINGS = ("none", "default", "unbiased", "megvii", "udp")


def kind(name):
    return pytest.mark.golden(of=lambda case: case.meta.get("kind") == name)


def drawn(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


# Heads


def official_head(meta):
    kwargs = meta["kwargs"]
    if kwargs.get("input_transform") == "resize_concat":
        return ConcatHead(kwargs["in_channels"], kwargs["out_channels"])
    widths, kernels = kwargs["num_deconv_filters"], kwargs["num_deconv_kernels"]
    return DeconvHead(kwargs["in_channels"], kwargs["out_channels"], widths, kernels)


@kind("TopdownHeatmapSimpleHead")
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_heads_are_the_official_ones(golden_case, mode):
    head = official_head(golden_case.meta)
    head.load_state_dict(golden_case.under("weights/"))  # strict: under the official names
    maps = [golden_case.get(f"inputs/x{k}") for k in golden_case.meta["kwargs"].get("in_index", [0])]
    found = head.train(mode == "train")(maps)
    torch.testing.assert_close(found, golden_case.get(f"outputs/{mode}"), atol=1e-5, rtol=0)


def test_parameter_counts_are_the_official_ones():
    """Spec section 7: RepFusion's two heads on 98 points."""
    deconv, concat = DeconvHead(2048, 98), ConcatHead((18, 36, 72, 144), 98)
    assert sum(p.numel() for p in deconv.parameters()) == 10_512_482
    assert sum(p.numel() for p in concat.parameters()) == 100_268
    names = {name.rpartition(".")[0] for name in deconv.state_dict()}
    assert names == {f"deconv_layers.{k}" for k in (0, 1, 3, 4, 6, 7)} | {"final_layer"}
    assert {name.rpartition(".")[0] for name in concat.state_dict()} == {f"final_layer.{k}" for k in (0, 1, 3)}


@pytest.mark.parametrize("kernel", [2, 3, 4])
def test_every_deconvolution_is_twice_the_size(kernel):
    head = DeconvHead(6, 5, (8, 4), (kernel, kernel))
    assert head([None, torch.zeros(2, 6, 3, 4)]).shape == (2, 5, 12, 16)


def test_the_concatenating_head_works_at_the_size_of_the_first_map():
    head = ConcatHead((3, 4, 5), 7)
    assert head([drawn(2, 3, 12, 16), drawn(2, 4, 6, 8), drawn(2, 5, 3, 4)]).shape == (2, 7, 12, 16)


def test_heads_begin_as_officially():
    """Filters normal with deviation 0.001, biases 0, norms 1 and 0."""
    torch.manual_seed(0)
    for head in (DeconvHead(64, 98, (64, 64)), ConcatHead((30, 60), 98)):
        for name, value in head.state_dict().items():
            if value.dim() == 4:
                assert float(value.std()) == pytest.approx(0.001, rel=0.1) and abs(float(value.mean())) < 1e-4
            elif value.is_floating_point() and not name.endswith(("running_var", "weight")):
                assert not value.any(), name
    norm = nn.Sequential(nn.Conv2d(3, 50, 3), nn.BatchNorm2d(50))
    begin(norm, 0.5)
    assert float(norm[0].weight.detach().std()) == pytest.approx(0.5, rel=0.1) and norm[1].weight.eq(1).all()


def test_the_whole_network_has_mmposes_names():
    network = Landmarker(nn.Conv2d(3, 6, 1), DeconvHead(6, 5, (8,)))
    assert {name.split(".")[0] for name in network.state_dict()} == {"backbone", "keypoint_head"}


# Targets


@kind("heatmap targets")
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_targets_are_the_official_ones(golden_case, encoding):
    meta, get = golden_case.meta, golden_case.get
    points, visible = get("inputs/joints")[:, :2], get("inputs/visible")[:, 0]
    found, weight = targets(
        points[None], visible[None], tuple(meta["image_size"]), tuple(meta["heatmap_size"]), encoding, meta["sigma"]
    )
    torch.testing.assert_close(found[0], get(f"outputs/{encoding}/target"), atol=1e-6, rtol=0)
    torch.testing.assert_close(weight[0], get(f"outputs/{encoding}/target_weight"), atol=0, rtol=0)


def one(x, y, encoding="msra", seen=True, sigma=2):
    """The target and weight of one point on a 64 x 48 crop of heatmap 16 x 12."""
    points, visible = torch.tensor([[[x, y]]]), torch.tensor([[seen]])
    found, weight = targets(points, visible, (64, 48), (16, 12), encoding, sigma)
    return found[0, 0], float(weight[0, 0, 0])


def test_a_gaussian_by_hand():
    found, weight = one(21.0, 22.0)  # cells 5.25 and 5.5: nearest 5 and 6
    assert weight == 1 and found.shape == (12, 16) and float(found.max()) == float(found[6, 5]) == 1
    assert float(found[6, 7]) == pytest.approx(2.718281828 ** (-4 / 8))
    assert float(found[8, 7]) == pytest.approx(2.718281828 ** (-8 / 8))
    assert float(found[6, 12]) == 0 and float(found[6, 11]) > 0  # reaches three deviations
    exact, _ = one(21.0, 22.0, "unbiased")
    assert float(exact[6, 5]) == pytest.approx(2.718281828 ** (-(0.25**2 + 0.5**2) / 8)) and exact.gt(0).all()
    udp, _ = one(21.0, 22.0, "udp")
    x, y = 21 * 15 / 63, 22 * 11 / 47
    assert float(udp[5, 5]) == pytest.approx(2.718281828 ** (-((x - 5) ** 2 + (y - 5) ** 2) / 8))


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("place", [(-40.0, 20.0), (100.0, 20.0), (20.0, -40.0), (20.0, 75.0)])
def test_a_point_far_outside_has_no_part(encoding, place):
    found, weight = one(*place, encoding)
    assert weight == 0 and not found.any()


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_point_just_outside_shows_its_slope(encoding):
    found, weight = one(-8.0, 20.0, encoding)
    assert weight == 1 and 0 < found.max() < 1 and found[:, 0].max() == found.max()


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_point_that_is_not_visible_has_no_part(encoding):
    found, weight = one(20.0, 20.0, encoding, seen=False)
    assert weight == 0 and not found.any()


# The loss


@kind("JointsMSELoss")
def test_the_loss_is_the_official_one(golden_case):
    output, target, weight = (golden_case.get(f"inputs/{name}") for name in ("output", "target", "target_weight"))
    found = joints_mse(output, target, weight)
    torch.testing.assert_close(found, golden_case.get("outputs/loss_weighted"), atol=1e-6, rtol=0)
    found = joints_mse(output, target, torch.ones_like(weight))
    torch.testing.assert_close(found, golden_case.get("outputs/loss_unweighted"), atol=1e-6, rtol=0)


def test_points_without_weight_stay_in_the_denominator():
    output, target = drawn(2, 3, 4, 5), drawn(2, 3, 4, 5, seed=1)
    weight = torch.tensor([[1.0, 0, 1], [0, 1, 1]])[..., None]
    expected = sum(float((output[b, k] - target[b, k]).square().sum()) for b, k in weight[..., 0].nonzero().tolist())
    assert float(joints_mse(output, target, weight)) == pytest.approx(expected / output.numel())
    assert float(joints_mse(output.bfloat16(), target, weight)) == pytest.approx(expected / output.numel(), rel=0.05)


# Decoding


@kind("heatmap decoding")
@pytest.mark.parametrize("how", DECODINGS)
def test_decodings_are_the_official_ones(golden_case, how):
    maps, center, scale = (golden_case.get(f"inputs/{name}") for name in ("heatmaps", "center", "scale"))
    points, peaks = decode(maps, center, scale, how)
    expected = golden_case.get(f"outputs/{how}/preds").double()
    blurs = how in ("unbiased", "megvii", "udp")
    judged = maps.amax((2, 3)) > 0 if how == "udp" else torch.ones_like(peaks, dtype=torch.bool)  # see Deviation
    torch.testing.assert_close(points[judged], expected[judged], atol=1e-2 if blurs else 1e-3, rtol=0)
    torch.testing.assert_close(peaks[..., None], golden_case.get(f"outputs/{how}/maxvals"), atol=1e-5, rtol=0)


@kind("heatmap decoding")
def test_where_udp_finds_no_peak_the_point_stays_at_minus_one(golden_case):
    maps, center, scale = (golden_case.get(f"inputs/{name}").double() for name in ("heatmaps", "center", "scale"))
    maps[:, 0] = -maps[:, 0].abs()
    empty = maps.amax((2, 3)) <= 0
    sides = torch.tensor([maps.shape[3] - 1, maps.shape[2] - 1])
    expected = (-200 * scale / sides + center - 100 * scale)[:, None].expand(-1, maps.shape[1], 2)
    torch.testing.assert_close(decode(maps, center, scale, "udp")[0][empty], expected[empty], atol=1e-4, rtol=0)


@kind("heatmap decoding")
def test_the_flip_test_is_the_official_one(golden_case):
    maps, center, scale = (golden_case.get(f"inputs/{name}") for name in ("heatmaps", "center", "scale"))
    order = exchanged(maps.shape[1], golden_case.meta["flip_pairs"])
    assert torch.equal(flipped_back(maps, order), golden_case.get("outputs/flip_back"))
    shifted = flipped_back(maps, order, shift=True)
    assert torch.equal(shifted, golden_case.get("outputs/flip_back_shifted"))
    points, peaks = decode((maps + shifted) / 2, center, scale, "default")
    torch.testing.assert_close(points, golden_case.get("outputs/flip_test_default/preds").double(), atol=1e-3, rtol=0)
    torch.testing.assert_close(
        peaks[..., None], golden_case.get("outputs/flip_test_default/maxvals"), atol=1e-5, rtol=0
    )


def one_by_one(maps, how):
    """The official loops over points, in plain Python; what is blurred is taken from the batched code."""
    found = torch.full((*maps.shape[:2], 2), -1.0, dtype=torch.float64)
    height, width = maps.shape[2:]
    for b in range(maps.shape[0]):
        for k in range(maps.shape[1]):
            rows = maps[b, k].tolist()
            peak = max(max(row) for row in rows)
            if peak <= 0:
                continue
            y, x = next((y, x) for y in range(height) for x in range(width) if rows[y][x] == peak)
            place = [float(x), float(y)]
            if how == "default" and 1 < x < width - 1 and 1 < y < height - 1:
                slope = [rows[y][x + 1] - rows[y][x - 1], rows[y + 1][x] - rows[y - 1][x]]
                place = [p + 0.25 * ((s > 0) - (s < 0)) for p, s in zip(place, slope, strict=True)]
            found[b, k] = torch.tensor(place)
    return found


@pytest.mark.parametrize("how", ["none", "default"])
@pytest.mark.parametrize("shape", [(3, 5, 12, 16), (1, 2, 3, 3), (2, 4, 7, 1), (2, 98, 16, 16)])
def test_all_points_at_once_are_one_after_the_other(how, shape):
    maps = drawn(*shape) - 0.5
    maps[0, 0] = -maps[0, 0].abs()
    maps[-1, -1] = 0.25  # a plateau: the first cell
    found, peaks = cells_of(maps, how)
    assert torch.equal(found, one_by_one(maps, how)) and torch.equal(peaks, maps.amax((2, 3)))


@pytest.mark.parametrize("how", DECODINGS)
def test_a_point_does_not_hang_on_its_neighbours(how):
    maps = drawn(3, 4, 16, 12) - 0.3
    maps[1] = -1.0
    whole = cells_of(maps, how)[0]
    for b in range(3):
        torch.testing.assert_close(cells_of(maps[b : b + 1], how)[0], whole[b : b + 1], atol=1e-2, rtol=0)
        torch.testing.assert_close(cells_of(maps[b : b + 1, 2:3], how)[0], whole[b : b + 1, 2:3], atol=1e-2, rtol=0)


@pytest.mark.parametrize("how", DECODINGS)
@pytest.mark.parametrize("at", [(0, 0), (0, 11), (15, 0), (15, 11), (1, 1), (7, 0)])
def test_peaks_at_the_edge_are_no_error(how, at):
    maps = torch.zeros(1, 1, 16, 12)
    maps[0, 0, at[0], at[1]] = 1.0
    found = cells_of(maps, how)[0][0, 0]
    assert found.isfinite().all() and (found - torch.tensor([at[1], at[0]])).abs().max() < 1.5


@pytest.mark.parametrize("how", DECODINGS)
def test_flat_and_empty_maps_are_no_error(how):
    for value in (0.0, 1.0, -1.0):
        assert cells_of(torch.full((1, 2, 16, 16), value), how)[0].isfinite().all()


# There and back: spec section 7, 98 random points of a 256 crop, sigma 2


@pytest.mark.parametrize(
    ("encoding", "decoding", "largest", "mean"),
    [
        ("msra", "default", 2.00, 1.01),
        ("msra", "unbiased", 2.00, 1.01),
        ("unbiased", "default", 1.00, 0.51),
        ("unbiased", "unbiased", 0.075, 0.001),
    ],
)
def test_what_is_drawn_is_read_again(encoding, decoding, largest, mean):
    """Errors in x or y, in pixels of the crop: their order, and what cannot be undone."""
    points = 40 + 176 * drawn(20, 98, 2, seed=3)  # the blur does not reach the edge
    maps, _ = targets(points, torch.ones(20, 98), (256, 256), (64, 64), encoding, 2)
    found, _ = decode(maps, torch.full((20, 2), 128.0), torch.full((20, 2), 256 / 200), decoding)
    errors = (found - points).abs()
    assert float(errors.max()) <= largest + 0.03 and float(errors.mean()) == pytest.approx(mean, abs=0.03)


def test_udp_is_read_again_where_it_was_drawn():
    """Its crop measures from the first pixel's centre to the last one's."""
    points = 40 + 176 * drawn(4, 98, 2, seed=3)
    maps, _ = targets(points, torch.ones(4, 98), (256, 256), (64, 64), "udp", 2)
    found, _ = decode(maps, torch.full((4, 2), 127.5), torch.full((4, 2), 255 / 200), "udp")
    assert float((found - points).abs().max()) < 0.1
