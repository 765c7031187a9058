"""Shares of weights and optimiser on two processes give what whole ones give: pytest tests/training/test_sharding.py"""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_processes import torchrun

SCRIPT = '''
"""Arguments: the folder with tokenizer and predictor, and where to leave results."""
import os
import sys
from pathlib import Path

import sharding_cases as cases
import torch

from diffrep.errors import DiffrepError

torch.set_num_threads(1)
tokens, out, rank = sys.argv[1], Path(sys.argv[2]), int(os.environ["RANK"])
for name in cases.CASES:
    for sharding in ("fsdp", None):
        cases.fitted(tokens, out / f"{name}-{sharding or 'whole'}", name, rank, sharding=sharding)
for stop in (3, None):
    try:
        cases.fitted(tokens, out / "resumed", "adam", rank, stop, sharding="fsdp")
    except DiffrepError as error:
        assert stop and error.exit_code == 130, error
for name, options in cases.REFUSED.items():
    try:
        cases.fitted(tokens, out / name, "adam", rank, sharding="fsdp", **options)
    except DiffrepError as error:
        (out / f"{name}-{rank}.txt").write_text(f"{error.exit_code} {error}")
'''

CASES = '''
import gc
import json
import weakref

import tiny
import torch
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from diffrep.methods.addp import ADDP, ADDPConfig
from diffrep.randomness import seeded
from diffrep.training.optim import OptimConfig
from diffrep.training.run import RunDir

SMALL = {"embed_dim": 16, "depth": 2, "num_heads": 2, "decoder_depth": 2, "decoder_num_heads": 4}
ADAM = {"name": "adamw", "lr": 1e-2, "weight_decay": 0.05, "weight_decay_exclude_1d": True}
# One of two processes may have nothing but masks, and the other not, in the law of "sample".
SAMPLE = {"ratio_per": "sample", "minimum": 0.9, "mu": 1.0, "std": 0.05}
CASES = {
    "adam": {"clip_norm": 0.5, "micro_batch_size": 2},
    "sample": {"method": {"mask": SAMPLE}, "optim": {"name": "sgd", "lr": 0.1, "momentum": 0.9}},
    "mean": {"ema_decay": 0.9, "method": {"checkpoint_blocks": True, "dropout": 0.0}, "precision": "bf16"},
}
REFUSED = {
    "muon": {"optim": {"name": "muon", "lr": 0.1}},
    "unused": {"uses_all": False},
    "infinite": {"spoilt": True, "clip_norm": None},
    "seven": {"batch_size": 7},
}


def built(tokens, uses_all=True, dropout=0.1, **options):
    network = SMALL | {"dropout": dropout}
    with seeded(1, "addp"):
        made = ADDP(ADDPConfig(tokenizer=tokens, token_predictor=tokens, network=network, **options), 2, 8)
    made.uses_all_parameters = uses_all
    return made


def loop(tokens, folder, name, rank=0, uses_all=True, optim=None, **more):
    case = dict(CASES[name])
    made = built(tokens, uses_all, **case.pop("method", {}))
    chosen = OptimConfig(**(optim or case.pop("optim", ADAM)))
    options = {"steps": 4, "log_every": 1, "checkpoint_every": 2} | case | more
    found = tiny.trainer(folder, made, chosen, augment="none", **options)
    found.run.writes = rank == 0
    pixels = found.feed.images._images
    found.feed.images._images = pixels.repeat_interleave(2, 2).repeat_interleave(2, 3)
    return found


def spoilt_losses(made):
    """Finite, with a gradient that is not: the root of 0."""
    bias, plain = (lambda: made.network.mlm_layer.bias), made.losses
    return lambda *given: plain(*given) + (0 * bias()).sum().abs().sqrt()


def fitted(tokens, folder, name, rank, stop=None, spoilt=False, **options):
    """Train to the end, or to a stop; then leave the export, and this process's weights."""
    made = loop(tokens, folder, name, rank, **options)
    made.accelerator.end_training = lambda: None  # it would close the process group, which serves all cases
    seen = []
    before = [weakref.ref(weight) for weight in made.method.parameters()]
    if spoilt and rank:
        made.method.losses = spoilt_losses(made.method)

    def heard():
        weights = list(made.method.parameters())
        seen.append((sum(isinstance(w, DTensor) for w in weights), len(weights)))
        state = [v for s in made.optimizer.state.values() for k, v in s.items() if k != "step"]
        if made.shards:
            gc.collect()
            assert not any(weight() is not None for weight in before)  # nobody holds whole weights
            assert all(isinstance(v, DTensor) for v in state) and state
            here = sum(v.to_local().numel() for v in state)
            assert here < 0.6 * sum(v.numel() for v in state)  # the first process has what divides unevenly
        return len(seen) == stop

    made.fit(heard)
    assert all(count == (total if made.shards else 0) for count, total in seen), seen
    weights = {n: v.contiguous() for n, v in tiny.weights(made.method).items()}
    assert not any(isinstance(v, DTensor) for v in weights.values())
    save_file(weights, folder / f"weights-{rank}.safetensors")
    if rank == 0:
        made.method.export(folder / "export")
'''
NAMES = ("adam", "sample", "mean")


