"""Commands for a painter that costs nothing."""

import pytest

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
