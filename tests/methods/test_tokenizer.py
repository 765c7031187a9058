"""A tokenizer learns: codebook, revival, what it costs and what it says: pytest tests/methods/test_tokenizer.py"""

import json
import math

import pytest
import tiny
import torch
from safetensors.torch import load_file

from diffrep.data.batch import Batch
from diffrep.errors import Interrupted, UserError
from diffrep.methods.tokenizer import RECENT, Perceptual, PerceptualConfig, TokenizerConfig, TokenizerMethod, offered
from diffrep.models.vqgan import VQGANConfig, perplexity
from diffrep.randomness import Rows, seeded
from diffrep.training.optim import OptimConfig

NETWORK = VQGANConfig(ch=32, ch_mult=(1, 1), num_res_blocks=0, z_channels=4, num_codes=6)  # 4 tokens of 4x4 pixels
BY_GRADIENT = {"codebook": 0.25, "commitment": 1.0}  # the released network's
SGD = OptimConfig(name="sgd", lr=0.05)


def method(image_size=4, **settings):
    """Always the same initialisation, codes taken from images."""
    with seeded(3, "tokenizer"):
        made = TokenizerMethod(TokenizerConfig(**{"network": NETWORK} | settings), 2, image_size)
    made.prepare([batch(8, image_size)])
    return made.train()


def batch(count=8, size=4):
    images = torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(count))
    index = torch.arange(count)
    return Batch(images, index % 2, index, torch.zeros(count, dtype=torch.int64))


def rows(total, kept=None, seed=0):
    return Rows(torch.Generator().manual_seed(seed), total, kept)


def step(made, seed=0):
    made(batch(), rows(8, seed=seed), 0.0)
    made.after_step()


def latents(made):
    with torch.no_grad():
        return made.network.encoder(batch().images).movedim(1, 3).flatten(0, 2)


# The codebook


def test_losses_of_a_hand_made_step():
    """Two codes, latents between them: each term by hand."""
    made = method(**BY_GRADIENT)
    parts = {name: value.detach() for name, value in made(batch(), rows(8), 0.0).items()}
    z, codes = latents(made), made.network.codebook.detach()
    chosen = codes[torch.cdist(z, codes).argmin(1)]
    gap = float((z - chosen).square().mean())
    drawn = made.network.decode(chosen.view(8, 4, 4), (2, 2))
    mse = float((drawn - batch().images).square().mean().detach())
    assert float(parts["mse"]) == pytest.approx(mse, rel=1e-4)
    assert float(parts["commitment"]) == pytest.approx(gap, rel=1e-4) == float(parts["codebook"])
    assert float(parts["loss"]) == pytest.approx(mse + 1.25 * gap, rel=1e-4)


def test_each_term_of_the_codebook_loss_moves_its_own_side():
    made = method(**BY_GRADIENT)
    parts = made(batch(), rows(8), 0.0)
    encoder, codes = made.network.encoder.conv_out.weight, made.network.codebook
    moved = {
        name: [g is not None and bool(g.any()) for g in torch.autograd.grad(
            parts[name], (encoder, codes), retain_graph=True, allow_unused=True
        )] for name in ("mse", "commitment", "codebook")
    }  # fmt: skip
    assert moved == {"mse": [True, False], "commitment": [True, False], "codebook": [False, True]}


def test_running_means_keep_codes_from_the_optimiser():
    assert not any("codebook" in n or "embedding" in n for n, p in method().named_parameters() if p.requires_grad)
    assert any("embedding" in n for n, p in method(**BY_GRADIENT).named_parameters() if p.requires_grad)


@pytest.mark.parametrize("settings", [{"revive_below": 0.9}, {"revive_after": 2}, {"revive_after": 2, **BY_GRADIENT}])
def test_a_dead_code_begins_anew_at_a_latent_of_the_batch(settings):
    made = method(**settings)
    far = torch.full((4,), 1000.0)
    made.network.codebook.data[2] = far
    made.summed[2] = far * made.chosen[2]
    for number in range(8):
        assert torch.allclose(made.network.codebook[2], far, rtol=1e-4)
        before = latents(made)
        step(made, number)
        if not torch.allclose(made.network.codebook[2], far, rtol=1e-4):
            break
    wanted = 2 if "revive_after" in settings else math.ceil(math.log(0.9) / math.log(made.config.decay))
    assert number + 1 == wanted
    assert torch.isclose(before, made.network.codebook[2], atol=1e-6).all(1).any()


def test_a_code_that_nobody_takes_gets_another_place_each_time():
    made = method(revive_after=3)
    places = []
    for number in range(9):
        made.network.codebook.data[2] = made.summed[2] = 1000.0  # whatever was offered, nobody took it
        made.chosen[2] = 1.0
        step(made, number)
        if made.network.codebook[2, 0] < 900:
            places.append((number, made.network.codebook[2].clone()))
    assert [number for number, _ in places] == [2, 5, 8] and int(made.idle[2]) == 9
    assert not torch.equal(places[0][1], places[1][1])


