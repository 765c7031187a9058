"""Students: timm's and ours behind one door: pytest tests/models/test_students.py"""

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from diffrep.errors import UserError
from diffrep.models import cifar
from diffrep.models.students import OWN, Student, StudentConfig, create

GREY = {"in_chans": 1}
KINDS = [
    ("conv_small", GREY, 8, (64, 4, 4), 256),
    ("conv_small", {}, 8, (64, 4, 4), 256),
    ("mlp_small", {**GREY, "img_size": 8}, 8, (64, 2, 2), 256),
    ("resnet18_cifar", {}, 32, (512, 4, 4), 512),
    ("mobilenetv2_035", {}, 32, (1280, 1, 1), 1280),
    ("mobilenetv2_cifar", {}, 32, (1280, 4, 4), 1280),
    ("vit_tiny_patch16_224", {"img_size": 32, "patch_size": 8}, 32, (192, 4, 4), 192),
]


def images(size=8, count=2):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name, options, size, shape, width", KINDS)
def test_every_kind_gives_a_map_a_vector_and_logits(name, options, size, shape, width):
    student = Student(StudentConfig(name=name, options=options), num_classes=5).eval()
    with torch.no_grad():
        assert student.feature_map(images(size)).shape == (2, *shape)
        assert student.pooled(images(size)).shape == (2, width)
        logits = student(images(size))
        assert logits.shape == (2, 5)
        torch.testing.assert_close(student.backbone.get_classifier()(student.pooled(images(size))), logits)


def test_our_small_networks_have_the_parameters_they_claim():
    def count(name, **options):
        return sum(p.numel() for p in create(name, 0, **options).parameters())

    assert count("conv_small", in_chans=1) == 55904
    assert count("mlp_small", in_chans=1, img_size=8) == 83456


FUSED = {"head_conv_bias": False}  # HRNet's neck as the official one: no biases before batch norms
# RepFusion's students (specification, section 4): millions of parameters, pixels, map at the official tap.
PUBLISHED = [
    ("resnet18_cifar", {}, 11.169, 32, (512, 4, 4)),
    ("resnet18_cifar", {}, 11.169, 64, (512, 8, 8)),
    ("resnet18", {}, 11.177, 64, (512, 2, 2)),
    ("resnet18", {}, 11.177, 256, (512, 8, 8)),
    ("resnet50", {}, 23.508, 256, (2048, 8, 8)),
    ("mobilenetv2_cifar", {}, 2.224, 32, (1280, 4, 4)),
    ("mobilenetv2_cifar", {}, 2.224, 64, (1280, 8, 8)),
    ("hrnet_w18", FUSED, 9.562 + 9.684, 256, (2048, 8, 8)),
]


@pytest.mark.parametrize("name, options, millions, size, shape", PUBLISHED)
def test_published_students_have_their_parameters_and_maps(name, options, millions, size, shape):
    with torch.device("meta"):
        student = Student(StudentConfig(name=name, options=options)).eval()
        found = student.feature_map(torch.zeros(1, 3, size, size))
    assert found.shape == (1, *shape)
    assert round(sum(p.numel() for p in student.parameters()) / 1e6, 3) == round(millions, 3)


def test_hrnets_parts_are_the_official_backbone_and_neck():
    with torch.device("meta"):
        network = create("hrnet_w18", 0, **FUSED)
    neck = ("incre_modules.", "downsamp_modules.", "final_layer.")
    sizes = {name: p.numel() for name, p in network.named_parameters()}
    of_neck = sum(count for name, count in sizes.items() if name.startswith(neck))
    assert (round(of_neck / 1e6, 3), round((sum(sizes.values()) - of_neck) / 1e6, 3)) == (9.684, 9.562)
    assert sum(not name.startswith(neck) for name in network.state_dict()) == 1830  # specification, section 4


def test_hrnets_map_is_the_chain_of_its_neck():
    """HRFuseScales: each branch widened, the sum so far halved and added to the next, at last 1x1 to 2048."""
    torch.manual_seed(0)
    student, x = Student(StudentConfig(name="hrnet_w18", options=FUSED)).eval(), images(64, 1)
    network = student.backbone
    with torch.no_grad():
        h = network.act1(network.bn1(network.conv1(student.normalise(x))))
        wide = [
            w(b)
            for w, b in zip(
                network.incre_modules, network.stages(network.act2(network.bn2(network.conv2(h)))), strict=True
            )
        ]
        assert [w.shape[1:] for w in wide] == [(128, 16, 16), (256, 8, 8), (512, 4, 4), (1024, 2, 2)]
        total = wide[0]
        for halve, branch in zip(network.downsamp_modules, wide[1:], strict=True):
            total = halve(total) + branch
        torch.testing.assert_close(student.feature_map(x), network.final_layer(total))


