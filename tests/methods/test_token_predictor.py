"""MAGE's predictor learns, with tokens dropped: pytest tests/methods/test_token_predictor.py"""

import pytest
import tiny
import torch
from pydantic import ValidationError
from torch import nn

from diffrep import losses
from diffrep.data.batch import Batch
from diffrep.diffusion.masking import drawn_counts, lowest
from diffrep.errors import UserError
from diffrep.files import read_json, write_json
from diffrep.methods.finetune import Finetune, FinetuneConfig
from diffrep.methods.token_predictor import TokenPredictorMethod, TokenPredictorMethodConfig
from diffrep.models.depths import layers
from diffrep.models.masked_vit import TokenPredictor, TokenPredictorConfig, TransformerConfig
from diffrep.randomness import Rows, seeded
from diffrep.training.optim import OptimConfig

SMALL = {"embed_dim": 16, "depth": 1, "num_heads": 2, "decoder_depth": 1, "decoder_num_heads": 2}
NETWORK = TransformerConfig(**SMALL, dropout=0.0, init_std=0.5)


@pytest.fixture
def method(token_networks):
    """method(image_size, ...): always the same initialisation."""

    def make(image_size=8, **settings):
        config = TokenPredictorMethodConfig(tokenizer=token_networks, network=NETWORK, **settings)
        with seeded(3, "predictor"):
            return TokenPredictorMethod(config, 2, image_size).train()

    return make


def network(num_tokens=4, **changes):
    with seeded(1, "network"):
        return TokenPredictor(
            TokenPredictorConfig(**SMALL | {"dropout": 0.0} | changes, num_codes=5, num_tokens=num_tokens)
        )


# Dropped tokens


def test_what_is_left_out_and_what_stands_in_its_place():
    """A tiny case enumerated: without blocks, each slot of the decoder's input is known from the tables."""
    net = network()
    net.blocks, net.norm, net.decoder_blocks = nn.Identity(), nn.Identity(), nn.Identity()
    ids = torch.tensor([[3, 1, 4, 0], [2, 2, 0, 1]])
    mask = torch.tensor([[True, False, True, True], [True, True, True, False]])
    shown = torch.tensor([[1, 2], [0, 3]])  # of the masked ones 2 in the first image, 0 in the second
    words, places = net.token_emb.word_embeddings.weight, net.token_emb.position_embeddings.weight
    feature = {  # (image, slot): the class slot, then what is shown
        (0, 0): (5 + 76, 0), (0, 2): (1, 2), (0, 3): (5 + 1000, 3),
        (1, 0): (5 + 76, 0), (1, 1): (5 + 1000, 1), (1, 4): (1, 4),
    }  # fmt: skip
    told = {key: net.token_emb.LayerNorm(words[row] + places[place]) for key, (row, place) in feature.items()}
    into_decoder = [
        [told[0, 0], told[0, 0], told[0, 2], told[0, 0], told[0, 0]],  # only token 1 is visible
        [told[1, 0], told[1, 0], told[1, 0], told[1, 0], told[1, 4]],
    ]
    seen = []
    net.decoder_blocks.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    net(ids, mask, shown=shown)
    for image, row in enumerate(into_decoder):
        for slot, value in enumerate(row):
            wanted = net.decoder_embed(value) + net.decoder_pos_embed_learned[0, slot]
            torch.testing.assert_close(seen[0][image, slot], wanted, msg=f"image {image}, slot {slot}")
    encoded = net.encode(ids, mask, shown)
    for image, slots in enumerate(([0, 2, 3], [0, 1, 4])):
        for position, slot in enumerate(slots):
            torch.testing.assert_close(encoded[image, position], told[image, slot])


def test_to_show_everything_is_to_drop_nothing():
    net = network()
    ids, mask = torch.tensor([[3, 1, 4, 0]]), torch.tensor([[True, False, True, True]])
    torch.testing.assert_close(net(ids, mask, shown=torch.arange(4)[None]), net(ids, mask))


def test_dropped_tokens_change_nothing_and_shown_ones_do():
    net, mask = network(), torch.tensor([[True, False, True, False]])
    ids, shown = torch.tensor([[3, 1, 4, 0]]), torch.tensor([[1, 3]])
    before = net(ids, mask, shown=shown)
    assert torch.equal(before, net(torch.tensor([[0, 1, 2, 0]]), mask, shown=shown))
    assert not torch.equal(before, net(torch.tensor([[3, 2, 4, 0]]), mask, shown=shown))
    assert not torch.allclose(before, net(ids, mask))  # the mask's embeddings are seen there
    table = torch.autograd.grad(before.square().sum(), net.token_emb.position_embeddings.weight)[0]
    assert [bool(row.any()) for row in table] == [True, False, True, False, True]


@pytest.mark.parametrize("drop_ratio, tokens, dropped", [(0.5, 16, 8), (0.5, 5, 3), (0.3, 16, 5), (0.01, 16, 1)])
def test_masked_tokens_alone_are_dropped(method, drop_ratio, tokens, dropped):
    """ceil(drop_ratio L), inside the mask that the same order makes, for every share of the law."""
    made, order = method(drop_ratio=drop_ratio), torch.rand(6, tokens)
    shown = made.shown(order)
    assert shown.shape == (6, tokens - dropped) and bool((shown.diff(dim=1) > 0).all())
    missing = torch.ones_like(order, dtype=torch.bool).scatter(1, shown, False)
    for ratio in (0.0, 0.3, 0.999):
        mask = lowest(order, drawn_counts(made.config.mask, tokens, ratio, 0.0)[0])
        assert bool((mask | ~missing).all())


def test_nothing_is_dropped_by_default(method):
    assert method().shown(torch.rand(2, 16)) is None


