"""A frozen classifier asked for its opinion: pytest tests/frozen/test_classifier.py"""

import io
import json
import os
import urllib.error
from urllib.request import Request

import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import nn

from diffrep.errors import UserError
from diffrep.frozen.classifier import ClassifierConfig, ClassifierTeacher, load_classifier
from diffrep.methods.base import save_student
from diffrep.models.students import Student, StudentConfig, create

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
PLAIN = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


def images(size=32, count=2):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def load(reference, wanted=None, allow_code=False, **settings):
    """``wanted``: classes of the images; ``num_classes`` is the config's."""
    return load_classifier(ClassifierConfig(reference=str(reference), **settings), wanted, allow_code)


def refused(reference, *words, **settings):
    with pytest.raises(UserError) as caught:
        load(reference, **settings)
    said = str(caught.value)
    assert "\n" not in said and all(word in said for word in words), said
    return said


# The real thing

# Parameters, correct among the first 500 test images, logits of test image 0: README of the weights.
PUBLISHED = {
    "resnet20": (
        269_722,
        455,
        [-5.3097, -0.4958, 0.8773, 23.7305, -4.1050, 4.4637, -0.2343, -5.4179, -3.7118, -9.8822],
    ),
    "resnet56": (853_018, 470, [-5.5256, -1.5469, -0.7158, 19.4394, -5.0977, 3.0219, -1.5109, -0.935, -1.7958, -5.405]),
}


@pytest.fixture(scope="module")
def test_images():
    """test_images(folder): the first 500 of CIFAR-10's test split and their labels."""
    found = {}

    def read(shared):
        if not found:
            rows = next(pq.ParquetFile(shared / "data/cifar10/test.parquet").iter_batches(500)).to_pydict()
            raw = [Image.open(io.BytesIO(row["bytes"])).tobytes() for row in rows["img"]]
            pixels = torch.frombuffer(bytearray(b"".join(raw)), dtype=torch.uint8).view(500, 32, 32, 3)
            found["pair"] = pixels.permute(0, 3, 1, 2) / 255, torch.tensor(rows["label"])
        return found["pair"]

    return read


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_weights_give_their_published_answers(shared, test_images, name):
    parameters, correct, logits = PUBLISHED[name]
    teacher = load(shared / f"weights/{name}_cifar10.safetensors", 10, **IMAGENET)
    assert (teacher.num_parameters, teacher.num_classes, teacher.in_chans) == (parameters, 10, 3)
    pixels, labels = test_images(shared)
    found = torch.cat([teacher.logits(block) for block in pixels.split(100)])
    assert found[0].tolist() == pytest.approx(logits, abs=1e-4)
    assert int((found.argmax(1) == labels).sum()) == correct


def test_published_weights_as_they_were_released(shared, tmp_path):
    """akamaster's .th: DataParallel's prefix, a score beside the weights, a legacy pickle."""
    file = shared / "weights/resnet20_cifar10.safetensors"
    state = {f"module.{name}": value for name, value in load_file(file).items()}
    for legacy in (True, False):
        path = tmp_path / "resnet20.th"
        torch.save({"best_prec1": 91.78, "state_dict": state}, path, _use_new_zipfile_serialization=not legacy)
        told = {"architecture": "resnet20_cifar", "options": {"shortcut": "pad"}} if legacy else {}
        teacher = load(path, **told, **IMAGENET)
        assert torch.equal(teacher.logits(images()), load(file, **IMAGENET).logits(images()))
        assert teacher.sha256 == load(file, **IMAGENET).sha256
    known = "by its names it is resnet20_cifar with options {'shortcut': 'pad'} of 10 classes"
    refused(path, "missing (layer1.3.conv1.weight", known, architecture="resnet56_cifar", **IMAGENET)
    refused(path, "60 left over (layer1.1.bn1.", known, architecture="resnet8_cifar", **IMAGENET)


# Frozen


@pytest.fixture
def file(tmp_path):
    """A small classifier of four classes with batch statistics of its own."""
    torch.manual_seed(3)
    network = create("resnet8_cifar", 4)
    for _ in range(3):
        network(images(count=8) * 3)
    save_file(network.state_dict(), tmp_path / "net.safetensors")
    return tmp_path / "net.safetensors"


class Owner(nn.Module):
    def __init__(self, teacher):
        super().__init__()
        self.teacher, self.layer = teacher, nn.Linear(2, 2)


