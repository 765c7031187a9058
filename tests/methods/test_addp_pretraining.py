"""What ADDP's training leaves out or computes again changes nothing: pytest tests/methods/test_addp_pretraining.py"""

import json
import shutil

import pytest
import tiny
import torch
from golden_addp import close
from hypothesis import given, settings
from hypothesis import strategies as st
from small_addp import CODES, LENGTH, SMALL, batch, images, nested

from diffrep import losses
from diffrep.assemble import multiply_adds_per_image
from diffrep.counting import multiply_adds, on_meta
from diffrep.data.batch import Batch
from diffrep.diffusion.masking import MaskConfig, PairMaskConfig, counts_of, drawn_counts, lowest, pair_counts
from diffrep.errors import Interrupted, RunError, UserError
from diffrep.frozen.tokens import write_network
from diffrep.methods.addp import ADDP, ADDPConfig
from diffrep.models.masked_vit import TokenPredictor
from diffrep.models.some_rows import places
from diffrep.models.vqgan import VQGAN, VQGANConfig
from diffrep.randomness import Rows, seeded, stream
from diffrep.training.optim import LrScheduleConfig, OptimConfig


def plainly(made, ids, m_t, m_next):
    """The loss of spec and paper, image by image, every row of every network: two passes, decode, encode, decode."""
    total = 0.0
    for k in range(len(ids)):
        z, mask, more = ids[k : k + 1], m_t[k : k + 1], m_next[k : k + 1]
        with torch.no_grad():
            guess, target = (made.predictor.module.probabilities(z, m) for m in (more, mask))
            z_t = torch.where(mask[..., None], made.tokenizer.soft(guess), made.tokenizer.lookup(z))
            pixels = made.tokenizer.decode(z_t, made.network.config.grid)
        logits = made.network(pixels, z, mask)
        smoothing = made.config.label_smoothing
        total = total + (losses.soft_token_cross_entropy(logits, target, smoothing) * mask).sum()
    return total / m_t.sum()


def gradients(made, loss):
    made.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in made.network.named_parameters()}


def same_gradients(found, expected, **limits):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        close(found[name], value, **({"atol": 1e-5, "rtol": 1e-4} | limits), msg=lambda m, name=name: f"{name}: {m}")


# Nothing is lost


@given(st.lists(st.tuples(st.integers(1, LENGTH), st.integers(0, 5)), min_size=1, max_size=4), st.integers(0, 2**31))
@settings(max_examples=12, deadline=None)
def test_loss_and_gradients_are_those_of_the_plain_computation(build, counts, seed):
    """Also where images differ in masked tokens, where masks are equal, and where nothing is visible."""
    made = build()
    ids = torch.randint(0, CODES, (len(counts), LENGTH), generator=torch.Generator().manual_seed(seed))
    m_t, m_next = nested([n for n, _ in counts], [min(LENGTH, n + more) for n, more in counts], seed)
    expected, found = plainly(made, ids, m_t, m_next), made.losses(ids, m_t, m_next)
    assert found.shape == (int(m_t.sum()),)
    close(found.mean(), expected, atol=1e-5)
    wanted = gradients(made, expected)
    same_gradients(gradients(made, found.mean()), wanted)


def test_everything_masked_leaves_the_encoder_alone_and_costs_it_nothing(build, monkeypatch):
    made, ids = build(), torch.randint(0, CODES, (3, LENGTH))
    m_t, m_next = nested([LENGTH] * 3, [LENGTH] * 3)
    expected = plainly(made, ids, m_t, m_next)
    wanted = gradients(made, expected)
    called = []
    for part in ("encode", "embed"):
        monkeypatch.setattr(made.network, part, lambda *_, part=part: called.append(part))
    monkeypatch.setattr(made.tokenizer, "decode", lambda *_: called.append("decode"))
    found = gradients(made, made.losses(ids, m_t, m_next).mean())
    assert not called
    same_gradients(found, wanted)
    for name in ("patch_embed.proj.weight", "pos_embed", "blocks.0.attn.qkv.weight", "norm.bias", "token_emb.weight"):
        assert not found[name].any() and not wanted[name].any(), name  # zero, and not missing: AdamW decays them


