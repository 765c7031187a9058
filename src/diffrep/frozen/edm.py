"""Networks that are told a noise level and return the clean image (EDM), read as networks of (x_t, timestep).

Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", NeurIPS 2022. Such a network is a
function D(x; sigma) of x = clean + sigma noise. The walk here keeps the variance, x_t = sqrt(alpha_bar) clean +
sqrt(1 - alpha_bar) noise: the same image at sigma_t = sqrt((1 - alpha_bar) / alpha_bar) is x = x_t / sqrt(alpha_bar),
and the predicted noise is (x - D) / sigma_t.

For features (``noise=None``) the clean image is fed as it is, and sigma_t alone says how noisy it is held to be: the
counterpart of feeding a network of timesteps the clean image. ``noise="forward"`` feeds what the walk would.

Letters: B images, C channels, K classes, T timesteps.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from diffrep.diffusion.schedules import NoiseSchedule
from diffrep.errors import UserError
from diffrep.frozen.diffusion import DiffusionTeacher
from diffrep.randomness import Rows


class Preconditioned(nn.Module):
    """``net(x, sigma, class_labels=None) -> clean`` as a network of (x_t, timestep) -> epsilon.

    net:         sigma comes as (B,) float32; class_labels as one-hot rows (B, K), all zero for the null class.
    num_classes: K, None for an unconditional network.
    """

    scale: Tensor  # (T,) sqrt(alpha_bar)
    sigma: Tensor  # (T,)

    def __init__(self, net: nn.Module, schedule: NoiseSchedule, num_classes: int | None = None) -> None:
        super().__init__()
        self.net, self.num_classes = net, num_classes
        self.reads_clean = False
        sigma = torch.tensor([schedule.sigma_at(step) for step in range(len(schedule))])
        scale = torch.from_numpy(schedule.alphas_cumprod**0.5).float()
        self.register_buffer("sigma", sigma.float(), persistent=False)  # of the walk, not of the network's weights
        self.register_buffer("scale", scale, persistent=False)

    def forward(self, x: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """(B, C, H, W) x_t, (B,) int64, (B,) int64 with K the null class -> epsilon (B, C, H, W)."""
        sigma = self.sigma[timestep]
        scale = torch.ones_like(sigma) if self.reads_clean else self.scale[timestep]
        x = x / scale.view(-1, 1, 1, 1)
        clean = self.net(x, sigma) if class_labels is None else self.net(x, sigma, self._one_hot(class_labels))
        return (x - clean) / sigma.view(-1, 1, 1, 1)

    def _one_hot(self, labels: Tensor) -> Tensor:
        classes = torch.arange(self.num_classes or 0, device=labels.device)
        return (labels[:, None] == classes).float()  # (B, K); K itself is no class, so its row is zero

    @contextlib.contextmanager
    def reading(self, noise: str | None) -> Iterator[None]:
        """Inside, with ``noise`` None, x is a clean image, which stays at its own scale."""
        self.reads_clean = noise is None
        try:
            yield
        finally:
            self.reads_clean = False


class PreconditionedTeacher(DiffusionTeacher):
    """A teacher whose network is :class:`Preconditioned`; its taps begin with ``net.``."""

    module: Preconditioned

    def features(
        self,
        images: Tensor,
        timestep: int | Tensor,
        taps: Sequence[str],
        noise: Literal["forward"] | None = None,
        labels: Tensor | None = None,
        rng: Rows | None = None,
    ) -> dict[str, Tensor]:
        """As :meth:`DiffusionTeacher.features`; the page's first lines say what the network is fed."""
        with self.module.reading(noise):
            return super().features(images, timestep, taps, noise, labels, rng)


def is_preconditioned(module: nn.Module) -> bool:
    """Whether a network looks like one of the official EDM code: it names its noise levels and its image size."""
    return all(hasattr(module, name) for name in ("sigma_min", "sigma_max", "img_resolution"))


def edm_teacher(
    module: nn.Module,
    image_size: int | None = None,
    name: str = "edm",
    in_channels: int | None = None,
    num_classes: int | None = None,
    schedule: NoiseSchedule | None = None,
    licence: str = "unknown",
) -> PreconditionedTeacher:
    """A network of (x, sigma) as a teacher, e.g. what a factory of ``python:module:factory`` returns.

    Args:
        module: ``net(x, sigma, class_labels=None) -> clean``, of images in [-1, 1].
        image_size, in_channels, num_classes: default what the network says of itself, as official ones do
            (``img_resolution``, ``img_channels``, ``label_dim``).
        schedule: of the walk, which names sigma by a timestep; default linear, sigma 0.01 to 157.

    Raises:
        UserError: no image size.
    """
    size = image_size or getattr(module, "img_resolution", None)
    if not isinstance(size, int):
        raise UserError(f"{name}: the network has no img_resolution; give image_size (pixels)")
    channels = getattr(module, "img_channels", 3) if in_channels is None else in_channels
    classes: int | None = num_classes or getattr(module, "label_dim", 0) or None  # the official code says 0 for none
    walk = schedule or NoiseSchedule.named("linear")
    network = Preconditioned(module, walk, classes)
    return PreconditionedTeacher(network, name, size, channels, walk, classes, licence=licence)