def test_every_part_of_hrnet_and_its_neck_has_a_part_in_the_map():
    assert Student(StudentConfig(name="hrnet_w18", options=FUSED)).try_out(32) == (2048, True)


@pytest.mark.parametrize(
    "name, tap", [("resnet18_cifar", "layer4.1.act2"), ("resnet18", "layer4.1.act2"), ("mobilenetv2_cifar", "bn2")]
)
def test_the_official_tap_is_the_last_map(name, tap):
    """Official words: layer4.1.relu, conv2.activate."""
    torch.manual_seed(0)
    student, x = Student(StudentConfig(name=name)).eval(), images(64, 1)
    torch.manual_seed(0)
    tapped = Student(StudentConfig(name=name, tap=tap)).eval()
    with torch.no_grad():
        assert torch.equal(student.feature_map(x), tapped.feature_map(x))


def test_mobilenet_for_cifar_differs_from_timms_in_two_strides():
    with torch.device("meta"):
        small, standard = create("mobilenetv2_cifar", 10), create("mobilenetv2_100", 10)
    shapes = [{n: v.shape for n, v in network.state_dict().items()} for network in (small, standard)]
    assert shapes[0] == shapes[1]
    convolutions = {n: m for n, m in standard.named_modules() if isinstance(m, nn.Conv2d)}
    other = [n for n, m in convolutions.items() if m.stride != small.get_submodule(n).stride]
    assert other == ["conv_stem", "blocks.2.0.conv_dw"]
    places = cifar.features(small, torch.zeros(1, 3, 32, 32, device="meta"))[:-1]
    found = [(f.shape[1], 32 // f.shape[2], p["module"]) for f, p in zip(places, small.feature_info, strict=True)]
    assert found == [(p["num_chs"], p["reduction"], p["module"]) for p in small.feature_info]


@pytest.mark.parametrize("name", OWN)
def test_what_is_ours_has_no_pretrained_weights(name):
    """timm's create_model("local-dir:...", pretrained=True) would otherwise give random ones in silence."""
    create("conv_small", 0)
    import timm

    with pytest.raises(UserError, match=f"{name} is diffrep's: build it without pretrained"):
        timm.create_model(name, pretrained=True)


def test_resnet18_for_cifar_has_the_stem_and_timms_names():
    small, standard = create("resnet18_cifar", 10).state_dict(), create("resnet18", 10).state_dict()
    assert small.keys() == standard.keys()
    assert [n for n in small if small[n].shape != standard[n].shape] == ["conv1.weight"]
    assert small["conv1.weight"].shape == (64, 3, 3, 3)


def test_a_student_normalises_for_itself():
    config = StudentConfig(name="conv_small", mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 0.125))
    found = Student(config).normalise(torch.ones(1, 3, 2, 2))
    torch.testing.assert_close(found[0, :, 0, 0], torch.tensor([0.9 / 0.5, 0.8 / 0.25, 0.7 / 0.125]))
    grey = Student(config.model_copy(update={"options": GREY})).normalise(torch.ones(1, 3, 2, 2))
    torch.testing.assert_close(grey, found.mean(1, keepdim=True))
    assert not any(n in ("mean", "std") for n in Student(config).state_dict())  # a setting, not a weight


def test_a_tap_is_read_where_it_is_named():
    torch.manual_seed(0)
    student = Student(StudentConfig(name="resnet18_cifar", tap="layer2.1.conv1"))
    student.eval()
    seen = []
    student.backbone.layer2[1].conv1.register_forward_hook(lambda _m, _i, out: seen.append(out))
    with torch.no_grad():
        found = student.feature_map(images(32))
        student(images(32))
    assert found.shape == (2, 128, 16, 16) and torch.equal(found, seen[-1])


def test_a_tap_ends_the_pass_and_learning_reaches_it():
    student = Student(StudentConfig(name="conv_small", options=GREY, tap="layer1"))
    student.feature_map(images()).sum().backward()
    with_gradient = {n.split(".")[1] for n, p in student.named_parameters() if p.grad is not None}
    assert with_gradient == {"stem", "layer1"}
    assert int(student.backbone.layer2[1].num_batches_tracked) == 0
    assert int(student.backbone.layer1[1].num_batches_tracked) == 1  # looking for the tap has not counted as a batch


class Shared(nn.Module):
    """One ReLU used twice, as in the official ResNets: the tap is the block's output, not the first use."""

    def __init__(self, **_):
        super().__init__()
        self.a, self.b, self.relu = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.ReLU()
        self.num_features, self.num_classes, self.head = 4, 0, nn.Identity()

    def forward_features(self, x):
        return self.relu(self.b(self.relu(self.a(x)))) * 2

    def forward_head(self, x, pre_logits=False):
        return x.mean((2, 3))


def test_a_module_used_twice_leaves_its_last_output(monkeypatch):
    network = Shared()
    monkeypatch.setattr("diffrep.models.students.create", lambda *_, **__: network)
    student = Student(StudentConfig(name="shared", tap="relu"))
    x = images()
    torch.testing.assert_close(student.feature_map(x) * 2, network.forward_features(student.normalise(x)))


@pytest.mark.parametrize(
    "tap, words",
    [("layer9", "did you mean 'layer2' or 'layer1'"), ("head", "not reached"), ("layer2.0.weight", "does not exist")],
)
def test_a_tap_that_cannot_be_read_is_refused(tap, words):
    student = Student(StudentConfig(name="conv_small", options=GREY, tap=tap))
    with pytest.raises(UserError, match=words):
        student.feature_map(images())


def test_a_tap_without_places_is_refused():
    student = Student(StudentConfig(name="mlp_small", options={"img_size": 8}, tap="layer1")).eval()
    with pytest.raises(UserError, match=r"its tap gives shape \(2, 256\), not a map"):
        student.feature_map(images())


@pytest.mark.parametrize("name, words", [("resnet18_cifra", "did you mean 'resnet18_cifar'"), ("", "valid: ")])
def test_an_unknown_network_is_refused_with_the_nearest(name, words):
    with pytest.raises(UserError, match="is no timm model") as caught:
        create(name, 10)
    assert words in str(caught.value)


@pytest.mark.parametrize("name", ["conv_small", "resnet18"])
def test_an_unknown_option_is_refused(name):
    with pytest.raises(UserError, match="does not take options"):
        create(name, 10, no_such_option=3)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"options": {"num_classes": 3}}, "is set by the run"),
        ({"options": {"pretrained": True}}, "is set by the run"),
        ({"std": (0.5, 0.0, 0.5)}, "must be above 0"),
        ({"mean": (0.5, 0.5)}, "one per channel"),
        ({"std": ()}, "one per channel"),
        ({"tpa": "layer1"}, "Extra inputs"),
    ],
)
def test_settings_that_cannot_work_are_refused_at_once(settings, words):
    with pytest.raises(ValidationError, match=words):
        StudentConfig(name="conv_small", **settings)


