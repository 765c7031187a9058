"""Learning from labels, from scratch or from a distilled run: pytest tests/methods/test_finetune.py"""

import json
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from diffrep.data.batch import Batch
from diffrep.errors import UserError
from diffrep.frozen.start import load_backbone
from diffrep.methods.base import save_student
from diffrep.methods.finetune import Finetune, FinetuneConfig
from diffrep.models.students import Student, StudentConfig
from diffrep.randomness import Rows

CONV = StudentConfig(name="conv_small", options={"in_chans": 1})


def images(count=6, seed=0):
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def batch(labels):
    return Batch(images(len(labels)), torch.tensor(labels), torch.arange(len(labels)))


def built(**settings):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Finetune(FinetuneConfig(student=CONV, **settings), 3, 8)


def step(method, labels, progress=0.0):
    parts = method(batch(labels), Rows(torch.Generator(), len(labels)), progress)
    method.zero_grad()
    parts["loss"].backward()
    return parts, {n: p.grad.clone() for n, p in method.named_parameters() if p.grad is not None}


@pytest.fixture
def run(tmp_path):
    """A finished run with a student that has no classifier."""
    with torch.random.fork_rng():
        torch.manual_seed(9)
        student = Student(CONV)
    save_student(tmp_path, student)
    (tmp_path / "result.json").write_text(json.dumps({"name": "distilled", "licence": "CC-BY-4.0"}))
    return tmp_path, student


def test_the_loss_is_cross_entropy_over_what_is_labelled():
    method = built(label_smoothing=0.1).eval()
    parts, _ = step(method, [0, 1, -1, 2, -1, 1])
    known = torch.tensor([0, 1, 3, 5])
    logits = method.student(images())[known]
    each = F.cross_entropy(logits, torch.tensor([0, 1, 2, 1]), reduction="none", label_smoothing=0.1)
    torch.testing.assert_close(parts["loss"], each.sum() / 6)  # divided by the batch, so that parts add up
    correct = (logits.argmax(1) == torch.tensor([0, 1, 2, 1])).float().mean()
    torch.testing.assert_close(parts["train_top1"], correct)


def test_a_batch_of_hidden_labels_teaches_nothing():
    parts, grads = step(built(), [-1] * 6)
    assert float(parts["loss"].detach()) == 0 and all(float(g.abs().max()) == 0 for g in grads.values())


def test_every_parameter_gets_a_gradient_and_groups_share_them_out():
    method = built()
    _, grads = step(method, [0, 1, 2, 0, 1, 2])
    names = {id(p): n for n, p in method.named_parameters()}
    assert grads.keys() == set(names.values()) and all(float(g.abs().max()) > 0 for g in grads.values())
    groups = {k: {names[id(p)] for p in v} for k, v in method.parameter_groups().items()}
    assert groups["head"] == {"student.backbone.head.weight", "student.backbone.head.bias"}
    assert groups["student"] | groups["head"] == set(names.values()) and not groups["student"] & groups["head"]


def test_at_first_only_the_head_learns_from_the_frozen_vector():
    method = built(head_first=0.5).train()
    assert not method.uses_all_parameters and built().uses_all_parameters
    before = {n: b.clone() for n, b in method.named_buffers()}
    _, grads = step(method, [0, 1, 2, 0, 1, 2], progress=0.49)
    assert grads.keys() == {"student.backbone.head.weight", "student.backbone.head.bias"}
    assert all(torch.equal(b, before[n]) for n, b in method.named_buffers()) and method.student.training
    method.student.eval()
    logits = method.student(images())
    parts, _ = step(method, [0, 1, 2, 0, 1, 2], progress=0.0)
    torch.testing.assert_close(parts["loss"], F.cross_entropy(logits, torch.tensor([0, 1, 2, 0, 1, 2])))
    method.train()
    _, grads = step(method, [0, 1, 2, 0, 1, 2], progress=0.5)
    assert len(grads) == len(list(method.parameters()))


