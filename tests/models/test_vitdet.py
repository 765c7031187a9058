"""ViTDet and its pyramid: pytest tests/models/test_vitdet.py"""

import math

import pytest
import torch
import torch.nn.functional as F

from diffrep import _torchvision_compat
from diffrep.counting import peak_bytes
from diffrep.errors import UserError
from diffrep.models.vitdet import (
    RelativeAttention,
    SimplePyramid,
    ViTDet,
    global_blocks,
    joined,
    partition,
    relative,
)
from diffrep.randomness import seeded


def timm_vit(**options):
    _torchvision_compat.install()
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(num_classes=0, **options)


def pyramid(*, window, windowed, image_size, out_channels=256, **options):
    net = ViTDet(timm_vit(**options), window, windowed, image_size)
    return SimplePyramid(net, net.width, net.stride, out_channels)


# The official numbers


@pytest.mark.golden(of=lambda case: case.meta.get("kind", "").startswith("ViTDet"))
def test_golden_map_and_pyramid(golden_case):
    told, weights = golden_case.meta, golden_case.under("weights/")
    made = pyramid(
        window=told["window_size"], windowed=told["window_block_indexes"], image_size=told["img_size"],
        out_channels=told["out_channels"], img_size=told["pretrain_img_size"], embed_dim=told["embed_dim"],
        depth=told["depth"], num_heads=told["num_heads"],
    ).eval()  # fmt: skip
    made.load_state_dict(weights)  # strict: the official names and shapes, and nothing else
    image = golden_case.get("inputs/image")
    with torch.no_grad():
        found = {"last_feat": made.net(image), **made(image)}
    assert found.keys() == golden_case.under("outputs/").keys()
    for name, wanted in golden_case.under("outputs/").items():
        torch.testing.assert_close(found[name], wanted, atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    "name, body, whole",
    [("vit_base_patch16_224", 85_889_024, 91_449_024), ("vit_large_patch16_224", 303_432_704, 311_237_888)],
)
def test_parameters_are_as_many_as_officially(name, body, whole):
    _torchvision_compat.install()
    import timm

    with torch.device("meta"):
        vit = timm.create_model(name, num_classes=0)
        windowed = sorted({*range(len(vit.blocks))} - {*global_blocks(len(vit.blocks))})
        net = ViTDet(vit, 14, windowed, 1024)
        made = SimplePyramid(net, net.width, net.stride, 256)
    assert sum(p.numel() for p in net.parameters()) == body
    assert sum(p.numel() for p in made.parameters()) == whole


def test_the_published_global_blocks():
    assert global_blocks(12) == (2, 5, 8, 11) and global_blocks(24) == (5, 11, 17, 23)
    assert global_blocks(1) == (0,) and global_blocks(2) == (0, 1) and global_blocks(6)[-1] == 5


# Windows


def test_windows_of_64_by_64_are_25_and_give_it_back():
    x = torch.randn(2, 64, 64, 3)
    windows, padded = partition(x, 14)
    assert windows.shape == (2 * 25, 14, 14, 3) and padded == (70, 70)
    assert torch.equal(windows[0], x[0, :14, :14]) and torch.equal(windows[1], x[0, :14, 14:28])
    assert torch.equal(windows[4][:, :8], x[0, :14, 56:]) and not windows[4][:, 8:].any()
    assert torch.equal(windows[25], x[1, :14, :14])
    assert torch.equal(joined(windows, 14, padded, (64, 64)), x)


@pytest.mark.parametrize("height, width, window", [(4, 6, 2), (5, 3, 4), (1, 7, 3)])
def test_windows_of_any_size_give_the_map_back(height, width, window):
    x = torch.randn(2, height, width, 5)
    assert torch.equal(joined(*partition(x, window)[:1], window, partition(x, window)[1], (height, width)), x)


def test_a_window_sees_nothing_outside():
    with seeded(0, "test"):
        attention = RelativeAttention(timm_vit(embed_dim=8, depth=1, num_heads=2).blocks[0].attn, 3, 3)
    x = torch.randn(1, 6, 6, 8)
    other = x.clone()
    other[0, 4, 4] += 1
    changed = (attention(x) - attention(other)).abs().amax(3)[0] > 1e-7
    assert changed[3:, 3:].all() and not changed[:3].any() and not changed[:, :3].any()


# Relative positions


def written_out(attention, x):
    """The same attention with a table of all pairs of positions, as the paper writes it."""
    _, height, width, _ = x.shape
    qkv = attention.qkv(x.flatten(1, 2)).unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    query, key, value = qkv
    logits = query @ key.transpose(2, 3) / math.sqrt(query.shape[-1])
    for i in range(height * width):
        for j in range(height * width):
            down, across = i // width - j // width, i % width - j % width
            logits[:, :, i, j] += query[:, :, i] @ relative_row(attention.rel_pos_h, down, height)
            logits[:, :, i, j] += query[:, :, i] @ relative_row(attention.rel_pos_w, across, width)
    return attention.proj((logits.softmax(3) @ value).transpose(1, 2).flatten(2)).unflatten(1, (height, width))


