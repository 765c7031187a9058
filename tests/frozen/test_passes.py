"""How a teacher's pass is run changes rounding at most: pytest tests/frozen/test_passes.py"""

import pytest
import torch
from torch import nn

from diffrep import counting
from diffrep.errors import UserError
from diffrep.frozen.diffusion import DiffusionTeacher
from diffrep.frozen.passes import PassConfig, compiled_blocks
from diffrep.frozen.teachers import load_teacher
from diffrep.randomness import Rows, stream

TAPS = ["mid_block", "up_blocks.0"]


def images(count=5):
    torch.manual_seed(3)
    return torch.rand(count, 3, 8, 8)


@pytest.fixture
def plain(pipeline):
    return load_teacher(str(pipeline()))


@pytest.fixture
def other(pipeline):
    return load_teacher(str(pipeline()))


def off(a, b):
    return float((a - b).abs().max() / b.square().mean().sqrt())


@pytest.mark.parametrize(
    ("how", "limit"),
    [({"channels_last": True}, 1e-4), ({"attention": "plain"}, 1e-4), ({"precision": "bf16"}, 0.1)],
)
def test_features_stay_what_they_were(plain, other, how, limit):
    other.run_as(PassConfig(**how))
    for tap in TAPS:
        expected, found = (t.features(images(), 40, TAPS)[tap] for t in (plain, other))
        assert found.dtype == torch.float32 and off(found, expected) < limit
        if how.get("precision") == "bf16":
            assert not torch.equal(found, expected)  # it is in force


def test_channels_last_reaches_weights_and_maps(plain):
    plain.run_as(PassConfig(channels_last=True))
    assert plain.module.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    seen = []
    plain.module.conv_in.register_forward_hook(lambda _m, _i, out: seen.append(out))
    plain.features(images(), 0, ["mid_block"])
    assert seen[-1].is_contiguous(memory_format=torch.channels_last)


def test_a_batch_is_split_until_it_fits(plain, other):
    each = plain.peak_bytes(TAPS)
    assert each >= max(torch.zeros(tap.shape).nbytes for tap in plain.taps() if tap.name in TAPS)
    other.run_as(PassConfig(memory_mb=1))
    assert other.split_size(TAPS, 10_000) == max(1, 1_000_000 // each) < 10_000
    assert plain.split_size(TAPS, 10_000) == 10_000
    parts = []
    other.split_size = lambda taps, batch: 2
    other.module.conv_in.register_forward_hook(lambda _m, _i, out: parts.append(len(out)))
    noisy = {"noise": "forward"}
    found, expected = (
        t.features(images(), torch.arange(5), TAPS, rng=Rows(stream(0, "x"), 5), **noisy) for t in (other, plain)
    )
    assert parts[-3:] == [2, 2, 1]
    for tap in TAPS:
        assert off(found[tap], expected[tap]) < 1e-4


def test_peak_memory_of_known_computations():
    def chain():
        a = torch.zeros(1000, device="meta")
        b = a + 1
        c = b + 1
        del b
        return a.view(10, 100), c + 1

    assert counting.peak_bytes(chain) == 3 * 4000
    layers = nn.Sequential(*[nn.Linear(100, 100) for _ in range(4)]).requires_grad_(False)
    assert counting.peak_bytes(counting.on_meta(layers, torch.zeros(50, 100))) == 2 * 50 * 100 * 4


def test_blocks_are_compiled_around_the_taps(plain):
    """No compiled block holds a tap inside, and together they hold all weights but those of modules on the way."""
    taps = ("mid_block.resnets.1.conv2", "up_blocks.0")
    names = {module: name for name, module in plain.module.named_modules()}
    found = {names[module] for module in compiled_blocks(plain.module, taps)}
    assert "up_blocks.0" in found and "mid_block.resnets.0" in found and "mid_block.resnets.1.conv1" in found
    assert not any(tap.startswith(f"{name}.") for name in found for tap in taps)
    held = {p for module in compiled_blocks(plain.module, taps) for p in module.parameters()}
    assert held == set(plain.module.parameters())


def test_compiled_features_end_at_the_tap(plain, other, monkeypatch):
    """With an eager backend: the machine's compiler is not what is tested."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda run: compile_(run, backend="eager"))
    other.run_as(PassConfig(compile=True))
    for name, parameter in other.module.named_parameters():
        if name.startswith(("up_blocks.1", "conv_norm_out", "conv_out")):
            nn.init.constant_(parameter, float("nan"))
    for _ in range(2):
        for tap in TAPS:
            expected, found = (t.features(images(), 40, TAPS)[tap] for t in (plain, other))
            assert torch.equal(found, expected)
    assert other.multiply_adds("mid_block") == plain.multiply_adds("mid_block")  # counting sees the plain blocks
    assert all("forward" not in vars(module) for module in other.module.modules())


# What nobody reads is let go


def test_the_decoder_is_let_go(plain, other):
    other.keep_only(["mid_block"])
    kept = {name.partition(".")[0] for name, _ in other.module.named_parameters()}
    assert kept == {"conv_in", "time_embedding", "down_blocks", "mid_block"}
    assert torch.equal(*(t.features(images(), 9, ["mid_block"])["mid_block"] for t in (plain, other)))
    assert other.sha256 == plain.sha256 and other.num_parameters < plain.num_parameters
    with pytest.raises(RuntimeError, match="let go"):
        other.predict(images() * 2 - 1, torch.zeros(5, dtype=torch.int64))


def test_up_to_the_deepest_of_several_taps(plain, other):
    other.keep_only(["mid_block", "up_blocks.0"])
    assert "up_blocks.0" in {".".join(name.split(".")[:2]) for name, _ in other.module.named_parameters()}
    for tap in TAPS:
        assert torch.equal(*(t.features(images(), 9, TAPS)[tap] for t in (plain, other)))


class Tied(nn.Module):
    """Uses a layer's weights without calling it."""

    def __init__(self):
        super().__init__()
        self.table, self.mid, self.late = nn.Linear(3, 3), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x, timestep):
        return self.late(self.mid(x * self.table.weight.sum()))


