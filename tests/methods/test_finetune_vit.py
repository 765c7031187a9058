"""Fine-tuning and probing a ViT, from its start to its scores: pytest tests/methods/test_finetune_vit.py"""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from diffrep.config import validate
from diffrep.data.batch import Batch, Mixture
from diffrep.data.datasets import DataConfig, ImageSet
from diffrep.data.feed import Feed
from diffrep.data.timm_views import TimmConfig
from diffrep.errors import Interrupted, UserError
from diffrep.evaluation.classify import student_scores
from diffrep.frozen.start import load_backbone
from diffrep.frozen.tokens import write_network
from diffrep.methods.base import save_student
from diffrep.methods.finetune import Finetune, FinetuneConfig, fold
from diffrep.models.addp_vit import MEAN, STD, ADDPVit, ADDPVitConfig, timm_vit
from diffrep.models.stored import load_student
from diffrep.models.students import Student, StudentConfig
from diffrep.randomness import Rows, seeded
from diffrep.training.config import TrainConfig
from diffrep.training.optim import LrScheduleConfig, OptimConfig
from diffrep.training.run import RunDir
from diffrep.training.trainer import Trainer

SIZE = {"image_size": 8, "patch_size": 2, "embed_dim": 16, "depth": 2, "num_heads": 4}
SHAPE = {"decoder_depth": 1, "decoder_num_heads": 4, "num_codes": 5, "init_std": 0.5}


def vit(**options):
    told = {"img_size": 8, "patch_size": 2, "embed_dim": 16, "depth": 2, "num_heads": 4, **options}
    return StudentConfig(name="vit_base_patch16_224", options=told, mean=MEAN, std=STD)


def built(num_classes=3, image_size=8, student=None, **settings):
    with seeded(0, "finetune"):
        return Finetune(FinetuneConfig(student=student or vit(), **settings), num_classes, image_size)


def images(count=6, size=8):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(2))


def batch(labels, target=None):
    return Batch(images(len(labels)), torch.tensor(labels), torch.arange(len(labels)), target=target)


def stepped(method, shown, progress=0.0):
    return method(shown, Rows(torch.Generator(), len(shown.images)), progress)


@pytest.fixture(scope="module")
def network():
    with seeded(1, "network"):
        made = ADDPVit(ADDPVitConfig(**SIZE, **SHAPE)).eval()
        for norm in (made.tokenizer_norm, made.norm):
            norm.weight.data.uniform_(0.5, 1.5), norm.bias.data.normal_()
        made.patch_embed.proj.bias.data.normal_()
    return made


@pytest.fixture
def released(tmp_path, network):
    """What diffrep convert makes of a released file."""
    write_network(tmp_path / "released", "addp", network, "addp_vit_tiny", "CC-BY-NC-4.0")
    return tmp_path / "released"


# Where it starts


@pytest.mark.parametrize("kept", [None, False, True])
def test_a_released_encoder_with_and_without_its_tokenizer_norm(released, network, kept):
    method = built(init=str(released), tokenizer_norm=kept, pooling="avg").eval()
    theirs = timm_vit(network, tokenizer_norm=bool(kept)).eval()
    x = method.student.normalise(images())
    mean = theirs.forward_features(x)[:, 1:].mean(1)
    torch.testing.assert_close(method.student.pooled(images()), F.layer_norm(mean, (16,), eps=1e-6))
    assert method.licence == "CC-BY-NC-4.0" and method.notes[0].startswith(f"started from {released}: matched")
    assert not method.loaded.missing and not method.loaded.left_over


def test_keeping_the_norm_gives_the_first_block_what_it_was_trained_with(released, network):
    backbone = built(init=str(released), tokenizer_norm=True).eval().student.backbone
    seen = []
    backbone.blocks[0].register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    student = built().student  # the same normalisation
    backbone.forward_features(student.normalise(images()))
    torch.testing.assert_close(seen[0], network.embed(images()))