def test_equal_masks_need_one_pass_to_the_same_bits(build):
    made, ids = build(), torch.randint(0, CODES, (3, LENGTH))
    m_t, m_next = nested([9] * 3, [9] * 3)
    pixels, target = made.teach(ids, m_t, m_next)
    again = made.predictor.probabilities_at(ids, m_next, m_t)
    assert torch.equal(target, again)
    codes = made.tokenizer.lookup(ids)
    codes[m_t] = made.tokenizer.soft(again)
    assert torch.equal(pixels, made.tokenizer.decode(codes, (4, 4)))


def test_an_image_with_equal_masks_asks_the_predictor_once(build, monkeypatch):
    made, asked = build(), []
    inner = made.predictor.probabilities_at

    def counted(ids, *given, **options):
        asked.append(len(ids))
        return inner(ids, *given, **options)

    monkeypatch.setattr(made.predictor, "probabilities_at", counted)
    ids = torch.randint(0, CODES, (3, LENGTH))
    for more, rows in (([12, 12, 12], 6), ([9, 12, 9], 4), ([9, 9, 9], 3)):
        made.teach(ids, *nested([9] * 3, more))
        assert asked.pop() == rows
    made.teach(ids, *nested([16] * 3, [16] * 3))
    assert asked.pop() == 1 and not asked


def test_checkpointed_blocks_give_the_same_bits_with_dropout_on(build):
    ids = torch.randint(0, CODES, (2, LENGTH))
    m_t, m_next = nested([9, 9], [12, 12])
    found = []
    for recompute in (False, True):
        made = build(dropout=0.3, checkpoint_blocks=recompute)
        with seeded(1, "dropout"):
            found.append(gradients(made, made.losses(ids, m_t, m_next).mean()))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_what_a_step_costs_is_counted_with_the_work_left_out(build):
    """Checkpointed, every block is computed once more."""
    kept, again = (multiply_adds_per_image(build(checkpoint_blocks=wanted), 8) for wanted in (False, True))
    made = build()
    with torch.device("meta"):
        whole = TokenPredictor(made.predictor.module.config)
        ids = torch.zeros(1, LENGTH, dtype=torch.int64)
    full = multiply_adds(lambda: whole(ids, ids == 0))
    encode, decode = made.tokenizer.module.encoder, made.tokenizer.module.decoder
    ends = [(encode, torch.zeros(1, 3, 8, 8)), (decode, torch.zeros(1, 4, 4, 4))]
    assert made.frozen_multiply_adds() < 2 * full + sum(multiply_adds(on_meta(*end)) for end in ends)
    assert made.frozen_multiply_adds() < kept < again


def test_places_of_a_mask():
    mask = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 1]]).bool()
    found = places(mask)
    assert found.index[0].tolist() == [1, 2] and int(found.index[1, 0]) == 3
    assert found.real.tolist() == [[True, True], [True, False]]
    assert found.joined(torch.arange(4.0).view(2, 2, 1)).flatten().tolist() == [0, 1, 2]
    assert places(mask[:, 1:3]).index.shape == (2, 2) and places(~mask[:1]).real is None
    assert places(torch.zeros(2, 4, dtype=torch.bool)).index.shape == (2, 0)


# Precision


def test_ids_are_those_of_float32_whatever_the_precision(build):
    made, shown = build(), images(64)
    expected = made.tokenizer.encode(shown)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(made.tokenizer.encode(shown), expected)
        half = made.tokenizer.module.quantize.nearest(made.tokenizer.module.encoder(shown))
    assert not torch.equal(half, expected)  # or the line above would say nothing


