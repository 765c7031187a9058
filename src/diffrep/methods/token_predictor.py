"""MAGE's token predictor: name the hidden ids of a partly masked image (Li et al. 2023, section 3).

Loss: cross-entropy over the codebook at masked positions, with label smoothing. Of the masked tokens the encoder is
shown some as the mask id and, if ``drop_ratio`` says so, others not at all; the decoder sees the class slot's feature
in the place of each. :func:`mage` generates with the predictor alone: the rival of ADDP's alternation.
Letters: B images, L tokens, D width, K codes.

Deviations from `main_pretrain.py` of MAGE: nothing is dropped unless ``drop_ratio`` is set (there 0.5; ADDP and the
generation ask the predictor with nothing dropped); one masked share for a whole batch.
Generation draws each image from its own seed (official: from the number of its batch), and may begin with some tokens
visible.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from diffrep import losses
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
from diffrep.frozen.tokens import FrozenPredictor, Tokenizer, load_tokenizer, write_network
from diffrep.methods.base import Method, MethodConfig, save_student
from diffrep.models import mage_vit
from diffrep.models.masked_vit import TokenPredictor, TokenPredictorConfig, TransformerConfig
from diffrep.models.students import Student, StudentConfig
from diffrep.models.vqgan import VQGAN
from diffrep.randomness import Rows


class TokenPredictorMethodConfig(MethodConfig):
    """The tokenizer whose ids are learnt, the network, and how ids are hidden."""

    kind: Literal["token_predictor"] = "token_predictor"
    tokenizer: str  # a run folder or a file
    network: TransformerConfig = TransformerConfig()
    mask: MaskConfig = MaskConfig()
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    drop_ratio: float = Field(0.0, ge=0, lt=1)  # of all tokens; so many masked ones the encoder is not shown; MAGE: 0.5

    @model_validator(mode="after")
    def _fits(self) -> TokenPredictorMethodConfig:
        if self.drop_ratio > self.mask.minimum:
            least = f"mask.minimum {self.mask.minimum}"
            raise ValueError(f"drop_ratio {self.drop_ratio}: only masked tokens are dropped, of which {least} is sure")
        return self


class TokenPredictorMethod(Method):
    """One step: encode, hide, name."""

    def __init__(
        self, config: TokenPredictorMethodConfig, num_classes: int, image_size: int, allow_code: bool = False
    ) -> None:
        super().__init__()
        self.config, self.tokenizer = config, load_tokenizer(config.tokenizer)
        self.image_size = image_size
        self.licence = f"{Method.licence}; of the ids of {self.tokenizer.name} ({self.tokenizer.licence})"
        height, width = self.tokenizer.grid(torch.empty(1, 3, image_size, image_size, device="meta"))
        shape = {"num_codes": self.tokenizer.num_codes, "num_tokens": height * width}
        self.network = TokenPredictor(TokenPredictorConfig(**config.network.model_dump(), **shape))
        if not isinstance(self.tokenizer.module, VQGAN):
            self.notes = (f"{self.tokenizer.name} is a tokenizer of another library: no encoder is exported or probed",)

    def forward(self, batch: Batch, rng: Rows, progress: float) -> dict[str, Tensor]:
        ids = self.tokenizer.encode(batch.images)  # (B, L)
        masked, _ = drawn_counts(self.config.mask, ids.shape[1], rng.shared(), rng.shared())
        order = rng.uniform(ids.shape[1]).to(ids.device)
        mask = lowest(order, masked)
        logits = self.network(ids, mask, self.tokenizer.num_codes, self.shown(order))[:, 1:]
        each = losses.token_cross_entropy(logits, ids, self.config.label_smoothing)
        correct = (logits.detach().argmax(2) == ids) & mask
        return {"loss": losses.mean_at(each, mask), "masked_top1": correct.sum() / mask.sum()}

    def shown(self, order: Tensor) -> Tensor | None:
        """What the encoder sees, (B, S): all but the first ceil(drop_ratio L) of those that are masked; None: all."""
        dropped = math.ceil(self.config.drop_ratio * order.shape[1])
        return order.argsort(dim=1, stable=True)[:, dropped:].sort(1).values if dropped else None

    @property
    def student(self) -> Student | None:
        """The encoder as it has come, reading images; None behind a tokenizer of another library."""
        if not isinstance(self.tokenizer.module, VQGAN):
            return None
        options = mage_vit.options_of(self.tokenizer.module.config, self.network.config)
        student = Student(StudentConfig(name=mage_vit.NAME, options=options, mean=(0.0,), std=(1.0,)))
        student.backbone.load_state_dict(mage_vit.encoder_state(self.tokenizer.module, self.network))
        return student

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        return {"token_predictor": [p for p in self.parameters() if p.requires_grad]}

    def dry_step(self, images: Tensor) -> None:
        ids = torch.zeros(len(images), self.network.config.num_tokens, dtype=torch.int64, device=images.device)
        self.network(ids, ids == 0, shown=self.shown(ids)).sum().backward()

    def frozen_multiply_adds(self) -> int:
        return self.tokenizer.encode_multiply_adds(self.image_size)

    def depths(self) -> tuple[list[list[nn.Parameter]], list[nn.Parameter]]:
        """The head's bias over the vocabulary is stored with three dimensions, and is a bias all the same."""
        return [], [self.network.mlm_layer.bias]

    def export(self, run_dir: Path) -> dict[str, Any]:
        """The predictor, the tokenizer it belongs to, and its encoder as a student."""
        write_network(run_dir, "token_predictor", self.network, run_dir.name, self.licence)
        write_network(run_dir, "tokenizer", self.tokenizer.module, self.tokenizer.name, self.tokenizer.licence)
        if student := self.student:
            save_student(run_dir, student)
        return {}


