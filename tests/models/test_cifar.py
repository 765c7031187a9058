"""CIFAR classifiers against the official numbers: pytest tests/models/test_cifar.py"""

import math

import filled
import pytest
import torch
from torch import nn

from diffrep import counting
from diffrep.errors import UserError
from diffrep.models import cifar, mobilenet
from diffrep.models.cifar import features
from diffrep.models.students import Student, StudentConfig, create

# Official name -> parameters of 10 and of 100 classes, multiply-adds of 100 classes at 32 pixels, state-dict keys.
# Source: specification of the distillation road, section 3.1 (counted on the official networks).
COUNTS = {
    "resnet8": (78_042, 83_892, 12_507_392, 56),
    "resnet14": (175_258, 181_108, 26_663_168, 92),
    "resnet20": (272_474, 278_324, 40_818_944, 128),
    "resnet32": (466_906, 472_756, 69_130_496, 200),
    "resnet44": (661_338, 667_188, 97_442_048, 272),
    "resnet56": (855_770, 861_620, 125_753_600, 344),
    "resnet110": (1_730_714, 1_736_564, 253_155_584, 668),
    "resnet8x4": (1_210_410, 1_233_540, 177_071_104, 62),
    "resnet32x4": (7_410_730, 7_433_860, 1_083_040_768, 206),
    "akamaster_resnet20": (269_722, 275_572, 40_556_800, 116),
    "akamaster_resnet32": (464_154, 470_004, 68_868_352, 188),
    "akamaster_resnet44": (658_586, 664_436, 97_179_904, 260),
    "akamaster_resnet56": (853_018, 858_868, 125_491_456, 332),
    "akamaster_resnet110": (1_727_962, 1_733_812, 252_893_440, 656),
    "ResNet18": (11_173_962, 11_220_132, 555_468_800, 122),
    "ResNet34": (21_282_122, 21_328_292, 1_159_448_576, 218),
    "ResNet50": (23_520_842, 23_705_252, 1_298_014_208, 320),
    "cifarresnet18": (11_173_962, 11_220_132, 555_468_800, 122),
    "cifarresnet34": (21_282_122, 21_328_292, 1_159_448_576, 218),
    "wrn_16_1": (175_066, 180_916, 26_663_168, 82),
    "wrn_16_2": (691_674, 703_284, 101_118_464, 83),
    "wrn_40_1": (563_930, 569_780, 83_286_272, 226),
    "wrn_40_2": (2_243_546, 2_255_156, 327_610_880, 227),
    "vgg8": (3_918_858, 3_965_028, 96_192_512, 37),
    "vgg11": (9_231_114, 9_277_284, 209_438_720, 58),
    "vgg13": (9_416_010, 9_462_180, 284_936_192, 72),
    "vgg16": (14_728_266, 14_774_436, 398_182_400, 93),
    "vgg19": (20_040_522, 20_086_692, 511_428_608, 114),
    "MobileNetV2": (697_546, 812_836, 6_523_648, 320),
    "ShuffleV1": (862_768, 949_258, 38_691_456, 296),
    "ShuffleV2": (1_263_278, 1_355_528, 44_504_448, 338),
}


def on_meta(name, num_classes, **options):
    with torch.device("meta"):
        return create(name, num_classes, **options)


def images(size=32, count=2, channels=3):
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(0))


def parameters(network):
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize("arch", COUNTS)
def test_size_and_cost_are_the_official_ones(arch):
    of_10, of_100, multiply_adds, keys = COUNTS[arch]
    name, options = filled.OURS[arch]
    network = on_meta(name, 10, **options).eval()
    assert (parameters(network), len(network.state_dict())) == (of_10, keys)
    network.reset_classifier(100)
    assert (parameters(network), len(network.state_dict())) == (of_100, keys)
    assert counting.multiply_adds(counting.on_meta(network, torch.zeros(1, 3, 32, 32))) == multiply_adds


# Golden numbers


def is_classifier(case):
    return "arch" in case.meta and "fill_seed" in case.meta


