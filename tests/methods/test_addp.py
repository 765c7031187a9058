"""ADDP's training step and its generation: pytest tests/methods/test_addp.py"""

import pytest
import torch
from golden_addp import addp, close, is_addp, masks, predictor, rows, tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from diffrep import losses
from diffrep.diffusion.masking import (
    AlternationConfig,
    ImageDraws,
    MaskConfig,
    drawn_counts,
    lowest,
    mask_ratios,
    masked_after,
    masked_count,
    ratio_probabilities,
)
from diffrep.errors import UserError
from diffrep.frozen.tokens import FrozenPredictor, Tokenizer, load_tokenizer, write_network
from diffrep.methods.addp import ADDP, ADDPConfig, all_masked, alternate, as_uint8, first_step, predicted
from diffrep.models.addp_vit import ADDPVit, ADDPVitConfig
from diffrep.models.vqgan import VQGAN, VQGANConfig


def method(case):
    """The training method with the networks of a golden case."""
    found = ADDP.__new__(ADDP)
    torch.nn.Module.__init__(found)
    smoothing = case.meta["addp"]["label_smoothing"]
    found.config = ADDPConfig(tokenizer="golden", token_predictor="golden", label_smoothing=smoothing)
    found.network, found.tokenizer = addp(case), Tokenizer(tokenizer(case), "golden")
    found.predictor = FrozenPredictor(predictor(case), "golden")
    return found


# The official numbers


@pytest.mark.golden(of=is_addp)
def test_golden_masks(golden_case):
    given = golden_case.meta["addp"]
    law = MaskConfig(
        minimum=given["mask_ratio_min"], maximum=given["mask_ratio_max"],
        mu=given["mask_ratio_mu"], std=given["mask_ratio_std"],
    )  # fmt: skip
    ratios = mask_ratios(law)
    assert torch.equal(ratios, golden_case.get("outputs/train.mask_ratios"))
    close(ratio_probabilities(law), golden_case.get("outputs/train.mask_ratio_probs"), atol=1e-12, rtol=1e-9)
    noise, (mask, more) = golden_case.get("inputs/mask_noise"), masks(golden_case)
    index, offset = (int(golden_case.get(f"inputs/mask_rate_idx{part}")) for part in ("", "_offset"))
    counts = [masked_count(ratios[min(k, len(ratios) - 1)], noise.shape[1]) for k in (index, index + offset)]
    assert torch.equal(lowest(noise, counts[0]), mask) and torch.equal(lowest(noise, counts[1]), more)


@pytest.mark.golden(of=is_addp)
def test_golden_training_step(golden_case):
    """The step as it is run: at masked positions alone, both predictor passes at once."""
    found, ids, (m_t, m_next) = method(golden_case), golden_case.get("outputs/vq.indices"), masks(golden_case)
    x_t, target = found.teach(ids, m_t, m_next)
    if bool(m_t.all()):
        assert x_t is None
    else:
        close(x_t, golden_case.get("outputs/train.x_t"))
    close(target, rows(golden_case.get("outputs/train.target"), found.network.config.grid)[m_t])
    logits, positions = found.network.masked_logits(x_t, ids, m_t), slice(1, 1 + m_t.shape[1])
    kept = golden_case.get("outputs/train.logits[:n_embed+8]")[:, positions][m_t]
    close(logits[:, : kept.shape[1]], kept)
    close(logits.logsumexp(1), golden_case.get("outputs/train.logits.logsumexp")[:, positions][m_t])
    loss = found.losses(ids, m_t, m_next).mean()
    close(loss.view(1), golden_case.get("outputs/train.loss"))
    loss.backward()
    parameters, wanted = dict(found.network.named_parameters()), golden_case.under("outputs/train.grad.")
    for name, expected in wanted.items():
        name, _, cut = name.partition("[")
        gradient = parameters[name].grad
        kept = gradient[: len(expected)] if name == "token_emb.weight" else gradient[..., : expected.shape[-1]]
        close(kept if cut else gradient, expected)
    assert wanted and all(parameter.grad is not None for parameter in parameters.values())
    assert not found.network.token_emb.weight.grad[found.tokenizer.num_codes :].any()


class Given:
    """The chance of a golden case: ids are argmax(logits + noise)."""

    def __init__(self, case):
        self.noise, self.choice = case.get("inputs/gen.sample_gumbel"), case.get("inputs/gen.choice_gumbel")

    def ids(self, step, probabilities):
        return (probabilities.log() + self.noise[step]).argmax(2)

    def gumbel(self, step):
        return self.choice[step]


