"""Views that follow the epoch: pytest tests/data/test_feed.py"""

import torch

from diffrep.data.datasets import DataConfig, ImageSet
from diffrep.data.feed import Feed

PLACES = 5 * 5  # of alternate_flip:2; views from there on are mirrored


def feed(batch_size, count=40, seed=3, augment="alternate_flip:2", labelled=None, share=None):
    rng = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (count, 3, 8, 8), generator=rng).to(torch.uint8)
    images = ImageSet("noise", "train", ("a", "b"), "ours", pixels, torch.arange(count) % 2)
    counts = {"labels": len(labelled), "labelled_share": share} if share else {}
    return Feed(images, DataConfig(source="digits", augment=augment, **counts), batch_size, seed, labelled)


def views(made, epochs, count=40):
    """{(image, epoch): view} of whole epochs; the epoch is counted here, by how often an image came before."""
    found, seen = {}, [0] * count
    for step in range(epochs * count // made.batch_size):
        for image, view in zip(made.index(step).tolist(), made.view(step).tolist(), strict=True):
            found[image, seen[image]] = view
            seen[image] += 1
    assert seen == [epochs] * count
    return found


def test_each_image_is_mirrored_at_every_other_epoch():
    found = views(feed(8), 4)
    for image in range(40):
        mirrored = [found[image, epoch] >= PLACES for epoch in range(4)]
        assert mirrored in ([True, False] * 2, [False, True] * 2)


def test_half_are_mirrored_on_average_and_the_seed_says_which():
    first = [views(feed(40, 400, seed), 1, 400) for seed in (3, 4)]
    mirrored = [[found[image, 0] >= PLACES for image in range(400)] for found in first]
    assert all(160 < sum(them) < 240 for them in mirrored)  # 4 standard deviations of 400 coins
    assert 160 < sum(a != b for a, b in zip(*mirrored, strict=True)) < 240


def test_shifts_are_drawn_anew_per_epoch_and_all_come_up():
    found = views(feed(40, 400), 4, 400)
    shifts = torch.tensor([[found[image, epoch] % PLACES for epoch in range(4)] for image in range(400)])
    counts = shifts.flatten().bincount(minlength=PLACES)
    assert counts.shape == (PLACES,) and counts.min() > 32 and counts.max() < 96  # 64 each, 4 deviations
    assert (shifts[:, 0] == shifts[:, 1]).float().mean() < 0.1


def test_a_view_depends_on_image_and_epoch_not_on_the_batch():
    assert views(feed(8), 3) == views(feed(10), 3) == views(feed(40), 3)
    assert views(feed(15), 3) == views(feed(8), 3)  # batches that lie across the border of epochs


def test_labelled_images_count_their_own_epochs():
    made = feed(8, labelled=torch.tensor([0, 7, 9]), share=0.5)
    assert made.epoch(2).tolist() == [2, 3, 3, 3, 0, 0, 0, 0]  # positions 8..11 of three, 8..11 of forty
    seen = [made.view(step)[row] for step in range(2) for row in range(4) if made.index(step)[row] == 7]
    assert len(seen) >= 2 and (seen[0] >= PLACES) != (seen[1] >= PLACES)


def test_the_batch_shows_what_the_view_says():
    made = feed(8)
    batch = made.batch(6, list(range(8)), torch.device("cpu"))
    assert torch.equal(batch.view, made.view(6))
    pixels = made.augmentation.apply(made.images.gather(made.index(6)), made.view(6))
    assert torch.equal(batch.images, pixels / 255)


def test_mixtures_of_an_alternating_flip_are_drawn_per_epoch_too():
    made = feed(40, 400, augment="alternate_flip+cutmix:3")
    found = views(made, 2, 400)
    assert {view // 2 for view in found.values()} == {0, 1, 2}
    assert all((found[image, 0] % 2) != (found[image, 1] % 2) for image in range(400))
