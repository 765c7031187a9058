"""Detection: what a step is, where it starts, what it learns: pytest tests/methods/test_detect.py"""

import json

import pytest
import torch
from safetensors.torch import load_file
from toy_objects import CATEGORY_IDS, CLASSES, object_set, shapes

from diffrep import api
from diffrep.assemble import multiply_adds_per_image
from diffrep.data.batch import Batch
from diffrep.data.datasets import DataConfig
from diffrep.data.dense import load_dense
from diffrep.data.dense_feed import DenseFeed
from diffrep.data.detect_views import DetectTraining, DetectViews
from diffrep.errors import UserError
from diffrep.evaluation.detection import detection_scores
from diffrep.methods.detect import Detect, DetectConfig
from diffrep.models.mask_rcnn import HeadConfig
from diffrep.models.students import StudentConfig
from diffrep.models.vitdet import RelativeAttention
from diffrep.randomness import Rows, seeded, stream

HEADS = HeadConfig(
    channels=8, box_width=16, num_convs=1, anchors=(8, 16, 32, 64, 128), candidates=(60, 60), proposals=30, regions=16,
    detections=8,
)  # fmt: skip
VIT = {"img_size": 32, "embed_dim": 16, "depth": 4, "num_heads": 2}
IMAGES = object_set([shapes(48, 64, 3, seed=k) for k in range(4)])
CPU = torch.device("cpu")


def settings(**changes):
    values = {
        "student": StudentConfig(name="vit_tiny_patch16_224", options=VIT), "views": DetectViews(size=64), "window": 2,
        "heads": HEADS,
    }  # fmt: skip
    return DetectConfig(**values | changes)


def build(images=IMAGES, **changes):
    with seeded(0, "test"):
        return Detect(settings(**changes), images).train()


def batch(method, step=0, rows=(0, 1), images=IMAGES, total=4):
    feed = DenseFeed(images, DetectTraining(method.config.views, images), total, 0)
    return feed.batch(step, list(rows), CPU)


def losses(method, shown):
    with seeded(0, "draws"):
        return method(shown, Rows(stream(0, "step"), len(shown.images)), 0.0)


# A step


def test_the_loss_is_the_sum_of_five():
    method = build()
    found = losses(method, batch(method))
    parts = {name: float(value.detach()) for name, value in found.items()}
    assert list(parts) == ["loss", "objectness_loss", "proposal_loss", "class_loss", "box_loss", "mask_loss"]
    assert parts["loss"] == pytest.approx(sum(parts.values()) - parts["loss"], rel=1e-6)


def test_every_parameter_learns_in_its_group():
    method = build()
    losses(method, batch(method))["loss"].backward()
    assert [name for name, p in method.named_parameters() if p.grad is None] == []
    groups = method.parameter_groups()
    assert {id(p) for group in groups.values() for p in group} == {id(p) for p in method.network.parameters()}
    assert {id(p) for p in groups["student"]} == {id(p) for p in method.backbone.parameters()}
    assert any(name.endswith("rel_pos_h") for name, _ in method.backbone.named_parameters())


def test_layers_from_the_patches_to_the_heads():
    method = build()
    layers, tables = method.depths()
    names = {id(p): name for name, p in method.network.backbone.net.named_parameters()}
    told = [{names.get(id(p), "head").split(".attn")[0] for p in layer} for layer in layers]
    assert told[0] == {"pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"} and told[-1] == {"head"}
    assert len(told) == 6 and all(any(n.startswith(f"blocks.{k}") for n in told[k + 1]) for k in range(4))
    assert {names[id(p)] for p in tables} == {"pos_embed"}
    assert {id(p) for layer in layers for p in layer} == {id(p) for p in method.network.parameters()}


def test_which_blocks_see_everything():
    def windows(method):
        return [block.attn.window for block in method.network.backbone.net.blocks]

    assert windows(build(global_blocks=(3, 1))) == [2, 0, 2, 0]
    eight = build(student=StudentConfig(name="vit_tiny_patch16_224", options=VIT | {"depth": 8}), window=3)
    assert windows(eight) == [3, 0] * 4  # the last of each quarter
    attentions = [m for m in build(global_blocks=(3,)).modules() if isinstance(m, RelativeAttention)]
    assert [len(a.rel_pos_w) for a in attentions] == [3, 3, 3, 7]  # windows of 2; 64 pixels are 4 patches