def relative_row(table, difference, side):
    assert len(table) == 2 * side - 1
    return table[difference + side - 1]


def test_relative_positions_are_the_sum_written_out():
    with seeded(0, "test"):
        attention = RelativeAttention(timm_vit(embed_dim=8, depth=1, num_heads=2).blocks[0].attn, 0, 4)
        for table in (attention.rel_pos_h, attention.rel_pos_w, attention.qkv.weight, attention.proj.weight):
            torch.nn.init.normal_(table)
        attention, x = attention.double(), torch.randn(2, 4, 4, 8, dtype=torch.float64)
    expected = written_out(attention, x)
    torch.testing.assert_close(attention(x), expected, atol=1e-12, rtol=1e-12)
    gradients = [torch.autograd.grad(made.square().sum(), attention.rel_pos_w)[0] for made in (attention(x), expected)]
    torch.testing.assert_close(*gradients, atol=1e-10, rtol=1e-10)
    attention.rel_pos_h.data.zero_(), attention.rel_pos_w.data.zero_()
    assert (attention(x) - expected).abs().max() > 0.1


def test_a_table_of_another_size_is_resized_linearly():
    table = torch.randn(7, 3)
    assert torch.equal(relative(table, 4)[1, 3], table[1 - 3 + 3])
    longer = F.interpolate(table.t()[None], size=11, mode="linear")[0].t()
    assert torch.equal(relative(table, 6)[5, 2], longer[5 - 2 + 5])


def test_a_fresh_table_changes_nothing():
    """Zero relative positions and one window as large as the map: timm's own ViT without class token and norm."""
    with seeded(0, "test"):
        vit = timm_vit(
            img_size=64, patch_size=16, embed_dim=16, depth=2, num_heads=2, class_token=False, global_pool="avg"
        )
        images = torch.randn(2, 3, 64, 64)
        with torch.no_grad():
            expected = vit.blocks(vit.patch_embed(images) + vit.pos_embed)
            found = ViTDet(vit, 4, [0], 64)(images)
    torch.testing.assert_close(found.flatten(2).transpose(1, 2), expected, atol=1e-5, rtol=1e-5)


def test_no_table_of_all_pairs_is_held():
    """Global attention at 32 x 32 tokens: with a table of pairs each head alone would hold 4 MB."""
    with torch.device("meta"):
        attention = RelativeAttention(timm_vit(embed_dim=16, depth=1, num_heads=4).blocks[0].attn, 0, 32)
        x = torch.zeros(1, 32, 32, 16)
    pairs = 4 * 4 * (32 * 32) ** 2
    assert peak_bytes(lambda: attention(x)) < pairs / 4


# Any size, any start


def test_other_sizes_than_it_was_made_for():
    made = pyramid(
        window=3, windowed=[0], image_size=64, out_channels=4, img_size=32, embed_dim=8, depth=2, num_heads=2
    )
    found = made(torch.randn(1, 3, 96, 48))
    assert [tuple(level.shape[2:]) for level in found.values()] == [(24, 12), (12, 6), (6, 3), (3, 1), (2, 1)]
    assert list(found) == ["p2", "p3", "p4", "p5", "p6"] and made.strides == [4, 8, 16, 32, 64]


def test_positions_are_resized_as_officially():
    vit = timm_vit(img_size=32, patch_size=16, embed_dim=8, depth=1, num_heads=2)
    table = vit.pos_embed[:, 1:].reshape(1, 2, 2, 8).permute(0, 3, 1, 2)
    net = ViTDet(vit, 2, [], 48)
    net.blocks = torch.nn.ModuleList()
    with torch.no_grad():
        net.patch_embed.proj.weight.zero_(), net.patch_embed.proj.bias.zero_()
        found = net(torch.zeros(1, 3, 48, 64))
    expected = F.interpolate(table, size=(3, 4), mode="bicubic", align_corners=False)
    torch.testing.assert_close(found, expected)


def test_every_parameter_has_a_gradient():
    made = pyramid(
        window=2, windowed=[0], image_size=64, out_channels=4, img_size=32, embed_dim=8, depth=2, num_heads=2
    )
    torch.stack([level.sum() for level in made(torch.randn(1, 3, 64, 64)).values()]).sum().backward()
    assert [name for name, p in made.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("name", ["resnet18", "swin_tiny_patch4_window7_224", "deit_tiny_distilled_patch16_224"])
def test_only_a_plain_vit_fits(name):
    _torchvision_compat.install()
    import timm

    with torch.device("meta"):
        net = timm.create_model(name, num_classes=0)
    if name.startswith("deit"):
        net.pos_embed = None
    with pytest.raises(UserError, match="a detector stands on a plain ViT"):
        ViTDet(net, 14, [], 224)


@pytest.mark.parametrize("patch", [14, 2])
def test_patches_that_halve_are_needed(patch):
    with torch.device("meta"):
        net = ViTDet(timm_vit(img_size=28, patch_size=patch, embed_dim=8, depth=1, num_heads=2), 2, [], 28)
    with pytest.raises(UserError, match=f"patches of {patch} pixels; the pyramid needs 4, 8, 16 or 32"):
        SimplePyramid(net, 8, net.stride, 4)
