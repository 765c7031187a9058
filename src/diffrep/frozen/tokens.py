"""The networks of the third road, loaded to be read: tokenizer, token predictor, ADDP.

A reference is a folder that holds one of them or, by name, several (what ``diffrep convert`` and our runs write):

FOLDER/tokenizer/config.json, weights.safetensors
FOLDER/token_predictor/...
FOLDER/addp/...

or a file of the authors (:mod:`diffrep.models.addp_files`); a tokenizer may also be a folder of diffusers' VQModel.
Nothing is ever replaced by random weights.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffrep.config import Config, validate
from diffrep.counting import multiply_adds
from diffrep.errors import UserError
from diffrep.files import located, read_json, write_json
from diffrep.frozen.base import FrozenModule
from diffrep.frozen.vqmodel import VQModelConfig, VQModelTokenizer, is_vqmodel, read_vqmodel
from diffrep.models.addp_files import KINDS, WORDS, Heads, OfficialFile, described, split
from diffrep.models.addp_vit import ADDPVit, ADDPVitConfig
from diffrep.models.convert import fitted, unwrap
from diffrep.models.masked_vit import TokenPredictor
from diffrep.models.some_rows import places, predicted_at
from diffrep.models.stored import read_checkpoint
from diffrep.models.vqgan import VQGAN, whole_precision
from diffrep.models.weights import read_weights, write_weights

WEIGHTS, CARD = "weights.safetensors", "config.json"

# What travels with the files of each layout. The authors of ADDP contradict themselves.
LICENCES = {
    "addp": "contradictory: Apache-2.0 (README, model page), CC BY-NC 4.0 (LICENSE file); take it as non-commercial",
    "mage": "MIT (that of the MAGE repository)",
    "tokenizer": "unknown (MAGE, which passes it on, is under MIT)",
}


class Tokenizer(FrozenModule):
    """Images to ids and back.

    stride:    pixels per token, in each direction.
    num_codes: K.
    """

    module: VQGAN | VQModelTokenizer

    @property
    def stride(self) -> int:
        return self.module.config.stride

    @property
    def num_codes(self) -> int:
        return self.module.config.num_codes

    def encode_multiply_adds(self, image_size: int) -> int:
        """Of one square image."""
        blank = copy.deepcopy(self.module).to("meta")
        return multiply_adds(lambda: blank.encode(torch.empty(1, 3, image_size, image_size, device="meta")))

    def decode_multiply_adds(self, image_size: int) -> int:
        """Of one square image."""
        blank, side = copy.deepcopy(self.module).to("meta"), image_size // self.stride
        latents = torch.empty(1, side * side, self.module.config.z_channels, device="meta")
        return multiply_adds(lambda: blank.decode(latents, (side, side)))

    def grid(self, images: Tensor) -> tuple[int, int]:
        """(h, w) of (B, 3, H, W).

        Raises:
            UserError: a size that the stride does not divide.
        """
        height, width = images.shape[-2:]
        if height % self.stride or width % self.stride:
            near = sorted({_near(height, width, self.stride, up) for up in (0, 1)})
            told = f"{height}x{width} is not divisible; valid near it: {' or '.join(f'{h}x{w}' for h, w in near)}"
            raise UserError(f"{self.name} makes one token of {self.stride} pixels: {told}")
        return height // self.stride, width // self.stride

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> ids (B, L), always in float32: near a boundary half precision names others."""
        self.grid(images)
        self.follow(images)
        with whole_precision(images.device):
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
        """(B, L, c) -> (B, 3, H, W), around [0, 1] but not held there.

        Raises:
            UserError: a tokenizer of an encoder alone.
        """
        if not self.module.config.decoder:
            raise UserError(f"the tokenizer {self.name} has no decoder: it makes ids of images, and no images")
        self.follow(latents)
        return self.module.decode(latents, grid)