@pytest.mark.parametrize("kept", [False, True])
def test_a_run_of_ours_exported_either_way_gives_both(tmp_path, network, kept):
    exported = Student(vit(global_pool="avg", pre_norm=kept))
    save_student(tmp_path, exported)
    write_network(tmp_path, "addp", network, "ours", "MIT")
    (tmp_path / "result.json").write_text(json.dumps({"licence": "MIT", "labels_seen": {"x": 3}}))
    method = built(init=str(tmp_path), tokenizer_norm=not kept)
    wanted = timm_vit(network, tokenizer_norm=not kept).state_dict()
    assert torch.equal(method.student.backbone.pos_embed, wanted["pos_embed"])
    assert method.labels_behind == {"before: x": 3}
    as_exported = built(init=str(tmp_path), student=vit(pre_norm=kept, global_pool="avg"))
    assert torch.equal(as_exported.student.backbone.pos_embed, exported.backbone.pos_embed)


def test_the_last_norm_starts_afresh_where_pooling_differs(tmp_path):
    save_student(tmp_path, Student(vit(global_pool="avg")))
    (tmp_path / "result.json").write_text("{}")
    found = built(init=str(tmp_path), pooling="cls").loaded
    assert set(found.new) == {"norm.weight", "norm.bias", "head.weight", "head.bias"}
    same = built(init=str(tmp_path), pooling="avg").loaded
    assert set(same.new) == {"head.weight", "head.bias"} and same.matched == found.matched + 2


def test_pooling_reads_the_class_token_or_the_mean():
    for pooling in ("avg", "cls"):
        method = built(pooling=pooling).eval()
        backbone, x = method.student.backbone, method.student.normalise(images())
        features = backbone.forward_features(x)
        wanted = backbone.fc_norm(features[:, 1:].mean(1)) if pooling == "avg" else features[:, 0]
        torch.testing.assert_close(method.student.pooled(images()), wanted)
        assert isinstance(backbone.norm, nn.LayerNorm) == (pooling == "cls")


@pytest.mark.parametrize("size", [6, 8, 12])
def test_the_position_table_follows_the_image(released, network, size):
    method = built(init=str(released), image_size=size, student=vit(img_size=size))
    table, own = network.pos_embed.detach(), method.student.backbone.pos_embed
    grid = size // 2
    assert own.shape == (1, 1 + grid * grid, 16) and torch.equal(own[:, 0], table[:, 0])
    if size == 8:
        assert torch.equal(own, table)
    square = table[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
    wanted = F.interpolate(square, size=(grid, grid), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
    torch.testing.assert_close(own[:, 1:], wanted)
    assert method.student(images(2, size)).shape == (2, 3)


@pytest.mark.golden(of=lambda case: "outputs/vit.pos_embed_interpolated" in case.keys)
def test_the_resized_table_is_the_official_one(golden_case, tmp_path):
    wanted = golden_case.get("outputs/vit.pos_embed_interpolated")
    state = golden_case.under("weights/")
    patch = state["patch_embed.proj.weight"].shape[-1]
    there, here = (round((table.shape[1] - 1) ** 0.5) * patch for table in (state["pos_embed"], wanted))
    told = {"patch_size": patch, "embed_dim": wanted.shape[-1], "depth": 1, "num_heads": 1, "global_pool": "avg"}
    source = Student(vit(**told, img_size=there))
    source.backbone.pos_embed.data = state["pos_embed"]
    save_student(tmp_path, source)
    (tmp_path / "result.json").write_text("{}")
    method = built(init=str(tmp_path), image_size=here, student=vit(**told, img_size=here))
    torch.testing.assert_close(method.student.backbone.pos_embed.detach(), wanted, atol=2e-4, rtol=1e-4)


def refused(**settings):
    with pytest.raises(UserError) as caught:
        built(**settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_does_not_fit_is_refused(released, tmp_path):
    assert "is no finished run (no result.json), and holds no ADDP network" in refused(init=str(tmp_path / "nowhere"))
    told = refused(init=str(released), student=vit(embed_dim=24))
    assert "a addp_vit_tiny, does not fit vit_base_patch16_224: matched 0" in told
    other = StudentConfig(name="vit_base_patch16_224", options=vit().options)
    assert f"{released} saw images with mean [0.485, 0.456, 0.406]; set method.student.mean to it" in refused(
        init=str(released), student=other
    )
    conv = StudentConfig(name="conv_small")
    assert "conv_small' does not take options {'drop_path_rate': 0.1}" in refused(student=conv, drop_path=0.1)
    fast = StudentConfig(name="fast_cnn", options={"widths": [8, 8, 8]})
    assert "the head of fast_cnn is no linear layer with biases" in refused(student=fast, image_size=16, head_std=0.1)
    with pytest.raises(UserError, match="head_norm is part of a linear probe: it needs head_first 1"):
        validate(FinetuneConfig, {"student": vit(), "head_norm": True}, "here")


# Drop path, head, losses


def test_drop_path_rises_linearly():
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in built(
        student=vit(depth=5), drop_path=0.2
    ).student.backbone.blocks]  # fmt: skip
    assert rates == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2])
    assert not any(getattr(block.drop_path1, "drop_prob", 0.0) for block in built().student.backbone.blocks)