def test_a_part_whose_weights_are_used_without_a_call_comes_back():
    teacher = DiffusionTeacher(Tied(), "tied", 8)
    teacher.keep_only(["mid"])
    assert isinstance(teacher.module.late, nn.Conv2d) and teacher.kept is None
    assert teacher.features(images(), 0, ["mid"])["mid"].shape == (5, 3, 8, 8)


class Attends(nn.Module):
    """torch's own attention reads a layer's weights without calling it; the decoder's length is asked beforehand."""

    def __init__(self):
        super().__init__()
        self.attend, self.late = nn.MultiheadAttention(3, 1, batch_first=True), nn.ModuleList([nn.Conv2d(3, 3, 1)])

    def forward(self, x, timestep):
        rows = x.flatten(2).transpose(1, 2) * len(self.late[0].weight)
        return self.late[0](self.attend(rows, rows, rows)[0].transpose(1, 2).view_as(x))


def test_a_network_that_needs_all_its_parts_keeps_them():
    teacher = DiffusionTeacher(Attends(), "attends", 8)
    expected = teacher.features(images(), 0, ["attend"])["attend"]
    teacher.keep_only(["attend"])
    assert torch.equal(teacher.features(images(), 0, ["attend"])["attend"], expected)


def test_every_block_of_one_class_is_compiled(monkeypatch):
    """torch keeps 8 versions of one piece of code and runs the others uncompiled, unless it is told otherwise."""
    versions = []

    def backend(graph, example):
        versions.append(graph)
        return graph.forward

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda run: compile_(run, backend=backend))

    class Twelve(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Block(3 + k) for k in range(12))

        def forward(self, x, timestep):
            for block in self.blocks:
                x = block(x)
            return x

    class Block(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.up, self.down = nn.Conv2d(3, width, 1), nn.Conv2d(width, 3, 1)

        def forward(self, x):
            return self.down(self.up(x))

    teacher = DiffusionTeacher(Twelve(), "twelve", 8)
    teacher.run_as(PassConfig(compile=True))
    teacher.features(images(), 0, ["blocks.11"])
    assert len(versions) == 12


def test_fused_attention_holds_no_table_of_pairs():
    def attend():
        q = torch.zeros(1, 2, 512, 8, device="meta")
        return torch.nn.functional.scaled_dot_product_attention(q, q, q)

    one = 2 * 512 * 8 * 4
    assert (
        counting.peak_bytes(attend) == 2 * one and counting.peak_bytes(attend, fused_attention=False) > 2 * 512**2 * 4
    )


# Classes


def test_a_network_without_a_null_class_is_told_none(tiny_denoiser):
    told = []

    class Conditional(nn.Module):
        def __init__(self):
            super().__init__()
            self.mid = nn.Conv2d(3, 3, 1)

        def forward(self, x, timestep, class_labels=None):
            told.append(class_labels)
            return self.mid(x)

    teacher = DiffusionTeacher(Conditional(), "adm", 8, num_classes=7, null_class=False)
    teacher.features(images(), 0, ["mid"])
    assert told[-1] is None
    teacher.given_class = 3
    teacher.features(images(), 0, ["mid"])
    assert told[-1].tolist() == [3] * 5
    with pytest.raises(UserError, match=r"class 7 is outside 0..6 of adm, no null class"):
        teacher.features(images(), 0, ["mid"], labels=torch.full((5,), 7))
    with_null = DiffusionTeacher(tiny_denoiser(num_classes=4), "dit", 8, num_classes=4)
    with pytest.raises(UserError, match=r"class -1 is outside 0..3 of dit, null class 4"):
        with_null.features(images(), 0, ["mid"], labels=torch.tensor([0, -1, 4, 0, 0]))