def test_nothing_touches_a_teacher(file):
    teacher = load(file, **PLAIN)
    owner = Owner(teacher).train()
    before, sha256 = {k: v.clone() for k, v in teacher.module.state_dict().items()}, teacher.sha256
    shown = images().requires_grad_()
    first = teacher.logits(shown)
    for _ in range(5):
        owner.train().requires_grad_(True)
        found = teacher.logits(shown)
        assert torch.equal(found, first) and not found.requires_grad
        (owner.layer.weight.sum() * found.sum()).backward()
    assert not any(module.training for module in teacher.module.modules())
    assert not any(p.requires_grad or p.grad is not None for p in teacher.module.parameters()) and shown.grad is None
    assert all(torch.equal(before[k], v) for k, v in teacher.module.state_dict().items())
    assert set(owner.state_dict()) == {"layer.weight", "layer.bias"}
    del vars(teacher)["sha256"]
    assert teacher.sha256 == sha256


def test_inference_mode_changes_nothing(file):
    teacher = load(file, **PLAIN)
    outside = teacher.logits(images())
    with torch.inference_mode():
        inside = teacher.logits(images())
    assert torch.equal(inside, outside) and torch.equal(teacher.logits(images()), outside)


def test_gradients_pass_through_the_parts_of_a_teacher(file):
    teacher, shown = load(file, **PLAIN), images().requires_grad_()
    teacher.module(teacher.normalise(shown)).sum().backward()
    assert shown.grad.abs().sum() > 0 and all(p.grad is None for p in teacher.module.parameters())


def test_loading_leaves_global_randomness_alone(file):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    load(file, **PLAIN)
    load(f"random:{file}", **PLAIN)
    assert torch.equal(torch.rand(3), expected)


def test_a_teacher_normalises_for_itself(file):
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 0.125)
    teacher = load(file, mean=mean, std=std)
    found = teacher.normalise(torch.ones(1, 3, 2, 2))[0, :, 0, 0]
    torch.testing.assert_close(found, torch.tensor([0.9 / 0.5, 0.8 / 0.25, 0.7 / 0.125]))
    bare = create("resnet8_cifar", 4).eval()
    bare.load_state_dict(load_file(file))
    x = torch.stack([(images()[:, c] - mean[c]) / std[c] for c in range(3)], 1)
    torch.testing.assert_close(teacher.logits(images()), bare(x))


def test_the_cost_of_a_pass_is_counted(shared):
    teacher = load(shared / "weights/resnet20_cifar10.safetensors", **IMAGENET)
    assert teacher.multiply_adds(32) == 40_556_800 - 90 * 64  # specification, section 3.1, without 90 of 100 classes
    assert teacher.multiply_adds(64) == 4 * (teacher.multiply_adds(32) - 640) + 640


def test_images_of_another_size_are_refused_in_one_line(file):
    teacher = load(file, **PLAIN)
    with pytest.raises(UserError, match=r"net.safetensors does not take 64-pixel images: CifarResNet takes 32-pixel"):
        teacher.multiply_adds(64)
    with pytest.raises(UserError, match="takes 32-pixel images alone"):
        teacher.logits(images(64))


# Run folders


@pytest.fixture
def run(tmp_path):
    """run(...) is a finished run that kept a student."""

    def make(num_classes=4, **settings):
        torch.manual_seed(0)
        config = StudentConfig(**{"name": "conv_small", "mean": (0.4,), "std": (0.2,)} | settings)
        student, folder = Student(config, num_classes), tmp_path / "run"
        save_student(folder, student)
        result = {"licence": "MIT", "labels_seen": {"student": 50}, "labels_behind": {"before: head": 7}}
        (folder / "result.json").write_text(json.dumps(result))
        return folder, student.eval()

    return make


@pytest.mark.parametrize("options", [{}, {"in_chans": 1}])
@torch.no_grad()
def test_a_run_of_ours_teaches(run, options):
    folder, student = run(options=options)
    for reference in (folder, folder / "weights.safetensors"):
        teacher = load(reference, 4)
        torch.testing.assert_close(teacher.logits(images(8)), student(images(8)), rtol=0, atol=0)
    assert (teacher.name, teacher.licence, teacher.num_classes) == ("run", "MIT", 4)
    assert teacher.labels_seen == {"student": 50, "before: head": 7}
    other = load(folder, mean=(0.1, 0.1, 0.1)).logits(images(8))  # the user's word goes first
    assert not torch.allclose(other, student(images(8)))