def test_a_code_that_waits_for_long_stays_where_it_is():
    """Its running sum and number both fall to nothing, and their ratio stays."""
    made = method(decay=0.5, revive_after=1000)
    made.network.codebook.data[2] = made.summed[2] = 1000.0
    for number in range(60):
        step(made, number)
    assert made.network.codebook[2].tolist() == pytest.approx([1000.0] * 4, rel=1e-3)


def test_what_is_offered_is_a_draw_from_the_whole_batch():
    z = torch.arange(4 * 3 * 2.0).view(4, 3, 2) + 1
    whole = offered(z, 5, rows(4))
    halves = [offered(z[kept], 5, rows(4, kept)) for kept in ([0, 2], [1, 3])]
    assert torch.equal(whole, sum(halves)) and all((half == 0).any() for half in halves)
    every = {tuple(v) for v in z.flatten(0, 1).tolist()}
    assert len({tuple(v) for v in whole.tolist()} & every) == 5  # all different
    assert len(offered(z, 99, rows(4))) == 12
    assert not torch.equal(whole, offered(z, 5, rows(4, seed=1)))


@pytest.mark.parametrize("settings", [{}, BY_GRADIENT])
def test_micro_batches_and_processes_add_up_to_one_step(settings, monkeypatch):
    whole, parts = (method(revive_after=1, **settings) for _ in range(2))
    for made in (whole, parts):
        made.network.codebook.data[4] = 1000.0
    whole(batch(), rows(8), 0.0)
    shown = batch()
    for kept in ([0, 2, 4, 6], [1, 3, 5, 7]):
        part = Batch(shown.images[kept], shown.labels[kept], shown.index[kept], shown.view[kept])
        parts(part, rows(8, kept), 0.0)
    for made in (whole, parts):
        made.after_step()
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], value, rtol=1e-5, atol=1e-6, msg=name)
    assert float(whole.network.codebook[4].detach().abs().max()) < 900


@pytest.mark.parametrize("settings", [{}, BY_GRADIENT])
def test_micro_batches_of_a_trainer_equal_one(settings, tmp_path):
    found = []
    for size in (None, 2):
        loop = tiny.trainer(tmp_path / str(size), method(revive_after=2, **settings), SGD, micro_batch_size=size)
        for number in range(5):
            loop.step(number)
        found.append(tiny.weights(loop.method))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("settings", [{}, BY_GRADIENT])
def test_resuming_with_revival_gives_the_same_bits(settings, tmp_path):
    """Codes are lost and begin anew on both sides of the interruption."""
    many = NETWORK.model_copy(update={"num_codes": 24})  # for 32 latents a step
    kept, adam, asked = {"revive_after": 2, "network": many, **settings}, OptimConfig(lr=1e-2), []
    whole = tiny.trainer(tmp_path / "whole", method(**kept), adam)
    whole.fit()
    first = tiny.trainer(tmp_path / "parts", method(**kept), adam)
    with pytest.raises(Interrupted, match="stopped at step 5 of 12"):
        first.fit(stop=lambda: asked.append(1) or len(asked) == 5)
    again = tiny.trainer(tmp_path / "parts", method(**kept), adam)
    again.fit()
    assert tiny.same(tiny.weights(again.method), tiny.weights(whole.method))
    assert int(whole.method.idle.max()) > 0 and float(whole.method.used()) > 0


# How much of it is used


def test_perplexity_of_known_counts():
    assert float(perplexity(torch.tensor([5, 5, 5, 5]))) == pytest.approx(4)
    assert float(perplexity(torch.tensor([7, 0, 0]))) == pytest.approx(1)
    by_hand = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert float(perplexity(torch.tensor([3.0, 1.0, 0.0]))) == pytest.approx(by_hand)


def test_use_is_counted_by_latents_and_not_by_revivals():
    made = method(revive_after=1)
    assert float(made.used()) == 0
    z = latents(made)
    made.network.codebook.data.fill_(1000.0)
    made.network.codebook.data[1] = z.mean(0)
    step(made)  # all latents choose code 1; the other five begin anew
    assert float(made.used()) == pytest.approx(1 / 6) and float(perplexity(made.named)) == pytest.approx(1)
    assert float(made.network.codebook.max()) < 900
    made.idle[1] = RECENT
    assert float(made.used()) == 0


@pytest.mark.parametrize("is_collapsed", [True, False])
def test_a_collapsed_codebook_is_said_in_the_notes(is_collapsed, tmp_path):
    network = NETWORK.model_copy(update={"num_codes": 11})
    made = TokenizerMethod(TokenizerConfig(network=network), 2, 4)
    made.named[3], made.idle[4:] = 8.0, RECENT
    if not is_collapsed:
        made.named[:2] = 8.0
    found = made.export(tmp_path)
    assert found["codes_used"] == pytest.approx((1 if is_collapsed else 3) / 11, abs=1e-4)
    assert found["perplexity"] == (1 if is_collapsed else 3)
    wanted = ["the codebook has collapsed: 9.1 % of 11 codes are in use, as evenly as 1.0 codes would be"]
    assert found["notes"] == (wanted if is_collapsed else [])
    assert json.loads((tmp_path / "tokenizer" / "config.json").read_text())["config"]["num_codes"] == 11