@pytest.mark.golden(of=lambda case: is_addp(case) and case.meta["generate"]["mask_ratio"] == 1)
@torch.no_grad()
def test_golden_generation(golden_case):
    wanted, vq, network = golden_case.meta["generate"], Tokenizer(tokenizer(golden_case), "golden"), addp(golden_case)
    config = AlternationConfig(
        steps=wanted["num_iteration"], schedule=wanted["mask_ratio_sample_strategy"],
        choice_temperature=wanted["choice_temperature"], temperature_strategy=wanted["temperature_strategy"],
    )  # fmt: skip
    logits, after = golden_case.get("outputs/gen.logits"), golden_case.get("outputs/gen.masks_next").bool()
    drawn, latents = golden_case.get("outputs/gen.sampled_ids"), golden_case.get("outputs/gen.z_q")
    ids, seen = golden_case.get("outputs/vq.indices"), []
    mask = torch.ones_like(ids, dtype=torch.bool)
    final = alternate(network, vq, config, Given(golden_case), ids, mask, watch=seen.append)
    before = [mask, *after[:-1]]
    for moment in seen:
        step = moment.step
        close(moment.probabilities, logits[step].softmax(2))
        assert torch.equal(moment.ids[before[step]], drawn[step][before[step]])
        assert torch.equal(moment.mask, after[step])
        close(moment.latents, rows(latents[step], network.config.grid))
    skipped = config.steps - len(seen)
    assert skipped == first_step(after.sum(2)[:, 0].tolist(), mask.shape[1])
    close(logits[:skipped].softmax(3), all_masked(network, mask[:1]).expand(skipped, len(mask), -1, -1))
    close(final, golden_case.get("outputs/gen.final_image"))


# Counts of the specification


def test_masked_tokens_of_the_released_schedules():
    cosine = masked_after(AlternationConfig(), 256)
    assert cosine == [256, 253, 249, 244, 237, 229, 219, 208, 195, 182, 167, 151, 134, 117, 98, 80, 60, 41, 21, 1]
    linear = masked_after(AlternationConfig(steps=256, schedule="linear"), 256)
    assert linear == [*range(255, 0, -1), 1]
    assert masked_after(AlternationConfig(steps=12, schedule="linear"), 256) == [
        235, 214, 192, 171, 150, 128, 107, 86, 64, 43, 22, 1,
    ]  # fmt: skip
    assert masked_after(AlternationConfig(steps=5), 192) == [183, 156, 113, 60, 1]
    assert masked_after(AlternationConfig(finish=True), 256)[-2:] == [21, 0]
    assert first_step(cosine, 256) == 1 and first_step(linear, 256) == 0
    with pytest.raises(UserError, match="17: there are 16 tokens"):
        masked_after(AlternationConfig(steps=17), 16)


def test_training_masks_of_the_specification():
    law = MaskConfig()
    counts = [masked_count(r, 256) for r in mask_ratios(law)]
    assert len(counts) == 66 and counts[:4] == [131, 134, 138, 141] and counts[-6:] == [255, *[256] * 5]
    probabilities = ratio_probabilities(law)
    assert abs(float((probabilities * torch.tensor(counts)).sum()) - 191.3) < 0.05
    assert abs(float(probabilities[-5:].sum()) - 0.0284) < 1e-4
    for ratio, offset in ((0.0, 0.0), (0.3, 0.99), (1 - 1e-12, 0.5)):
        masked, noisier = drawn_counts(law, 256, ratio, offset)
        assert counts.index(masked) <= counts.index(noisier) <= counts.index(masked) + 5


@given(st.integers(0, 2**31), st.integers(0, 12), st.integers(0, 12))
@settings(max_examples=30, deadline=None)
def test_masks_are_nested(seed, one, other):
    values = torch.rand(3, 12, generator=torch.Generator().manual_seed(seed))
    few, many = lowest(values, min(one, other)), lowest(values, max(one, other))
    assert few.sum(1).tolist() == [min(one, other)] * 3 and bool((few <= many).all())


@given(st.floats(0, 1), st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_soft_loss_is_the_formula(smoothing, seed):
    rng = torch.Generator().manual_seed(seed)
    logits, q = torch.randn(2, 3, 9, generator=rng), torch.rand(2, 3, 4, generator=rng).softmax(2)
    padded = torch.cat([q, torch.zeros(2, 3, 5)], 2)
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), padded.flatten(0, 1), reduction="none", label_smoothing=smoothing
    ).view(2, 3)
    close(losses.soft_token_cross_entropy(logits, q, smoothing), expected, atol=1e-5)
    ids = torch.randint(0, 9, (2, 3), generator=rng)
    plain = losses.soft_token_cross_entropy(logits, torch.nn.functional.one_hot(ids, 9).float(), smoothing)
    close(losses.token_cross_entropy(logits, ids, smoothing), plain, atol=1e-5)


# Generation: what it depends on