def test_runs_that_cannot_teach_are_refused(run, tmp_path):
    folder, _ = run()
    refused(folder, "knows 4 classes, the images have 10", wanted=10)
    refused(folder, "knows its own architecture: leave architecture out", architecture="resnet8_cifar")
    (folder / "weights.safetensors").write_bytes(b"half")
    refused(folder, "weights.safetensors is corrupt or truncated")
    save_file({"stem.0.weight": torch.zeros(1)}, folder / "weights.safetensors")
    refused(folder, "weights.safetensors does not fit conv_small", "missing (stem.1.weight")
    (folder / "result.json").write_text("[]")
    refused(folder, "result.json was not written by diffrep")
    (folder / "config.json").write_text("[]")
    refused(folder, "config.json was not written by diffrep")
    (folder / "result.json").unlink()
    refused(folder, "has not finished (no result.json)")
    (folder / "config.json").unlink()
    refused(folder, "holds no classifier (no config.json)")
    refused(run(num_classes=0)[0], "holds a student without a classifier")


# Files


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".th"])
def test_pickles_of_tensors_are_read(file, tmp_path, suffix):
    path = tmp_path / f"net{suffix}"
    torch.save({"model": load_file(file), "epoch": 240, "accuracy": torch.tensor(71.3)}, path)
    assert torch.equal(load(path, **PLAIN).logits(images()), load(file, **PLAIN).logits(images()))


class Hostile:
    def __reduce__(self):
        return os.mkdir, (self.where,)


@pytest.mark.parametrize("legacy", [True, False])
def test_a_pickle_that_wants_to_run_code_is_refused(tmp_path, legacy):
    hostile = Hostile()
    hostile.where = str(tmp_path / "ran")
    path = tmp_path / "hostile.pth"
    torch.save({"state_dict": hostile}, path, _use_new_zipfile_serialization=not legacy)
    refused(path, "hostile.pth cannot be loaded", "wants to run code; nothing of it was run", **PLAIN)
    assert not (tmp_path / "ran").exists()
    torch.load(path, weights_only=False)  # it would have
    assert (tmp_path / "ran").exists()


def cut(path):
    path.write_bytes(path.read_bytes()[:1000])


def nonsense(path):
    path.write_bytes(bytes(range(256)) * 9)


@pytest.mark.parametrize("spoil", [cut, nonsense, lambda path: path.write_bytes(b"")])
@pytest.mark.parametrize("suffix, words", [(".safetensors", "is corrupt or truncated"), (".pth", "it is damaged")])
def test_damaged_files_are_refused(file, tmp_path, spoil, suffix, words):
    path = tmp_path / f"bad{suffix}"
    save_file(load_file(file), path) if suffix == ".safetensors" else torch.save(load_file(file), path)
    spoil(path)
    refused(path, f"bad{suffix}", words, **PLAIN)


