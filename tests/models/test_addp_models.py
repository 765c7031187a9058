"""ADDP's tokenizer, token predictor and own network: pytest tests/models/test_addp_models.py"""

import pytest
import torch
from golden_addp import addp, close, has_vit, is_addp, is_tokenizer, masks, predictor, rows, tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from diffrep.models.addp_vit import LARGE, MEAN, SMALL, STD, UNUSED, ADDPVit, ADDPVitConfig, timm_vit
from diffrep.models.masked_vit import TokenPredictor, TokenPredictorConfig, Vocabulary
from diffrep.models.vqgan import VQGAN, VQGANConfig


def seeded(make):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return make().eval()


def count(network):
    return sum(p.numel() for p in network.parameters())


# The official numbers


@pytest.mark.golden(of=is_tokenizer)
@torch.no_grad()
def test_golden_tokenizer(golden_case):
    vq, image = tokenizer(golden_case), golden_case.get("inputs/image")
    close(vq.encoder(image), golden_case.get("outputs/vq.pre_quant"))
    ids = vq.encode(image)
    assert torch.equal(ids, golden_case.get("outputs/vq.indices"))
    latents = golden_case.get("outputs/vq.z_q")
    grid = tuple(latents.shape[-2:])
    close(vq.lookup(ids), rows(latents, grid), atol=1e-5)
    if "outputs/vq.reconstruction" in golden_case.keys:
        close(vq.decode(vq.lookup(ids), grid), golden_case.get("outputs/vq.reconstruction"))
    if "inputs/soft_prob" in golden_case.keys:
        soft = vq.soft(rows(golden_case.get("inputs/soft_prob"), grid))
        close(soft, rows(golden_case.get("outputs/vq.soft_embedding"), grid))


@pytest.mark.golden(of=is_addp)
@torch.no_grad()
def test_golden_token_predictor(golden_case):
    network, vq = predictor(golden_case), tokenizer(golden_case)
    ids, (mask, more) = golden_case.get("outputs/vq.indices"), masks(golden_case)
    first = golden_case.get("outputs/tp.prob_mask_t")
    grid = tuple(first.shape[-2:])
    close(network.probabilities(ids, mask), rows(first, grid))
    close(network.probabilities(ids, more), rows(golden_case.get("outputs/tp.prob_mask_next"), grid))
    close(vq.soft(network.probabilities(ids, more)), rows(golden_case.get("outputs/tp.soft_mask_next"), grid))
    logits = network(ids, mask)
    kept = golden_case.get("outputs/tp.logits_mask_t[:n_embed+8]")
    close(logits[..., : kept.shape[-1]], kept)
    close(logits.logsumexp(2), golden_case.get("outputs/tp.logits_mask_t.logsumexp"))


@pytest.mark.golden(of=is_addp)
@torch.no_grad()
def test_golden_addp_network(golden_case):
    network, ids, (mask, _) = addp(golden_case), golden_case.get("outputs/vq.indices"), masks(golden_case)
    pixels = golden_case.get("outputs/train.x_t")
    close(network.embed(pixels), golden_case.get("outputs/train.embed_in"))
    latent = network.encode(pixels)
    close(latent, golden_case.get("outputs/train.latent"))
    logits = network.decode(latent, ids, mask)
    kept = golden_case.get("outputs/train.logits[:n_embed+8]")
    close(logits[..., : kept.shape[-1]], kept)
    close(logits.logsumexp(2), golden_case.get("outputs/train.logits.logsumexp"))


@pytest.mark.golden(of=has_vit)
@torch.no_grad()
def test_golden_fine_tuned_vit(golden_case):
    from timm.layers import resample_abs_pos_embed

    network, state = addp(golden_case), golden_case.under("weights/vit.")
    vit = timm_vit(network, num_classes=len(state["head.bias"])).eval()
    key = "inputs/vit.image" if "inputs/vit.image" in golden_case.keys else "inputs/image"
    image = golden_case.get(key)
    if image.shape[-1] != network.config.image_size:
        side = image.shape[-1] // network.config.patch_size
        table = resample_abs_pos_embed(vit.pos_embed, [side, side], antialias=False)
        close(table, golden_case.get("outputs/vit.pos_embed_interpolated"))
        vit.pos_embed, vit.patch_embed.strict_img_size = torch.nn.Parameter(table), False
    vit.load_state_dict(vit.state_dict() | state)
    features = vit.forward_features(image)
    close(features, golden_case.get("outputs/vit.features"))
    close(vit.forward_head(features, pre_logits=True), golden_case.get("outputs/vit.pooled"))
    close(vit(image), golden_case.get("outputs/vit.logits"))


