"""Sets of masks, points and objects, and the feed that crops them: splits, refusals, and draws that nothing moves."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from diffrep.data import dense, dense_kinds, sources
from diffrep.data.coco import Objects
from diffrep.data.datasets import DataConfig
from diffrep.data.dense_feed import DenseFeed, moved
from diffrep.errors import UserError


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


def part(count, side=6, mask_side=None, broken=()):
    """Pictures whose every pixel says which they are, with masks that say the same."""
    images = [b"no picture" if k in broken else png(np.full((side, side, 3), k, np.uint8)) for k in range(count)]
    masks = [torch.full((mask_side or side, mask_side or side), k % 3, dtype=torch.uint8) for k in range(count)]
    return dense.DensePart([f"p{k}" for k in range(count)], images.__getitem__, masks.__getitem__)


@pytest.fixture
def source(monkeypatch):
    """source(parts) makes ``placed:toy`` a source of these parts."""

    def make(**parts):
        found = dense.DenseRead(("a", "b", "c"), parts, ((0, 2),))
        monkeypatch.setitem(dense_kinds.DENSE_KINDS, "placed", dense.DenseKind(lambda *_: found, "none"))
        return lambda split, **settings: dense.load_dense(DataConfig(source="placed:toy", **settings), split, "segment")

    return make


def numbers(images):
    return [int(images[k][0][0, 0, 0]) for k in range(len(images))]


def test_a_lone_training_part_is_split_without_overlap(source):
    load = source(train=part(40))
    splits = {split: numbers(load(split)) for split in ("train", "validation", "test")}
    assert [len(found) for found in splits.values()] == [24, 4, 12]
    assert sorted(k for found in splits.values() for k in found) == list(range(40))


def test_what_is_not_held_out_is_trained_on(source):
    source(train=part(40), test=part(5))
    config = DataConfig(source="placed:toy")
    whole = dense.load_dense(config, "train", "segment", holds_out=False)
    assert len(whole) == 40 and len(dense.load_dense(config, "train", "segment")) == 36
    assert len(dense.load_dense(config, "validation", "segment")) == 4


def test_the_test_split_does_not_depend_on_what_is_held_out(source):
    source(train=part(40))
    config = DataConfig(source="placed:toy")
    with_it, without = (dense.load_dense(config, "train", "segment", holds_out=h) for h in (True, False))
    test = dense.load_dense(config, "test", "segment")
    assert set(numbers(with_it)) <= set(numbers(without)) and not set(numbers(without)) & set(numbers(test))


def test_one_part_for_all_only_when_asked_for(source):
    load = source(validation=part(3))
    with pytest.raises(UserError, match=r"no train part, only validation; data\.only_part"):
        load("train")
    assert numbers(load("train", only_part="validation")) == numbers(load("test", only_part="validation")) == [0, 1, 2]
    with pytest.raises(UserError, match=r"data\.only_part test: placed:toy has validation"):
        load("train", only_part="test")


def test_a_damaged_picture_is_named(source):
    load = source(train=part(3, broken=[1]), test=part(1))
    images = load("train", only_part="train")
    assert images[0][0].shape == (3, 6, 6)
    with pytest.raises(UserError, match="picture 'p1' is unreadable"):
        images[1]


def test_a_mask_of_another_frame_is_refused_and_a_scaled_one_is_not(source):
    assert source(train=part(2, side=8, mask_side=4))("train", only_part="train")[0][1].shape == (4, 4)
    wrong = dense.DensePart(["p"], lambda k: png(np.zeros((8, 6, 3), np.uint8)), lambda k: torch.zeros(6, 6))
    with pytest.raises(UserError, match="its mask is 6x6, the picture 8x6"):
        source(train=wrong)("train", only_part="train")[0]


def test_objects_of_another_frame_are_refused(source):
    """Else masks as large as the annotations say would be made, whatever that is."""
    truth = Objects.from_masks(torch.ones(1, 6, 6, dtype=torch.bool), torch.zeros(1, dtype=torch.int64))
    for height in (6, 12):  # no scaled copy either: boxes are in pixels
        size = (height, height, 3)
        found = dense.DensePart(["p"], lambda k, size=size: png(np.zeros(size, np.uint8)), lambda k: truth)
        images = source(train=found)("train", only_part="train")
        if height == 6:
            assert images[0][1] is truth
        else:
            with pytest.raises(UserError, match="'p': its annotations are of 6x6, the picture 12x12"):
                images[0]


def test_settings_of_image_sets_are_refused(source):
    load = source(train=part(20))
    for name, value in {"image_size": 8, "augment": "flip", "unreadable": "skip"}.items():
        with pytest.raises(UserError, match=f"data.{name}: belongs to sets of whole images"):
            load("train", **{name: value})


def test_sources_are_told_apart_by_their_truth():
    with pytest.raises(UserError, match="holds no classes of whole images, but truth for the task landmark"):
        sources.parse("wflw:somewhere")
    with pytest.raises(UserError, match="no truth for the task 'detect'; sources that have: coco, placed"):
        dense.load_dense(DataConfig(source="wflw:somewhere"), "train", "detect")
    with pytest.raises(UserError, match="no truth for the task 'segment'"):
        dense.load_dense(DataConfig(source="digits"), "train", "segment")
    with pytest.raises(ValueError, match="did you mean 'ade20k'"):
        sources.parse_any("ade20:somewhere")
    assert set(sources.DENSE_TASKS) == set(dense_kinds.DENSE_KINDS)


def test_decoded_pictures_are_kept_as_long_as_there_is_room(source, monkeypatch):
    asked = []
    whole = part(4)
    counted = dense.DensePart(whole.names, lambda k: asked.append(k) or whole.image(k), whole.truth)
    monkeypatch.setattr(dense, "KEPT_BYTES", 2 * (6 * 6 * 3 + 6 * 6))  # two pictures
    images = source(train=counted)("train", only_part="train")
    for _ in range(2):
        assert numbers(images) == [0, 1, 2, 3]
    assert asked == [0, 1, 2, 3, 2, 3]


def test_few_pictures_are_nested():
    few, more = (dense.some_pictures(30, count, seed=1).tolist() for count in (5, 12))
    assert more[:5] == few and len(set(more)) == 12 and few != dense.some_pictures(30, 5, seed=2).tolist()
    with pytest.raises(UserError, match="the split has 30 pictures"):
        dense.some_pictures(30, 31, seed=1)


class Noisy:
    """Views that add what they draw."""

    def __call__(self, image, truth, rng):
        return image.float() / 255 + torch.rand((), generator=rng), {"mask": truth}

    def collate(self, targets):
        return {"mask": torch.stack([target["mask"] for target in targets])}


def test_rows_of_a_step_depend_on_nothing_else(source):
    images = source(train=part(10))("train", only_part="train")
    feed = DenseFeed(images, Noisy(), batch_size=6, seed=3)
    device = torch.device("cpu")
    whole = feed.batch(5, list(range(6)), device)
    apart = DenseFeed(images, Noisy(), batch_size=6, seed=3).batch(5, [4, 1], device)
    assert torch.equal(apart.images, whole.images[[4, 1]]) and torch.equal(apart.index, whole.index[[4, 1]])
    assert torch.equal(apart.target["mask"], whole.target["mask"][[4, 1]])
    other = DenseFeed(images, Noisy(), batch_size=6, seed=4).batch(5, list(range(6)), device)
    assert not torch.equal(other.images, whole.images)


def test_the_next_step_is_made_ahead_and_shown_once(source):
    """Each row of each step is cropped once, in micro-batches or whole; any other step is made anew."""
    images, made = source(train=part(10))("train", only_part="train"), []

    class Counted(Noisy):
        def __call__(self, image, truth, rng):
            seen = super().__call__(image, truth, rng)
            made.append(float(seen[0].sum()))
            return seen

    feed, device = DenseFeed(images, Counted(), batch_size=4, seed=3), torch.device("cpu")
    shown = [feed.batch(step, rows, device) for step in range(3) for rows in ([0, 2], [1, 3])]
    assert len({float(image.sum()) for batch in shown for image in batch.images}) == 12
    feed._pool.shutdown(wait=True)
    assert len(made) == len(set(made)) == 16  # four steps: one ahead
    again = DenseFeed(images, Noisy(), batch_size=4, seed=3)
    assert torch.equal(again.batch(2, [1, 3], device).images, shown[-1].images)
    assert torch.equal(again.batch(0, [0, 2], device).images, shown[0].images)


def test_a_damaged_picture_stops_the_step_that_shows_it(source):
    images = source(train=part(4, broken=[2]))("train", only_part="train")
    feed = DenseFeed(images, Noisy(), batch_size=4, seed=0)
    with pytest.raises(UserError, match="picture 'p2' is unreadable"):
        feed.batch(0, [0, 1, 2, 3], torch.device("cpu"))


def test_what_is_moved_keeps_its_shape():
    value = {"a": [torch.ones(2), (torch.zeros(1), "word")], "b": None}
    assert str(moved(value, torch.device("cpu"))) == str(value)
