"""Images that a token model made, as a data source: pytest tests/data/test_generated.py"""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from diffrep.assemble import generator_labels
from diffrep.data.datasets import DataConfig, load_data
from diffrep.errors import UserError

LICENCES = {"network": "MIT", "tokenizer": "MIT"}


def made(folder, count=20, first=40, **changes):
    """What `diffrep generate` leaves, its pictures beside the images included; pixel (0, 0) tells the seed."""
    (folder / "images").mkdir(parents=True)
    seeds = list(range(first, first + count))
    for seed in seeds:
        pixels = np.full((4, 4, 3), seed, np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"seed-{seed:06d}.png")
        Image.fromarray(pixels).save(folder / "grid.png")
    (folder / "generated.json").write_text(json.dumps({"seeds": seeds, "licences": LICENCES} | changes))
    return f"generated:{folder}"


def refused(reference, split="train"):
    with pytest.raises(UserError) as caught:
        load_data(DataConfig(source=reference), split)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_they_come_by_seed_without_classes_the_last_tenth_held_out(tmp_path):
    config = DataConfig(source=made(tmp_path / "set"))
    train, held_out = load_data(config, "train"), load_data(config, "validation")
    assert train.labels is None and train.classes == () and train.licence == "MIT"
    shown = [part.gather(torch.arange(len(part)))[:, 0, 0, 0].tolist() for part in (train, held_out)]
    assert shown == [list(range(40, 58)), [58, 59]]
    assert generator_labels(config.source) == {}
    assert "no test split" in refused(config.source, "test")


def test_of_few_images_none_is_held_out_twice(tmp_path):
    config = DataConfig(source=made(tmp_path / "set", count=4))
    assert len(load_data(config, "train")) == 3  # a source with training images alone is split as any other
    assert len(load_data(config, "test")) == 1


@pytest.mark.parametrize("written", ["[]", '{"seeds": []}', '{"seeds": ["../x"], "licences": {}}', '{"seeds": [true]}'])
def test_a_card_of_somebody_else_is_refused(written, tmp_path):
    reference = made(tmp_path / "set")
    (tmp_path / "set" / "generated.json").write_text(written)
    assert "was not written by diffrep generate" in refused(reference)


def test_what_is_not_whole_is_refused(tmp_path):
    reference = made(tmp_path / "set")
    (tmp_path / "set" / "images" / "seed-000041.png").unlink()
    assert "1 of 20 images are missing, first images/seed-000041.png" in refused(reference)
    (tmp_path / "set" / "generated.json").unlink()
    assert "no finished folder of diffrep generate (no generated.json)" in refused(reference)
    assert "no finished folder" in refused(f"generated:{tmp_path / 'nowhere'}")
