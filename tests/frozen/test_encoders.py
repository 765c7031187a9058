"""The student of a run as a teacher of features, a ViT's tokens as maps: pytest tests/frozen/test_encoders.py"""

import json

import pytest
import torch

from diffrep import api
from diffrep.errors import UserError
from diffrep.frozen.hints import LiveHints
from diffrep.frozen.supervised import SupervisedTeacher
from diffrep.frozen.teachers import load_teacher
from diffrep.methods.base import save_student
from diffrep.models.students import Student, StudentConfig
from diffrep.randomness import seeded

VIT = {"img_size": 8, "patch_size": 2, "embed_dim": 24, "depth": 3, "num_heads": 3}


def vit(num_classes=0, **changes):
    with seeded(0, "vit"):
        config = StudentConfig(name="vit_base_patch16_224", options=VIT | changes, mean=(0.4,), std=(0.2,))
        return Student(config, num_classes).eval()


def run_of(student, folder, **said):
    """What a finished run leaves of its student."""
    folder.mkdir()
    save_student(folder, student)
    (folder / "result.json").write_text(json.dumps({"name": "mine", "licence": "MIT"} | said))
    return str(folder)


def images(size=8):
    return torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(0))


def refused(work):
    with pytest.raises(UserError) as caught:
        work()
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"global_pool": "avg", "pre_norm": True},
        {"global_pool": "token"},
        {"global_pool": "avg", "reg_tokens": 4},
        {"global_pool": "avg", "class_token": False, "img_size": 12, "patch_size": 3, "depth": 2},
    ],
)
def test_a_vits_tokens_are_the_maps_that_timm_gives(changes, tmp_path):
    student = vit(**changes)
    teacher = load_teacher(run_of(student, tmp_path / "run"))
    size, depth = student.config.options["img_size"], student.config.options["depth"]
    with torch.no_grad():
        expected = student.backbone.forward_intermediates(
            student.normalise(images(size)), norm=False, output_fmt="NCHW", intermediates_only=True
        )
    names = [f"network.blocks.{k}" for k in range(depth)]
    for t in (0, 999):
        found = teacher.features(images(size), t, names)
        for name, feature in zip(names, expected, strict=True):
            assert torch.equal(found[name], feature)
            assert teacher.tap(name).shape == feature.shape[1:]
            assert teacher.tap(name).stride == student.config.options["patch_size"]


def test_only_what_is_a_map_is_called_one(tmp_path):
    teacher = load_teacher(run_of(vit(global_pool="avg"), tmp_path / "run"))
    maps = {tap.name for tap in teacher.taps() if len(tap.shape) == 3}
    assert {"network.patch_embed.proj", "network.blocks.0.attn", "network.blocks.2"} <= maps
    assert all(teacher.tap(name).shape[1:] == (4, 4) for name in maps)
    assert "network.blocks.0.attn.q_norm" not in {tap.name for tap in teacher.taps()}


def test_its_origin_goes_along(tmp_path):
    place = run_of(vit(), tmp_path / "run", labels_seen={"student": 50}, labels_behind={"before: policy": 20})
    teacher = load_teacher(place)
    assert (teacher.name, teacher.licence) == ("mine", "MIT")
    assert teacher.labels_seen == {"student": 50, "before: policy": 20}
    fresh = load_teacher(f"random:{place}")
    assert fresh.sha256 != teacher.sha256 and fresh.labels_seen == {} and fresh.name.startswith("untrained")
    assert fresh.sha256 == load_teacher(f"random:{place}").sha256


def test_a_cnn_of_a_run_needs_its_image_size(tmp_path):
    student = Student(StudentConfig(name="conv_small", options={"in_chans": 1})).eval()
    place = run_of(student, tmp_path / "run")
    assert "its image size is not known; say" in refused(lambda: load_teacher(place))
    teacher = load_teacher(f"{place}?image_size=8")
    with torch.no_grad():
        expected = student.backbone.forward_features(student.normalise(images()))
    assert torch.equal(teacher.features(images(), 0, ["network.layer2"])["network.layer2"], expected)


@pytest.mark.parametrize(
    "tap, words",
    [
        ("network.fc_norm", "gives one vector of 24 numbers per image, not a map (C, h, w)"),
        ("network.blocks.7", "tap 'network.blocks.7' does not exist in Timeless; did you mean 'network.blocks"),
        ("blocks.1", "tap 'blocks.1' does not exist"),
        ("network.blocks.0.attn.q_norm", "returns no feature with a channel axis"),
    ],
)
def test_what_is_no_map_teaches_no_student(tap, words, tmp_path):
    place = run_of(vit(global_pool="avg"), tmp_path / "run")
    assert words in refused(lambda: LiveHints(place, [tap], 2, None, False))


def test_what_an_encoder_cannot_do_is_refused(tmp_path):
    place = run_of(vit(), tmp_path / "run")
    teacher = load_teacher(place)
    assert "reads 8-pixel images" in refused(lambda: teacher.features(images(9), 0, ["network.blocks.0"]))
    assert "clean images: noise 'forward'" in refused(lambda: teacher.check_noise("forward"))
    assert "takes no option 'vae'; valid behind its '?': image_size" in refused(lambda: load_teacher(f"{place}?vae=x"))
    assert "does not take 9-pixel images" in refused(lambda: load_teacher(f"{place}?image_size=9"))
    drawn = refused(lambda: api.synthesize(place, {"images": 2}, out=tmp_path / "set"))
    assert "predicts 'features'" in drawn and not (tmp_path / "set").exists()
    (tmp_path / "run" / "result.json").unlink()
    assert "a run that has not finished" in refused(lambda: load_teacher(place))


def test_damaged_weights_are_refused(tmp_path):
    place = run_of(vit(), tmp_path / "run")
    file = tmp_path / "run" / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    assert "weights.safetensors" in refused(lambda: load_teacher(place))


def test_a_classifiers_tokens_are_maps_too(tmp_path):
    place = run_of(vit(num_classes=5, global_pool="token"), tmp_path / "run")
    teacher, encoder = load_teacher(f"classifier:{place}"), load_teacher(place)
    assert isinstance(teacher, SupervisedTeacher)
    name = "network.blocks.1"
    found = [network.features(images(), 0, [name])[name] for network in (teacher, encoder)]
    assert found[0].shape == (3, 24, 4, 4) and torch.equal(*found)


def test_a_student_learns_from_it(tmp_path):
    """The whole way by command; a ViT of 8 pixels teaches, and the run says whose labels stand behind it."""
    place = run_of(vit(global_pool="avg"), tmp_path / "run", labels_seen={"student": 50})
    changes = [f"method.teacher={place}", "method.tap=network.blocks.2"]
    result = api.run("repfusion_debug", changes, out=tmp_path / "student")
    assert result["labels_behind"]["teacher: student"] == 50 and "distilled from mine (MIT)" in result["licence"]