@pytest.fixture(scope="module")
def pair(token_networks):
    """An untrained network and the tokenizer it belongs to: 16 tokens of 2x2 pixels, 11 codes."""
    shape = {"embed_dim": 16, "depth": 1, "num_heads": 2, "decoder_depth": 1, "decoder_num_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(5)
        network = ADDPVit(ADDPVitConfig(**shape, num_codes=11, image_size=8, patch_size=2, init_std=0.5))
    return network.eval(), load_tokenizer(token_networks)


def plainly(network, vq, config, draws, ids, pixels):
    """The whole computation in the official order, nothing left out."""
    mask = torch.ones_like(ids, dtype=torch.bool)
    for step, count in enumerate(masked_after(config, ids.shape[1])):
        logits = network.decode(network.encode(pixels), ids, mask)[:, 1 : 1 + ids.shape[1]]
        probabilities = logits[..., : vq.num_codes].float().softmax(2)
        ids = torch.where(mask, draws.ids(step, probabilities), ids)
        r = (step + 1) / config.steps
        noise = config.choice_temperature * (1 - r) * draws.gumbel(step)
        chosen = probabilities.gather(2, ids[..., None])[..., 0].double().log() + noise
        order = torch.where(mask, chosen, torch.inf).argsort(1)
        mask = torch.zeros_like(mask).scatter(1, order[:, :count], True)
        latents = torch.where(mask[..., None], vq.soft(probabilities), vq.lookup(ids))
        pixels = vq.decode(latents, (4, 4))
    return pixels


@pytest.mark.parametrize("config", [AlternationConfig(steps=16), AlternationConfig(steps=8, schedule="linear")])
@torch.no_grad()
def test_work_that_is_left_out_changes_no_bit(pair, config):
    network, vq = pair
    ids, mask = torch.randint(0, 11, (1, 16)), torch.ones(1, 16, dtype=torch.bool)
    found = alternate(network, vq, config, ImageDraws([7], 16), ids, mask)
    for start in (torch.rand(1, 3, 8, 8), torch.full((1, 3, 8, 8), 0.3)):
        assert torch.equal(found, plainly(network, vq, config, ImageDraws([7], 16), ids, start))
    assert first_step(masked_after(config, 16), 16) == (3 if config.schedule == "cosine" else 0)


@given(st.lists(st.integers(0, 99), min_size=1, max_size=5, unique=True))
@settings(max_examples=8, deadline=None)
@torch.no_grad()
def test_an_image_depends_on_its_seed_alone(pair, seeds):
    network, vq = pair
    together = alternate(network, vq, AlternationConfig(steps=4), ImageDraws(seeds, 16), *blank(len(seeds)))
    for seed, image in zip(seeds, together, strict=True):
        alone = alternate(network, vq, AlternationConfig(steps=4), ImageDraws([seed], 16), *blank(1))[0]
        torch.testing.assert_close(alone, image, atol=1e-4, rtol=0)


def blank(count):
    return torch.zeros(count, 16, dtype=torch.int64), torch.ones(count, 16, dtype=torch.bool)


@given(st.integers(0, 2**31), st.integers(2, 15))
@settings(max_examples=10, deadline=None)
@torch.no_grad()
def test_a_repair_keeps_what_is_visible_and_reads_nothing_else(pair, seed, masked):
    network, vq = pair
    rng = torch.Generator().manual_seed(seed)
    ids, mask = torch.randint(0, 11, (1, 16), generator=rng), lowest(torch.rand(1, 16, generator=rng), masked)
    config, seen = AlternationConfig(steps=2), []
    found = alternate(network, vq, config, ImageDraws([seed], 16), ids, mask, watch=seen.append)
    other = torch.where(mask, (ids + 3) % 11, ids)
    assert torch.equal(found, alternate(network, vq, config, ImageDraws([seed], 16), other, mask))
    assert all(torch.equal(moment.ids[~mask], ids[~mask]) for moment in seen)
    assert seen[-1].mask.sum() == 1 and bool((seen[-1].mask <= mask).all())
    hidden = torch.where(~mask, (ids + 3) % 11, ids)
    assert not torch.equal(found, alternate(network, vq, config, ImageDraws([seed], 16), hidden, mask))


@torch.no_grad()
def test_pixels_between_steps_matter(pair):
    network = pair[0]
    ids, mask = torch.zeros(1, 16, dtype=torch.int64), torch.arange(16)[None] < 8
    one, other = (predicted(network, torch.full((1, 3, 8, 8), v), ids, mask) for v in (0.2, 0.9))
    assert float((one - other).abs().max()) > 1e-3


def test_levels_are_cut_off_or_rounded():
    pixels = torch.tensor([0.9999, 1.2, -0.1, 0.5]).view(1, 1, 2, 2)
    assert as_uint8(pixels).flatten().tolist() == [254, 255, 0, 127]
    assert as_uint8(pixels, "nearest").flatten().tolist() == [255, 255, 0, 128]


# Training


def test_networks_that_were_not_trained_together_are_refused(token_networks, tmp_path):
    with torch.random.fork_rng():
        other = VQGAN(VQGANConfig(ch=32, ch_mult=(1, 1), num_res_blocks=1, z_channels=4, num_codes=9))
    write_network(tmp_path, "tokenizer", other, "nine", "MIT")
    small = {"embed_dim": 16, "depth": 1, "num_heads": 2, "decoder_depth": 1, "decoder_num_heads": 2}
    with pytest.raises(UserError, match="knows 11 codes, the tokenizer nine has 9"):
        ADDP(ADDPConfig(tokenizer=str(tmp_path), token_predictor=token_networks, network=small), 10, 8)
    with pytest.raises(UserError, match="no token predictor"):
        ADDP(ADDPConfig(tokenizer=token_networks, token_predictor=str(tmp_path), network=small), 10, 8)
