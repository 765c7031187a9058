"""A frozen diffusion model asked for images: (labels, seeds) -> images.

Image k depends on (generator's hash, seed k) alone: its noise has a stream of its own, so batch size, order and
number of processes change nothing but rounding.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import torch
from torch import Tensor

from diffrep.diffusion.sampling import ddim, guided, noise_from_velocity
from diffrep.errors import UserError
from diffrep.frozen.diffusion import DiffusionTeacher
from diffrep.randomness import stream


class DiffusionGenerator:
    """Samples a :class:`DiffusionTeacher`'s network, conditional or not."""

    def __init__(self, network: DiffusionTeacher) -> None:
        self.network = network

    @torch.no_grad()
    def sample(
        self, labels: Tensor | None, seeds: Sequence[int], num_sampling_steps: str = "20", guidance_scale: float = 1.0
    ) -> Tensor:
        """Draw ``len(seeds)`` images with DDIM.

        Args:
            labels: (B,) int64 classes, or None for an unconditional network.
            seeds: one integer per image.
            num_sampling_steps: ``N``, ``a,b,c`` or ``ddimN`` (see diffusion/schedules.py).
            guidance_scale: 1 is off; then the unconditional half is not computed.

        Returns:
            (B, 3, H, W) float32 in [0, 1].
        """
        self._check(labels, guidance_scale)
        noise = torch.stack([self._noise(seed) for seed in seeds])
        schedule = self.network.schedule.respaced(num_sampling_steps)

        def denoiser(x: Tensor, timestep: Tensor) -> Tensor:
            prediction = self.network.predict(x, timestep, labels)
            if guidance_scale != 1:
                prediction = guided(prediction, self.network.predict(x, timestep), guidance_scale)
            if self.network.prediction == "v_prediction":
                alpha_bar = self.network.schedule.alpha_bar(timestep, x)
                prediction = noise_from_velocity(x, prediction, alpha_bar)
            return prediction

        images = (ddim(denoiser, noise, schedule) / 2 + 0.5).clamp(0, 1)
        return images.expand(-1, 3, -1, -1).contiguous()

    def _noise(self, seed: int) -> Tensor:
        size = self.network.image_size
        rng = stream(seed, f"noise of {self.network.sha256}")
        return torch.randn(self.network.in_channels, size, size, generator=rng)

    def _check(self, labels: Tensor | None, guidance_scale: float) -> None:
        classes = self.network.num_classes
        if classes is None and (labels is not None or guidance_scale != 1):
            raise UserError(f"{self.network.name} knows no classes: it takes neither labels nor guidance")
        if classes is not None and labels is not None:
            wrong = [label for label in labels.tolist() if not 0 <= label < classes]
            if wrong:
                raise UserError(f"class {wrong[0]} is outside 0..{classes - 1} of {self.network.name}")
        if self.network.prediction not in ("epsilon", "v_prediction"):
            raise UserError(f"{self.network.name} predicts '{self.network.prediction}'; valid: epsilon, v_prediction")


def grid_png(images: Tensor, columns: int = 10) -> bytes:
    """(N, 3, H, W) in [0, 1] -> one PNG, ``columns`` images wide with a one-pixel white line between them."""
    from PIL import Image

    count, _, height, width = images.shape
    rows = -(-count // columns)
    sheet = torch.full((3, rows * (height + 1) - 1, min(columns, count) * (width + 1) - 1), 255, dtype=torch.uint8)
    for k, image in enumerate((images * 255).round().to(torch.uint8)):
        top, left = (k // columns) * (height + 1), (k % columns) * (width + 1)
        sheet[:, top : top + height, left : left + width] = image
    file = io.BytesIO()
    Image.fromarray(sheet.permute(1, 2, 0).numpy()).save(file, "PNG")
    return file.getvalue()