def test_images_are_normalised_once():
    method = build(student=StudentConfig(name="vit_tiny_patch16_224", options=VIT, mean=(0.2,), std=(0.5,)))
    seen = []
    method.network.backbone.net.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    shown = batch(method)
    losses(method, shown)
    method.eval().found(shown.images, [(64, 64)] * 2)
    assert len(seen) == 2 and all(torch.equal(x, (shown.images - 0.2) / 0.5) for x in seen)


def test_in_bf16_the_losses_are_float32():
    method = build()
    with torch.autocast("cpu", torch.bfloat16):
        found = losses(method, batch(method))
    found["loss"].backward()
    assert all(value.dtype == torch.float32 and value.isfinite() for value in found.values())


def test_a_batch_of_pictures_without_objects():
    method, none = build(), object_set([shapes(48, 64, 0)])
    shown = batch(method, images=none, rows=(0,), total=1)
    found = losses(method, shown)
    found["loss"].backward()
    assert all(value.isfinite() for value in found.values()) and found["mask_loss"] == 0


def test_the_same_draws_give_the_same_bits():
    method = build()
    shown = batch(method)
    first, again = losses(method, shown), losses(method, batch(method))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(losses(method, batch(method, step=1))["loss"], first["loss"])


def test_a_step_is_counted_without_computing():
    method = build()
    one = multiply_adds_per_image(method, method.image_size)
    wider = multiply_adds_per_image(build(heads=HEADS.model_copy(update={"regions": 32})), 64)
    assert 0 < one < wider < 2 * one and method.image_size == 64


def test_the_published_sizes_are_counted():
    with torch.device("meta"):
        method = Detect(DetectConfig(student=StudentConfig(name="vit_base_patch16_224")), IMAGES)
    # ViTDet-B: 111 M parameters with the heads of 2 classes; its paper counts 111 M
    assert sum(p.numel() for p in method.network.parameters()) == pytest.approx(111e6, rel=0.02)
    assert method.image_size == 1024 and method.network.backbone.strides == [4, 8, 16, 32, 64]


# Where it starts


def test_it_starts_from_an_encoder_run(tmp_path):
    """MAE's encoder of 8-pixel images; its positions are resized, its class token goes, tables start at 0."""
    api.run("mae_debug", out=tmp_path / "mae", overrides=["method.network.patch_size=4", "evaluate.probe_labels=[]"])
    card = json.loads((tmp_path / "mae/config.json").read_text())["student"]
    method = build(
        student=StudentConfig.model_validate(card), init=str(tmp_path / "mae"), views=DetectViews(size=32), window=2
    )
    kept, net = load_file(tmp_path / "mae/weights.safetensors"), method.network.backbone.net
    state = net.state_dict()
    same = [name for name in kept if name in state]
    assert all(torch.equal(kept[name], state[name]) for name in same) and "pos_embed" in same
    assert {name.split(".")[0] for name in kept} - {name.split(".")[0] for name in state} <= {
        "cls_token",
        "norm",
        "fc_norm",
    }
    assert method.loaded is not None and "started from" in method.notes[0]
    assert not any(value.any() for name, value in state.items() if "rel_pos" in name)
    losses(method, batch(method))["loss"].backward()


def test_what_is_exported_can_be_loaded(tmp_path):
    method, other = build(), build()
    shown = batch(method)
    with torch.no_grad():
        for parameter in method.network.parameters():
            parameter.add_(0.01)
    method.export(tmp_path)
    card = json.loads((tmp_path / "config.json").read_text())
    assert card == {"task": "detect", "classes": list(CLASSES), "category_ids": CATEGORY_IDS}
    other.load(tmp_path)
    assert torch.equal(losses(method, shown)["loss"], losses(other, shown)["loss"])
    with pytest.raises(UserError, match="weights do not fit its recipe"):
        build(global_blocks=(3,)).load(tmp_path)