# Sizes of the released networks


def test_parameters_of_the_released_networks():
    with torch.device("meta"):
        vq = VQGAN(VQGANConfig())
        base, large = ADDPVit(ADDPVitConfig()), ADDPVit(ADDPVitConfig(**LARGE))
        teacher = TokenPredictor(TokenPredictorConfig())
    assert count(vq) == 54_515_587 and len(vq.state_dict()) == 168
    assert (count(vq.encoder), count(vq.decoder), count(vq.quantize)) == (23_775_104, 30_478_339, 262_144)
    unused = {"tables": 3 * 257, "decoder_pred": 16 * 16 * 3}  # of width D; the last has a bias
    for network, width, own in ((base, 768, 147_066_345), (large, 1024, 410_681_065)):
        assert count(network) + width * sum(unused.values()) + unused["decoder_pred"] == own
    assert len(base.state_dict()) + len(UNUSED) == 267
    dead = 768 * (1 + 2 * 257 + 1) + 768 * 3 * 256 + 768 + 768 * 768 + 768  # tables, mask, patches, pixels
    assert count(teacher) + dead == 146_474_217


@torch.no_grad()
def test_the_small_network_at_another_image_and_patch_size():
    network = seeded(lambda: ADDPVit(ADDPVitConfig(**SMALL, image_size=48, patch_size=8, num_codes=50)))
    ids = torch.zeros(1, 36, dtype=torch.int64)
    assert network.encode(torch.rand(1, 3, 48, 48)).shape == (1, 37, 384)
    assert network(torch.rand(1, 3, 48, 48), ids, torch.arange(36)[None] < 20).shape == (1, 36, 1051)


# What nothing depends on


TINY = {"embed_dim": 16, "depth": 2, "num_heads": 2, "decoder_depth": 1, "decoder_num_heads": 4, "num_codes": 7}


@pytest.fixture(scope="module")
def small():
    return seeded(lambda: ADDPVit(ADDPVitConfig(**TINY, image_size=8, patch_size=2, init_std=0.5)))


@pytest.fixture(scope="module")
def small_predictor():
    return seeded(lambda: TokenPredictor(TokenPredictorConfig(**TINY, num_tokens=16, init_std=0.5)))


def some_ids(seed, batch=3):
    rng = torch.Generator().manual_seed(seed)
    noise = torch.rand(batch, 16, generator=rng)
    return torch.randint(0, 7, (batch, 16), generator=rng), noise


@torch.no_grad()
def test_all_masked_logits_depend_on_nothing(small):
    ids, noise = some_ids(0)
    mask = torch.ones_like(noise, dtype=torch.bool)
    pixels = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    first, other = small(pixels, ids, mask), small(1 - pixels, (ids + 1) % 7, mask)
    assert torch.equal(first, other) and torch.equal(first[0], first[1])
    assert torch.equal(small.decode(None, ids, mask)[:, 1:17], first)


@given(st.integers(0, 2**31), st.integers(1, 15))
@settings(max_examples=15, deadline=None)
@torch.no_grad()
def test_hidden_ids_and_their_features_change_nothing(small, seed, masked):
    ids, noise = some_ids(seed)
    mask = noise.argsort(1).argsort(1) < masked
    pixels = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    latent = small.encode(pixels)
    plain = small.decode(latent, ids, mask)
    assert plain.shape == (3, 17 + 16 - masked, 7 + 1001)
    other = torch.where(torch.nn.functional.pad(mask, (1, 0), value=True)[..., None], 1e3, latent)
    assert torch.equal(small.decode(other, torch.where(mask, 6 - ids, ids), mask), plain)
    assert not torch.equal(small.decode(latent, torch.where(mask, ids, 6 - ids), mask), plain)
    assert not torch.equal(small(pixels.where(pixels > 0.5, 0), ids, mask), plain[:, 1:17])
    assert torch.equal(small(pixels * 3 - 1, ids, mask), small((pixels * 3 - 1).clamp(0, 1), ids, mask))