# Generation


def mage_counts(config: AlternationConfig, masked: int) -> list[int]:
    """Masked tokens after each step (`gen_img_uncond.py`): max(1, min(one less than before, floor(masked gamma(r)))).

    Every step reveals a token, where ADDP's count rounds up and may stay. After the last step none is masked any more.

    Raises:
        UserError: more steps than tokens.
    """
    masked_after(config, masked)  # refuses as ADDP's does
    counts, before = [], masked
    for step in range(config.steps):
        r = (step + 1) / config.steps
        share = math.cos(math.pi * r / 2) if config.schedule == "cosine" else 1 - r
        before = max(1, min(before - 1, math.floor(masked * share)))
        counts.append(before)
    return [*counts[:-1], 0]


@torch.no_grad()
def mage(
    predictor: FrozenPredictor,
    tokenizer: Tokenizer,
    config: AlternationConfig,
    draws: Draws,
    ids: Tensor,
    mask: Tensor,
    grid: tuple[int, int],
    watch: Callable[[int, Tensor, Tensor], None] = lambda step, ids, mask: None,
) -> Tensor:
    """From masked ids to an image: tokens alone all the way, pixels once at the end, of hard ids.

    Args:
        ids: (B, L); those of masked positions are not read. mask: (B, L), of every image the same number masked.
        watch: shown step, proposed ids (B, L) and the mask after the step.

    Returns:
        (B, 3, H, W), not held in [0, 1].
    """
    for step, count in enumerate(mage_counts(config, int(mask[0].sum()))):
        probabilities = predictor.probabilities(ids, mask)
        ids = torch.where(mask, draws.ids(step, within_top_p(probabilities, config.top_p)), ids)
        noise = choice_temperature(config, step) * draws.gumbel(step).to(ids.device)
        mask = lowest(confidence(probabilities, ids, mask, noise), count)
        watch(step, ids, mask)
    return tokenizer.decode(tokenizer.lookup(ids), grid)
