"""A classifier in a diffusion model's place: pytest tests/frozen/test_supervised.py"""

import pytest
import torch

from diffrep import api
from diffrep.errors import UserError
from diffrep.frozen.teachers import load_teacher


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A run with a classifier of digits."""
    out = tmp_path_factory.mktemp("classifier") / "run"
    api.run("finetune_debug", out=out)
    return out


def images():
    return torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_its_features_are_the_classifiers_whatever_the_timestep(classifier):
    teacher = load_teacher(f"classifier:{classifier}")  # the run knows its images
    names = [tap.name for tap in teacher.taps() if len(tap.shape) == 3]
    assert names and all(name.startswith("network.") for name in names)
    seen = {}
    teacher.module.get_submodule(names[-1]).register_forward_hook(lambda _m, _i, out: seen.update(tap=out))
    with torch.no_grad():
        teacher.classifier.logits(images())
    expected = seen["tap"]
    early, late = (teacher.features(images(), t, [names[-1]])[names[-1]] for t in (0, 999))
    assert torch.equal(early, late) and torch.equal(early, expected)
    assert teacher.labels_seen  # a supervised teacher has read labels, and says so
    assert teacher.multiply_adds(names[0]) <= teacher.multiply_adds(names[-1])


def test_untrained_and_unknown(classifier):
    fresh = load_teacher(f"random:classifier:{classifier}?image_size=8")
    assert fresh.sha256 != load_teacher(f"classifier:{classifier}?image_size=8").sha256
    with pytest.raises(UserError, match="takes no option 'vae'"):
        load_teacher(f"classifier:{classifier}?vae=x")


def test_a_student_takes_hints_from_it(classifier, tmp_path):
    teacher = f"classifier:{classifier}?image_size=8"
    tap = [tap.name for tap in load_teacher(teacher).taps() if len(tap.shape) == 3][-1]
    changes = [f"method.teacher={teacher}", f"method.tap={tap}"]
    result = api.run("repfusion_debug", [*changes, "method.loss=rkd"], out=tmp_path / "run")
    assert any("teacher" in part for part in result["labels_behind"])
