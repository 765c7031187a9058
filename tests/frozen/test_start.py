"""A backbone of maps started from runs, official checkpoints and plain files: pytest tests/frozen/test_start.py"""

import json

import pytest
import torch
from safetensors.torch import save_file

from diffrep.errors import UserError
from diffrep.frozen import classifier_sources, start
from diffrep.frozen.start import begin
from diffrep.frozen.tokens import write_network
from diffrep.methods.base import save_student
from diffrep.models.addp_vit import MEAN, STD, ADDPVit, ADDPVitConfig
from diffrep.models.maps import MapBackbone
from diffrep.models.students import Student, StudentConfig, create
from diffrep.models.vit_students import vit_student
from diffrep.randomness import seeded

CONV = StudentConfig(name="conv_small", options={"widths": (4, 8, 8)})
VIT = {"patch_size": 4, "embed_dim": 16, "depth": 4, "num_heads": 2}


def built(config, names=(), seed=1):
    with seeded(seed, "test"):
        return MapBackbone(config, names)


def kept(folder, config, num_classes=0, card=None):
    """A finished run with a student."""
    folder.mkdir(exist_ok=True)
    with seeded(9, "test"):
        student = Student(config, num_classes)
    save_student(folder, student)
    (folder / "result.json").write_text(json.dumps(card or {"name": "distilled", "licence": "CC-BY-4.0"}))
    return student.backbone.state_dict()


def same(network, state):
    own = network.net.state_dict()
    return own and all(torch.equal(value, state[name]) for name, value in own.items())


# Runs of ours


def test_a_distilled_student_gives_its_maps_and_keeps_its_classifier(tmp_path):
    card = {"licence": "CC-BY-4.0", "labels_seen": {"student": 50}, "labels_behind": {"before: teacher": 7}}
    state = kept(tmp_path, CONV, 5, card)
    network = built(CONV)
    found = begin(network, str(tmp_path))
    assert same(network, state)
    assert (found.licence, found.labels_behind) == (
        "CC-BY-4.0",
        {"before: student": 50, "before: before: teacher": 7},
    )
    assert f"started from {tmp_path}: matched 18, missing none, left over none" in found.note


def test_what_lies_behind_the_maps_stays_behind_and_is_said(tmp_path):
    state = kept(tmp_path, CONV, 5)
    network = built(CONV, ("stem", "layer1"))
    found = begin(network, str(tmp_path))
    assert same(network, state) and found.fit.matched == 12
    assert "6 of its tensors are needed by no map (layer2.0.weight, ...)" in found.note


