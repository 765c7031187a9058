"""Reading a network at a point and stopping there; counting what that costs: pytest tests/test_taps.py"""

import pytest
import torch
from torch import nn

from diffrep import _torchvision_compat, counting, taps
from diffrep.errors import UserError


def dry(network, size=8):
    return counting.on_meta(network, torch.zeros(1, 3, size, size), torch.zeros(1, dtype=torch.int64))


def inputs():
    torch.manual_seed(1)
    return torch.randn(2, 3, 8, 8), torch.tensor([3, 700])


def by_hooks(network, run):
    """Every module's last output in one whole pass, by torch's own means."""
    seen = {}
    handles = [
        m.register_forward_hook(lambda _m, _i, out, n=n: seen.__setitem__(n, out.clone()))
        for n, m in network.named_modules()
    ]
    with torch.no_grad():
        run()
    for handle in handles:
        handle.remove()
    return seen


def test_taps_are_listed_in_the_order_of_their_last_call(tiny_denoiser):
    found = taps.list_taps(tiny_denoiser(), dry(tiny_denoiser()), 8)
    assert found == {}  # the pass of another network reaches nothing of this one
    network = tiny_denoiser().eval()
    found = taps.list_taps(network, dry(network), 8)
    assert list(found) == ["time", "stem", "down.0", "down.1", "down.2", "down", "mid", "up", "out"]
    assert found["mid"] == taps.Tap("mid", (8, 4, 4), stride=2, calls=2)
    assert found["out"] == taps.Tap("out", (3, 8, 8), stride=1)
    assert found["time"] == taps.Tap("time", (8,), stride=None)


def test_listing_computes_nothing_and_leaves_no_hook(tiny_denoiser):
    network = tiny_denoiser().eval()
    before = {n: p.clone() for n, p in network.named_parameters()}
    found = taps.list_taps(network, dry(network), 8)
    taps.read(network, lambda: network(*inputs()), [found["stem"]])
    assert all(not m._forward_hooks for m in network.modules())
    for name, value in network.named_parameters():
        assert value.device.type == "cpu" and torch.equal(value, before[name])


@pytest.mark.parametrize("name", ["time", "stem", "down.0", "down", "mid", "up", "out"])
def test_features_equal_the_full_pass_bit_for_bit(tiny_denoiser, name):
    """Also at a module that is called twice: its last output counts, as with a hook on a whole pass."""
    network = tiny_denoiser().eval()
    x = inputs()
    whole = by_hooks(network, lambda: network(*x))
    found = taps.list_taps(network, dry(network), 8)
    with torch.no_grad():
        read = taps.read(network, lambda: network(*x), [found[name]])
    assert list(read) == [name] and torch.equal(read[name], whole[name])
    assert read[name].shape[1:] == found[name].shape


@pytest.mark.parametrize("name, behind", [("stem", ("down", "mid", "up", "out")), ("mid", ("up", "out"))])
def test_parameters_behind_the_tap_are_never_touched(tiny_denoiser, name, behind):
    clean, poisoned = tiny_denoiser().eval(), tiny_denoiser().eval()
    for module in behind:
        for parameter in poisoned.get_submodule(module).parameters():
            nn.init.constant_(parameter, float("nan"))
    ran = []
    for module in behind:
        poisoned.get_submodule(module).register_forward_pre_hook(lambda m, _i: ran.append(m))
    points = [taps.list_taps(clean, dry(clean), 8)[name]]
    with torch.no_grad():
        expected = taps.read(clean, lambda: clean(*inputs()), points)[name]
        found = taps.read(poisoned, lambda: poisoned(*inputs()), points)[name]
    assert torch.equal(found, expected) and not ran


def test_several_taps_come_from_one_pass_that_ends_at_the_last_of_them(tiny_denoiser):
    network = tiny_denoiser().eval()
    nn.init.constant_(network.out.weight, float("nan"))
    calls = []
    network.stem.register_forward_hook(lambda *_: calls.append(1))
    x = inputs()
    whole = by_hooks(network, lambda: network(*x))
    calls.clear()
    found = taps.list_taps(network, dry(network), 8)
    calls.clear()
    with torch.no_grad():
        read = taps.read(network, lambda: network(*x), [found[n] for n in ("up", "stem", "mid")])
    assert set(read) == {"up", "stem", "mid"} and len(calls) == 1
    assert all(torch.equal(read[n], whole[n]) for n in read)


