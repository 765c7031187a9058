"""A frozen diffusion model asked for images: (labels, seeds) -> images.

Image k depends on (generator's hash, seed k) alone: its noise has a stream of its own, so batch size, order and
number of processes change nothing but rounding. Letters: B images, K classes, s guidance scale.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from diffrep.config import Config
from diffrep.diffusion.sampling import (
    Denoiser,
    asked_timesteps,
    clean_from_noise,
    clipped,
    guided,
    named_sampler,
    noise_from_velocity,
)
from diffrep.errors import UserError, nearest
from diffrep.frozen.diffusion import DiffusionTeacher
from diffrep.randomness import PerImage, stream

Scale = Annotated[float, Field(ge=0)]


# The paper's two settings: DDPM, and official DiT's guidance of three channels.
_PAPER = {"sampler": "ddpm", "guided_channels": 3}
FIDELITIES: dict[str, dict[str, Any]] = {
    "low": {**_PAPER, "num_sampling_steps": "100", "guidance_scale": 2.0},
    "high": {**_PAPER, "num_sampling_steps": "250", "guidance_scale": 4.0},
}


class SamplingConfig(Config):
    """How an image is drawn. Defaults: what taught best on digits.

    ``fidelity: low`` or ``high`` stands for one of :data:`FIDELITIES`; what is said beside it changes that.
    """

    sampler: Literal["ddpm", "ddim", "dpmsolver++", "unipc", "heun"] = "ddim"
    num_sampling_steps: str = "20"  # N, a,b,c or ddimN; the solvers take N
    eta: float = Field(0.0, ge=0, le=1)  # of ddim: 0 deterministic, 1 as noisy as ddpm
    guidance_scale: Scale | tuple[Scale, Scale] = 1.0  # s, 1 = off; or a range that each image draws its own s from
    guided_channels: Annotated[int, Field(ge=1)] | None = None  # None: all; official DiT guides 3 of its 4
    guidance_interval: tuple[Scale, Scale] | None = None  # (low, high] in sigma; outside it one conditional call

    @model_validator(mode="before")
    @classmethod
    def _named(cls, values: Any) -> Any:
        if not isinstance(values, dict) or "fidelity" not in values:
            return values
        name = values["fidelity"]
        if name not in list(FIDELITIES):  # whatever was written there
            raise ValueError(f"fidelity '{name}': {nearest(name, FIDELITIES)}")
        return FIDELITIES[name] | {field: value for field, value in values.items() if field != "fidelity"}

    @field_validator("num_sampling_steps", mode="before")
    @classmethod
    def _text(cls, value: Any) -> Any:
        return str(value) if type(value) is int else value

    @model_validator(mode="after")
    def _fits(self) -> SamplingConfig:
        for name in ("guidance_scale", "guidance_interval"):
            pair = getattr(self, name)
            if isinstance(pair, tuple) and pair[0] >= pair[1]:
                raise ValueError(f"{name} is (low, high) with low below high")
        if self.eta and self.sampler != "ddim":
            raise ValueError(f"eta belongs to sampler ddim, not to {self.sampler}")
        return self

    @property
    def is_guided(self) -> bool:
        return self.guidance_scale != 1.0


LOW_FIDELITY, HIGH_FIDELITY = (SamplingConfig.model_validate(values) for values in FIDELITIES.values())

# Something that judges clean images: (images (B, 3, H, W) in [0, 1], labels (B,)) -> what to increase, (B,).
Judge = Callable[[Tensor, Tensor], Tensor]


class DiffusionGenerator:
    """Samples a :class:`DiffusionTeacher`'s network in pixel space, conditional or not."""

    clips = True  # pixels have a range, latents have none

    def __init__(self, network: DiffusionTeacher) -> None:
        self.network = network
        # (C, H, W) of what the walk starts from.
        self.noise_shape = (network.in_channels, network.image_size, network.image_size)
        if network.prediction not in ("epsilon", "v_prediction"):
            raise UserError(f"{network.name} predicts '{network.prediction}'; valid: epsilon, v_prediction")

    @property
    def name(self) -> str:
        return self.network.name

    @property
    def licence(self) -> str:
        return self.network.licence

    @property
    def sha256(self) -> str:
        return self.network.sha256

    @property
    def num_classes(self) -> int | None:
        return self.network.num_classes

    @property
    def labels_seen(self) -> dict[str, int]:
        return self.network.labels_seen

    @torch.no_grad()
    def sample(
        self,
        labels: Tensor | None,
        seeds: Sequence[int],
        sampling: SamplingConfig,
        device: torch.device | str = "cpu",
        judge: Judge | None = None,
    ) -> Tensor:
        """Draw ``len(seeds)`` images.

        Args:
            labels: (B,) int64 classes; None for an unconditional network, or for the null class of another.
            seeds: one integer per image.
            judge: what the walk is steered towards, besides the class (see :meth:`_steered`).

        Returns:
            (B, 3, H, W) float32 in [0, 1], on ``device``.
        """
        self.check(labels, sampling)
        rng = PerImage([stream(seed, f"noise of {self.sha256}") for seed in seeds])
        noise = rng.normal(*self.noise_shape).to(device)
        shown = None if labels is None else labels.to(device)
        denoiser = self._guided(shown, sampling, guidance_scales(sampling, seeds).to(device))
        if judge is not None:
            if shown is None:
                raise UserError(f"{self.name}: steering (hard) judges an image by its class: give labels")
            denoiser = self._steered(denoiser, shown, judge)
        if self.clips:
            denoiser = clipped(denoiser, self.network.schedule)
        walk = named_sampler(sampling.sampler, sampling.num_sampling_steps, sampling.eta)
        return self.decode(walk(denoiser, noise, self.network.schedule, rng))

    def decode(self, x: Tensor) -> Tensor:
        """(B, C, H, W) where the walk ended -> images (B, 3, H, W) in [0, 1]."""
        return (x / 2 + 0.5).clamp(0, 1).expand(-1, 3, -1, -1).contiguous()

    def check(self, labels: Tensor | None, sampling: SamplingConfig) -> None:
        """Refuse classes the network does not have, guidance without them, and steps the schedule does not have."""
        classes, channels = self.num_classes, self.noise_shape[0]
        if classes is None and (labels is not None or sampling.is_guided):
            raise UserError(f"{self.name} knows no classes: it takes neither labels nor guidance")
        if classes is not None and not self.network.null_class and (labels is None or sampling.is_guided):
            raise UserError(f"{self.name} has no null class: it draws given classes only, and without guidance")
        if classes is not None and labels is not None:
            wrong = [label for label in labels.tolist() if not 0 <= label < classes]
            if wrong:
                raise UserError(f"class {wrong[0]} is outside 0..{classes - 1} of {self.name}")
        if sampling.guided_channels is not None and sampling.guided_channels > channels:
            raise UserError(f"guided_channels {sampling.guided_channels}: {self.name} has {channels} channels")
        self.calls(sampling)

    def calls(self, sampling: SamplingConfig) -> tuple[int, int]:
        """Network calls for one image: with its class, and for the unconditional half."""
        walk = named_sampler(sampling.sampler, sampling.num_sampling_steps, sampling.eta)
        asked = asked_timesteps(walk, self.network.schedule)
        return len(asked), sum(self._guides(sampling, t) for t in asked)

    def multiply_adds(self, sampling: SamplingConfig) -> int:
        """Counted multiply-adds of one image."""
        return sum(self.calls(sampling)) * self.network.multiply_adds() + self.decoder_multiply_adds()

    def decoder_multiply_adds(self) -> int:
        return 0

    def _guides(self, sampling: SamplingConfig, timestep: int) -> bool:
        """Whether the unconditional half has an effect at this timestep."""
        low, high = sampling.guidance_interval or (-1.0, float("inf"))
        return sampling.is_guided and low < self.network.schedule.sigma_at(timestep) <= high

    def _guided(self, labels: Tensor | None, sampling: SamplingConfig, scales: Tensor) -> Denoiser:
        def denoiser(x: Tensor, timestep: Tensor) -> Tensor:
            output = self.network.predict(x, timestep, labels)
            if self._guides(sampling, int(timestep[0])):
                null = self.network.predict(x, timestep)
                channels = sampling.guided_channels or x.shape[1]  # a learned variance is never guided
                output = guided(output, null, scales.view(-1, 1, 1, 1), channels)
            if self.network.prediction == "v_prediction":
                output = noise_from_velocity(x, output, self.network.schedule.alpha_bar(timestep, x))
            return output

        return denoiser

    def _steered(self, denoiser: Denoiser, labels: Tensor, judge: Judge) -> Denoiser:
        """epsilon - sqrt(1 - alpha_bar) grad_x judge(x_0(x)) (Dhariwal and Nichol 2021, algorithm 2).

        The gradient flows through the predicted clean image but not through the network, which would cost it two more
        passes per step.
        """

        def steered(x: Tensor, timestep: Tensor) -> Tensor:
            output, alpha_bar = denoiser(x, timestep), self.network.schedule.alpha_bar(timestep, x)
            with torch.enable_grad():
                state = x.detach().requires_grad_()
                clean = clean_from_noise(state, output[:, : x.shape[1]], alpha_bar)
                wanted = judge(self.decode(clean), labels).sum()
                (gradient,) = torch.autograd.grad(wanted, state)
            epsilon = output[:, : x.shape[1]] - (1 - alpha_bar).sqrt() * gradient
            return torch.cat([epsilon, output[:, x.shape[1] :]], 1)

        return steered


def guidance_scales(sampling: SamplingConfig, seeds: Sequence[int]) -> Tensor:
    """(B,) float32: the scale of each image, its own draw where the setting is a range."""
    scale = sampling.guidance_scale
    if not isinstance(scale, tuple):
        return torch.full((len(seeds),), scale)
    drawn = [torch.rand((), generator=stream(seed, "guidance scale")) for seed in seeds]
    return scale[0] + (scale[1] - scale[0]) * torch.stack(drawn)


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