def test_a_toy_task_is_learnt():
    method = built()
    optimizer = torch.optim.Adam(method.parameters(), 1e-2)
    shades = torch.tensor([0.1, 0.5, 0.9]).repeat(8)
    shown = Batch(
        shades.view(-1, 1, 1, 1).expand(-1, 3, 8, 8) + 0.02 * torch.randn(24, 3, 8, 8),
        torch.arange(24) % 3,
        torch.arange(24),
    )
    for _ in range(30):
        parts = method(shown, Rows(torch.Generator(), 24), 0.0)
        optimizer.zero_grad()
        parts["loss"].backward()
        optimizer.step()
    assert float(parts["train_top1"]) == 1 and float(parts["loss"].detach()) < 0.3


def test_it_starts_from_a_finished_run(run):
    folder, student = run
    method = built(init=str(folder))
    found = {"matched": len(student.backbone.state_dict()), "missing": (), "left_over": (), "mismatched": ()}
    assert asdict(method.loaded) == found | {"new": ("head.weight", "head.bias")}
    said = "matched 18, missing none, left over none, mismatched none, new 2 (head.weight, head.bias)"
    assert method.notes == (f"started from {folder}: {said}",)
    assert method.licence == "CC-BY-4.0"
    for name, value in student.backbone.state_dict().items():
        assert torch.equal(method.student.backbone.state_dict()[name], value)
    torch.testing.assert_close(method.student.eval().pooled(images()), student.eval().pooled(images()))


def test_it_starts_from_a_run_that_had_a_classifier_of_other_classes(tmp_path):
    other = Finetune(FinetuneConfig(student=CONV), 7, 8)
    other.export(tmp_path)
    (tmp_path / "result.json").write_text("{}")
    assert built(init=str(tmp_path)).loaded.new == ("head.weight", "head.bias")


