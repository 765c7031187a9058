"""Images through a tokenizer: pytest tests/evaluation/test_tokenize.py"""

import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from diffrep import api
from diffrep.data.datasets import ImageSet
from diffrep.errors import UserError
from diffrep.evaluation.tokenize import Tally, reconstruction_scores
from diffrep.frozen.tokens import write_network
from diffrep.models.vqgan import VQGAN, VQGANConfig


@pytest.fixture(scope="module")
def network():
    """Codes where latents of noise are, so that many are named."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(3)
        vq = VQGAN(VQGANConfig(ch=32, ch_mult=(1, 1, 1), num_res_blocks=0, z_channels=4, num_codes=7)).eval()
        vq.codebook.copy_(vq.encoder(torch.rand(1, 3, 16, 16)).flatten(2)[0].T[:7])
        return vq


@pytest.fixture
def folder(network, tmp_path):
    write_network(tmp_path / "folder", "tokenizer", network, "tiny", "MIT")
    return tmp_path / "folder"


def everything(folder):
    return {str(p.relative_to(folder)): p.stat().st_size for p in folder.rglob("*")}


@pytest.fixture
def photo(tmp_path):
    pixels = torch.randint(0, 256, (8, 12, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    Image.fromarray(pixels.numpy()).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def stored(path):
    return torch.from_numpy(np.asarray(Image.open(path)).copy())


def test_numbers_of_a_tally():
    tally = Tally(torch.zeros(4, dtype=torch.int64))
    tally.add(torch.tensor([[0, 0], [2, 2]]), torch.zeros(2, 3, 1, 1), torch.tensor([0.1, 0.3]).view(2, 1, 1, 1))
    found = tally.found()
    assert found["codes_used"] == 2 and found["share_used"] == 0.5
    assert found["perplexity"] == pytest.approx(2.0)
    assert found["mse"] == pytest.approx(0.05) and found["psnr"] == pytest.approx(13.0103, abs=1e-3)


class OneGrey:
    """Copies every image as grey of 0.5, by four ids of which half are code 3."""

    num_codes = 5

    def grid(self, images):
        return 2, 2

    def encode(self, images):
        return torch.tensor([3, 0, 3, 1]).repeat(len(images), 1)

    def lookup(self, ids):
        return ids[..., None]

    def decode(self, latents, grid):
        return torch.full((len(latents), 3, 2, 2), 0.5)


def test_scores_of_a_known_error():
    """Every pixel is wrong by a half."""
    pixels = torch.full((20, 3, 2, 2), 255, dtype=torch.uint8)  # more than a block
    pixels[:, :, 0] = 0
    pixels[10:] = 0
    images = ImageSet("made", "test", ("a",), "ours", pixels, torch.zeros(20, dtype=torch.int64))
    grey = OneGrey()
    found = reconstruction_scores(grey, images, torch.device("cpu"))
    assert found["psnr"] == pytest.approx(-10 * math.log10(0.25), abs=1e-3)
    assert found["test_codes_used"] == 60 and found["test_images"] == 20
    assert found["test_perplexity"] == pytest.approx(math.exp(1.5 * math.log(2)), abs=1e-3)
    grey.decode = lambda latents, grid: torch.zeros(len(latents), 3, 2, 2)
    half = reconstruction_scores(grey, images, torch.device("cpu"))
    assert half["psnr"] == pytest.approx(-10 * math.log10(0.25), abs=1e-3)  # a quarter of all pixels is wrong by one
    black = ImageSet("made", "test", ("a",), "ours", torch.zeros_like(pixels), images.labels)
    assert "psnr" not in reconstruction_scores(grey, black, torch.device("cpu"))  # perfect


def test_one_image(folder, photo, network):
    found = api.tokenize(photo, str(folder), out=photo.parent / "again.png")
    pixels = stored(photo).movedim(2, 0)[None] / 255
    with torch.no_grad():
        ids = network.encode(pixels)
        drawn = network.decode(network.lookup(ids), (2, 3)).clamp(0, 1)
    assert torch.tensor(found["ids"]).flatten().tolist() == ids[0].tolist() and found["grid"] == [2, 3]
    assert found["mse"] == pytest.approx(float((drawn - pixels).square().mean()), rel=1e-5)
    assert torch.equal(stored(photo.parent / "again.png"), (drawn[0] * 255).round().byte().movedim(0, 2))


def test_many_images(folder, photo):
    shutil.copy(photo, photo.parent / "twin.png")
    one, two = api.tokenize(photo, str(folder)), api.tokenize([str(photo), str(photo.parent / "twin.png")], str(folder))
    assert two["images"] == 2 and "ids" not in two and two["mse"] == pytest.approx(one["mse"])
    assert two["perplexity"] == pytest.approx(one["perplexity"])
    digits = api.tokenize("digits", str(folder), split="test")
    assert digits["images"] > 100 and digits["grid"] == [2, 2] and digits["image_size"] == [8, 8]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"images": "digits", "image_size": 10}, "10x10 is not divisible; valid near it: 8x8 or 12x12"),
        ({"images": "digits", "out": "x.png"}, "images were given, and one reconstruction"),
        ({"images": "nowhere.png"}, "nowhere.png does not exist"),
        ({"images": "digit"}, "did you mean 'digits'"),
        ({"images": "digits", "split": "tset"}, "split 'tset'; did you mean 'test'"),
        ({"images": "photo.png", "out": "x.jpg"}, "is written as a .png file"),
        ({"images": "photo.png", "out": "photo.png"}, "is the image itself"),
        ({"images": "folder/tokenizer/config.json"}, "is unreadable"),
        ({"images": "empty"}, "holds no image"),
        ({"images": []}, "no image was given"),
    ],
)
def test_images_that_cannot_be_read_are_refused(folder, photo, monkeypatch, given, words):
    monkeypatch.chdir(photo.parent)
    (photo.parent / "empty").mkdir()
    before = everything(photo.parent)
    with pytest.raises(UserError, match=words):
        api.tokenize(tokenizer=str(folder), **given)
    assert everything(photo.parent) == before
