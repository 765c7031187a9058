"""Gives each test the same draws at every run."""

import pytest
import torch


@pytest.fixture(autouse=True)
def same_draws():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
