"""MAE: give back the pixels of hidden patches from those in sight (He et al., CVPR 2022).

Of each image a random three quarters of the patches are hidden. The encoder reads the others alone, so a step costs a
fraction of one on whole images; a small decoder, which is thrown away, is told where patches are missing and names
their pixels. It is what ADDP is compared with: no tokenizer, no teacher, pixels alone.
Letters: B images, L patches of p x p pixels, S of them visible and M hidden.

Deviations from `main_pretrain.py` and `models_mae.py`: pixels of each patch are normalised by default, as in the
paper's best rows (there an option); augmentation is the recipe's (theirs: random resized crops and flips); the decoder
names hidden patches alone, the only ones that its loss reads; the exported ViT is read by the mean of its patches,
through a fresh norm, as in the official fine-tuning (the official linear probe reads the class token); a step's
patches are drawn from the run's seed, image by image.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from diffrep.data.batch import Batch
from diffrep.errors import UserError
from diffrep.methods.base import Method, MethodConfig, save_student
from diffrep.models.mae_vit import MAEVit, MAEVitConfig, patchify, timm_state
from diffrep.models.some_rows import picked
from diffrep.models.students import Student
from diffrep.models.vit_students import filled, vit_student
from diffrep.randomness import Rows

VARIANCE_EPS = 1e-6  # of a patch without contrast; official


class MAEConfig(MethodConfig):
    """Defaults are those of mae_vit_base_patch16 and the paper's best target."""

    kind: Literal["mae"] = "mae"
    network: MAEVitConfig = MAEVitConfig()
    mask_ratio: float = Field(0.75, gt=0, lt=1)  # of the patches of each image; what is left is rounded down
    norm_pix_loss: bool = True  # targets are each patch's pixels minus their mean, over their standard deviation


class MAE(Method):
    """One step of figure 1: hide, encode what is left, decode, compare."""

    def __init__(self, config: MAEConfig, num_classes: int, image_size: int, allow_code: bool = False) -> None:
        super().__init__()
        patch = config.network.patch_size
        if image_size % patch:
            raise UserError(f"method.network.patch_size: images of {image_size} pixels do not divide into {patch}")
        self.config, self.network = config, MAEVit(config.network, image_size)
        self.num_shown = int(self.network.num_patches * (1 - config.mask_ratio))  # S, rounded as official
        if not self.num_shown:
            patches = f"{self.network.num_patches} patches (method.network.patch_size {patch})"
            raise UserError(f"method.mask_ratio {config.mask_ratio} of {patches} leaves none in sight; take a smaller")

    def forward(self, batch: Batch, rng: Rows, progress: float) -> dict[str, Tensor]:
        # 1. Each image hides patches of its own choice.
        noise = rng.uniform(self.network.num_patches).to(batch.images.device)
        shown, hidden = self.split(noise.argsort(dim=1, stable=True))

        # 2. From those in sight the network guesses the others.
        pixels = self.network.normalise(batch.images)
        guess = self.network(pixels, shown, hidden)  # (B, M, 3 p^2)

        # 3. Every image hides as many, so a plain mean is one over the hidden patches of the global batch.
        error = guess.float() - self.target(pixels, hidden)
        return {"loss": error.square().mean()}

    def split(self, order: Tensor) -> tuple[Tensor, Tensor]:
        """Patches in a drawn order (B, L) -> shown (B, S) and hidden (B, M)."""
        return order[:, : self.num_shown], order[:, self.num_shown :]

    def target(self, pixels: Tensor, hidden: Tensor) -> Tensor:
        """What stands at hidden patches, (B, M, 3 p^2)."""
        patches = picked(patchify(pixels, self.config.network.patch_size), hidden)
        if not self.config.norm_pix_loss:
            return patches
        variance, mean = torch.var_mean(patches, 2, keepdim=True)
        return (patches - mean) / (variance + VARIANCE_EPS).sqrt()

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        return {"mae": [p for p in self.parameters() if p.requires_grad]}

    def dry_step(self, images: Tensor) -> None:
        order = torch.arange(self.network.num_patches, device=images.device).expand(len(images), -1)
        self.network(images, *self.split(order)).sum().backward()

    @property
    def student(self) -> Student:
        """The encoder as a plain ViT that reads whole images, as far as it has come."""
        config = self.config.network
        return filled(vit_student(self.network.image_size, config.patch_size, config, False), timm_state(self.network))

    def export(self, run_dir: Path) -> dict[str, Any]:
        save_student(run_dir, self.student)
        return {}