@pytest.mark.parametrize(
    "reference, words",
    [
        ("nowhere.pth", "does not exist here; a classifier is a run folder, a weights file, timm:NAME"),
        ("", "holds no classifier (no config.json)"),
        ("random:random:x", "'random:x' does not exist here"),
        ("notes.txt", "notes.txt is no weights file; valid: .ckpt, .pt, .pth, .safetensors, .th"),
        ("empty.pth", "holds a dict and no weights by name"),
        ("scores.pth", "holds best_acc besides tensors"),
        ("strange.pth", "no network known here has its keys (a, b): set architecture"),
    ],
)
def test_what_is_no_classifier_is_refused(tmp_path, monkeypatch, reference, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("nothing")
    torch.save({}, "empty.pth")
    torch.save({"best_acc": 3.0}, "scores.pth")
    torch.save({"a": torch.zeros(1), "b": torch.zeros(1)}, "strange.pth")
    refused(reference, words, **PLAIN)


def test_settings_that_do_not_fit_a_file_are_refused(file):
    refused(file, "does not tell how it normalises images: set mean and std")
    refused(file, "set mean and std", mean=(0.5, 0.5, 0.5))
    refused(file, "teacher 'resnet8_cifra' is no timm model; did you mean 'resnet8_cifar'",
            architecture="resnet8_cifra", **PLAIN)  # fmt: skip
    refused(file, "does not take options {'shortcut': 'none'}", architecture="resnet8_cifar",
            options={"shortcut": "none"}, **PLAIN)  # fmt: skip
    refused(file, "does not fit vit_tiny_patch16_224", "it is resnet8_cifar of 4 classes",
            architecture="vit_tiny_patch16_224", **PLAIN)  # fmt: skip
    refused(file, "does not fit mlp_small", architecture="mlp_small", **PLAIN)
    refused(file, "knows 4 classes, num_classes says 10", num_classes=10, **PLAIN)
    refused(file, "knows 4 classes, the images have 10", wanted=10, **PLAIN)


def test_a_file_that_fits_two_networks_is_asked_about(tmp_path):
    path = tmp_path / "dmkd.pth"
    network = create("resnet18_cifar", 3, stem_relu=False, zero_init_last=False)
    torch.save({"model": network.state_dict()}, path)
    refused(path, "with and without a ReLU behind the stem", "set options.stem_relu", **PLAIN)
    with_relu, without = (load(path, options={"stem_relu": choice}, **PLAIN) for choice in (True, False))
    assert not torch.allclose(with_relu.logits(images()), without.logits(images()))


def test_weights_of_any_timm_or_torchvision_network(tmp_path):
    path = tmp_path / "net.safetensors"
    network = create("mobilenetv2_035", 6).eval()
    save_file(network.state_dict(), path)
    teacher = load(path, architecture="mobilenetv2_035", **PLAIN)
    torch.testing.assert_close(teacher.logits(images()), network(images() * 2 - 1))
    from torchvision import models

    network = models.get_model("shufflenet_v2_x0_5", num_classes=7).eval()
    save_file(network.state_dict(), path)
    teacher = load(path, 7, architecture="torchvision:shufflenet_v2_x0_5", **PLAIN)
    torch.testing.assert_close(teacher.logits(images()), network(images() * 2 - 1))
    refused(path, "did you mean 'shufflenet_v2_x0_5'", architecture="torchvision:shufflenet_v2_x05", **PLAIN)
    refused(path, "does not take options {'depth': 3}", architecture="torchvision:shufflenet_v2_x0_5",
            options={"depth": 3}, **PLAIN)  # fmt: skip


# Libraries


@pytest.fixture
def timm_weights(monkeypatch, tmp_path):
    """lcnet_050, as if the Hub had sent it."""
    torch.manual_seed(0)
    network = create("lcnet_050", 1000).eval()
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    monkeypatch.setattr("timm.models._hub.hf_hub_download", lambda *_, **__: str(tmp_path / "model.safetensors"))
    return network


@torch.no_grad()
def test_timms_weights_come_with_what_timm_knows(timm_weights):
    teacher = load("timm:lcnet_050.ra2_in1k", 1000)
    assert (teacher.num_classes, teacher.image_size, teacher.licence) == (1000, 224, "apache-2.0")
    x = torch.stack([(images(64)[:, c] - IMAGENET["mean"][c]) / IMAGENET["std"][c] for c in range(3)], 1)
    torch.testing.assert_close(teacher.logits(images(64)), timm_weights(x))


def test_without_a_network_timm_is_refused_in_one_line(monkeypatch):
    def offline(*_args, **_named):
        raise LocalEntryNotFoundError("cannot find the requested files\nin the local cache")

    create("lcnet_050", 0)
    monkeypatch.setattr("timm.models._hub.hf_hub_download", offline)
    refused("timm:lcnet_050", "cannot fetch timm:lcnet_050 (LocalEntryNotFoundError", "give a weights file")


def test_timm_names_without_weights_are_refused():
    told = {"num_classes": 10, **PLAIN}
    refused("timm:resnet18_cifar", "timm:resnet18_cifar does not tell its number of classes")
    refused("timm:resnet18_cifar", "no weights called 'resnet18_cifar'", "architecture=resnet18_cifar", **told)
    refused("timm:resnet18.a9_in1k", "did you mean 'resnet18.a", "architecture=resnet18", **told)
    refused("timm:resnt18", "teacher 'resnt18' is no timm model; did you mean 'resnet18'")
    refused("timm:resnet18", "timm:resnet18 knows 1000 classes, the images have 10", wanted=10)  # nothing was fetched


@torch.no_grad()
def test_torchvisions_weights_come_with_what_torchvision_knows(monkeypatch):
    from torchvision import models

    torch.manual_seed(0)
    network = models.get_model("shufflenet_v2_x0_5").eval()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: network.state_dict())
    teacher = load("torchvision:shufflenet_v2_x0_5", 1000)
    assert (teacher.num_classes, teacher.image_size) == (1000, 224)
    x = torch.stack([(images(64)[:, c] - IMAGENET["mean"][c]) / IMAGENET["std"][c] for c in range(3)], 1)
    torch.testing.assert_close(teacher.logits(images(64)), network(x))


