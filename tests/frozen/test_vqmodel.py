"""diffusers' VQModel as a tokenizer: pytest tests/frozen/test_vqmodel.py"""

import json

import pytest
import torch
from golden_addp import close

from diffrep.counting import multiply_adds
from diffrep.errors import UserError
from diffrep.frozen.token_files import convert
from diffrep.frozen.tokens import load_tokenizer, write_network


def seeded(make):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return make().eval()


@pytest.fixture(
    scope="module", params=[{"vq_embed_dim": 5}, {"norm_type": "spatial"}, {"lookup_from_codebook": True}], ids=str
)
def vqmodel(request):
    from diffrep import _torchvision_compat

    _torchvision_compat.install()
    from diffusers import VQModel

    def make():
        network = VQModel(
            block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, num_vq_embeddings=11,
            **request.param,
        )  # fmt: skip
        with torch.no_grad():  # codes where latents are, so that many are named
            latents = network.encode(torch.rand(1, 3, 8, 8)).latents.flatten(2)[0].T
            network.quantize.embedding.weight.copy_(latents[:11])
        return network

    return seeded(make)


@torch.no_grad()
def test_ids_and_pixels_are_those_of_diffusers(vqmodel, tmp_path):
    vqmodel.save_pretrained(tmp_path / "vq")
    vq, images = (
        load_tokenizer(str(tmp_path / "vq")),
        torch.rand(3, 3, 8, 12, generator=torch.Generator().manual_seed(0)),
    )
    is_amused = vqmodel.config.lookup_from_codebook
    latents = vqmodel.encode(images if is_amused else images * 2 - 1).latents
    ids = vq.encode(images)
    assert torch.equal(ids, vqmodel.quantize(latents)[2][2].view(3, 24)) and len(ids.unique()) > 3
    drawn = vqmodel.decode(latents).sample
    found = vq.decode(vq.lookup(ids), vq.grid(images))
    close(found if is_amused else found * 2 - 1, drawn, atol=1e-5)
    close(vq.soft(torch.nn.functional.one_hot(ids, 11).float()), vq.lookup(ids), atol=1e-6)
    assert (vq.stride, vq.num_codes) == (2, 11) and vq.module.codebook.shape == (11, vq.module.config.z_channels)


def test_a_vqmodel_travels_in_our_folders(vqmodel, tmp_path):
    vqmodel.save_pretrained(tmp_path / "vq")
    vq, images = load_tokenizer(str(tmp_path / "vq")), torch.rand(1, 3, 4, 4)
    write_network(tmp_path / "run", "tokenizer", vq.module, vq.name, vq.licence)
    again = load_tokenizer(str(tmp_path / "run"))
    assert again.sha256 == vq.sha256 and torch.equal(again.encode(images), vq.encode(images))
    with pytest.raises(UserError, match="no official file holds one"):
        convert(str(tmp_path / "run"), tmp_path / "file.pth")


def test_a_vqmodel_whose_files_do_not_fit_is_refused(vqmodel, tmp_path):
    vqmodel.save_pretrained(tmp_path / "vq")
    card = json.loads((tmp_path / "vq/config.json").read_text())
    for change, words in (
        ({"num_vq_embeddings": 12}, "of another shape"),
        ({"nonsense": 1}, "makes no VQModel of this config"),
        ({"down_block_types": ["NoBlock", "NoBlock"]}, "makes no VQModel of this config"),
        ({"in_channels": 1}, "reads 1 channels"),
    ):
        (tmp_path / "vq/config.json").write_text(json.dumps(card | change))
        with pytest.raises(UserError, match=words):
            load_tokenizer(str(tmp_path / "vq"))
    (tmp_path / "vq/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"without diffusion_pytorch_model\.safetensors"):
        load_tokenizer(str(tmp_path / "vq"))


def test_what_it_costs_is_counted_on_shapes(vqmodel, tmp_path):
    """As its own passes count, to what torch's small kernels leave out and shapes alone do not."""
    vqmodel.save_pretrained(tmp_path / "vq")
    loaded = load_tokenizer(str(tmp_path / "vq"))
    images = torch.rand(1, 3, 8, 8)
    encoded = multiply_adds(lambda: vqmodel.quantize(vqmodel.encode(images).latents))
    assert loaded.encode_multiply_adds(8) == pytest.approx(encoded, rel=0.01)
    ids = loaded.encode(images)
    decoded = multiply_adds(lambda: loaded.decode(loaded.lookup(ids), loaded.grid(images)))
    assert loaded.decode_multiply_adds(8) == pytest.approx(decoded, rel=0.01)