# What it learns

SEEN = DetectViews(size=128, scale=(1.0, 1.0), flip=0.0)
LEARNER = {
    "student": StudentConfig(
        name="vit_tiny_patch16_224", options={"img_size": 128, "embed_dim": 64, "depth": 4, "num_heads": 4}
    ),
    "views": SEEN, "window": 4,
    "heads": HeadConfig(
        channels=32, box_width=64, num_convs=1, anchors=(8, 16, 32, 64, 128), candidates=(100, 100), proposals=50,
        regions=48, detections=20,
    ),
}  # fmt: skip


def by_heart(images, steps, lr=2e-3):
    """All pictures in every step; the rate falls to 0. Returns the losses of each step and the scores."""
    method = build(images, **LEARNER)
    feed = DenseFeed(images, DetectTraining(SEEN, images), len(images), 0)
    optimizer, found = torch.optim.AdamW(method.parameters(), lr), []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * min(1.0, (step + 1) / 20, 2 - 2 * step / steps)
        with seeded(0, "dropout", step):
            parts = method(feed.batch(step, list(range(len(images))), CPU), None, step / steps)
        optimizer.zero_grad()
        parts["loss"].backward()
        optimizer.step()
        found.append({name: float(value.detach()) for name, value in parts.items()})
    return found, detection_scores(method.eval(), images, CPU)


def test_it_learns_two_photographs_by_heart(shared):
    images = load_dense(DataConfig(source=f"coco:{shared}/data/fixtures/coco", only_part="test"), "train", "detect")
    found, scores = by_heart(images.subset(torch.tensor([0, 1])), 120)
    assert found[0]["loss"] > 2 and found[-1]["loss"] < 0.4, found[-1]
    assert found[-1]["objectness_loss"] < 0.05 and found[-1]["mask_loss"] < 0.3
    assert scores["box_ap"] > 40 and scores["mask_ap50"] > 60, scores


@pytest.mark.slow
def test_it_learns_all_photographs_to_near_zero_loss(shared):
    images = load_dense(DataConfig(source=f"coco:{shared}/data/fixtures/coco", only_part="test"), "train", "detect")
    found, scores = by_heart(images, 900)
    assert found[-1]["loss"] < 0.15 and scores["box_ap50"] > 85 and scores["mask_ap50"] > 85, (found[-1], scores)


# Whole runs


def test_the_debug_recipe_runs_to_its_report(shared, tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFREP_DATA", str(shared))
    whole = api.run("detect_coco_vitdet_debug", out=tmp_path / "whole")
    assert {"box_ap", "mask_ap", "box_ap50", "classes"} <= whole["scores"].keys()
    assert len(json.loads((tmp_path / "whole/samples/predictions.json").read_text())) == 2
    lines = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2] and all("mask_loss" in line for line in lines)


# Refusals


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"views": DetectViews(size=60)}, "method.views.size 60: takes multiples of 16, one patch"),
        ({"global_blocks": (4,)}, "method.global_blocks 4: the network has blocks 0 to 3"),
        ({"student": StudentConfig(name="resnet10t")}, "a detector stands on a plain ViT"),
        (
            {"student": StudentConfig(name="vit_tiny_patch16_224", options=VIT | {"patch_size": 2})},
            "patches of 2 pixels; the pyramid needs 4, 8, 16 or 32",
        ),
        ({"init": "nowhere"}, "nowhere"),
    ],
)
def test_networks_that_do_not_fit_are_one_line(changes, words):
    with pytest.raises(UserError) as caught:
        build(**changes)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_named_maps_are_refused():
    with pytest.raises(ValueError, match="the pyramid is made of the last map alone"):
        settings(maps=("blocks.1",))


def test_a_batch_says_what_it_is_of():
    shown = batch(build(), rows=(2, 0))
    assert isinstance(shown, Batch) and shown.labels is None and len(shown.target) == 2
    assert shown.images.shape == (2, 3, 64, 64) and shown.images.min() >= 0 and shown.images.max() <= 1