def test_a_run_that_took_no_step_has_not_collapsed(tmp_path):
    assert method().export(tmp_path)["notes"] == []


# Features


def classifier():
    """Normalises, has a map, tokens and a vector."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        net = torch.nn.Sequential(
            torch.nn.Conv2d(3, 5, 3, padding=1), torch.nn.Tanh(), torch.nn.Flatten(), torch.nn.Linear(80, 6),
            torch.nn.Tanh(), torch.nn.Linear(6, 2),
        )  # fmt: skip
    net.num_classes = 2
    return net


LOOK = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4), "taps": ("0", "4")}


@pytest.fixture
def config(factory):
    return PerceptualConfig(reference=factory(classifier), weight=0.5, **LOOK)


def test_equal_images_are_no_distance_apart(config):
    judge, images = Perceptual(config, 4, allow_code=True), batch().images
    assert torch.equal(judge.distance(images, images), torch.zeros(8))
    assert bool((judge.distance(images, images.flip(0)) > 1e-3).all())


def test_distance_by_hand(config):
    a, b = batch().images[:2], batch().images[2:4]
    net = classifier()

    def units(x):
        x = (x - torch.tensor(LOOK["mean"]).view(3, 1, 1)) / torch.tensor(LOOK["std"]).view(3, 1, 1)
        return [f / f.norm(dim=1, keepdim=True) for f in (net[0](x), net[:5](x))]

    with torch.no_grad():
        (map_a, vector_a), (map_b, vector_b) = units(a), units(b)
    wanted = (map_a - map_b).square().sum(1).mean((1, 2)) + (vector_a - vector_b).square().sum(1)
    torch.testing.assert_close(Perceptual(config, 4, allow_code=True).distance(a, b), wanted)


def test_the_gradient_reaches_the_decoder_through_the_image_alone(config):
    with seeded(3, "tokenizer"):
        made = TokenizerMethod(TokenizerConfig(network=NETWORK, perceptual=config), 2, 4, allow_code=True)
    z = torch.rand(2, 4, 4)
    drawn = made.network.decode(z, (2, 2))
    apart = made.perceptual.distance(drawn, batch().images[:2]).sum()
    (through,) = torch.autograd.grad(apart, drawn, retain_graph=True)
    weights = [*made.network.decoder.parameters()]
    whole = torch.autograd.grad(apart, weights, retain_graph=True)
    for one, other in zip(whole, torch.autograd.grad(drawn, weights, through), strict=True):
        assert torch.equal(one, other)
    assert any(g.any() for g in whole)
    parts = made.train()(batch(), rows(8), 0.0)
    parts["loss"].backward()
    assert all(p.grad is None and not p.requires_grad for p in made.perceptual.module.parameters())
    whole_loss = parts["mse"] + 0.25 * parts["commitment"] + 0.5 * parts["perceptual"]
    assert float(parts["loss"]) == pytest.approx(float(whole_loss))


def test_the_features_are_no_part_of_the_run(config):
    with seeded(3, "tokenizer"):
        made = TokenizerMethod(TokenizerConfig(network=NETWORK, perceptual=config), 2, 4, allow_code=True)
    assert made.state_dict().keys() == method().state_dict().keys()
    assert "judged by features of python:" in made.licence
    to_vector = 16 * 27 * 5 + 80 * 6  # up to the last tap
    assert made.frozen_multiply_adds() == 3 * to_vector


def test_unknown_taps_are_refused(factory):
    config = PerceptualConfig(reference=factory(classifier), **{**LOOK, "taps": ("0", "44")})
    with pytest.raises(UserError, match=r"method\.perceptual.taps: '44' cannot be read; did you mean '4'"):
        Perceptual(config, 4, allow_code=True)


# As a whole


def test_it_learns_to_copy(tmp_path):
    loop = tiny.trainer(tmp_path, method(), OptimConfig(lr=5e-3), steps=60, log_every=10)
    loop.fit()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["mse"] < 0.5 * lines[0]["mse"]
    assert 0 < lines[-1]["codes_used"] <= 1 <= lines[-1]["perplexity"] <= 6
    loop.method.export(tmp_path)
    stored = load_file(tmp_path / "tokenizer" / "weights.safetensors")
    assert torch.equal(stored["quantize.embedding.weight"], loop.method.network.codebook)


def test_too_few_images_for_a_codebook_are_refused():
    made = TokenizerMethod(TokenizerConfig(network=NETWORK.model_copy(update={"num_codes": 33})), 2, 4)
    with pytest.raises(UserError, match="num_codes 33: the first images have 32 latents only"):
        made.prepare([batch()])
    with pytest.raises(UserError, match=r"data\.image_size 5 is not divisible"):
        method(image_size=5)