def test_frozen_networks_have_a_precision_of_their_own(build):
    ids = torch.randint(0, CODES, (3, LENGTH))
    m_t, m_next = nested([9] * 3, [12] * 3)
    whole, half = build(), build(frozen_precision="bf16")
    expected, found = whole.teach(ids, m_t, m_next), half.teach(ids, m_t, m_next)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.float32 and not torch.equal(ours, theirs)
        close(ours, theirs, atol=0.05, rtol=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        kept = build(frozen_precision="fp32").teach(ids, m_t, m_next)
        assert not torch.equal(build().teach(ids, m_t, m_next)[1], expected[1])  # None: as train.precision
    assert all(torch.equal(a, b) for a, b in zip(kept, expected, strict=True))


# The teacher's dropout


def test_the_teachers_dropout_is_a_quirk_with_a_name(build):
    ids = torch.randint(0, CODES, (3, LENGTH))
    for masks in (nested([9] * 3, [9] * 3), nested([16] * 3, [16] * 3)):
        steady, official = build(), build(predictor_dropout="official")
        assert torch.equal(steady.teach(ids, *masks)[1], steady.teach(ids, *masks)[1])
        with seeded(1, "dropout"):
            one, other = official.teach(ids, *masks), official.teach(ids, *masks)
        with seeded(1, "dropout"):
            again = official.teach(ids, *masks)
        assert torch.equal(one[1], again[1]) and not torch.equal(one[1], other[1])
        assert not official.predictor.module.training


# One share for a step, or one for each image


def test_counts_of_many_are_the_counts_of_one():
    law = MaskConfig()
    rng = torch.Generator().manual_seed(0)
    ratio, offset = (torch.rand(200, generator=rng).double() for _ in range(2))
    masked, noisier = counts_of(law, 256, ratio, offset)
    alone = [drawn_counts(law, 256, float(r), float(o)) for r, o in zip(ratio, offset, strict=True)]
    assert list(zip(masked.tolist(), noisier.tolist(), strict=True)) == alone
    assert len(set(alone)) > 50


def test_the_law_of_the_specification_is_drawn():
    """P(all masked) 2.84 %, P(both masks equal) 3.21 %, E[n_t] 191.3, by a million draws of each image's own share."""
    rng = Rows(stream(0, "law"), 1_000_000)
    masked, noisier, mean = pair_counts(PairMaskConfig(ratio_per="sample"), 256, rng)
    assert abs(float((masked == 256).double().mean()) - 0.0284) < 6e-4
    assert abs(float((masked == noisier).double().mean()) - 0.0321) < 6e-4
    assert abs(mean - 191.3) < 0.1 and mean == float(masked.double().mean())


@pytest.mark.parametrize("per", ["batch", "sample"])
def test_processes_and_micro_batches_add_up(build, per):
    made, shown = build(mask={"ratio_per": per}), batch(6)

    def part(rows):
        given = Batch(shown.images[rows], shown.labels[rows], shown.index[rows])
        return made(given, Rows(stream(3, "step", 0), 6, rows), 0.0)["loss"]

    whole = gradients(made, made(shown, Rows(stream(3, "step", 0), 6), 0.0)["loss"])
    for shares in ([[0, 2, 4], [1, 3, 5]], [[0], [1, 2, 3], [4, 5]]):
        total = sum(part(rows) * len(rows) / 6 for rows in shares)
        same_gradients(gradients(made, total), whole, atol=2e-6)


def test_the_loss_is_a_mean_over_the_masked_tokens_of_all_images(build):
    made, shown = build(mask={"ratio_per": "sample"}), batch(8)
    masked, noisier, _ = pair_counts(made.config.mask, LENGTH, rng := Rows(stream(5, "step"), 8))
    order = rng.uniform(LENGTH)
    m_t, m_next = (lowest(order, n[:, None]) for n in (masked, noisier))
    assert len(set(masked.tolist())) > 2
    expected = plainly(made, made.tokenizer.encode(shown.images), m_t, m_next)
    close(made(shown, Rows(stream(5, "step"), 8), 0.0)["loss"], expected, atol=1e-5)


# The loop around it

ADAM = OptimConfig(
    lr=1e-2, betas=(0.9, 0.95), weight_decay=0.05, weight_decay_exclude_1d=True,
    lr_schedule=LrScheduleConfig(warmup_steps=2, warmup_from_zero=True),
)  # fmt: skip


def loop(folder, made, **train):
    """A trainer on the forty small images, brought to 8 pixels."""
    trainer = tiny.trainer(folder, made, ADAM, augment="none", **({"steps": 6, "checkpoint_every": 2} | train))
    whole = trainer.feed.images
    whole._images = whole._images.repeat_interleave(2, 2).repeat_interleave(2, 3)
    return trainer


@pytest.mark.parametrize("options", [{}, {"mask": {"ratio_per": "sample"}, "predictor_dropout": "official"}])
def test_a_resumed_run_ends_in_the_same_bits(build, tmp_path, options):
    options = options | {"dropout": 0.1, "checkpoint_blocks": True}
    loop(tmp_path / "whole", whole := build(**options), ema_decay=0.9, clip_norm=3.0).fit()
    stop = iter([False, False, True])
    with pytest.raises(Interrupted, match="stopped at step 3 of 6"):
        loop(tmp_path / "two", build(**options), ema_decay=0.9, clip_norm=3.0).fit(lambda: next(stop))
    loop(tmp_path / "two", again := build(**options), ema_decay=0.9, clip_norm=3.0).fit()
    assert tiny.same(tiny.weights(whole), tiny.weights(again))
    assert not tiny.same(tiny.weights(whole), tiny.weights(build(**options)))


def test_blocks_are_computed_again_by_the_attention_they_were_computed_by(build, tmp_path):
    """In bfloat16 on a CPU forward and backward pass leave torch's fused kernel alone (training/devices.py)."""
    made = build(dropout=0.0, checkpoint_blocks=True)
    loop(tmp_path / "again", made, precision="bf16").fit()
    kept = build(dropout=0.0)
    loop(tmp_path / "kept", kept, precision="bf16").fit()
    assert tiny.same(tiny.weights(made), tiny.weights(kept))


def test_weight_decay_spares_what_the_official_code_spares(build, tmp_path):
    """Biases and norms; not class token, mask token, tables of positions and token embeddings."""
    made = build()
    groups = loop(tmp_path, made).optimizer.param_groups
    names = {id(p): n for n, p in made.network.named_parameters()}
    decayed, spared = (
        {names[id(p)] for g in groups if bool(g["weight_decay"]) == wanted for p in g["params"]}
        for wanted in (True, False)
    )
    assert {"cls_token", "mask_token", "pos_embed", "token_emb.weight", "decoder_pos_mask_embed"} <= decayed
    last = {name.rsplit(".", 2)[-2] for name in spared if name.endswith(".weight")}
    assert last == {"norm", "norm1", "norm2", "tokenizer_norm", "decoder_norm", "ln"}
    assert {name for name in names.values() if name.endswith("bias")} <= spared and "mlm_layer.bias" in spared
    assert decayed | spared == set(names.values()) and not decayed & spared


def test_a_loss_that_is_not_finite_ends_the_run(build, tmp_path):
    made = build()
    with torch.no_grad():
        made.tokenizer.module.codebook.fill_(float("nan"))
    with pytest.raises(RunError, match="loss is NaN at step 1; there was no checkpoint yet") as caught:
        loop(tmp_path, made).fit()
    assert caught.value.exit_code == 3 and len(str(caught.value).splitlines()) == 1


# Refusals


def refusal(tokenizer, predictor, size=8):
    config = ADDPConfig(tokenizer=str(tokenizer), token_predictor=str(predictor), network=SMALL)
    with pytest.raises(UserError) as caught:
        ADDP(config, 2, size)
    assert caught.value.exit_code == 2 and len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_frozen_networks_that_are_missing_or_do_not_fit_are_refused_in_a_line(token_networks, tmp_path):
    assert "holds no tokenizer" in refusal(tmp_path / "nowhere", token_networks)
    assert "holds no token predictor" in refusal(token_networks, tmp_path / "nowhere")
    said = refusal(token_networks, token_networks, 16)
    assert said == "images of 16 pixels are 64 tokens of tiny, the token predictor tiny knows 16; see data.image_size"
    assert "7x7 is not divisible; valid near it: 6x6 or 8x8" in refusal(token_networks, token_networks, 7)


def test_a_tokenizer_that_cannot_draw_is_refused(token_networks, tmp_path):
    shape = {"ch": 32, "ch_mult": (1, 1), "num_res_blocks": 1, "z_channels": 4, "num_codes": CODES}
    write_network(tmp_path, "tokenizer", VQGAN(VQGANConfig(**shape, decoder=False)), "blind", "MIT")
    assert "the tokenizer blind has no decoder" in refusal(tmp_path, token_networks)


def test_weights_of_other_sizes_than_their_card_says_are_refused(token_networks, tmp_path):
    shutil.copytree(token_networks, tmp_path / "changed")
    card = tmp_path / "changed" / "token_predictor" / "config.json"
    said = json.loads(card.read_text())
    said["config"]["embed_dim"] = 32
    card.write_text(json.dumps(said))
    assert "is no token predictor as its config.json says" in refusal(token_networks, tmp_path / "changed")