def _near(height: int, width: int, stride: int, up: int) -> tuple[int, int]:
    """The next size that the stride divides, below (never nothing) or above."""
    high, wide = (max(1, side // stride + (up if side % stride else 0)) * stride for side in (height, width))
    return high, wide


class FrozenPredictor(FrozenModule):
    """q(z | z_t) of a MAGE ViT."""

    module: TokenPredictor

    @torch.no_grad()
    def probabilities(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Ids (B, L), mask (B, L) bool, True where hidden -> (B, L, K)."""
        self.follow(ids)
        return self.module.probabilities(ids, mask)

    @torch.no_grad()
    def probabilities_at(self, ids: Tensor, mask: Tensor, read: Tensor, dropout: bool = False) -> Tensor:
        """:meth:`probabilities` at masked positions that are read.

        Args:
            ids: (B, L). mask: (B, L) bool. read: (B, L) bool, inside ``mask``.
            dropout: answer as in training, by chance (only the official code wants that of a teacher).

        Returns:
            (M, K): of all M positions read, image by image, row by row.
        """
        self.follow(ids)
        asked = places(read)
        self.module.train(dropout)
        try:
            return asked.joined(predicted_at(self.module, ids, mask, places(~mask).index, asked.index))
        finally:
            self.module.eval()


class FrozenADDP(FrozenModule):
    """p_theta(z_{t-1} | x_t, z_t)."""

    module: ADDPVit

    @property
    def config(self) -> ADDPVitConfig:
        return self.module.config


def load_tokenizer(reference: str) -> Tokenizer:
    """Raises UserError: nothing there, no tokenizer in it, a damaged or unfitting file."""
    place = located(reference)
    if place.is_dir() and is_vqmodel(place):
        return Tokenizer(read_vqmodel(place), place.name, "unknown")
    module, card = read_network(reference, "tokenizer")
    return Tokenizer(module, card["name"], card["licence"])


def load_predictor(reference: str, tokenizer: Tokenizer) -> FrozenPredictor:
    """Raises UserError: as :func:`load_tokenizer`, or a codebook of another size than the tokenizer's."""
    module, card = read_network(reference, "token_predictor")
    _same_codes(reference, "token_predictor", module.config, tokenizer)
    return FrozenPredictor(module, card["name"], card["licence"])


def load_addp(reference: str, tokenizer: Tokenizer) -> FrozenADDP:
    """Raises UserError: as :func:`load_predictor`, or patches that are not the tokenizer's tokens."""
    module, card = read_network(reference, "addp")
    _same_codes(reference, "addp", module.config, tokenizer)
    if module.config.patch_size != tokenizer.stride:
        told = (
            f"patches of {module.config.patch_size} pixels, the tokenizer {tokenizer.name} tokens of {tokenizer.stride}"
        )
        raise UserError(f"{reference}: this ADDP network has {told}")
    return FrozenADDP(module, card["name"], card["licence"])


def _same_codes(reference: str, kind: str, config: Any, tokenizer: Tokenizer) -> None:
    if config.num_codes != tokenizer.num_codes:
        told = f"knows {config.num_codes} codes, the tokenizer {tokenizer.name} has {tokenizer.num_codes}"
        size = described(kind, config)
        raise UserError(f"{reference}: this {WORDS[kind]} ({size}) {told}; they were not trained together")


# Folders and files


def write_network(folder: Path, kind: str, network: nn.Module, name: str, licence: str) -> None:
    """``folder/KIND/``: the weights, then what is needed to build the network again."""
    config: Config = network.config
    write_part(folder, kind, config, network.state_dict(), name, licence)


def write_part(folder: Path, kind: str, config: Config, state: Mapping[str, Tensor], name: str, licence: str) -> None:
    """:func:`write_network` of tensors that no network holds."""
    card = {"kind": kind, "name": name, "licence": licence, "config": config.model_dump(mode="json")}
    write_weights(folder / kind / WEIGHTS, state)
    write_json(folder / kind / CARD, card)


def read_network(reference: str, kind: str) -> tuple[Any, dict[str, Any]]:
    """The network of one kind, and its card.

    Raises:
        UserError: not there, or its weights do not fit its config.
    """
    place = located(reference)
    if place.is_file():
        return _from_file(place, kind, reference)
    places = held(place)
    if kind not in places:
        raise UserError(f"{reference} {_instead(place, places)} no {WORDS[kind]}; {_valid(kind)}")
    config, state, card = read_part(places[kind], kind)
    build = VQModelTokenizer if isinstance(config, VQModelConfig) else KINDS[kind][0]
    network = build(config)
    what = f"{places[kind] / WEIGHTS} is no {WORDS[kind]} as its {CARD} says ({described(kind, config)})"
    network.load_state_dict(fitted(state, network.state_dict(), what))
    return network, card


def _valid(kind: str) -> str:
    return f"valid: a folder with {kind}/{CARD}, as diffrep convert or a run of ours writes it, or an official file"


def _instead(place: Path, found: Mapping[str, Path]) -> str:
    """What stands in the place of the network that was asked for."""
    if not place.exists():
        return "does not exist and holds"
    return f"holds {', '.join(WORDS[kind] for kind in found)} and" if found else "holds"


def held(folder: Path) -> dict[str, Path]:
    """{kind: where it stands} of the networks in a folder that ``diffrep convert`` or a run of ours wrote."""
    found = {}
    for kind in KINDS:
        for place in (folder / kind, folder):
            card = read_json(place / CARD) if (place / CARD).is_file() else None
            if kind not in found and isinstance(card, dict) and card.get("kind") == kind:
                found[kind] = place
    return found


def read_part(place: Path, kind: str) -> tuple[Any, Mapping[str, Tensor], dict[str, Any]]:
    """Config, tensors and card of one of our folders."""
    card = {"name": place.name, "licence": "unknown"} | read_json(place / CARD)
    values = card.get("config")
    is_foreign = kind == "tokenizer" and isinstance(values, dict) and "vqmodel" in values
    config = validate(VQModelConfig if is_foreign else KINDS[kind][1], values, str(place / CARD))
    return config, read_weights(place / WEIGHTS), card


def read_official(path: Path, heads: Heads | None = None) -> OfficialFile:
    """A file of the authors, or one that official code wrote; nothing in it is run.

    Raises:
        UserError: a damaged file, one of another kind, and what :func:`diffrep.models.addp_files.split` refuses.
    """
    return split(unwrap(read_checkpoint(path), str(path)), str(path), heads)


def _from_file(path: Path, kind: str, reference: str) -> tuple[nn.Module, dict[str, Any]]:
    official = read_official(path)
    if kind not in official.parts:
        told = ", ".join(WORDS[k] for k in official.parts)
        raise UserError(f"{reference} holds {told} and no {WORDS[kind]}; {_valid(kind)}")
    part = official.parts[kind]
    network = KINDS[kind][0](part.config)
    network.load_state_dict(part.state)
    return network, {"name": path.name, "licence": LICENCES[official.layout]}
