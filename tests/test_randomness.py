"""Every draw is a function of (seed, purpose, index): pytest tests/test_randomness.py"""

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffrep import randomness
from diffrep.randomness import Rows, cycle, derived_seed, hashed_uniform, seeded, stream

NAMES = st.sampled_from(["noise", "order", "view"])


@given(st.integers(0, 2**62), NAMES, st.lists(st.integers(0, 9), max_size=3))
def test_a_derived_seed_fits_torch_and_is_always_the_same(seed, purpose, index):
    found = derived_seed(seed, purpose, *index)
    assert 0 <= found < 2**63 and found == derived_seed(seed, purpose, *index)
    torch.Generator().manual_seed(found)


def test_seeds_of_neighbours_differ():
    seeds = {derived_seed(s, p, k) for s in range(5) for p in ("a", "b") for k in range(50)}
    assert len(seeds) == 500
    assert derived_seed(0, "a", 1, 12) != derived_seed(0, "a", 11, 2)


def test_a_stream_does_not_depend_on_what_ran_before():
    first = torch.randn(3, generator=stream(0, "x", 4))
    torch.randn(100)
    assert torch.equal(first, torch.randn(3, generator=stream(0, "x", 4)))
    assert not torch.equal(first, torch.randn(3, generator=stream(0, "x", 5)))
    assert not torch.equal(first, torch.randn(3, generator=stream(1, "x", 4)))


def draws():
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_seeded_gives_the_same_draws_and_leaves_no_trace():
    with seeded(3, "init"):
        inside = draws()
    for action in (lambda: None, draws):
        states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
        with seeded(3, "init"):
            assert draws() == inside
            action()
        assert random.getstate() == states[0]
        assert (np.random.get_state()[1] == states[1]).all() and torch.equal(torch.get_rng_state(), states[2])
    with seeded(3, "other"):
        assert all(a != b for a, b in zip(draws(), inside, strict=True))


def test_seeded_restores_after_an_error():
    before = random.getstate(), torch.get_rng_state()
    with pytest.raises(KeyError), seeded(0, "x"):
        draws()
        raise KeyError
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])


def all_draws(rng):
    probs = torch.tensor([[0.2, 0.5, 0.3]]).expand(len(rng.rows) if rng.rows is not None else rng.total, -1)
    return rng.normal(2, 3), rng.uniform(), rng.integers(5, 90), rng.categorical(probs), rng.uniform(4)


@given(st.integers(1, 12), st.integers(1, 5), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_rows_get_the_same_numbers_in_any_micro_batch(total, micro, seed):
    whole = all_draws(Rows(stream(seed, "step"), total))
    for start in range(0, total, micro):
        rows = list(range(start, min(start + micro, total)))
        for full, part in zip(whole, all_draws(Rows(stream(seed, "step"), total, rows)), strict=True):
            assert torch.equal(full[rows], part)


@given(st.integers(0, 9), st.integers(1, 9))
def test_integers_keep_to_their_range(low, width):
    found = Rows(stream(0, "x"), 200).integers(low, low + width)
    assert found.dtype == torch.int64 and int(found.min()) >= low and int(found.max()) < low + width


def test_categorical_follows_its_probabilities():
    probs = torch.tensor([0.05, 0.0, 0.6, 0.35, 0.0])
    found = Rows(stream(0, "x"), 20000).categorical(probs.expand(20000, -1)).bincount(minlength=5) / 20000
    assert (found - probs).abs().max() < 0.012  # three standard deviations
    assert found[1] == 0 and found[4] == 0


def test_categorical_takes_a_certain_choice_even_where_sums_do_not_reach_one():
    probs = torch.tensor([[0.0, 0.0, 1.0], [0.9999999, 0.0, 0.0], [0.0, 3e-8, 0.0]]).repeat(500, 1)
    found = Rows(stream(0, "x"), 1500).categorical(probs)
    assert torch.equal(found, torch.tensor([2, 0, 1]).repeat(500))


@given(st.integers(1, 30), st.integers(0, 90), st.integers(0, 70), st.integers(0, 5))
def test_cycle_is_a_sequence_of_whole_permutations(size, start, count, seed):
    """Any stretch equals the same stretch of a longer one, and every epoch shows everything once."""
    found = cycle(seed, "order", size, start, count)
    whole = cycle(seed, "order", size, 0, start + count + size)
    assert torch.equal(found, whole[start : start + count])
    epochs = whole[: len(whole) // size * size].view(-1, size)
    assert all(sorted(epoch.tolist()) == list(range(size)) for epoch in epochs)


def test_epochs_and_seeds_are_permuted_differently():
    a, b = cycle(0, "order", 50, 0, 100).view(2, 50)
    assert not torch.equal(a, b) and not torch.equal(a, cycle(1, "order", 50, 0, 50))
    assert len(randomness._recent) <= 4  # what is remembered stays small


# Numbers for (index, view)


def test_splitmix64_gives_the_published_numbers():
    """Outputs of the reference implementation for seed 1234567, as its test vectors list them."""
    state, outputs = np.full(1, 1234567, dtype=np.uint64), []
    for _ in range(5):
        outputs.append(int(randomness._splitmix64(state)[0]))
        state = state + randomness._GOLDEN
    assert outputs == [
        6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821,
    ]  # fmt: skip


@given(st.integers(0, 2**62), NAMES, st.lists(st.tuples(st.integers(0, 2**62), st.integers(0, 2**62)), min_size=1))
def test_a_hashed_number_belongs_to_its_index_and_view(seed, purpose, pairs):
    index, view = torch.tensor(pairs).unbind(1)
    found = hashed_uniform(seed, purpose, index, view)
    assert found.dtype == torch.float64 and bool(((found >= 0) & (found < 1)).all())
    for k in range(len(pairs)):
        assert torch.equal(hashed_uniform(seed, purpose, index[k : k + 1], view[k : k + 1])[0], found[k])


def test_hashed_numbers_are_uniform_and_unrelated_to_their_neighbours():
    index, view = (grid.reshape(-1) for grid in torch.meshgrid(torch.arange(300), torch.arange(200), indexing="ij"))
    first, other = hashed_uniform(0, "a", index, view), hashed_uniform(0, "b", index, view)
    cells = (first * 100).long().bincount(minlength=100).double()
    assert float(((cells - 600) ** 2 / 600).sum()) < 99 + 5 * 14  # chi-squared, 99 degrees of freedom
    grid = first.reshape(300, 200)
    pairs = [
        (grid[1:], grid[:-1]),
        (grid[:, 1:], grid[:, :-1]),
        (first, other),
        (first, hashed_uniform(0, "a", view, index)),
    ]
    pairs.append((first, hashed_uniform(1, "a", index, view)))
    for left, right in pairs:
        together = torch.corrcoef(torch.stack([left.reshape(-1), right.reshape(-1)]))[0, 1]
        assert abs(float(together)) < 4.5 / left.numel() ** 0.5
    assert len(first.unique()) == len(first)