def test_more_than_is_always_masked_cannot_be_dropped(method):
    with pytest.raises(ValidationError, match=r"only masked tokens are dropped, of which mask\.minimum 0\.5 is sure"):
        TokenPredictorMethodConfig(tokenizer="x", drop_ratio=0.6)


# A step


def batch(count=4, size=8):
    images, index = torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0)), torch.arange(count)
    return Batch(images, index % 2, index, torch.zeros(count, dtype=torch.int64))


@pytest.mark.parametrize("drop_ratio", [0.0, 0.5])
def test_the_loss_of_a_step_by_hand(method, drop_ratio):
    made = method(drop_ratio=drop_ratio)
    parts = made(batch(), Rows(torch.Generator().manual_seed(5), 4), 0.0)
    rng = Rows(torch.Generator().manual_seed(5), 4)
    count, _ = drawn_counts(made.config.mask, 16, rng.shared(), rng.shared())
    order, ids = rng.uniform(16), made.tokenizer.encode(batch().images)
    mask = lowest(order, count)
    keep = [sorted(row.argsort()[8:].tolist()) for row in order] if drop_ratio else None
    logits = made.network(ids, mask, 11, torch.tensor(keep) if keep else None)[:, 1:].log_softmax(2)
    each = -(0.9 * logits.gather(2, ids[..., None])[..., 0] + 0.1 * logits.mean(2))
    assert float(parts["loss"]) == pytest.approx(float((each * mask).sum() / mask.sum()), rel=1e-5)
    right = (losses.token_cross_entropy(logits, ids, 0) == -logits.max(2).values) & mask
    assert float(parts["masked_top1"]) == pytest.approx(float(right.sum() / mask.sum()))


def test_fewer_rows_cost_less(method):
    """Half of the tokens: the encoder has 9 slots of 17, the decoder all."""
    from diffrep.assemble import multiply_adds_per_image

    whole, half = (multiply_adds_per_image(method(drop_ratio=ratio), 8) for ratio in (0.0, 0.5))
    frozen, block = method().frozen_multiply_adds(), 12 * 16 * 16
    encoder = 3 * (17 - 9) * (block + 16 * 16)  # decoder_embed is spared too
    attention = 3 * 2 * (17 * 17 - 9 * 9) * 16
    assert whole - half == pytest.approx(encoder + attention, rel=0.1) and half > frozen


def test_micro_batches_equal_one(method, tmp_path):
    """All images of a step have one masked share, so the mean over masked tokens is a mean over images."""
    found = []
    for size in (None, 2):
        made = method(image_size=4, drop_ratio=0.5)
        loop = tiny.trainer(tmp_path / str(size), made, OptimConfig(name="sgd", lr=0.1), micro_batch_size=size)
        for number in range(4):
            loop.step(number)
        found.append(tiny.weights(made))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_it_learns_with_half_of_the_tokens_dropped(method):
    made, told = method(drop_ratio=0.5), []
    optimiser = torch.optim.AdamW(made.parameters(), 5e-3)
    for number in range(60):
        loss = made(batch(), Rows(torch.Generator().manual_seed(number), 4), 0.0)["loss"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        told.append(float(loss.detach()))
    assert sum(told[-10:]) < 0.7 * sum(told[:10])


# The encoder, judged


def test_the_encoder_reads_all_ids(method):
    made = method().eval()
    encoder, images = made.student.eval(), batch().images
    ids = made.tokenizer.encode(images)
    features = made.network.encode(ids, torch.zeros_like(ids, dtype=torch.bool))
    assert encoder.pooled(images).shape == (4, 16)
    torch.testing.assert_close(encoder.pooled(images), features[:, 1:].mean(1))
    assert encoder.backbone.num_classes == 0
    with torch.autocast("cpu", torch.bfloat16):  # ids are those of float32
        half = encoder.pooled(images)
    torch.testing.assert_close(half.float(), features[:, 1:].mean(1), atol=0.05, rtol=0.05)


def test_fine_tuning_starts_from_the_run_and_leaves_the_tokenizer_alone(method, tmp_path):
    made = method().eval()
    made.export(tmp_path)
    write_json(tmp_path / "result.json", {"licence": "of mine"})
    card = read_json(tmp_path / "config.json")["student"]
    config = FinetuneConfig.model_validate({"student": card, "init": str(tmp_path)})
    tuned = Finetune(config, 2, 8)
    images = batch().images
    torch.testing.assert_close(tuned.eval().student.pooled(images), made.student.eval().pooled(images))
    before = {name: value.clone() for name, value in tuned.student.backbone.state_dict().items()}
    groups = tuned.parameter_groups()
    optimiser = torch.optim.SGD([p for group in groups.values() for p in group], 0.1)
    tuned.train()(batch(), Rows(torch.Generator(), 4), 0.0)["loss"].backward()
    optimiser.step()
    moved = {n.split(".")[0] for n, v in tuned.student.backbone.state_dict().items() if not torch.equal(v, before[n])}
    assert moved == {"token_emb", "blocks", "norm", "head"}


def test_rates_fall_from_the_head_to_the_words(method):
    tuned = method().student.backbone
    named = {id(p): n.split(".")[0] for n, p in tuned.named_parameters()}
    depth = [{named[id(p)] for p in one} for one in layers(tuned)]
    assert depth[0] == {"token_emb", "tokenizer"} and depth[1] == {"blocks"} and depth[-1] >= {"norm"}


def test_images_of_another_size_are_refused(method):
    card = method().student.config
    with pytest.raises(UserError, match="does not take 16-pixel images"):
        Finetune(FinetuneConfig(student=card), 2, 16)
