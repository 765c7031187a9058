"""A student as others take it: pytest tests/models/test_export.py"""

import importlib.util
import json

import pytest
import torch
from filled import fill
from safetensors.torch import load_file

from diffrep.errors import UserError
from diffrep.files import write_json
from diffrep.models.export import export
from diffrep.models.stored import load_student, student_card
from diffrep.models.students import Student, StudentConfig
from diffrep.models.weights import write_weights

VIT = {"img_size": 32, "patch_size": 8, "depth": 2}
# name, options, image size, classes
KINDS = [
    ("conv_small", {"in_chans": 1}, 8, 0),
    ("resnet18_cifar", {}, 32, 10),
    ("vit_tiny_patch16_224", VIT, 32, 4),
]


def images(size, count=3):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def answer(student, x):
    with torch.no_grad():
        return student(x) if student.backbone.num_classes else student.pooled(x)


@pytest.fixture
def run(tmp_path):
    """run(name, options, classes, size) -> a run folder whose student has weights and statistics that matter."""

    def make(name="conv_small", options=None, classes=0, size=None, **look):
        student = Student(StudentConfig(name=name, options=options or {}, **look), classes).eval()
        own = student.backbone.state_dict()
        student.backbone.load_state_dict(fill([(n, v.shape) for n, v in own.items()], 3, 1.0))
        student.image_size = size
        folder = tmp_path / "run"
        write_weights(folder / "weights.safetensors", student.backbone.state_dict())
        write_json(folder / "config.json", student_card(student))
        write_json(folder / "result.json", {"licence": "CC-BY-4.0"})
        return folder, student

    return make


@pytest.mark.parametrize("name, options, size, classes", KINDS)
def test_onnx_answers_as_the_student_does_for_any_number_of_images(run, tmp_path, name, options, size, classes):
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is in the extra dev")
    folder, student = run(name, options, classes, size)
    found = export(folder, tmp_path / "out", onnx=True)
    assert (found.image_size, found.files) == (size, ("model.safetensors", "config.json", "model.onnx"))
    assert {p.name for p in (tmp_path / "out").iterdir()} == set(found.files)  # no weights beside the graph
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"))
    word = "logits" if classes else "features"
    assert [(i.name, i.shape[1:]) for i in session.get_inputs()] == [("images", [3, size, size])]
    assert [o.name for o in session.get_outputs()] == [word]
    for count in (1, 5):
        x = images(size, count)
        (there,) = session.run(None, {"images": x.numpy()})
        expected = answer(student, x)
        assert float(expected.std()) > 0.05  # weights that do something
        torch.testing.assert_close(torch.from_numpy(there), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name, options, classes, size",
    [
        ("resnet18", {}, 5, 64),
        ("mobilenetv2_035", {"in_chans": 1}, 0, 32),
        ("vit_tiny_patch16_224", VIT, 4, 32),
        ("hrnet_w18", {"head_conv_bias": False}, 0, None),
    ],
)
def test_timm_alone_builds_loads_and_prepares(run, tmp_path, name, options, classes, size):
    folder, student = run(name, options, classes, size, mean=(0.4,), std=(0.2,))
    found = export(folder, tmp_path / "out")
    assert found.in_timm and found.files == ("model.safetensors", "config.json") and found.licence == "CC-BY-4.0"
    import timm

    network = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert type(network).__module__.startswith("timm.")
    look = timm.data.resolve_model_data_config(network)
    channels = options.get("in_chans", 3)
    assert look["mean"] == pytest.approx([0.4] * channels) and look["std"] == pytest.approx([0.2] * channels)
    assert look["crop_pct"] == 1 and (size is None or list(look["input_size"]) == [channels, size, size])
    x = images(size or 64, 2)
    with torch.no_grad():
        torch.testing.assert_close(network(student.normalise(x)), answer(student, x))
    if classes:  # another head than the saved one
        assert timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, num_classes=7).num_classes == 7


def test_the_file_is_a_plain_state_dict_under_the_networks_own_names(run, tmp_path):
    folder, student = run("resnet18_cifar", {}, 10)
    found = export(folder, tmp_path / "out")
    state, own = load_file(tmp_path / "out" / "model.safetensors"), student.backbone.state_dict()
    assert state.keys() == own.keys() and all(torch.equal(state[n], own[n]) for n in own)
    assert (found.tensors, found.parameters, found.num_classes) == (122, 11_168_832 + 5130, 10)
    # timm has no such stem: diffrep loads the folder, and says how
    assert not found.in_timm and "timm has no resnet18_cifar" in "\n".join(found.lines())
    again = load_student(tmp_path / "out" / "model.safetensors").eval()
    assert torch.equal(answer(again, images(32)), answer(student, images(32)))


def test_a_grey_networks_look_at_a_grey_image_is_one_line(run, tmp_path):
    """(B, 3, H, W) normalised per channel and then averaged, as one mean and one deviation."""
    folder, student = run("conv_small", {"in_chans": 1}, mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 0.125))
    export(folder, tmp_path / "out")
    look = json.loads((tmp_path / "out" / "config.json").read_text())["pretrained_cfg"]
    grey = images(8)[:, :1].expand(-1, 3, -1, -1)
    torch.testing.assert_close(student.normalise(grey), (grey[:, :1] - look["mean"][0]) / look["std"][0])


def test_the_image_size_is_found_or_asked_for(run, tmp_path, monkeypatch):
    folder, _ = run("conv_small")
    written = []
    monkeypatch.setattr("diffrep.models.export.write_onnx", lambda student, path: written.append(student.image_size))
    (folder / "recipe.yaml").write_text("data: {source: digits, image_size: 16}\n")
    export(folder, tmp_path / "a", onnx=True)
    export(folder, tmp_path / "b", onnx=True, image_size=24)
    folder, _ = run("conv_small", size=8)
    export(folder, tmp_path / "c", onnx=True)
    assert written == [16, 24, 8]


def refused(*given, **how):
    with pytest.raises(UserError) as caught:
        export(*given, **how)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_cannot_be_exported_is_refused_and_nothing_written(run, tmp_path, monkeypatch):
    folder, _ = run("mlp_small", {"img_size": 8})
    out = tmp_path / "out"
    assert "no weights.safetensors): is the run finished, and one of a student?" in refused(tmp_path, out)
    assert "no such folder" in refused(tmp_path / "nowhere", out)
    assert "--image-size" in refused(folder, out, onnx=True)
    assert "does not take 16-pixel images" in refused(folder, out, onnx=True, image_size=16)
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("no\nway")))
    assert "torch cannot write mlp_small as ONNX: no" in refused(folder, out, onnx=True, image_size=8)
    found = importlib.util.find_spec
    monkeypatch.setattr("diffrep.models.export.find_spec", lambda name: None if name == "onnx" else found(name))
    assert refused(folder, out, onnx=True) == "--onnx needs onnx: pip install 'diffrep[export]'"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]
    out.mkdir()
    assert "exists already" in refused(folder, out)


def test_a_damaged_run_is_refused(run, tmp_path):
    folder, _ = run("conv_small")
    file = folder / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    assert "is corrupt or truncated" in refused(folder, tmp_path / "out")
    (folder / "config.json").write_text("{}")
    assert "was not written by diffrep" in refused(folder, tmp_path / "out")
