"""ADDP on two processes is ADDP on one, to rounding: pytest tests/training/test_addp_processes.py"""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_processes import left_by_two

SCRIPT = '''
"""Arguments: the folder with tokenizer and predictor, and where to leave the weights."""
import os
import sys
from pathlib import Path

import addp_cases
import torch
from safetensors.torch import save_file

from diffrep.errors import UserError

torch.set_num_threads(1)
tokens, out, rank = sys.argv[1], Path(sys.argv[2]), os.environ["RANK"]
for name in addp_cases.LAWS:
    save_file(addp_cases.steps(tokens, out / f"run-{name}-{rank}", name), out / f"{name}-{rank}.safetensors")
try:
    addp_cases.steps(tokens, out / f"run-few-{rank}", "batch", batch_size=1)
except UserError as error:
    (out / f"few-{rank}.txt").write_text(f"{error.exit_code} {error}")
'''

CASES = '''
import tiny

from diffrep.methods.addp import ADDP, ADDPConfig
from diffrep.randomness import seeded
from diffrep.training.optim import OptimConfig

SMALL = {"embed_dim": 16, "depth": 2, "num_heads": 2, "decoder_depth": 2, "decoder_num_heads": 4, "dropout": 0.0}
# The law of "full" masks everything in half of the steps: no process may then miss a gradient.
LAWS = {"batch": {}, "sample": {"ratio_per": "sample"}, "full": {"minimum": 0.9, "mu": 1.0, "std": 0.05}}


def steps(tokens, folder, law, **options):
    """Five steps of SGD, where Adam would make whole steps of the rounding of gradients that are nearly zero."""
    with seeded(1, "addp"):
        made = ADDP(ADDPConfig(tokenizer=tokens, token_predictor=tokens, network=SMALL, mask=LAWS[law]), 2, 8)
    sgd = OptimConfig(name="sgd", lr=0.1, weight_decay=0.05)
    loop = tiny.trainer(folder, made, sgd, augment="none", **options)
    pixels = loop.feed.images._images
    loop.feed.images._images = pixels.repeat_interleave(2, 2).repeat_interleave(2, 3)
    made.train()
    for step in range(5):
        loop.step(step)
    return {name: value.contiguous() for name, value in tiny.weights(made).items()}
'''


@pytest.fixture(scope="module")
def two(token_networks, tmp_path_factory) -> Path:
    """What two processes leave behind; one start of torchrun serves all tests."""
    files = {"script.py": SCRIPT, "addp_cases.py": CASES}
    return left_by_two(tmp_path_factory.mktemp("two"), files, str(token_networks))


@pytest.mark.parametrize("law", ["batch", "sample", "full"])
def test_two_processes_equal_one(two, token_networks, tmp_path, law, monkeypatch):
    monkeypatch.syspath_prepend(str(two))
    import addp_cases

    alone = addp_cases.steps(token_networks, tmp_path, law)
    sys.modules.pop("addp_cases")
    first, second = (load_file(two / f"{law}-{rank}.safetensors") for rank in (0, 1))
    assert first.keys() == alone.keys()
    for name, value in alone.items():
        torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
        assert torch.equal(first[name], second[name]), name


def test_fewer_images_than_processes_are_refused_in_a_line(two):
    for rank in (0, 1):
        said = (two / f"few-{rank}.txt").read_text()
        assert said == "2 train.batch_size 1 cannot be split over 2 processes"