def compared(features_, case, kind):
    """(found, expected, rms) of the listed samples and of mean and rms, for every feature of one list."""
    for i, feature in enumerate(features_):
        mean, rms, size = case.get(f"outputs/{kind}{i}_stats").tolist()
        flat = feature.flatten()
        assert flat.numel() == size
        yield flat[torch.arange(64) * (flat.numel() - 1) // 63], case.get(f"outputs/{kind}{i}_samples"), rms
        exact = flat.double()
        yield torch.stack([exact.mean(), exact.square().mean().sqrt()]), torch.tensor([mean, rms]), rms


def as_official(found, arch):
    """The official code of these lists less."""
    if arch.startswith("fast_"):
        return found[-1:]
    return found[1:-1] if arch.startswith("cifarresnet") else found


@pytest.mark.golden(of=is_classifier)
@torch.no_grad()
def test_golden_classifiers(golden_case):
    meta = golden_case.meta
    arch = meta["arch"]
    network = filled.official(arch, meta["num_classes"], meta["state_dict"], meta["fill_seed"], meta["gain"]).eval()
    assert parameters(network) == meta["params"]
    x = filled.drawn_images(meta["input_seed"], meta["batch"], meta["px"])
    assert torch.equal(x, golden_case.get("inputs/x"))
    pairs = [(network(x), (logits := golden_case.get("outputs/logits")), float(logits.square().mean().sqrt()))]
    found = as_official(features(network, x), arch)
    assert [list(f.shape) for f in found] == meta["feature_shapes"]
    pairs += compared(found, golden_case, "f")
    if "outputs/pre0_stats" in golden_case.keys:
        # DM-KD's cifarresnet gives its activated stages whatever it is asked.
        before = features(network, x, preact=not arch.startswith("cifarresnet"))
        pairs += compared(as_official(before, arch), golden_case, "pre")
    for ours, theirs, rms in pairs:
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=0, atol=2e-5 * rms)


@pytest.mark.golden(of=lambda case: is_classifier(case) and "weights/first8" in case.keys)
def test_golden_weights_come_from_the_same_stream(golden_case):
    meta = golden_case.meta
    first = next(iter(filled.fill(meta["state_dict"][:1], meta["fill_seed"], meta["gain"]).values()))
    assert torch.equal(first.flatten()[:8], golden_case.get("weights/first8"))


@pytest.mark.golden(of=lambda case: {"outputs/normal", "outputs/uniform"} <= case.keys)
def test_golden_generator(golden_case):
    normal, uniform = golden_case.get("outputs/normal"), golden_case.get("outputs/uniform")
    rng = filled.generator(golden_case.meta["seed"])
    assert rng.standard_normal(len(normal)).tolist() == normal.tolist()
    assert rng.random(len(uniform)).tolist() == uniform.tolist()


# The words of timm


@pytest.mark.parametrize("name", ["resnet14_cifar", "resnet8x4_cifar", "resnet18_cifar", "resnet34_cifar",
                                  "resnet50_cifar", "wrn_16_1_cifar", "wrn_16_2_cifar", "vgg8_cifar", "vgg16_cifar",
                                  "mobilenetv2_half_cifar", "shufflenetv1_cifar", "shufflenetv2_cifar"])  # fmt: skip