@pytest.mark.parametrize("pooling", ["avg", "token"])
def test_a_vit_leaves_its_last_norm_and_brings_its_positions(tmp_path, pooling):
    """avg has a norm behind the mean, token one behind the blocks; the table is resized from 4x4 to 8x8."""
    taught = StudentConfig(name="vit_base_patch16_224", options=VIT | {"img_size": 16, "global_pool": pooling})
    state = kept(tmp_path, taught, 3)
    wider = taught.model_copy(update={"options": taught.options | {"img_size": 32}})
    network = built(wider)
    found = begin(network, str(tmp_path))
    assert found.fit.is_whole and not found.fit.new
    assert same(network, state | {"pos_embed": network.net.pos_embed.data})
    places = state["pos_embed"][:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    places = torch.nn.functional.interpolate(places, size=(8, 8), mode="bicubic", align_corners=False)
    torch.testing.assert_close(network.net.pos_embed.data[:, 1:], places.flatten(2).transpose(1, 2))
    assert torch.equal(network.net.pos_embed.data[:, :1], state["pos_embed"][:, :1])


def test_a_square_table_is_resized_for_an_oblong_grid_of_as_many(tmp_path):
    taught = StudentConfig(name="vit_base_patch16_224", options=VIT | {"img_size": 16})
    state = kept(tmp_path, taught)
    network = built(taught.model_copy(update={"options": taught.options | {"img_size": (8, 32)}}))
    begin(network, str(tmp_path))
    assert network.net.pos_embed.shape == state["pos_embed"].shape
    assert not torch.allclose(network.net.pos_embed, state["pos_embed"])


def test_a_network_that_saw_images_in_another_way_is_refused(tmp_path):
    kept(tmp_path, CONV)
    other = CONV.model_copy(update={"mean": MEAN})
    with pytest.raises(UserError, match=r"saw images with mean \[0\.5, 0\.5, 0\.5\]; set method\.student\.mean"):
        begin(built(other), str(tmp_path))


def test_strictly(tmp_path):
    kept(tmp_path, CONV)
    wider = CONV.model_copy(update={"options": {"widths": (4, 8, 16)}})
    with pytest.raises(UserError, match=r"layer2.0.weight: \(8, 8, 3, 3\) there, \(16, 8, 3, 3\) here") as caught:
        begin(built(wider), str(tmp_path))
    assert "\n" not in str(caught.value)


def test_fresh_parts_of_a_wrapper_start_as_they_are(tmp_path):
    kept(tmp_path, CONV)
    network = built(CONV)
    network.net.stem.table = torch.nn.Parameter(torch.full((2,), 3.0))
    with pytest.raises(UserError, match=r"missing 1 \(stem.table\)"):
        begin(network, str(tmp_path))
    network.fresh = ("stem.table",)
    assert begin(network, str(tmp_path)).fit.new == ("stem.table",)
    assert network.net.stem.table.tolist() == [3.0, 3.0]


# ADDP


@pytest.fixture
def addp(tmp_path):
    """A folder with an ADDP network of 16 tokens, as diffrep convert leaves it."""
    small = {"embed_dim": 16, "depth": 2, "num_heads": 2, "decoder_depth": 1, "decoder_num_heads": 2}
    config = ADDPVitConfig(**small, image_size=8, patch_size=2, num_codes=11)
    with seeded(3, "test"):
        network = ADDPVit(config)
    write_network(tmp_path, "addp", network, "tiny", "CC-BY-NC-4.0")
    return tmp_path, network


def test_an_addp_encoder_gives_maps(addp):
    folder, network = addp
    config = vit_student(16, 2, network.config, False)
    own = built(config)
    found = begin(own, str(folder))
    assert (found.licence, found.fit.is_whole) == ("CC-BY-NC-4.0", True)
    assert own.strides == (2,) * 4 and own.net.pos_embed.shape == (1, 65, 16)
    assert torch.equal(own.net.blocks[1].mlp.fc1.weight, network.blocks[1].mlp.fc1.weight)


# Files of others


def wrapped(state, prefix="student.backbone."):
    """A checkpoint in the layout of RepFusion's distillation: meta, and student, head and projector side by side."""
    inside = {f"{prefix}{name}": value for name, value in state.items()}
    inside |= {"student.head.fc.weight": torch.zeros(2, 2), "distill_layer.0.weight": torch.zeros(3)}
    return {"meta": {"epoch": 200, "mmcls_version": "0.23"}, "state_dict": inside}


def body(name, seed=5):
    with seeded(seed, "test"):
        return {n: v for n, v in create(name, 7).state_dict().items() if not n.startswith("fc.")}


def test_an_official_distilled_checkpoint_is_cut_at_its_prefix(tmp_path):
    state, file = body("resnet18"), tmp_path / "epoch_200.pth"
    torch.save(wrapped(state), file)
    network = built(StudentConfig(name="resnet18", mean=MEAN, std=STD))
    found = begin(network, str(file))
    assert same(network, state) and found.fit.matched == len(state) == 120
    assert "student.backbone.* are 120 of its 122 tensors" in found.note and found.licence is None
    assert "which labels its weights have seen is not said there" in found.note


def test_an_official_checkpoint_that_lacks_something_is_refused(tmp_path):
    state, file = body("resnet18"), tmp_path / "latest.pth"
    torch.save(wrapped({n: v for n, v in state.items() if n != "bn1.weight"} | {"extra": torch.zeros(1)}), file)
    network = built(StudentConfig(name="resnet18"))
    before = {n: v.clone() for n, v in network.net.state_dict().items()}
    with pytest.raises(UserError, match=r"missing 1 \(bn1.weight\), left over 1 \(extra\), mismatched none"):
        begin(network, str(file))
    assert same(network, before)  # nothing half taken over


def test_the_official_hrnet_fits_the_body_alone(tmp_path):
    """Its 1,830 tensors; a run of ours has the classifier's maps besides, which are not needed."""
    network = built(StudentConfig(name="hrnet_w18"))
    state = {name: torch.full_like(value, 0.25) for name, value in network.net.state_dict().items()}
    assert len(state) == 1830
    torch.save(wrapped(state), tmp_path / "hrnet.pth")
    assert begin(network, str(tmp_path / "hrnet.pth")).fit.matched == 1830 and same(network, state)
    whole = create("hrnet_w18", 4).state_dict()
    save_file({n: v.contiguous() for n, v in whole.items()}, tmp_path / "whole.safetensors")
    found = begin(network, str(tmp_path / "whole.safetensors"))
    assert found.fit.is_whole and "124 of its tensors are needed by no map" in found.note
    assert same(network, whole)


def test_a_plain_file_with_a_classifier(tmp_path):
    with seeded(2, "test"):
        state = create("resnet18", 7).state_dict()
    save_file(state, tmp_path / "resnet18.safetensors")
    network = built(StudentConfig(name="resnet18"))
    assert begin(network, str(tmp_path / "resnet18.safetensors")).fit.matched == 120 and same(network, state)


def test_a_place_below_the_data_folder_is_found(tmp_path, monkeypatch):
    kept(tmp_path / "distilled", CONV)
    monkeypatch.setenv("DIFFREP_DATA", str(tmp_path))
    assert begin(built(CONV), "distilled").fit.matched == 18


def test_timms_own_weights(monkeypatch):
    """No network here: what timm would have fetched is made."""
    made, seen = create("resnet18", 7), []

    def known(name, options):
        seen.append(name)
        return classifier_sources.Source(f"timm:{name}", 7, lambda _: made, lambda _: made, MEAN, STD, 224, 3, "MIT")

    monkeypatch.setattr(start, "of_timm", known)
    network = built(StudentConfig(name="resnet18", mean=MEAN, std=STD))
    found = begin(network, "timm:resnet18.a1_in1k")
    assert same(network, made.state_dict()) and found.licence == "MIT" and seen == ["resnet18.a1_in1k"]
    with pytest.raises(UserError, match=r"set method\.student\.mean"):
        begin(built(StudentConfig(name="resnet18")), "timm:resnet18.a1_in1k")


def test_timm_without_a_network_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"cannot fetch timm:resnet18.a1_in1k \(.*give a weights file") as caught:
        begin(built(StudentConfig(name="resnet18", mean=MEAN, std=STD)), "timm:resnet18.a1_in1k")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "cannot be loaded"),
        (b"PK\x03\x04 half a file", "cannot be loaded"),
    ],
)
def test_damaged_files_are_refused(tmp_path, content, words):
    (tmp_path / "latest.pth").write_bytes(content)
    with pytest.raises(UserError, match=words):
        begin(built(CONV), str(tmp_path / "latest.pth"))


def test_nothing_there(tmp_path):
    with pytest.raises(UserError, match=r"no finished run .*valid besides: a weights file, timm:NAME"):
        begin(built(CONV), str(tmp_path / "nowhere"))