def test_a_fault_inside_the_network_is_not_swallowed(tiny_denoiser):
    network = tiny_denoiser().eval()
    point = taps.list_taps(network, dry(network), 8)["out"]
    with pytest.raises(RuntimeError, match="channels"):
        taps.read(network, lambda: network(torch.zeros(1, 5, 8, 8), torch.zeros(1)), [point])
    assert all(not m._forward_hooks for m in network.modules())


def test_the_first_tensor_of_a_tuple_is_the_feature():
    class Pair(nn.Module):
        def forward(self, x):
            return (x + 1, [x + 2]), x + 3

    network = nn.Sequential(Pair())
    x = torch.zeros(1, 2, 4, 4)
    assert float(taps.read(network, lambda: network(x), [taps.Tap("0", (2, 4, 4), 1)])["0"].max()) == 1


@pytest.mark.parametrize("name, hint", [("midd", "'mid'"), ("", "valid: "), ("down.9", "'down.")])
def test_an_unknown_tap_is_refused_with_the_nearest(tiny_denoiser, name, hint):
    with pytest.raises(UserError, match="does not exist in TinyDenoiser") as caught:
        taps.find_module(tiny_denoiser(), name)
    assert hint in str(caught.value) and "\n" not in str(caught.value)


def test_multiply_adds_of_known_layers():
    linear, convolution = nn.Linear(10, 7), nn.Conv2d(3, 5, 3, padding=1)
    assert counting.multiply_adds(counting.on_meta(linear, torch.zeros(4, 10))) == 4 * 10 * 7
    assert counting.multiply_adds(counting.on_meta(convolution, torch.zeros(1, 3, 8, 8))) == 64 * 5 * 27

    def forward_and_backward():
        linear.to("meta")(torch.zeros(4, 10, device="meta", requires_grad=True)).sum().backward()

    assert counting.multiply_adds(forward_and_backward) == 3 * 4 * 10 * 7


# The published teachers, as networks of the specification's section 3.2, on the meta device

CIFAR10 = {
    "sample_size": 32,
    "block_out_channels": (128, 256, 256, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}
CELEBA_HQ = {
    "sample_size": 256,
    "block_out_channels": (128, 128, 256, 256, 512, 512),
    "down_block_types": ("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4,
}
COMMON = {
    "layers_per_block": 2, "norm_num_groups": 32, "norm_eps": 1e-6, "freq_shift": 1, "flip_sin_to_cos": False,
    "downsample_padding": 0, "attention_head_dim": None,
}  # fmt: skip


def published(settings):
    _torchvision_compat.install()
    from diffusers import UNet2DModel

    from diffrep.frozen.diffusion import DiffusionTeacher

    with torch.device("meta"):
        network = UNet2DModel(**COMMON, **settings)
    return DiffusionTeacher(network, "published", settings["sample_size"], call_options={"return_dict": False})


@pytest.mark.parametrize(
    "settings, parameters, full, to_mid, shape",
    [(CIFAR10, 35.746, 6.222, 1.663, (256, 4, 4)), (CELEBA_HQ, 113.673, 248.51, 67.58, (512, 8, 8))],
    ids=["cifar10", "celebahq"],
)
def test_published_teachers_cost_what_the_specification_says(settings, parameters, full, to_mid, shape):
    """By torch's counter: the mid block of CIFAR-10 is 26.7 % of the whole pass, that of CelebA-HQ 27.2 %."""
    teacher = published(settings)
    assert teacher.num_parameters / 1e6 == pytest.approx(parameters, abs=5e-4)
    assert teacher.multiply_adds() / 1e9 == pytest.approx(full, rel=1e-4)
    assert teacher.multiply_adds("mid_block") / 1e9 == pytest.approx(to_mid, rel=3e-4)
    share = teacher.multiply_adds("mid_block") / teacher.multiply_adds()
    assert round(100 * share, 1) == {6.222: 26.7, 248.51: 27.2}[full]
    for name in ("mid_block", "mid_block.resnets.1.conv2"):
        assert teacher.tap(name).shape == shape
        assert teacher.multiply_adds(name) == teacher.multiply_adds("mid_block")
    assert teacher.tap("mid_block").stride == settings["sample_size"] // shape[-1]