@given(st.integers(0, 2**31), st.integers(0, 16))
@settings(max_examples=15, deadline=None)
@torch.no_grad()
def test_the_predictor_reads_visible_ids_alone(small_predictor, seed, masked):
    ids, noise = some_ids(seed)
    mask = noise.argsort(1).argsort(1) < masked
    found = small_predictor.probabilities(ids, mask)
    assert found.shape == (3, 16, 7)
    torch.testing.assert_close(found.sum(2), torch.ones(3, 16), atol=1e-5, rtol=0)
    assert torch.equal(found, small_predictor.probabilities(torch.where(mask, 0, ids), mask))
    if masked == 16:
        assert torch.equal(found[0], found[1])


@torch.no_grad()
def test_first_rows_of_the_head_are_those_of_all(small_predictor):
    ids, noise = some_ids(4)
    close(small_predictor(ids, noise < 0.5, 7), small_predictor(ids, noise < 0.5)[..., :7], atol=1e-5)


def test_only_rows_of_codes_learn_and_none_where_everything_is_masked(small):
    ids, noise = some_ids(6)
    for mask in (noise.argsort(1).argsort(1) < 9, torch.ones_like(noise, dtype=torch.bool)):
        small.zero_grad()
        small(torch.rand(3, 3, 8, 8), ids, mask).square().mean().backward()
        table = small.token_emb.weight.grad
        assert not table[7:].any() and bool(table[:7].any()) != bool(mask.all())
        assert bool(small.patch_embed.proj.weight.grad.any()) != bool(mask.all())
    small.zero_grad()


# Quirks of the tokenizer


def test_a_block_that_changes_its_width_loses_its_input():
    vq = seeded(lambda: VQGAN(VQGANConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1, z_channels=4, num_codes=5)))
    block = vq.encoder.down[1].block[0]
    assert block.nin_shortcut.weight.shape == (64, 64, 1, 1)
    x = torch.randn(1, 32, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        block.nin_shortcut.weight.zero_()
        branch = block(x)
        block.conv2.weight.zero_()
        assert branch.any() and not block(x).any()


@pytest.mark.parametrize(("mult", "blocks"), [((1, 2), 2), ((1,), 1), ((1, 1, 1), 0), ((2, 1, 3), 1)])
def test_a_state_dict_says_what_it_was_built_as(mult, blocks):
    for decoder in (True, False):
        config = VQGANConfig(
            ch=32, ch_mult=mult, num_res_blocks=blocks, z_channels=3, num_codes=9, decoder=decoder
        )  # fmt: skip
        with torch.device("meta"):
            state = VQGAN(config).state_dict()
        if not (blocks == 0 and not decoder):  # nothing then tells how often the image was halved
            assert VQGANConfig.of(state) == config


@torch.no_grad()
def test_any_size_that_the_stride_divides():
    vq = seeded(lambda: VQGAN(VQGANConfig(ch=32, ch_mult=(1, 1), num_res_blocks=1, z_channels=4, num_codes=5)))
    ids = vq.encode(torch.rand(2, 3, 6, 10))
    assert ids.shape == (2, 15) and vq.decode(vq.lookup(ids), (3, 5)).shape == (2, 3, 6, 10)
    hard = torch.nn.functional.one_hot(ids, 5).float()
    close(vq.soft(hard), vq.lookup(ids), atol=1e-6)


# Export


@pytest.mark.parametrize("keep", [True, False])
@torch.no_grad()
def test_the_encoder_is_a_vit_of_timm(small, keep):
    vit = timm_vit(small, tokenizer_norm=keep).eval()
    pixels = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    x = small.embed(pixels)
    if not keep:
        patches = small.patch_embed((pixels - mean) / std)
        x = torch.cat([small.cls_token.expand(2, -1, -1), patches], 1) + small.pos_embed
        close(small.tokenizer_norm(x), small.embed(pixels), atol=1e-6)
    close(vit.forward_features((pixels - mean) / std), small.blocks(x), atol=1e-5)


# Refusals


def test_what_does_not_fit_is_refused():
    for wrong in ({"image_size": 9}, {"embed_dim": 10}, {"num_heads": 5}):
        with pytest.raises(ValidationError, match="divisible"):
            ADDPVitConfig(**({"image_size": 8, "patch_size": 2} | TINY | wrong))
    with pytest.raises(ValidationError, match="width cannot change"):
        VQGANConfig(ch_mult=(1, 2), num_res_blocks=0)


def test_ids_of_the_released_vocabulary():
    vocabulary = Vocabulary(1024)
    assert (vocabulary.rows, vocabulary.class_id, vocabulary.mask_id) == (2025, 1100, 2024)