def test_without_a_network_torchvision_is_refused_in_one_line(monkeypatch):
    def offline(url, *_args, **_named):
        raise urllib.error.URLError(f"no route to {Request(url).host}")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    refused("torchvision:resnet18", "cannot fetch torchvision:resnet18 (URLError: <urlopen error no route to down")
    refused("torchvision:resnt18", "no such classifier; did you mean 'resnet18'")
    refused("torchvision:resnet18", "leave options out", options={"a": 1})
    refused("torchvision:resnet18", "knows 1000 classes, the images have 10", wanted=10)


# Specification of the distillation road, section 3.1: parameters and multiply-adds at 224 pixels.
IMAGENET_COUNTS = {
    "timm:resnet18": (11_689_512, 1_814_073_344),
    "timm:resnet34": (21_797_672, 3_663_761_408),
    "timm:resnet50": (25_557_032, 4_089_184_256),
    "torchvision:shufflenet_v2_x1_0": (2_278_604, 144_907_992),
}


@pytest.mark.parametrize("name", IMAGENET_COUNTS)
def test_the_published_imagenet_networks_have_their_size_and_cost(name):
    teacher = load(f"random:{name}", 1000)
    assert (teacher.num_parameters, teacher.multiply_adds(224)) == IMAGENET_COUNTS[name]


# The untrained control


def test_the_untrained_control_is_the_same_network_without_its_weights(file, run):
    folder, _ = run()
    for reference, size, settings in [
        (file, 32, PLAIN),
        (folder, 8, {}),
        ("timm:lcnet_050", 32, {"num_classes": 5}),
        ("torchvision:shufflenet_v2_x0_5", 32, {"num_classes": 5}),
        ("timm:resnet8_cifar", 32, {"num_classes": 5, **PLAIN}),
    ]:
        control, again = (load(f"random:{reference}", **settings) for _ in range(2))
        assert control.sha256 == again.sha256 and control.name.startswith("untrained ")
        assert control.logits(images(size)).shape == (2, settings.get("num_classes", 4))
        assert control.labels_seen == {} and not control.module.training
    trained, control = load(file, **PLAIN), load(f"random:{file}", **PLAIN)
    assert control.num_parameters == trained.num_parameters and control.sha256 != trained.sha256
    assert load(f"random:{file}", 9, **PLAIN).num_classes == 9  # as many as the images have
    refused(f"random:{file}", "knows 5 classes, the images have 9", wanted=9, num_classes=5, **PLAIN)


# Code of the user's own


def with_classes(count):
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    network.num_classes = count
    return network


def test_a_factory_needs_leave_and_says_what_it_made(factory):
    reference = factory(lambda: with_classes(3))
    refused(reference, "runs foreign code")
    refused(f"random:{reference}", "what a factory's network was before training", allow_code=True)
    refused(reference, "set mean and std", allow_code=True)
    teacher = load(reference, 3, allow_code=True, **PLAIN)
    assert teacher.logits(images(8)).shape == (2, 3) and not teacher.module[1].weight.requires_grad
    untold = factory(lambda: nn.Flatten(), "untold")
    refused(untold, "does not tell its number of classes", allow_code=True, **PLAIN)
    with pytest.raises(UserError, match=r"returned shape \(2, 192\), not logits \(2, 5\)"):
        load(untold, allow_code=True, num_classes=5, **PLAIN).logits(images(8))
    with pytest.raises(UserError, match=r"does not take 8-pixel images: teacher .* returned a tuple, not logits"):
        load(factory(Pair, "pair"), allow_code=True, **PLAIN).multiply_adds(8)


class Pair(nn.Module):
    num_classes = 2

    def forward(self, x):
        return x, x


def test_a_factory_may_make_the_whole_teacher(factory):
    made = ClassifierTeacher(with_classes(3), "mine", 3, (0.0,), (1.0,))
    reference = factory(lambda: made)
    assert load(reference, 3, allow_code=True) is made
    refused(reference, "leave mean out", allow_code=True, **PLAIN)
    refused(reference, "knows 3 classes, the images have 4", wanted=4, allow_code=True)
    refused(factory(lambda: 3, "three"), "returned a int, not a torch module", allow_code=True)
    refused(factory(lambda: 1 / 0, "broken"), "raised ZeroDivisionError", allow_code=True)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"std": (0.5, 0.0, 0.5)}, "must be above 0"),
        ({"mean": (0.5,)}, "mean"),
        ({"options": {"pretrained": True}}, "is set by the run"),
        ({"num_classes": 0}, "num_classes"),
        ({"architectur": "vgg8_cifar"}, "Extra inputs"),
    ],
)
def test_settings_that_cannot_work_are_refused_at_once(settings, words):
    with pytest.raises(ValidationError, match=words):
        ClassifierConfig(reference="x", **settings)
