"""Students: timm's and ours behind one door: pytest tests/models/test_students.py"""

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from diffrep.errors import UserError
from diffrep.models.students import Student, StudentConfig, create

GREY = {"in_chans": 1}
KINDS = [
    ("conv_small", GREY, 8, (64, 4, 4), 256),
    ("conv_small", {}, 8, (64, 4, 4), 256),
    ("mlp_small", {**GREY, "img_size": 8}, 8, (64, 2, 2), 256),
    ("resnet18_cifar", {}, 32, (512, 4, 4), 512),
    ("mobilenetv2_035", {}, 32, (1280, 1, 1), 1280),
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
    assert count("resnet18_cifar") == 11168832  # specification, section 4: 11.169 M


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
