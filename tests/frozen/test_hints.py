"""A store in the teacher's place gives the same statistics and the same targets, view for view."""

import pytest
import torch

from diffrep.data.datasets import DataConfig, load_data
from diffrep.data.feed import Feed
from diffrep.frozen.features import FeatureConfig, write_features
from diffrep.frozen.hints import LiveHints, StoredHints, statistics
from diffrep.frozen.teachers import load_teacher

TAP, TIMESTEPS = "mid", (700, 3)


@pytest.fixture(scope="module")
def feed():
    return Feed(
        load_data(DataConfig(source="digits"), "validation"),
        DataConfig(source="digits", augment="shift:1"),
        16,
        0,
        None,
    )


@pytest.fixture
def both(feed, factory, tiny_denoiser, tmp_path):
    reference = factory(tiny_denoiser)
    config = FeatureConfig(taps=(TAP,), timesteps=TIMESTEPS, pool=2, dtype="float32")
    source = {"fingerprint": "f", "augment": "shift:1"}

    def shown(view, index):
        return feed.gather(index, torch.full_like(index, view), torch.device("cpu")).images

    write_features(tmp_path, load_teacher(reference, True), config, shown, len(feed.images), 9, source)
    return LiveHints(reference, [TAP], 2, None, True), StoredHints(str(tmp_path), [TAP], 2)


def test_statistics_agree_though_the_store_holds_shifted_views_too(both, feed):
    live, stored = (statistics(hints, [TAP], TIMESTEPS, feed.sweep(64, torch.device("cpu")))[TAP] for hints in both)
    torch.testing.assert_close(live, stored, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(live[0], live[1])  # two timesteps differ, so the order is right


def test_each_row_gets_its_own_timestep_and_view(both, feed):
    batch = feed.batch(0, list(range(16)), torch.device("cpu"))
    timestep = torch.tensor(TIMESTEPS).repeat(8)
    live, stored = (hints.hints(batch, timestep, [TAP])[TAP] for hints in both)
    assert batch.view.unique().numel() > 2
    torch.testing.assert_close(live, stored, rtol=1e-5, atol=1e-6)