@pytest.fixture(scope="module")
def two(token_networks, tmp_path_factory) -> Path:
    """What two processes leave behind; one start of torchrun serves all tests."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "script.py").write_text(SCRIPT)
    (folder / "sharding_cases.py").write_text(CASES)
    done = torchrun(folder, "script.py", token_networks, str(folder))
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def cases(two, monkeypatch):
    monkeypatch.syspath_prepend(str(two))
    import sharding_cases

    yield sharding_cases
    sys.modules.pop("sharding_cases")


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_close(one: dict, other: dict, **tolerance) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, **tolerance, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("name", NAMES)
def test_shares_train_as_whole_weights_do(two, name):
    shares, whole = two / f"{name}-fsdp", two / f"{name}-whole"
    assert losses(shares) == pytest.approx(losses(whole), rel=1e-5) and len(losses(shares)) == 4
    for file in ("weights-0.safetensors", "weights-1.safetensors"):
        assert_close(load_file(whole / file), load_file(shares / file), rtol=1e-4, atol=1e-5)


def test_what_is_exported_is_whole(two, cases):
    assert set(cases.CASES) == set(NAMES)
    for file in ("weights.safetensors", "addp/weights.safetensors"):
        shares, whole = (load_file(two / f"adam-{how}" / "export" / file) for how in ("fsdp", "whole"))
        assert_close(whole, shares, rtol=1e-4, atol=1e-5)


def test_a_resumed_run_is_the_uninterrupted_one(two):
    for rank in (0, 1):
        one, other = (load_file(two / run / f"weights-{rank}.safetensors") for run in ("adam-fsdp", "resumed"))
        assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def test_one_process_goes_on_from_a_checkpoint_of_shares(two, token_networks, tmp_path, cases):
    """And has no use for shares of its own: the setting then changes nothing."""
    shares, whole = (
        load_file(two / f"mean-{how}" / "checkpoints" / "step-00000002" / "state.safetensors")
        for how in ("fsdp", "whole")
    )
    assert any(key.startswith("ema/") for key in shares) and any(key.startswith("optim/") for key in shares)
    assert_close(whole, shares, rtol=1e-3, atol=1e-5)
    (tmp_path / "checkpoints").symlink_to(two / "mean-fsdp" / "checkpoints")
    alone = cases.loop(token_networks, tmp_path, "mean", sharding="fsdp")
    assert not alone.shards and alone.resume() == 4
    saved = load_file(two / "mean-fsdp" / "checkpoints" / "step-00000004" / "state.safetensors")
    assert all(torch.equal(saved[f"method/{n}"], v) for n, v in alone.method.state_dict().items())


def said(two: Path, name: str) -> list[str]:
    return [(two / f"{name}-{rank}.txt").read_text() for rank in (0, 1)]


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("muon", "2 train.sharding 'fsdp': optim.name 'muon' needs whole matrices; sgd or adamw do not"),
        ("unused", "2 train.sharding 'fsdp': some parameters of this method get no gradient; set it to null"),
        ("seven", "2 train.batch_size 7 cannot be split over 2 processes"),
    ],
)
def test_what_cannot_be_is_refused_by_all_and_nothing_is_written(two, name, line):
    assert said(two, name) == [line, line]
    assert not list((two / name).iterdir())


def test_a_gradient_that_is_not_finite_ends_all_with_the_same_words(two):
    """The bias is in the first process's share alone."""
    for line in said(two, "infinite"):
        assert line.startswith("3 weight network.mlm_layer.bias is not finite at step 1; there was no checkpoint yet")
