"""The networks of the third road, loaded to be read: tokenizer, token predictor, ADDP.

A reference is a folder that holds one of them or, by name, several (what ``diffrep convert`` and our runs write):

FOLDER/tokenizer/config.json, weights.safetensors
FOLDER/token_predictor/...
FOLDER/addp/...

or a file of the authors (:mod:`diffrep.frozen.token_files`). Nothing is ever replaced by random weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffrep.config import Config, validate
from diffrep.errors import UserError
from diffrep.files import located, read_json, write_json
from diffrep.frozen.base import FrozenModule
from diffrep.models.addp_vit import ADDPVit, ADDPVitConfig
from diffrep.models.convert import fitted
from diffrep.models.masked_vit import TokenPredictor, TokenPredictorConfig
from diffrep.models.vqgan import VQGAN, VQGANConfig
from diffrep.models.weights import read_weights, write_weights

KINDS: dict[str, tuple[type[nn.Module], type[Config]]] = {
    "tokenizer": (VQGAN, VQGANConfig),
    "token_predictor": (TokenPredictor, TokenPredictorConfig),
    "addp": (ADDPVit, ADDPVitConfig),
}
WORDS = {"tokenizer": "tokenizer", "token_predictor": "token predictor", "addp": "ADDP network"}


class Tokenizer(FrozenModule):
    """Images to ids and back.

    stride:    pixels per token, in each direction.
    num_codes: K.
    """

    module: VQGAN

    @property
    def stride(self) -> int:
        return self.module.config.stride

    @property
    def num_codes(self) -> int:
        return self.module.config.num_codes

    def grid(self, images: Tensor) -> tuple[int, int]:
        """(h, w) of (B, 3, H, W).

        Raises:
            UserError: a size that the stride does not divide.
        """
        height, width = images.shape[-2:]
        if height % self.stride or width % self.stride:
            raise UserError(f"{self.name} makes one token of {self.stride} pixels: {height}x{width} is not divisible")
        return height // self.stride, width // self.stride

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> ids (B, L), always in float32: near a boundary half precision names others."""
        self.grid(images)
        self.follow(images)
        with torch.autocast(images.device.type, enabled=False):
            return self.module.encode(images.float())

    @torch.no_grad()
    def lookup(self, ids: Tensor) -> Tensor:
        """(B, L) -> code vectors (B, L, c)."""
        self.follow(ids)
        return self.module.lookup(ids)

    @torch.no_grad()
    def soft(self, probabilities: Tensor) -> Tensor:
        """(B, L, K) -> expected code vectors (B, L, c)."""
        self.follow(probabilities)
        return self.module.soft(probabilities)

    @torch.no_grad()
    def decode(self, latents: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, L, c) -> (B, 3, H, W), around [0, 1] but not held there."""
        self.follow(latents)
        return self.module.decode(latents, grid)


class FrozenPredictor(FrozenModule):
    """q(z | z_t) of a MAGE ViT."""

    module: TokenPredictor

    @torch.no_grad()
    def probabilities(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Ids (B, L), mask (B, L) bool, True where hidden -> (B, L, K)."""
        self.follow(ids)
        return self.module.probabilities(ids, mask)


class FrozenADDP(FrozenModule):
    """p_theta(z_{t-1} | x_t, z_t)."""

    module: ADDPVit

    @property
    def config(self) -> ADDPVitConfig:
        return self.module.config


def load_tokenizer(reference: str) -> Tokenizer:
    """Raises UserError: no such folder, no tokenizer in it, a damaged or unfitting file."""
    module, card = read_network(reference, "tokenizer")
    return Tokenizer(module, card["name"], card["licence"])


def load_predictor(reference: str, tokenizer: Tokenizer) -> FrozenPredictor:
    """Raises UserError: as :func:`load_tokenizer`, or a codebook of another size than the tokenizer's."""
    module, card = read_network(reference, "token_predictor")
    _same_codes(reference, "token_predictor", module.config.num_codes, tokenizer)
    return FrozenPredictor(module, card["name"], card["licence"])


def load_addp(reference: str, tokenizer: Tokenizer) -> FrozenADDP:
    """Raises UserError: as :func:`load_predictor`, or patches that are not the tokenizer's tokens."""
    module, card = read_network(reference, "addp")
    _same_codes(reference, "addp", module.config.num_codes, tokenizer)
    if module.config.patch_size != tokenizer.stride:
        told = (
            f"patches of {module.config.patch_size} pixels, the tokenizer {tokenizer.name} tokens of {tokenizer.stride}"
        )
        raise UserError(f"{reference}: this ADDP network has {told}")
    return FrozenADDP(module, card["name"], card["licence"])


def _same_codes(reference: str, kind: str, codes: int, tokenizer: Tokenizer) -> None:
    if codes != tokenizer.num_codes:
        told = f"knows {codes} codes, the tokenizer {tokenizer.name} has {tokenizer.num_codes}"
        raise UserError(f"{reference}: this {WORDS[kind]} {told}; they were not trained together")


# Folders


def write_network(folder: Path, kind: str, network: nn.Module, name: str, licence: str) -> None:
    """``folder/KIND/``: the weights, then what is needed to build the network again."""
    card = {"kind": kind, "name": name, "licence": licence, "config": network.config.model_dump(mode="json")}
    write_weights(folder / kind / "weights.safetensors", network.state_dict())
    write_json(folder / kind / "config.json", card)


def read_network(reference: str, kind: str) -> tuple[Any, dict[str, Any]]:
    """The network of one kind, and its card.

    Raises:
        UserError: not there, or its weights do not fit its config.
    """
    folder = _place(located(reference), kind, reference)
    card = read_json(folder / "config.json")
    build, config = KINDS[kind]
    network = build(validate(config, card.get("config"), str(folder / "config.json")))
    state = read_weights(folder / "weights.safetensors")
    network.load_state_dict(fitted(state, network.state_dict(), str(folder / "weights.safetensors")))
    return network, card


def _place(folder: Path, kind: str, reference: str) -> Path:
    for place in (folder / kind, folder):
        card = read_json(place / "config.json") if (place / "config.json").exists() else None
        if isinstance(card, dict) and card.get("kind") == kind:
            return place
    wanted = f"a folder with {kind}/config.json, as diffrep convert or a run of ours writes it"
    raise UserError(f"{reference} holds no {WORDS[kind]}; valid: {wanted}")
