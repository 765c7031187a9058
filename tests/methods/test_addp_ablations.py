"""ADDP learnt otherwise, hard or without the predictor: pytest tests/methods/test_addp_ablations.py"""

import pytest
import torch
import torch.nn.functional as F
from golden_addp import close
from small_addp import CODES, LENGTH, SMALL, batch, nested

from diffrep.config import validate
from diffrep.diffusion.masking import AlternationConfig, ImageDraws, drawn_ids
from diffrep.errors import UserError
from diffrep.methods.addp import ADDPConfig, alternate
from diffrep.randomness import Rows, stream


def some_ids(count=3):
    return torch.randint(0, CODES, (count, LENGTH), generator=torch.Generator().manual_seed(4))


# Drawing


def test_ids_are_drawn_as_often_as_they_are_likely():
    """A grid of chances stands for all of them: id k has a share p_k of it, to one point of the grid."""
    p = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    grid = (torch.arange(1000) + 0.5) / 1000
    found = drawn_ids(p.expand(1000, -1), grid)
    assert (torch.bincount(found, minlength=6) - 1000 * p).abs().max() <= 1
    assert drawn_ids(p[None], torch.zeros(1)) == 1 and drawn_ids(p[None], torch.tensor([1 - 2**-24])) == 4


def test_a_certain_answer_is_drawn_whatever_chance_says():
    sure = F.one_hot(torch.arange(5), 5).float()
    for chance in (0.0, 0.5, 1 - 2**-24):
        assert drawn_ids(sure, torch.full((5,), chance)).tolist() == [0, 1, 2, 3, 4]


# Unreliable tokens


def test_hard_tokens_are_codes_that_the_predictor_would_give(build):
    made, ids = build(unreliable="hard"), some_ids()
    m_t, m_next = nested([9, 9, 9], [12, 12, 12])
    chance = torch.rand(3, LENGTH, generator=torch.Generator().manual_seed(1))
    pixels, target = made.teach(ids, m_t, m_next, chance)
    drawn = ids.clone()
    drawn[m_t] = drawn_ids(made.predictor.probabilities_at(ids, m_next, m_t), chance[m_t])
    assert not torch.equal(drawn, ids)
    close(pixels, made.tokenizer.decode(made.tokenizer.lookup(drawn), (4, 4)), atol=1e-5)
    assert torch.equal(target, build().teach(ids, m_t, m_next)[1])  # what is learnt is not touched


def test_softness_is_the_mean_of_hardness(build):
    """Expected codes are the mean of the codes drawn, over many chances."""
    made, ids = build(unreliable="hard"), some_ids(1)
    guess = made.predictor.probabilities_at(ids, *nested([LENGTH], [LENGTH]))
    many = torch.stack([made._drawn(guess, torch.full((LENGTH,), (k + 0.5) / 2000)) for k in range(2000)])
    close(many.mean(0), made.tokenizer.soft(guess), atol=0.02)


def test_chance_of_a_step_is_that_of_its_seed_however_it_is_split(build):
    made, shown = build(unreliable="hard"), batch(6)

    def loss(rows):
        part = type(shown)(shown.images[rows], shown.labels[rows], shown.index[rows])
        return made(part, Rows(stream(3, "step", 0), 6, rows), 0.0)["loss"]

    whole = made(shown, Rows(stream(3, "step", 0), 6), 0.0)["loss"]
    close((loss([0, 2, 4]) + loss([1, 3, 5])) / 2, whole, atol=1e-6)
    assert not torch.equal(made(shown, Rows(stream(4, "step", 0), 6), 0.0)["loss"], whole)


@pytest.mark.parametrize("unreliable", ["soft", "hard"])
def test_a_walk_decodes_what_the_network_has_learnt_to_read(build, unreliable):
    made, moments = build(), []
    config = AlternationConfig(steps=4, unreliable=unreliable)
    ids, mask = torch.zeros(2, LENGTH, dtype=torch.int64), torch.ones(2, LENGTH, dtype=torch.bool)
    alternate(made.network.eval(), made.tokenizer, config, ImageDraws([0, 1], LENGTH), ids, mask, watch=moments.append)
    hard = [torch.equal(m.latents, made.tokenizer.lookup(m.ids)) for m in moments]
    assert moments and hard == [unreliable == "hard"] * len(moments)


# Target


def test_without_the_predictor_the_image_itself_is_learnt(build):
    made, ids = build(target="tokens", label_smoothing=0), some_ids()
    m_t, m_next = nested([9, 9, 9], [12, 12, 12])
    pixels, target = made.teach(ids, m_t, m_next)
    assert target.argmax(1).tolist() == ids[m_t].tolist() and target.sum() == len(target) == target.max(1)[0].sum()
    close(pixels, build().teach(ids, m_t, m_next)[0], atol=1e-6)  # the way to x_t stays
    logits = made.network(pixels, ids, m_t)
    close(made.losses(ids, m_t, m_next), F.cross_entropy(logits[m_t], ids[m_t], reduction="none"), atol=1e-5)


def test_of_masks_alone_too(build):
    made, ids = build(target="tokens"), some_ids()
    pixels, target = made.teach(ids, *nested([LENGTH] * 3, [LENGTH] * 3))
    assert pixels is None and target.argmax(1).tolist() == ids.flatten().tolist()


def test_a_target_without_the_predictor_saves_one_of_its_passes(build):
    asked = [build(target=target).frozen_multiply_adds() for target in ("predictor", "tokens")]
    assert asked[1] < asked[0]


@pytest.mark.parametrize("setting", [{"unreliable": "medium"}, {"target": "pixels"}])
def test_other_words_are_refused(setting):
    with pytest.raises(UserError, match=r"'soft' or 'hard'|'predictor' or 'tokens'"):
        validate(ADDPConfig, {"tokenizer": "a", "token_predictor": "a", "network": SMALL} | setting, "a recipe")
