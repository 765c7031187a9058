"""ADDP: alternate between tokens and pixels, to generate and to recognise (Tian et al., ICLR 2024).

Training (figure 4): an image x_0 has ids z_0; m_t inside m_{t+1} say which tokens are masked. The token predictor q
names what is masked; its expected codes at t + 1 are decoded, with the reliable tokens, to pixels x_t; the network
learns q(z_{t-1} | z_t) from x_t and the reliable ids. Generation (figure 5) alternates: pixels to a distribution over
ids, ids drawn, the least sure masked again, codes to pixels.
Letters: B images, L tokens, K codes, V = K + 1001 rows of the vocabulary, c latent channels.

Deviations from `main_pretrain.py` and `models_addp.py`: frozen networks stay in eval mode (the official loop turns the
predictor's dropout on again); the share of masked tokens is drawn from the run's seed (official: partly from a
generator that nobody seeds); codebook and grid sizes come from the networks. Generation reads no image where none is
needed and no predictor, leaves out steps that cannot change the image, draws each image from its own seed, and takes
the first pixels of a repair from visible tokens alone (official: from the true image, hidden parts included).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from diffrep import losses
from diffrep.config import Config
from diffrep.counting import multiply_adds, on_meta
from diffrep.data.batch import Batch
from diffrep.diffusion.masking import (
    AlternationConfig,
    Draws,
    MaskConfig,
    choice_temperature,
    confidence,
    drawn_counts,
    lowest,
    masked_after,
    within_top_p,
)
from diffrep.frozen.tokens import Tokenizer, load_predictor, load_tokenizer, write_network
from diffrep.methods.base import Method, MethodConfig, save_student
from diffrep.models.addp_vit import MEAN, STD, ADDPVit, ADDPVitConfig, timm_state
from diffrep.models.masked_vit import TransformerConfig
from diffrep.models.students import Student, StudentConfig
from diffrep.randomness import Rows


class ADDPConfig(MethodConfig):
    """The two frozen networks, the trained one, and how tokens are masked."""

    kind: Literal["addp"] = "addp"
    tokenizer: str  # a run folder or a file
    token_predictor: str
    network: TransformerConfig = TransformerConfig()
    mask: MaskConfig = MaskConfig()
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    codes_alone: bool = False  # in the loss: leave out the 1001 ids that never occur; official: all V compete
    keep_tokenizer_norm: bool = False  # in the exported ViT; official fine-tuning drops it


# Training


class ADDP(Method):
    """One step of figure 4."""

    uses_all_parameters = False  # where everything is masked, nothing is read of the encoder

    def __init__(self, config: ADDPConfig, num_classes: int, image_size: int, allow_code: bool = False) -> None:
        super().__init__()
        self.config, self.tokenizer = config, load_tokenizer(config.tokenizer)
        self.predictor = load_predictor(config.token_predictor, self.tokenizer)
        shape = {"image_size": image_size, "patch_size": self.tokenizer.stride, "num_codes": self.tokenizer.num_codes}
        self.network = ADDPVit(config_of(config.network, shape))
        frozen = (self.tokenizer, self.predictor)
        self.licence = "; ".join([Method.licence, *(f"taught by {one.name} ({one.licence})" for one in frozen)])

    def forward(self, batch: Batch, rng: Rows, progress: float) -> dict[str, Tensor]:
        ids = self.tokenizer.encode(batch.images)  # z_0
        masked, noisier = drawn_counts(self.config.mask, ids.shape[1], rng.shared(), rng.shared())
        order = rng.uniform(ids.shape[1]).to(ids.device)
        m_t, m_next = lowest(order, masked), lowest(order, noisier)
        x_t, target = self.teach(ids, m_t, m_next)
        logits = self.network(x_t, ids, m_t)[..., : self.tokenizer.num_codes if self.config.codes_alone else None]
        each = losses.soft_token_cross_entropy(logits, target, self.config.label_smoothing)
        return {"loss": losses.mean_at(each, m_t), "masked_share": m_t.float().mean()}

    def teach(self, ids: Tensor, m_t: Tensor, m_next: Tensor) -> tuple[Tensor, Tensor]:
        """x_t (B, 3, H, W), not held in [0, 1], and the target q(z_{t-1} | z_t) (B, L, K)."""
        soft = self.tokenizer.soft(self.predictor.probabilities(ids, m_next))  # f: expected codes
        z_t = torch.where(m_t[..., None], soft, self.tokenizer.lookup(ids))
        return self.tokenizer.decode(z_t, self.network.config.grid), self.predictor.probabilities(ids, m_t)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        return {"addp": [p for p in self.parameters() if p.requires_grad]}

    def dry_step(self, images: Tensor) -> None:
        """At the law's mean share of masked tokens, which is near three quarters."""
        ids = torch.zeros(len(images), self.network.config.num_tokens, dtype=torch.int64, device=images.device)
        latent = self.network.encode(images)
        slots = latent.repeat(1, 2, 1)[:, : latent.shape[1] + ids.shape[1] // 4]
        y = self.network.decoder_blocks(self.network.decoder_embed(slots))
        self.network.mlm_layer(y, self.network.token_emb.weight).sum().backward()

    def frozen_multiply_adds(self) -> int:
        """Encode and decode an image, ask the predictor twice."""
        shape, tokens = self.network.config, self.network.config.num_tokens
        image = torch.zeros(1, 3, shape.image_size, shape.image_size)
        latents = torch.zeros(1, self.tokenizer.module.config.z_channels, *shape.grid)
        ids = torch.zeros(1, tokens, dtype=torch.int64)
        halves = (self.tokenizer.module.encoder, image), (self.tokenizer.module.decoder, latents)
        counted = sum(multiply_adds(on_meta(half, given)) for half, given in halves if half is not None)
        return counted + 2 * multiply_adds(on_meta(self.predictor.module, ids, ids == 0))

    @property
    def student(self) -> Student:
        """The encoder as a plain ViT, as far as it has come."""
        config = self.network.config
        options = {
            "img_size": config.image_size, "patch_size": config.patch_size, "embed_dim": config.embed_dim,
            "depth": config.depth, "num_heads": config.num_heads, "mlp_ratio": config.mlp_ratio,
            "global_pool": "avg", "pre_norm": self.config.keep_tokenizer_norm,
        }  # fmt: skip
        student = Student(StudentConfig(name="vit_base_patch16_224", options=options, mean=MEAN, std=STD))
        fresh = {n: v for n, v in student.backbone.state_dict().items() if n.startswith("fc_norm.")}
        student.backbone.load_state_dict(timm_state(self.network, self.config.keep_tokenizer_norm) | fresh)
        return student

    def export(self, run_dir: Path) -> dict[str, Any]:
        """The network with its tokenizer, to generate; the encoder as a timm ViT, to recognise."""
        write_network(run_dir, "addp", self.network, run_dir.name, self.licence)
        write_network(run_dir, "tokenizer", self.tokenizer.module, self.tokenizer.name, self.tokenizer.licence)
        save_student(run_dir, self.student)
        return {"tokenizer": self.tokenizer.sha256, "token_predictor": self.predictor.sha256}


def config_of(network: Config, shape: dict[str, int]) -> ADDPVitConfig:
    """The whole network from what a recipe says of it and what its tokenizer decides."""
    return ADDPVitConfig(**network.model_dump(), **shape)


# Generation


@dataclass(frozen=True)
class Moment:
    """What one step of a walk did. Pixels are as decoded, not held in [0, 1]."""

    step: int
    probabilities: Tensor  # (B, L, K)
    ids: Tensor  # (B, L), of masked positions still a proposal
    mask: Tensor  # (B, L), after the step
    latents: Tensor  # (B, L, c)
    pixels: Tensor  # (B, 3, H, W)


@torch.no_grad()
def alternate(
    network: ADDPVit,
    tokenizer: Tokenizer,
    config: AlternationConfig,
    draws: Draws,
    ids: Tensor,
    mask: Tensor,
    pixels: Tensor | None = None,
    watch: Callable[[Moment], None] = lambda moment: None,
) -> Tensor:
    """Figure 5: from pure masks, or from the visible ids of an image, to an image.

    Args:
        ids: (B, L); those of masked positions are not read.
        mask: (B, L), of every image the same number masked.
        pixels: what the encoder sees first, (B, 3, H, W); None: :func:`first_pixels`. Where everything is masked
            nothing depends on it.
        watch: shown every step that is done.

    Returns:
        (B, 3, H, W), not held in [0, 1].

    Raises:
        UserError: more steps than masked tokens.
    """
    counts, tokens = masked_after(config, int(mask[0].sum())), mask.shape[1]
    blank = all_masked(network, mask[:1])  # (1, L, K)
    if pixels is None and not bool(mask.all()):
        pixels = first_pixels(network, tokenizer, blank, ids, mask)
    for step in range(first_step(counts, tokens), config.steps):
        probabilities = blank if bool(mask.all()) else predicted(network, pixels, ids, mask)
        probabilities = probabilities.expand(len(ids), -1, -1)
        ids = torch.where(mask, draws.ids(step, within_top_p(probabilities, config.top_p)), ids)
        noise = choice_temperature(config, step) * draws.gumbel(step).to(ids.device)
        mask = lowest(confidence(probabilities, ids, mask, noise), counts[step])
        latents = torch.where(mask[..., None], tokenizer.soft(probabilities), tokenizer.lookup(ids))
        pixels = tokenizer.decode(latents, network.config.grid)
        watch(Moment(step, probabilities, ids, mask, latents, pixels))
    return pixels


def predicted(network: ADDPVit, pixels: Tensor | None, ids: Tensor, mask: Tensor) -> Tensor:
    """p_theta(z | x_t, z_t), (B, L, K): class and mask rows are cut off before the softmax."""
    latent = None if pixels is None else network.encode(pixels)
    logits = network.decode(latent, ids, mask)
    return logits[:, 1 : 1 + mask.shape[1], : network.config.num_codes].float().softmax(2)


def all_masked(network: ADDPVit, like: Tensor) -> Tensor:
    """What the network says where everything is masked: one table (1, L, K), whatever the pixels."""
    mask = torch.ones_like(like)
    return predicted(network, None, mask.long(), mask)


def first_step(counts: list[int], tokens: int) -> int:
    """The first step that can change the image: after those before it everything is masked still.

    A step that reveals nothing of a blank image leaves nothing behind: no later step reads its ids or its pixels.
    """
    return sum(count == tokens for count in counts[:-1])


def first_pixels(network: ADDPVit, tokenizer: Tokenizer, blank: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """The pixels of visible tokens, hidden ones being what a blank image expects there."""
    latents = torch.where(mask[..., None], tokenizer.soft(blank), tokenizer.lookup(ids))
    return tokenizer.decode(latents, network.config.grid)


def as_uint8(pixels: Tensor, rounding: Literal["truncate", "nearest"] = "truncate") -> Tensor:
    """(B, 3, H, W) -> uint8; official: clamp(255 x, 0, 255) cut off, which is half a level darker than rounding."""
    scaled = (pixels.float() * 255).clamp(0, 255)
    return (scaled if rounding == "truncate" else scaled.round()).to(torch.uint8)