def test_a_new_head_leaves_the_rest():
    student = Student(StudentConfig(name="conv_small", options=GREY), num_classes=3).eval()
    before = student.pooled(images())
    student.backbone.reset_classifier(7)
    assert student(images()).shape == (2, 7) and torch.equal(student.pooled(images()), before)
    assert isinstance(Student(StudentConfig(name="conv_small")).backbone.get_classifier(), nn.Identity)


def test_a_channels_last_map_is_turned(monkeypatch):
    student = Student(StudentConfig(name="swin_tiny_patch4_window7_224", options={"img_size": 64, "window_size": 2}))
    assert student.feature_map(torch.zeros(1, 3, 64, 64)).shape == (1, 768, 2, 2)


@pytest.mark.parametrize(
    "name, options",
    [("mlp_small", {"img_size": 8}), ("conv_small", {"in_chans": 2}), ("vit_tiny_patch16_224", {})],
)
def test_a_student_that_does_not_take_the_images_is_refused_in_one_line(name, options):
    with pytest.raises(UserError, match="does not take 16-pixel images"):
        Student(StudentConfig(name=name, options=options)).try_out(16)


def test_an_inner_map_as_wide_in_pixels_as_the_network_is_in_channels_stays_as_it_is():
    """resnet20_cifar has 64 channels at its end, and its first maps of a 64-pixel image are 64 pixels wide."""
    student = Student(StudentConfig(name="resnet20_cifar", tap="layer1")).eval()
    assert student.feature_map(torch.zeros(2, 3, 64, 64)).shape == (2, 16, 64, 64)