def refused(folder):
    with pytest.raises(UserError) as caught:
        load_backbone(Student(CONV, 3), folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_run_that_does_not_fit_is_refused(run):
    """Strictly: the official loader prints a line and goes on with a random first convolution."""
    folder, _ = run
    file = folder / "weights.safetensors"
    state = load_file(file)
    name = "stem.0.weight"
    assert name in state
    save_file({n: v for n, v in state.items() if n != name}, file)
    assert f"does not fit conv_small: matched 17, missing 1 ({name}), left over none" in refused(folder)
    save_file(state | {"extra": torch.zeros(1)}, file)
    assert "matched 18, missing none, left over 1 (extra), mismatched none" in refused(folder)
    save_file(state | {name: torch.zeros(32, 3, 3, 3)}, file)
    assert f"mismatched 1 ({name}: (32, 3, 3, 3) there, (32, 1, 3, 3) here)" in refused(folder)


def test_another_stem_is_refused_with_both_shapes(tmp_path):
    """D10: distilled with timm's stem, fine-tuned with the small one; every other tensor of the two fits."""
    save_student(tmp_path, Student(StudentConfig(name="resnet18")))
    (tmp_path / "result.json").write_text("{}")
    with pytest.raises(UserError) as caught:
        load_backbone(Student(StudentConfig(name="resnet18_cifar"), 10), tmp_path)
    told = str(caught.value)
    assert f"{tmp_path}, a resnet18, does not fit resnet18_cifar: matched 119, missing none" in told
    assert "mismatched 1 (conv1.weight: (64, 3, 7, 7) there, (64, 3, 3, 3) here)" in told and "\n" not in told
    with pytest.raises(
        UserError, match=r"init_skip: resnet18_cifar has no 'conv1.weigth'; did you mean 'conv1.weight'"
    ):
        load_backbone(Student(StudentConfig(name="resnet18_cifar"), 10), tmp_path, ("conv1.weigth",))
    student = Student(StudentConfig(name="resnet18_cifar"), 10)
    before = student.backbone.conv1.weight.clone()
    found = load_backbone(student, tmp_path, ("conv1.weight",))  # as released, but said
    assert found.matched == 119 and found.new == ("conv1.weight", "fc.weight", "fc.bias")
    assert torch.equal(student.backbone.conv1.weight, before)


def test_the_head_stays_the_fresh_one(tmp_path):
    """Of the classifier nothing is taken, whatever stands in the file under its name."""
    other = Student(CONV, 3)
    save_student(tmp_path, other)
    (tmp_path / "result.json").write_text("{}")
    student = Student(CONV, 3)
    before = student.backbone.head.weight.clone()
    load_backbone(student, tmp_path)
    assert torch.equal(student.backbone.head.weight, before)
    assert torch.equal(student.backbone.layer1[0].weight, other.backbone.layer1[0].weight)


def test_a_run_that_cannot_be_read_is_refused(run):
    folder, _ = run
    file = folder / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    assert "is corrupt or truncated" in refused(folder)
    file.unlink()
    assert "this run kept no student" in refused(folder)
    (folder / "result.json").unlink()
    assert "is no finished run" in refused(folder)


def test_the_export_rebuilds_the_student_in_timm(tmp_path):
    from diffrep.models.students import create

    method = built()
    step(method, [0, 1, 2, 0, 1, 2])
    assert method.export(tmp_path) == {"init": None, "loaded": None}
    card = json.loads((tmp_path / "config.json").read_text())
    again = create(card["architecture"], card["num_classes"], **card["model_args"]).eval()
    again.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    x = method.student.normalise(images())
    torch.testing.assert_close(again(x), method.student.eval()(images()))
    assert StudentConfig.model_validate(card["student"]) == CONV and card["num_features"] == 256


FAST = StudentConfig(name="fast_cnn", options={"widths": [8, 8, 8]}, mean=(0.3,), std=(0.2,))


def fast(**settings):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Finetune(FinetuneConfig(student=FAST, **settings), 3, 16)


def shown(count=6):
    pixels = torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    return Batch(pixels, torch.arange(count) % 3, torch.arange(count))


def test_a_network_that_whitens_is_shown_normalised_images_once(tmp_path):
    method = fast()
    method.prepare([shown(), shown(2)])
    answers = method.student.backbone.stem(method.student.normalise(torch.cat([shown().images, shown(2).images])))
    moments = answers.transpose(0, 1).flatten(1)[:12]
    torch.testing.assert_close(moments @ moments.T / moments.shape[1], torch.eye(12), atol=0.01, rtol=0)
    built().prepare(iter(()))  # others look at nothing
    method.export(tmp_path)
    (tmp_path / "result.json").write_text("{}")
    again = fast(init=str(tmp_path))
    before = again.student.backbone.stem.weight.clone()
    again.prepare([shown(3)])
    assert torch.equal(again.student.backbone.stem.weight, before)
    assert torch.equal(before, method.student.backbone.stem.weight)


def test_the_stem_stops_learning_when_it_is_told():
    method = fast(stem_until=0.375)
    assert not method.uses_all_parameters and fast().uses_all_parameters
    stem = method.student.backbone.stem.bias
    for progress, learns in ((0.0, True), (0.374, True), (0.375, False), (0.9, False), (0.1, True)):
        method.zero_grad()
        method(shown(), Rows(torch.Generator(), 6), progress)["loss"].backward()
        assert (stem.grad is not None) == learns
    with pytest.raises(UserError, match="stem_until: conv_small has no whitening stem"):
        built(stem_until=0.5)


def test_a_network_with_parts_of_its_own_names_them():
    method = fast()
    parts = method.parameter_groups()
    assert list(parts) == ["student", "biases", "head"]
    trained = {id(p) for p in method.parameters() if p.requires_grad}
    assert sorted(id(p) for part in parts.values() for p in part) == sorted(trained)
