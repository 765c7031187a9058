"""A store of a teacher's features replays the teacher: pytest tests/frozen/test_features.py"""

import json

import numpy as np
import pytest
import torch

from diffrep.errors import RunError, UserError
from diffrep.files import sha256_of
from diffrep.frozen.diffusion import DiffusionTeacher
from diffrep.frozen.features import FeatureConfig, FeatureStore, write_features
from diffrep.frozen.stores import MANIFEST, PROGRESS
from diffrep.randomness import Rows, stream

NUM, VIEWS = 10, 2
SOURCE = {"name": "made up", "split": "train", "fingerprint": "f00", "augment": "flip"}
PIXELS = torch.rand(VIEWS, NUM, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def images(view, index):
    return PIXELS[view, index]


@pytest.fixture
def teacher(tiny_denoiser):
    return DiffusionTeacher(tiny_denoiser(), "tiny", 8, licence="CC0")


def settings(**changes):
    return FeatureConfig(
        **{"taps": ("mid", "out"), "timesteps": (700, 3), "dtype": "float32", "block_size": 4} | changes
    )


def write(folder, teacher, config=None, shown=images, seed=0, num=NUM, **options):
    return write_features(folder, teacher, config or settings(), shown, num, VIEWS, SOURCE, seed, **options)


def refused(call):
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_float32_replays_the_teacher_bit_for_bit_at_equal_blocks(teacher, tmp_path):
    manifest = write(tmp_path / "store", teacher)
    store = FeatureStore(tmp_path / "store")
    assert manifest["shapes"] == {"mid": [8, 4, 4], "out": [3, 8, 8]}
    for tap in ("mid", "out"):
        assert store.array(tap).shape[:3] == (2, VIEWS, NUM) and store.array(tap).dtype == np.float32
        for timestep in (3, 700):
            for view in range(VIEWS):
                for first in range(0, NUM, 4):
                    index = torch.arange(first, min(first + 4, NUM))
                    online = teacher.features(images(view, index), timestep, [tap])[tap]
                    asked = torch.full_like(index, timestep), torch.full_like(index, view), index
                    assert torch.equal(store.gather(tap, *asked, torch.device("cpu")), online)


@pytest.mark.parametrize("resident", [True, False])
def test_gather_takes_each_images_own_timestep_and_view(teacher, tmp_path, monkeypatch, resident):
    write(tmp_path, teacher)
    if not resident:
        monkeypatch.setattr("diffrep.frozen.stores.RESIDENT_BYTES", 0)
    store = FeatureStore(tmp_path)
    timestep, view, index = torch.tensor([3, 700, 700, 3]), torch.tensor([1, 0, 1, 0]), torch.tensor([9, 9, 0, 2])
    found = store.gather("mid", timestep, view, index, torch.device("cpu"))
    for k in range(4):
        alone = teacher.features(PIXELS[view[k], index[k]][None], int(timestep[k]), ["mid"])["mid"][0]
        torch.testing.assert_close(found[k], alone, rtol=1e-5, atol=1e-5)
    first = store.gather("mid", timestep, None, index, torch.device("cpu"))
    assert torch.equal(first[1], found[1]) and not torch.equal(first[0], found[0])  # no view is view 0


def test_pooling_and_half_precision(teacher, tmp_path):
    write(tmp_path / "whole", teacher)
    write(tmp_path / "half", teacher, settings(pool=2, dtype="float16"))
    whole, half = FeatureStore(tmp_path / "whole").array("mid"), FeatureStore(tmp_path / "half").array("mid")
    assert half.shape == (2, VIEWS, NUM, 8, 2, 2) and half.dtype == np.float16
    np.testing.assert_allclose(half, whole.reshape(2, VIEWS, NUM, 8, 2, 2, 2, 2).mean((5, 7)), rtol=2e-3, atol=1e-3)


def test_noise_is_each_images_own_whatever_the_block(teacher, tmp_path):
    for size in (1, 4, 10):
        write(tmp_path / str(size), teacher, settings(noise="forward", block_size=size))
    arrays = [FeatureStore(tmp_path / str(size)).array("out") for size in (1, 4, 10)]
    for other in arrays[1:]:
        np.testing.assert_allclose(arrays[0], other, rtol=1e-4, atol=1e-5)
    noise = torch.randn(3, 8, 8, generator=stream(0, "feature noise", 700, 1, 4))[None]
    rng = Rows(torch.Generator(), 1)
    rng.normal = lambda *shape: noise
    online = teacher.features(PIXELS[1, 4][None], 700, ["out"], noise="forward", rng=rng)["out"][0]
    np.testing.assert_allclose(arrays[0][0, 1, 4], online, rtol=1e-4, atol=1e-5)
    write(tmp_path / "seed", teacher, settings(noise="forward"), seed=1)
    assert not np.allclose(FeatureStore(tmp_path / "seed").array("out"), arrays[0], atol=1e-2)


# Interruption: progress is noted every 256 blocks, so these stores have more


class CutError(Exception):
    pass


LONG = {"timesteps": (5, 50, 500), "taps": ("mid",), "block_size": 1, "pool": 1}
MANY = torch.rand(VIEWS, 100, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def until(blocks, asked):
    """images() that fails when block number ``blocks`` is asked for, and notes what was asked before."""

    def shown(view, index):
        if len(asked) == blocks:
            raise CutError
        asked.append((view, int(index[0])))
        return MANY[view, index]

    return shown


def test_an_interrupted_store_goes_on_and_ends_as_an_uninterrupted_one(teacher, tmp_path):
    config, through, asked = settings(**LONG), [], []
    whole = write(tmp_path / "whole", teacher, config, until(None, through), num=100)
    assert len(through) == 600
    with pytest.raises(CutError):
        write(tmp_path / "cut", teacher, config, until(530, asked), num=100)
    assert not (tmp_path / "cut" / MANIFEST).exists()
    refused(lambda: FeatureStore(tmp_path / "cut"))
    again, told = [], []
    write(tmp_path / "cut", teacher, config, until(None, again), num=100, progress=lambda d, t: told.append((d, t)))
    assert again == through[512:]  # from the last note on, nothing before it
    assert told[0] == (513, 600) and told[-1] == (600, 600)
    assert json.loads((tmp_path / "cut" / MANIFEST).read_text()) == whole
    assert (
        sha256_of(tmp_path / "cut" / "mid.npy")
        == sha256_of(tmp_path / "whole" / "mid.npy")
        == whole["sha256"]["mid.npy"]
    )
    assert not (tmp_path / "cut" / PROGRESS).exists()


def test_a_store_cut_before_its_first_note_begins_again(teacher, tmp_path):
    with pytest.raises(CutError):
        write(tmp_path, teacher, settings(**LONG), until(40, []), num=100)
    again = []
    write(tmp_path, teacher, settings(**LONG), until(None, again), num=100)
    assert len(again) == 600


def test_an_interrupted_store_with_other_settings_or_a_damaged_array_is_refused(teacher, tmp_path):
    with pytest.raises(CutError):
        write(tmp_path, teacher, settings(**LONG), until(300, []), num=100)
    other = settings(**LONG | {"pool": 2})
    told = refused(lambda: write(tmp_path, teacher, other, num=100))
    assert "was written with other settings (pool: 1, now 2)" in told
    array = tmp_path / "mid.npy"
    cut = array.read_bytes()[:-100]
    array.write_bytes(cut)
    again = refused(lambda: write(tmp_path, teacher, settings(**LONG), until(None, []), num=100))
    assert "mid.npy cannot be read" in again and array.read_bytes() == cut
    array.unlink()
    assert "mid.npy" in refused(lambda: write(tmp_path, teacher, settings(**LONG), until(None, []), num=100))


def test_a_finished_store_is_not_written_again_and_other_settings_are_refused(teacher, tiny_denoiser, tmp_path):
    first = write(tmp_path, teacher)

    def never(view, index):
        raise AssertionError("asked for images of a finished store")

    assert write(tmp_path, teacher, shown=never) == first
    other = DiffusionTeacher(tiny_denoiser(), "tiny", 8, licence="CC0")
    other.module.stem.bias[0] += 1
    for change in (
        lambda: write(tmp_path, teacher, settings(pool=2)),
        lambda: write(tmp_path, teacher, settings(timesteps=(3, 700))),
        lambda: write(tmp_path, teacher, settings(block_size=5)),
        lambda: write(tmp_path, teacher, seed=1),
        lambda: write(tmp_path, teacher, num=9),
        lambda: write(tmp_path, other),
    ):
        assert "was written with other settings" in refused(change)


def test_a_timestep_or_tap_that_the_teacher_lacks_is_refused_before_anything_is_written(teacher, tmp_path):
    assert "timestep 1000" in refused(lambda: write(tmp_path / "a", teacher, settings(timesteps=(3, 1000))))
    assert "did you mean 'mid'" in refused(lambda: write(tmp_path / "a", teacher, settings(taps=("midd",))))
    assert not (tmp_path / "a").exists()
    for twice in ({"taps": ("mid", "mid")}, {"timesteps": (1, 1)}):
        with pytest.raises(ValueError, match="one is named twice"):
            settings(**twice)


def test_a_truncated_array_is_named(teacher, tmp_path):
    write(tmp_path, teacher)
    array = tmp_path / "mid.npy"
    content = array.read_bytes()
    index = torch.tensor([0])
    for size in (len(content) - 1, 200, 3, 0):
        array.write_bytes(content[:size])
        store = FeatureStore(tmp_path)
        words = refused(lambda: store.gather("mid", index + 3, None, index, torch.device("cpu")))  # noqa: B023
        assert "mid.npy cannot be read" in words
    array.unlink()
    assert "mid.npy cannot be read" in refused(lambda: FeatureStore(tmp_path).array("mid"))


def test_what_is_not_in_a_store_is_refused(teacher, tmp_path):
    assert "no finished feature folder" in refused(lambda: FeatureStore(tmp_path))
    write(tmp_path, teacher, settings(pool=2))
    store = FeatureStore(tmp_path)
    store.check("mid", 2), store.check_timesteps([3, 700]), store.check_source("f00", "flip")
    assert "did you mean 'mid'" in refused(lambda: store.check("midd", 2))
    assert "not on a 1x1 grid" in refused(lambda: store.check("mid", 1))
    assert "no timestep 4; it holds [700, 3]" in refused(lambda: store.check_timesteps([3, 4]))
    assert "other images" in refused(lambda: store.check_source("f01", "flip"))
    assert "other augment" in refused(lambda: store.check_source("f00", "none"))


def test_what_float16_cannot_hold_is_not_written(tiny_denoiser, tmp_path):
    network = tiny_denoiser()
    with torch.no_grad():
        network.mid.bias.fill_(1e6)
    loud = DiffusionTeacher(network, "loud", 8)
    with pytest.raises(RunError, match="mid at t = 700 is not finite in float16; use dtype float32"):
        write(tmp_path, loud, settings(dtype="float16"))
    assert not (tmp_path / MANIFEST).exists()
