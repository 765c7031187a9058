"""Maps that heads of dense tasks read, against timm and the official names: pytest tests/models/test_maps.py"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from diffrep.errors import UserError
from diffrep.models import mage_vit
from diffrep.models.maps import MapBackbone, resized, vit_blocks
from diffrep.models.masked_vit import TokenPredictorConfig
from diffrep.models.students import Student, StudentConfig, create
from diffrep.models.vqgan import VQGANConfig
from diffrep.randomness import seeded

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "num_heads": 2}
TOKENS = mage_vit.options_of(
    VQGANConfig(ch=32, ch_mult=(1, 1), num_res_blocks=1, z_channels=4, num_codes=11),
    TokenPredictorConfig(embed_dim=16, depth=2, num_heads=2, decoder_num_heads=2, num_codes=11, num_tokens=16),
)
LOOK = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def student(name, **options):
    return StudentConfig(name=name, options=options, **LOOK)


def backbone(name, names=(), seed=0, fuse_upsample="nearest", **options):
    with seeded(seed, "test"):
        return MapBackbone(student(name, **options), names, fuse_upsample).eval()


def images(*size, count=2):
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(1))


def normalised(x):
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in LOOK.values())
    return (x - mean) / std


# What every family answers, and that everything that trains is part of it

FAMILIES = {
    "resnet18": ("resnet18", {}, (64, 96), (64, 128, 256, 512), (4, 8, 16, 32)),
    "resnet50": ("resnet50", {}, (64, 64), (256, 512, 1024, 2048), (4, 8, 16, 32)),
    "hrnet": ("hrnet_w18", {}, (64, 96), (18, 36, 72, 144), (4, 8, 16, 32)),
    "convnext": ("convnext_atto", {}, (64, 96), (40, 80, 160, 320), (4, 8, 16, 32)),
    "mobilenet": ("mobilenetv2_100", {}, (64, 96), (24, 32, 96, 320), (4, 8, 16, 32)),
    "swin": ("swin_tiny_patch4_window7_224", {"depths": (1, 1, 1, 1)}, (224, 224), (96, 192, 384, 768), (4, 8, 16, 32)),
    "vit": ("vit_base_patch16_224", TINY | {"depth": 4}, (48, 80), (16,) * 4, (8,) * 4),
    "vit of the mean": (
        "vit_base_patch16_224",
        TINY | {"depth": 4, "global_pool": "avg"},
        (48, 80),
        (16,) * 4,
        (8,) * 4,
    ),
    "short vit": ("vit_base_patch16_224", TINY | {"depth": 2}, (32, 32), (16,) * 4, (8,) * 4),
    "distilled vit": ("deit_tiny_distilled_patch16_224", TINY | {"depth": 4}, (32, 32), (16,) * 4, (8,) * 4),
    "tokens": ("mage_vit", TOKENS, (12, 8), (16,) * 4, (2,) * 4),
    "conv_small": ("conv_small", {}, (16, 24), (32, 64, 64), (1, 2, 2)),
    "grey": ("conv_small", {"in_chans": 1, "widths": (4, 8)}, (16, 24), (4, 8), (1, 2)),
    "fast_cnn": ("fast_cnn", {"widths": (8, 16, 16)}, (33, 41), (8, 16, 16), (2, 4, 8)),
    "cifar resnet": ("resnet20_cifar", {}, (32, 48), (16, 32, 64), (1, 2, 4)),
    "cifar resnet, padded": ("resnet8_cifar", {"shortcut": "pad"}, (32, 48), (16, 32, 64), (1, 2, 4)),
    "cifar resnet18": ("resnet18_cifar", {}, (32, 48), (64, 128, 256, 512), (1, 2, 4, 8)),
    "wide": ("wrn_16_1_cifar", {}, (32, 48), (16, 32, 64), (1, 2, 4)),
    "vgg": ("vgg8_cifar", {}, (32, 48), (128, 256, 512, 512), (2, 4, 8, 8)),
    "cifar mobilenet": ("mobilenetv2_cifar", {}, (32, 48), (24, 32, 96, 320), (2, 2, 4, 8)),
    "half mobilenet": ("mobilenetv2_half_cifar", {}, (32, 48), (12, 16, 48, 160), (2, 4, 8, 16)),
    "shuffle": ("shufflenetv1_cifar", {}, (32, 48), (240, 480, 960), (2, 4, 8)),
    "shuffle 2": ("shufflenetv2_cifar", {}, (32, 48), (116, 232, 464), (2, 4, 8)),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_gives_maps_and_leaves_nothing_idle(family):
    name, options, size, widths, strides = FAMILIES[family]
    network = backbone(name, **options)
    assert (network.widths, network.strides) == (widths, strides) and len(network.names) == len(widths)
    maps = network.train()(images(*size))
    cells = [tuple(s // stride for s in size) for stride in strides]
    if name == "fast_cnn":  # its 2x2 stem takes a row and a column away
        cells = [tuple((s - 1) // stride for s in size) for stride in strides]
    assert [tuple(m.shape) for m in maps] == [(2, w, *c) for w, c in zip(widths, cells, strict=True)]
    torch.stack([m.square().sum() for m in maps]).sum().backward()
    assert not [n for n, p in network.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "hrnet"])  # timm has two classes of it
def test_the_same_draws_make_the_student_and_its_maps(family):
    """So scratch and distilled arms of one seed differ in nothing else; and a run's tensors keep their names."""
    name, options, *_ = FAMILIES[family]
    own = backbone(name, **options)
    with seeded(0, "test"):
        whole = Student(student(name, **options)).backbone.state_dict()
    assert own.net.state_dict().keys() | own.unneeded == whole.keys()
    assert not own.net.state_dict().keys() & own.unneeded
    for tensor, value in own.net.state_dict().items():
        assert torch.equal(value, whole[tensor]), tensor


