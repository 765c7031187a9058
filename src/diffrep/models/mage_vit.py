"""MAGE's encoder as a network that reads images: tokenizer, token embedding, transformer (Li et al. 2023, section 3.2).

A student like any other, in timm's words: probed, fine-tuned, started from a token predictor's run. The tokenizer is
frozen and finds ids in float32 whatever the precision; all ids are shown. Names are the tokenizer's behind
``tokenizer.`` and the token predictor's.
Letters: B images, L tokens, D width.

Reading of ours, because the official fine-tuning is not at hand: the vector is the mean of the tokens behind the last
norm, without the class slot.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffrep.models.masked_vit import (
    TokenEmbedding,
    TokenPredictor,
    TokenPredictorConfig,
    Vocabulary,
    blocks,
    initialise,
    layer_norm,
)
from diffrep.models.vqgan import VQGAN, VQGANConfig, whole_precision

NAME = "mage_vit"
TABLES = ("token_emb.word_embeddings.weight", "token_emb.position_embeddings.weight")  # spared by weight decay


class MAGEVit(nn.Module):
    """Images (B, 3, H, W) in [0, 1], of the size that gives L tokens, to logits (B, K), or to features."""

    num_prefix_tokens = 1  # the class slot

    def __init__(self, tokenizer: Mapping[str, Any], network: Mapping[str, Any], num_classes: int = 0) -> None:
        """tokenizer: fields of :class:`VQGANConfig`. network: those of :class:`TokenPredictorConfig`."""
        super().__init__()
        config = TokenPredictorConfig.model_validate(network)
        self.vocabulary, self.num_features = Vocabulary(config.num_codes), config.embed_dim
        self.token_emb = TokenEmbedding(
            self.vocabulary.rows, 1 + config.num_tokens, config.embed_dim, config.dropout
        )  # fmt: skip
        self.blocks, self.norm = blocks(config, config.depth, config.num_heads), layer_norm(config.embed_dim)
        initialise(self, config.init_std)
        self.tokenizer = VQGAN(VQGANConfig.model_validate({**tokenizer, "decoder": False})).requires_grad_(False)
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def get_classifier(self) -> nn.Module:
        return self.head

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """How deep each parameter lies, for timm."""
        return {"stem": r"^(?:token_emb|tokenizer)", "blocks": r"^blocks\.(\d+)"}

    def no_weight_decay(self) -> set[str]:
        return set(TABLES)

    def forward_features(self, images: Tensor) -> Tensor:
        """(B, 1 + L, D), the class slot first."""
        with torch.no_grad(), whole_precision(images.device):
            ids = self.tokenizer.encode(images.float())
        ids = F.pad(ids, (1, 0), value=self.vocabulary.class_id)
        return self.norm(self.blocks(self.token_emb(ids)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = x[:, 1:].mean(1)
        return x if pre_logits else self.head(x)

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))


def options_of(tokenizer: VQGANConfig, network: TokenPredictorConfig) -> dict[str, Any]:
    """What builds the encoder of a token predictor, as plain JSON."""
    return {"tokenizer": tokenizer.model_dump(mode="json"), "network": network.model_dump(mode="json")}


def encoder_state(tokenizer: VQGAN, predictor: TokenPredictor) -> dict[str, Tensor]:
    """Its tensors."""
    both = {f"tokenizer.{n}": v for n, v in tokenizer.state_dict().items() if not n.startswith("decoder.")}
    parts = ("token_emb.", "blocks.", "norm.")
    return both | {name: v for name, v in predictor.state_dict().items() if name.startswith(parts)}


ENTRIES = {NAME: MAGEVit}
