"""Commands for a painter that costs nothing, and a token model that knows nothing."""

import shutil

import pytest
import torch

from diffrep.frozen.tokens import write_network
from diffrep.models.addp_vit import ADDPVit, ADDPVitConfig

PAINT = ("synthesize", "python:toys:painter", "--allow-code", "--images", 22, "--steps", 3)
PAINT += ("--block-size", 2, "--shard-size", 4)  # six shards of two blocks, the last of half its size


@pytest.fixture(scope="session")
def paint() -> tuple:
    """The words of a command that makes a set of 22 images in six shards; --out is still to be said."""
    return PAINT


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """A folder with that set, unbroken, made by one process, in whole/."""
    import commands

    folder = tmp_path_factory.mktemp("whole")
    done = commands.run(folder, *PAINT, "--out", "whole")
    assert done.code == 0, done.err
    return folder / "whole"


@pytest.fixture(scope="session")
def token_model(token_networks, tmp_path_factory):
    """A folder with all three networks, untrained: images of 8 pixels, 16 tokens."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    shutil.copytree(token_networks, folder)
    small = {"embed_dim": 16, "depth": 1, "num_heads": 2, "decoder_depth": 1, "decoder_num_heads": 2, "init_std": 0.5}
    with torch.random.fork_rng():
        torch.manual_seed(5)
        network = ADDPVit(ADDPVitConfig(**small, num_codes=11, image_size=8, patch_size=2))
    write_network(folder, "addp", network, "tiny", "MIT")
    return folder
