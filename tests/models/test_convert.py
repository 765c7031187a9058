"""Weights of others under our names: pytest tests/models/test_convert.py"""

import re

import pytest
import torch

from diffrep.errors import UserError
from diffrep.models import cifar, convert
from diffrep.models.students import create

OFFICIAL_CLASSIFIER = {"vgg": "classifier.", "mobilenetv2": "classifier.0.", "shufflenet": "linear."}


def network_state(name, num_classes=10, **options):
    with torch.device("meta"):
        return create(name, num_classes, **options).state_dict()


def officially(name, state, classifier=None):
    """Our names -> those of the code that published the family."""
    four_stages = any(key.startswith("layer4") for key in state)
    known = next((c for family, c in OFFICIAL_CLASSIFIER.items() if name.startswith(family)), "fc.")
    classifier = classifier or ("linear." if four_stages else known)
    named = {re.sub(r"^fc\.", classifier, key): value for key, value in state.items()}
    return {k.replace(".downsample.", ".shortcut."): v for k, v in named.items()} if four_stages else named


def same(found, wanted):
    return list(found) == list(wanted) and all(found[name] is wanted[name] for name in wanted)


@pytest.mark.parametrize("name", cifar.ENTRIES)
def test_official_names_come_home(name):
    ours = network_state(name)
    theirs = officially(name, ours)
    assert len(theirs) == len(ours)
    assert same(convert.rename(theirs), ours)
    shuffled = dict(reversed(theirs.items()))
    assert same(convert.fitted(shuffled, ours, "file"), ours)
    assert same(convert.rename(ours), ours)  # ours stay


@pytest.mark.parametrize("wrapper", [None, *convert.WRAPPERS])
@pytest.mark.parametrize("prefix", ["", "module.", "module.module."])
def test_what_is_wrapped_around_weights_is_taken_off(wrapper, prefix):
    """Files of DataParallel, of trainers that keep more than weights, of torch before it counted batches."""
    ours = network_state("resnet8_cifar", shortcut="pad")
    state = officially("", {f"{prefix}{k}": v for k, v in ours.items() if not k.endswith(convert.COUNTER)})
    checkpoint = {"epoch": 3, "best_prec1": 91.7, wrapper: state} if wrapper else state
    found = convert.fitted(convert.unwrap(checkpoint, "file"), ours, "file")
    assert list(found) == list(ours)
    counters = [name for name in ours if name.endswith(convert.COUNTER)]
    assert len(counters) == 7 and all(found[name] is ours[name] for name in ours.keys() - set(counters))
    assert all(found[name].shape == () and found[name].dtype == torch.int64 for name in counters)


def test_weights_before_their_average():
    state, average = {"a": torch.zeros(1)}, {"a": torch.ones(1)}
    assert convert.unwrap({"ema": average, "model": state}, "file") == state
    assert convert.unwrap({"ema": average, "epoch": 3}, "file") == average
    assert convert.unwrap({"state_dict": {"model": state}}, "file") == state


def endless():
    checkpoint = {}
    checkpoint["model"] = checkpoint
    return checkpoint


@pytest.mark.parametrize(
    "checkpoint, words",
    [
        (torch.zeros(3), "holds a Tensor and no weights by name"),
        ({}, "holds a dict and no weights"),
        ([{"a": torch.zeros(1)}], "holds a list"),
        ({"epoch": 3, "optimizer": {}}, "file holds epoch, optimizer besides tensors, and no weights under model, st"),
        ({"model": {}}, "holds a dict and no weights"),
        (endless(), "holds model besides tensors"),
        ({"a\nb": 1}, "holds a b besides tensors"),
    ],
)
def test_what_holds_no_weights_is_refused(checkpoint, words):
    with pytest.raises(UserError) as caught:
        convert.unwrap(checkpoint, "file")
    assert words in str(caught.value) and "\n" not in str(caught.value)


def refused(state, wanted):
    with pytest.raises(UserError) as caught:
        convert.fitted(state, wanted, "file")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_missing_or_left_over_is_listed():
    ours = network_state("resnet8_cifar")
    state = {k: v for k, v in ours.items() if not k.startswith("bn1.")} | {"extra.weight": torch.zeros(1)}
    said = refused(state, ours)
    assert "4 missing (bn1.weight, bn1.bias, bn1.running_mean, ...); 1 left over (extra.weight)" in said
    assert refused({**ours, "conv1.weight": torch.zeros(16, 1, 3, 3)}, ours).startswith(
        "file: 1 of another shape (conv1.weight (16, 1, 3, 3) instead of (16, 3, 3, 3))"
    )


def test_two_tensors_for_one_place_are_refused():
    ours = network_state("resnet8_cifar")
    for state in ({**ours, "linear.weight": torch.zeros(10, 64)}, {"linear.weight": torch.zeros(10, 64), **ours}):
        assert "1 left over (linear.weight)" in refused(state, ours)


def test_weights_of_another_depth_are_refused_with_what_they_are():
    said = refused(network_state("resnet20_cifar", shortcut="pad"), network_state("resnet56_cifar"))
    assert "missing (layer1.3.conv1.weight" in said
    assert said.endswith("by its names it is resnet20_cifar with options {'shortcut': 'pad'} of 10 classes")


# Which network is it


@pytest.mark.parametrize("name", cifar.ENTRIES)
def test_every_network_is_recognised_by_its_official_names(name):
    found = convert.recognise(officially(name, network_state(name, 23)))
    assert (found.architecture, found.options, found.num_classes, found.doubt) == (name, {}, 23, "")


@pytest.mark.parametrize("name", ["resnet20_cifar", "resnet110_cifar", "resnet32x4_cifar"])
def test_padded_shortcuts_are_recognised(name):
    state = officially(name, network_state(name, shortcut="pad"), classifier="linear.")
    assert convert.recognise(state) == convert.Recognised(name, 10, {"shortcut": "pad"})


def test_grey_images_are_recognised():
    assert convert.recognise(network_state("vgg8_cifar", in_chans=1)).options == {"in_chans": 1}


@pytest.mark.parametrize(
    "name, doubted", [("resnet18_cifar", True), ("resnet34_cifar", True), ("resnet50_cifar", False)]
)
def test_what_names_cannot_tell_is_said(name, doubted):
    """Ours under timm's names, or DM-KD's without the ReLU behind the stem: the tensors are the same."""
    assert bool(convert.recognise(network_state(name)).doubt) == doubted


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "vgg11_bn", "mobilenetv2_050", "vit_tiny_patch16_224",
                                  "conv_small", "wide_resnet50_2"])  # fmt: skip
def test_other_networks_are_not_taken_for_ours(name):
    assert convert.recognise(network_state(name)) is None


FC = {"fc.weight": torch.zeros(2, 2)}


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"fc.weight": torch.zeros(())},
        FC,
        FC | {"block1.layer.0.conv1.weight": torch.zeros(())},
        FC | {"block1.layer.0.conv1.weight": torch.zeros(7, 16, 3, 3)},
        FC | {"conv1.weight": torch.zeros(()), "layer3.0.x": torch.zeros(1), "layer4.0.x": torch.zeros(1)},
        FC | {f"layer3.{i}.x": torch.zeros(1) for i in range(99)},
    ],
)
def test_nonsense_is_not_taken_for_a_network(state):
    assert convert.recognise(state) is None