def test_stages_behind_the_last_map_are_not_there():
    network = backbone("resnet20_cifar", ("layer1", "layer2"))
    assert not any(name.startswith(("layer3", "fc")) for name in network.net.state_dict())
    assert {name.partition(".")[0] for name in network.unneeded} == {"layer3"}
    vit = backbone("vit_base_patch16_224", ("blocks.0", "blocks.1"), **TINY, depth=4)
    assert {name.rpartition(".")[0].split(".")[0] for name in vit.unneeded} == {"blocks", "norm"}
    assert len(vit.net.blocks) == 4  # placeholders, so that the numbers stay


# The same numbers as timm


def test_maps_of_a_resnet_are_timms():
    network, x = backbone("resnet18"), images(64, 96)
    theirs = create("resnet18", 0, features_only=True, out_indices=(1, 2, 3, 4)).eval()
    theirs.load_state_dict(network.net.state_dict())
    for found, wanted in zip(network(x), theirs(normalised(x)), strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("options", [{}, {"pre_norm": True}, {"reg_tokens": 3}, {"no_embed_class": True}])
def test_maps_of_a_vit_are_timms_without_a_last_norm(options):
    network, x = backbone("vit_base_patch16_224", **TINY, depth=6, **options), images(32, 32)
    assert network.names == ("blocks.1", "blocks.2", "blocks.4", "blocks.5")
    theirs = create("vit_base_patch16_224", 0, **TINY, depth=6, **options).eval()
    theirs.load_state_dict(network.net.state_dict(), strict=False)
    wanted = theirs.forward_intermediates(normalised(x), indices=[1, 2, 4, 5], norm=False, intermediates_only=True)
    for found, one in zip(network(x), wanted, strict=True):
        torch.testing.assert_close(found, one, atol=1e-5, rtol=1e-5)


def test_images_of_another_size_see_the_table_of_positions_resized():
    """As the official code: F.interpolate, bicubic, corners not aligned; the class token's position stays."""
    network, x = backbone("vit_base_patch16_224", **TINY, depth=2), images(40, 64)
    table = network.net.pos_embed.data.normal_(generator=torch.Generator().manual_seed(2))
    places = table[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    places = F.interpolate(places, size=(5, 8), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
    theirs = create("vit_base_patch16_224", 0, **TINY | {"img_size": (40, 64)}, depth=2).eval()
    state = network.net.state_dict() | {"pos_embed": torch.cat([table[:, :1], places], 1)}
    theirs.load_state_dict(state, strict=False)
    wanted = theirs.forward_intermediates(normalised(x), indices=[0, 0, 1, 1], norm=False, intermediates_only=True)
    found = network(x)
    torch.testing.assert_close(found[0], wanted[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[-1], wanted[-1], atol=1e-5, rtol=1e-5)


def test_a_table_of_the_same_grid_is_left_alone():
    table = torch.randn(1, 17, 3)
    assert resized(table, (4, 4), (4, 4), 1) is table
    assert not torch.equal(resized(table, (4, 4), (2, 8), 1), table)


def test_tokens_of_mage_are_its_own_at_its_own_size():
    network, x = backbone("mage_vit", **TOKENS), images(8, 8)
    with seeded(0, "test"):
        whole = Student(student("mage_vit", **TOKENS)).eval()
    kept = []
    whole.backbone.blocks.register_forward_hook(lambda *found: kept.append(found[-1]))
    whole(x)
    torch.testing.assert_close(network(x)[-1], kept[0][:, 1:].transpose(1, 2).unflatten(2, (4, 4)))


# HRNet


@pytest.fixture(scope="module")
def hrnet():
    return backbone("hrnet_w18")


def test_hrnet_is_the_official_body_and_not_the_classifiers(hrnet):
    network = hrnet
    assert len(network.net.state_dict()) == 1830
    assert sum(p.numel() for p in network.parameters()) == 9_562_260
    assert {name.split(".")[0] for name in network.unneeded} == {"incre_modules", "downsamp_modules", "final_layer"}


def test_hrnet_fuses_bilinearly_where_asked(hrnet):
    """timm's own network, every ``nn.Upsample`` of it switched by hand."""
    nearest, bilinear = hrnet, backbone("hrnet_w18", fuse_upsample="bilinear")
    by_hand, x = copy.deepcopy(nearest), images(32, 64)
    for module in by_hand.modules():
        if isinstance(module, nn.Upsample):
            module.mode, module.align_corners = "bilinear", False
    for found, wanted, other in zip(bilinear(x), by_hand(x), nearest(x), strict=True):
        assert torch.equal(found, wanted) and not torch.allclose(found, other)
    with pytest.raises(UserError, match="resnet18 fuses no branches"):
        backbone("resnet18", fuse_upsample="bilinear")


# Names of the official code


@pytest.mark.golden(of=lambda case: case.meta.get("kind") == "BiSeNetV1")
def test_golden_names_of_a_resnet_are_timms(golden_case):
    inside = "weights/backbone.context_path.backbone."
    official = {key.removeprefix(inside) for key in golden_case.keys if key.startswith(inside)}
    network = backbone(f"resnet{golden_case.meta['backbone_cfg']['depth']}")
    assert official == network.net.state_dict().keys()


# Where it is read


def test_the_published_blocks_and_evenly_elsewhere():
    assert vit_blocks(12) == (3, 5, 7, 11) and vit_blocks(24) == (7, 11, 15, 23)  # mmsegmentation; the usual choice
    assert vit_blocks(32) == (7, 15, 23, 31) and vit_blocks(4) == (0, 1, 2, 3) and vit_blocks(1) == (0, 0, 0, 0)


def test_taps_anywhere_in_the_order_given():
    network = backbone("resnet18", ("act1", "layer1.0.conv1", "layer2"))
    assert network.strides == (2, 4, 8) and network.widths == (64, 64, 128)
    assert [tuple(m.shape[-2:]) for m in network(images(32, 64))] == [(16, 32), (8, 16), (4, 8)]


@pytest.mark.parametrize(
    ("name", "names", "words"),
    [
        ("resnet18", ("layer5",), "method.maps: resnet18 has no map 'layer5'; did you mean 'layer4'"),
        ("resnet18", ("layer2", "layer1"), r"finest first \(layer2 1/8, layer1 1/4\)"),
        ("resnet188", (), "'resnet188' is no timm model; did you mean 'resnet18'"),
        ("hrnet_w18", ("stage2",), "its four branches; leave maps empty"),
        ("mlp_small", (), "mlp_small gives no maps of 256-pixel images"),
        ("vit_tiny_patch16_224", ("blocks.12",), "has no map 'blocks.12'"),
    ],
)
def test_what_is_not_there_is_refused(name, names, words):
    with pytest.raises(UserError, match=words) as caught:
        backbone(name, names)
    assert "\n" not in str(caught.value)


def test_sides_that_are_no_multiple_of_a_patch_are_refused():
    with pytest.raises(UserError, match="pictures are 33x32; it takes multiples of 8 pixels"):
        backbone("vit_base_patch16_224", **TINY, depth=2)(images(33, 32))


def test_on_shapes_alone():
    with torch.device("meta"):
        network = MapBackbone(student("vit_base_patch16_224", **TINY, depth=4))
        maps = network(torch.zeros(2, 3, 48, 80))
    assert [tuple(m.shape) for m in maps] == [(2, 16, 6, 10)] * 4
    maps[-1].sum().backward()