def test_the_head_starts_as_small_as_asked():
    head = built(num_classes=400, head_std=2e-5).student.backbone.head
    assert float(head.weight.detach().std()) == pytest.approx(2e-5, rel=0.05) and not head.bias.any()


def test_soft_cross_entropy_and_bce_are_timms():
    from timm.loss import BinaryCrossEntropy, SoftTargetCrossEntropy

    labels, others = [0, 1, 2, 0, 1, 1], torch.tensor([1, 1, 0, 2, 1, 0])
    for share in (0.3, 1.0):
        soft = torch.stack([F.one_hot(torch.tensor(labels), 3), F.one_hot(others, 3)]) * 0.9 + 0.1 / 3
        target = share * soft[0] + (1 - share) * soft[1]
        for loss, theirs in (("ce", SoftTargetCrossEntropy()), ("bce", BinaryCrossEntropy())):
            method = built(loss=loss, label_smoothing=0.1).eval()
            found = stepped(method, batch(labels, Mixture(others, share)))["loss"]
            torch.testing.assert_close(found, theirs(method.student(images()), target))
    method = built(loss="bce", label_smoothing=0.1).eval()
    plain = stepped(method, batch(labels))["loss"]
    torch.testing.assert_close(plain, BinaryCrossEntropy(0.1)(method.student(images()), torch.tensor(labels)))


@pytest.mark.parametrize("loss", ["ce", "bce"])
def test_hidden_labels_take_no_part(loss):
    method = built(loss=loss).eval()
    logits = method.student(images())
    functions = {"ce": F.cross_entropy, "bce": F.binary_cross_entropy_with_logits}

    def of(row, label):
        return functions[loss](logits[row], F.one_hot(torch.tensor(label), 3).float())

    found = stepped(method, batch([0, -1, 2, -1, 1, -1], Mixture(torch.tensor([1, 1, -1, -1, -1, 0]), 0.25)))["loss"]
    wanted = 0.25 * (of(0, 0) + of(2, 2) + of(4, 1)) + 0.75 * (of(0, 1) + of(1, 1) + of(5, 0))
    torch.testing.assert_close(found, wanted / 6)


# Linear probe


def probe(**settings):
    return built(head_first=1.0, head_norm=True, head_std=0.01, **settings)


def test_of_a_probe_only_the_head_learns_behind_a_batch_norm():
    method = probe().train()
    assert method.uses_all_parameters
    head = method.student.backbone.head
    assert [p for p in method.parameters() if p.requires_grad] == [*head.parameters()]
    assert method.parameter_groups() == {"student": [], "head": [*head.parameters()]}
    shown = batch([0, 1, 2, 0, 1, 2])
    vector = method.student.eval().pooled(shown.images)
    method.train()
    normed = (vector - vector.mean(0)) / (vector.var(0, unbiased=False) + 1e-6).sqrt()
    found = stepped(method, shown, progress=0.99)["loss"]
    torch.testing.assert_close(found, F.cross_entropy(head(normed), shown.labels))
    found.backward()
    assert head.weight.grad is not None and method.student.backbone.pos_embed.grad is None


