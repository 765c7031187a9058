"""diffusers' ``VQModel`` as a tokenizer: the methods of :class:`diffrep.models.vqgan.VQGAN`.

Letters: B images, c latent channels, K codes, (h, w) the token grid, L = h w.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffrep import _torchvision_compat
from diffrep.config import Config
from diffrep.errors import UserError
from diffrep.files import read_json
from diffrep.models.convert import fitted
from diffrep.models.weights import read_weights

CLASS = "VQModel"
WEIGHTS = "diffusion_pytorch_model.safetensors"


class VQModelConfig(Config):
    """What diffusers builds the network from."""

    vqmodel: dict[str, Any]  # the fields of its config.json

    @property
    def stride(self) -> int:
        """Pixels per token, in each direction."""
        return int(2 ** (len(self.vqmodel["block_out_channels"]) - 1))

    @property
    def num_codes(self) -> int:
        return int(self.vqmodel["num_vq_embeddings"])

    @property
    def z_channels(self) -> int:
        """c."""
        return int(self.vqmodel["vq_embed_dim"] or self.vqmodel["latent_channels"])

    @property
    def decoder(self) -> bool:
        return True


class VQModelTokenizer(nn.Module):
    """Images in [0, 1], whatever range the network was trained with."""

    def __init__(self, config: VQModelConfig) -> None:
        super().__init__()
        _torchvision_compat.install()
        from diffusers import VQModel

        try:
            self.model = VQModel(**config.vqmodel)
        except (TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
            raise UserError(f"diffusers makes no {CLASS} of this config ({str(error).splitlines()[0][:160]})") from None
        known = dict(self.model.config)
        if (known["in_channels"], known["out_channels"]) != (3, 3):
            told = f"reads {known['in_channels']} channels and draws {known['out_channels']}"
            raise UserError(f"this {CLASS} {told}; valid: 3 and 3")
        self.config = VQModelConfig(vqmodel={k: v for k, v in known.items() if not k.startswith("_")})
        # aMUSEd's networks, which alone look codes up by id, know pixels in [0, 1], all others in [-1, 1].
        self.low = 0.0 if known["lookup_from_codebook"] else -1.0

    @property
    def codebook(self) -> Tensor:
        """(K, c)."""
        return self.model.quantize.embedding.weight

    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> ids (B, L), row by row."""
        latents = self.model.encode(self.low + (1 - self.low) * images).latents
        ids: Tensor = self.model.quantize(latents)[2][2]
        return ids.view(len(images), -1)

    def lookup(self, ids: Tensor) -> Tensor:
        """Ids of any shape (..., L) -> code vectors (..., L, c)."""
        vectors: Tensor = self.model.quantize.embedding(ids)
        return vectors

    def soft(self, probabilities: Tensor) -> Tensor:
        """Distributions (..., K) -> expected code vectors (..., c)."""
        return probabilities.to(self.codebook.dtype) @ self.codebook

    def decode(self, latents: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, L, c), not quantised again -> (B, 3, H, W), around [0, 1] but not held there."""
        z = latents.transpose(1, 2).unflatten(2, grid)
        spatial = z if self.model.config.norm_type == "spatial" else None
        pixels: Tensor = self.model.decoder(self.model.post_quant_conv(z), spatial)
        return (pixels - self.low) / (1 - self.low)


def is_vqmodel(folder: Path) -> bool:
    """Whether diffusers wrote a ``VQModel`` there."""
    card = read_json(folder / "config.json") if (folder / "config.json").is_file() else None
    return isinstance(card, dict) and card.get("_class_name") == CLASS


def read_vqmodel(folder: Path) -> VQModelTokenizer:
    """Raises UserError: no safetensors file, a damaged one, or weights that do not fit the config."""
    card = read_json(folder / "config.json")
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"{folder} holds a {CLASS} without {WEIGHTS}; valid: what its save_pretrained writes")
    fields = {name: value for name, value in card.items() if not name.startswith("_")}
    network = VQModelTokenizer(VQModelConfig(vqmodel=fields))
    state = fitted(read_weights(folder / WEIGHTS), network.model.state_dict(), f"{folder / WEIGHTS}")
    network.model.load_state_dict(state)
    return network.to(torch.float32)
