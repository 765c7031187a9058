"""Dense tasks on two processes are those on one, to rounding, where batch norms stand still."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_processes import left_by_two

SCRIPT = '''
"""Argument: where to leave the weights."""
import os
import sys
from pathlib import Path

import dense_cases
import torch
from safetensors.torch import save_file

torch.set_num_threads(1)
for name in dense_cases.CASES:
    save_file(dense_cases.steps(name), Path(sys.argv[1]) / f"{name}-{os.environ['RANK']}.safetensors")
'''

MODULE = '''
from pathlib import Path

from diffrep.data.datasets import DataConfig
from diffrep.data.dense import load_dense
from diffrep.data.dense_feed import DenseFeed
from diffrep.data.landmark_views import LandmarkViews
from diffrep.data.segment_views import SegmentViews
from diffrep.dense import TASKS
from diffrep.methods.landmark import LandmarkConfig
from diffrep.methods.segment import SegmentConfig
from diffrep.models.students import StudentConfig
from diffrep.randomness import seeded
from diffrep.training.config import TrainConfig
from diffrep.training.optim import OptimConfig
from diffrep.training.run import RunDir
from diffrep.training.trainer import Trainer

RESNET = StudentConfig(name="resnet10t", options={"stem_width": 8, "channels": [8, 16, 32, 64]})
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 4, "num_heads": 2}
MASKS = SegmentViews(base=(64, 64), crop=64)
CASES = {
    "bisenet": SegmentConfig(student=RESNET, views=MASKS),
    "upernet": SegmentConfig(
        student=StudentConfig(name="vit_base_patch16_224", options=VIT), views=MASKS, head="upernet", side_width=8
    ),
    "heatmaps": LandmarkConfig(student=RESNET, views=LandmarkViews(size=64), deconv=(8, 8, 8)),
}


def steps(name):
    """Three steps of SGD; norms read their running numbers, so nothing depends on how a batch is shared out."""
    config = CASES[name]
    images = load_dense(DataConfig(source="placed:digits"), "validation", config.kind)
    with seeded(0, "dense"):
        method = TASKS[config.kind].method(config, images)
    feed = DenseFeed(images, TASKS[config.kind].views(config, images), 4, 0)
    train = TrainConfig(steps=3, batch_size=4)
    loop = Trainer(method, feed, OptimConfig(name="sgd", lr=0.01), train, 0, RunDir(Path("none"), writes=False))
    method.eval()
    for step in range(3):
        loop.step(step)
    return {key: value.detach().contiguous() for key, value in method.named_parameters()}
'''
NAMES = ("bisenet", "upernet", "heatmaps")


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """What two processes leave behind; one start of torchrun serves all tests."""
    return left_by_two(tmp_path_factory.mktemp("two"), {"script.py": SCRIPT, "dense_cases.py": MODULE})


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_equal_one(two, name, monkeypatch):
    monkeypatch.syspath_prepend(str(two))
    sys.modules.pop("dense_cases", None)
    import dense_cases

    ranks = [load_file(two / f"{name}-{rank}.safetensors") for rank in (0, 1)]
    alone = dense_cases.steps(name)
    assert ranks[0].keys() == ranks[1].keys() == alone.keys()
    for key, value in alone.items():
        assert torch.equal(ranks[0][key], ranks[1][key])
        torch.testing.assert_close(ranks[0][key], value, atol=2e-6, rtol=1e-4)