def test_the_batch_norm_is_folded_into_the_exported_head(tmp_path):
    method = probe().train()
    for _ in range(5):
        stepped(method, batch([0, 1, 2, 0, 1, 2]))
    method.eval()
    vector = method.student.pooled(images())
    wanted = method.student.backbone.head(method.head_norm(vector))
    method.export(tmp_path)
    torch.testing.assert_close(method.student(images()), wanted)
    torch.testing.assert_close(load_student(tmp_path / "weights.safetensors").eval()(images()), wanted)
    assert not [name for name in load_file(tmp_path / "weights.safetensors") if "head_norm" in name]
    method.export(tmp_path)  # twice is once
    torch.testing.assert_close(method.student(images()), wanted)


def test_folding_is_exact_algebra():
    norm, head = nn.BatchNorm1d(4, affine=False).double(), nn.Linear(4, 3).double()
    norm(torch.randn(64, 4).double() * 3 + 2)
    x = torch.randn(5, 4).double()
    wanted = head(norm.eval()(x))
    fold(norm, head)
    torch.testing.assert_close(head(x), wanted)
    torch.testing.assert_close(norm(x), x)


# Whole runs


def image_set(split="train", count=24):
    pixels = torch.randint(0, 256, (count, 3, 8, 8), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    return ImageSet("tiny", split, ("a", "b", "c"), "ours", pixels, torch.arange(count) % 3)


FULL = OptimConfig(
    base_lr=0.1, weight_decay=0.05, weight_decay_exclude_1d=True, layer_decay=0.65,
    lr_schedule=LrScheduleConfig(warmup_steps=2, warmup_from_zero=True),
)  # fmt: skip
VIEWS = TimmConfig(rand_augment="rand-m9-mstd0.5-inc1", erasing=0.25, mixup=0.8, cutmix=1.0)
TRAIN = {"steps": 6, "batch_size": 8, "log_every": 1, "checkpoint_every": 2}


def trainer(folder, method, optim=FULL, **train):
    config = TrainConfig(**TRAIN | train)
    feed = Feed(image_set(), DataConfig(source="digits", augment="flip"), 8, 5, None, method.config.augment)
    folder.mkdir(parents=True, exist_ok=True)
    return Trainer(method, feed, optim, config, 5, RunDir(folder))


def everything(released, **settings):
    return built(init=str(released), pooling="avg", drop_path=0.3, label_smoothing=0.1, augment=VIEWS, **settings)


@pytest.mark.parametrize("kind", ["finetune", "probe"])
def test_resumed_is_unbroken_bit_for_bit_with_all_of_it_on(tmp_path, released, kind):
    def method():
        return everything(released) if kind == "finetune" else probe(init=str(released), augment=VIEWS)

    optim = FULL if kind == "finetune" else OptimConfig(name="lars", lr=1.0)
    whole, again = method(), method()
    trainer(tmp_path / "whole", whole, optim).fit()
    steps = iter([False, False, True])
    with pytest.raises(Interrupted, match="stopped at step 3 of 6"):
        trainer(tmp_path / "broken", method(), optim).fit(lambda: next(steps))
    trainer(tmp_path / "broken", again, optim).fit()
    theirs = whole.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in again.state_dict().items())
    started = method().state_dict()
    assert not torch.equal(theirs["student.backbone.head.weight"], started["student.backbone.head.weight"])


def test_micro_batches_learn_the_same(tmp_path, released):
    """Without drop path, whose draws are of a whole forward pass."""
    found = []
    for size in (None, 3):
        method = built(init=str(released), augment=VIEWS)
        trainer(tmp_path / str(size), method, OptimConfig(name="sgd", lr=0.1), micro_batch_size=size).fit()
        found.append(method.state_dict())
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("pooling", ["avg", "cls"])
def test_an_encoder_as_it_is_has_probe_and_neighbour_scores(released, pooling):
    student = built(init=str(released), pooling=pooling).student
    scores = student_scores(student, image_set(), image_set("test"), (6, 24), 1, 0, torch.device("cpu"))
    assert {"linear_probe_6", "linear_probe_24", "knn_6", "knn_24", "top1"} <= scores.keys()
    assert scores["knn_24"] == 100  # its own images: the nearest is itself


def test_loading_says_what_is_new(released):
    fit = load_backbone(Student(vit(global_pool="avg"), 3), released)
    assert set(fit.new) == {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"} and fit.is_whole