def test_every_family_speaks_timms_words(name):
    network = on_meta(name, 5, in_chans=1).eval()
    x = images(channels=1).to("meta")
    pooled = network.forward_head(network.forward_features(x), pre_logits=True)
    assert pooled.shape == (2, network.num_features) and network(x).shape == (2, 5) and network.num_classes == 5
    assert network.get_classifier().weight.shape == (5, network.num_features)
    network.reset_classifier(7)
    assert network.to("meta")(x).shape == (2, 7) and network.num_classes == 7
    found = features(network, x)
    assert [f.shape[1] for f in found] == [p["num_chs"] for p in network.feature_info] + [network.num_features]
    assert [32 // f.shape[-1] for f in found[:-1]] == [p["reduction"] for p in network.feature_info]
    headless = on_meta(name, 0)
    assert isinstance(headless.get_classifier(), nn.Identity)
    assert headless(images().to("meta")).shape == (2, network.num_features)


def test_our_names_are_nobody_elses():
    create("conv_small", 0)
    import timm

    assert {n for n in timm.list_models() if n.endswith("_cifar")} == cifar.ENTRIES.keys() | mobilenet.ENTRIES.keys()


@pytest.mark.parametrize("name", ["resnet8_cifar", "wrn_16_1_cifar", "mobilenetv2_half_cifar", "shufflenetv2_cifar"])
def test_a_student_of_this_kind_is_whole(name):
    student = Student(StudentConfig(name=name))
    width, every_parameter_has_a_part = student.try_out(32)
    assert width == student.feature_map(images()).shape[1] == student.backbone.num_features
    assert every_parameter_has_a_part


@pytest.mark.parametrize("name", ["resnet8_cifar", "resnet8x4_cifar", "vgg8_cifar", "shufflenetv1_cifar"])
def test_activated_stages_are_the_relu_of_the_others(name):
    torch.manual_seed(0)
    network = create(name, 3).eval()
    after, before = features(network, images(count=1)), features(network, images(count=1), preact=True)
    for place, activated, raw in zip(network.feature_info, after, before, strict=False):
        torch.testing.assert_close(raw.relu() if "preact" in place else raw, activated)
        assert ("preact" in place) == bool((raw < 0).any())


def test_features_carry_gradients_and_leave_no_hook():
    network = create("resnet18_cifar", 2)
    sum(f.mean() for f in features(network, images(), preact=True)[1:-1]).backward()
    assert network.conv1.weight.grad.abs().sum() > 0
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


def test_features_of_a_network_that_names_none_are_refused():
    with pytest.raises(UserError, match="ConvSmall does not say where its features are"):
        features(create("conv_small", 2), images())


# Options, sizes, initial weights


def test_the_stem_relu_is_the_difference_to_the_cifarresnet_of_dmkd():
    torch.manual_seed(0)
    network = create("resnet18_cifar", 4, stem_relu=False).eval()
    stem = features(network, images())[0]
    torch.testing.assert_close(stem, network.bn1(network.conv1(images())))
    assert bool((stem < 0).any())


@pytest.mark.parametrize("name", ["resnet20_cifar", "wrn_16_2_cifar", "mobilenetv2_half_cifar", "shufflenetv1_cifar",
                                  "shufflenetv2_cifar"])  # fmt: skip
def test_a_size_that_the_official_pooling_would_crop_or_break_on_is_refused(name):
    network = on_meta(name, 10)
    for size in (8, 48, 64):
        with pytest.raises(UserError, match=r"takes 32-pixel images alone \(its last map is \d+x\d+ instead of"):
            network(torch.zeros(2, 3, size, size, device="meta"))


@pytest.mark.parametrize(
    "name, options", [("resnet20_cifar", {"shortcut": "pad"}), ("vgg8_cifar", {}), ("resnet18_cifar", {})]
)
def test_others_pool_any_map(name, options):
    network = on_meta(name, 10, **options)
    for size in (16, 64):
        assert network(torch.zeros(2, 3, size, size, device="meta")).shape == (2, 10)


@pytest.mark.parametrize(
    "name, options",
    [
        ("resnet20_cifar", {"shortcut": "avg"}),
        ("resnet20_cifar", {"depth": 26}),
        ("resnet18_cifar", {"stem": 1}),
        ("resnet18_cifar", {"features_only": True}),
        ("vgg8_cifar", {"shortcut": "pad"}),
        ("wrn_16_1_cifar", {"role": "teacher"}),
    ],
)
def test_options_of_no_such_network_are_refused(name, options):
    with pytest.raises(UserError, match=f"student '{name}' does not take options"):
        create(name, 10, **options)


def spread(weight):
    return float(weight.detach().square().mean().sqrt())


def test_initial_weights_are_the_published_ones():
    torch.manual_seed(0)
    fan_out, fan_in = create("resnet20_cifar", 10), create("resnet20_cifar", 10, shortcut="pad")
    wide, vgg, light = (create(name, 10) for name in ("wrn_16_1_cifar", "vgg8_cifar", "mobilenetv2_half_cifar"))
    expected = [
        (fan_out.layer3[0].conv1, math.sqrt(2 / (9 * 64))),
        (fan_in.layer3[0].conv1, math.sqrt(2 / (9 * 32))),
        (fan_in.fc, math.sqrt(2 / 64)),
        (wide.block3.layer[0].conv1, math.sqrt(2 / (9 * 64))),
        (vgg.block3[0], math.sqrt(2 / (9 * 512))),
        (vgg.fc, 0.01),
        (light.conv2[0], math.sqrt(2 / 1280)),
        (light.fc, 0.01),
        (create("shufflenetv2_cifar", 10).conv2, math.sqrt(1 / (3 * 464))),  # torch's own: uniform, variance 1/(3 fan)
    ]
    for layer, std in expected:
        assert spread(layer.weight) == pytest.approx(std, rel=0.08), layer
    for layer in (wide.fc, vgg.fc, vgg.block0[0], light.fc):
        assert not layer.bias.any()
    vgg.reset_classifier(100)  # a new classifier is born like the first
    assert spread(vgg.fc.weight) == pytest.approx(0.01, rel=0.08) and not vgg.fc.bias.any()
