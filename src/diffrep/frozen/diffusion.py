"""A frozen diffusion model asked for features: (images, timestep) -> features at taps.

Letters: B images, C channels, T timesteps. Images come in [0, 1]; the network sees [-1, 1]. The published method
feeds the clean image and lets only the time embedding speak of t (``noise=None``); ``noise="forward"`` feeds x_t.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from diffrep import counting, taps
from diffrep.diffusion.schedules import NoiseSchedule, cosine_betas, scaled_linear_betas
from diffrep.errors import UserError
from diffrep.frozen.base import FrozenModule
from diffrep.frozen.files import foreign_factory, load_unet, preset_unet
from diffrep.randomness import Rows, seeded
from diffrep.taps import Tap


class DiffusionTeacher(FrozenModule):
    """A denoiser read as a family of encoders, one per timestep.

    module:       any network of (x, timestep) or, with num_classes, of (x, timestep, class_labels=...).
    num_classes:  None for an unconditional network; else the label ``num_classes`` is the null class.
    prediction:   what the network returns: ``epsilon`` or ``v_prediction`` (only a generator asks).
    labels_seen:  how many labels its training read, by part, where a run of ours says so.
    call_options: further keywords for each call (diffusers: ``return_dict=False``).
    """

    def __init__(
        self,
        module: nn.Module,
        name: str,
        image_size: int,
        in_channels: int = 3,
        schedule: NoiseSchedule | None = None,
        num_classes: int | None = None,
        prediction: str = "epsilon",
        licence: str = "unknown",
        call_options: dict[str, Any] | None = None,
        labels_seen: dict[str, int] | None = None,
    ) -> None:
        super().__init__(module, name, licence)
        self.labels_seen = labels_seen or {}
        self.call_options = call_options or {}
        self.image_size, self.in_channels, self.num_classes = image_size, in_channels, num_classes
        self.schedule = schedule or NoiseSchedule.named("linear")
        self.prediction = prediction

    @property
    def num_train_timesteps(self) -> int:
        return len(self.schedule)

    @cached_property
    def _taps(self) -> dict[str, Tap]:
        return taps.list_taps(self.module, self._dry_pass(), self.image_size)

    def taps(self) -> list[Tap]:
        """Every point that can be read, with shape and stride, in the order a pass reaches them."""
        return list(self._taps.values())

    def tap(self, name: str) -> Tap:
        """One tap by its dotted name; an unknown one is refused with the nearest names."""
        if name not in self._taps:
            taps.find_module(self.module, name)  # says which names are near
            raise UserError(f"tap '{name}' of {self.name} returns no feature with a channel axis")
        return self._taps[name]

    def normalise(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, C, H, W) in [-1, 1]; a grey network gets the mean of the channels."""
        self.check_size(images.shape[-2], images.shape[-1])
        x = images.mean(1, keepdim=True) if self.in_channels == 1 else images
        return x * 2 - 1

    def check_size(self, height: int, width: int) -> None:
        """Refuse images of another size than the network was trained on."""
        if (height, width) != (self.image_size, self.image_size):
            found = f"{self.name} reads {self.image_size}-pixel images, not {height}x{width}"
            raise UserError(f"{found}: set data.image_size={self.image_size}")

    @torch.no_grad()
    def features(
        self,
        images: Tensor,
        timestep: int | Tensor,
        taps: Sequence[str],
        noise: Literal["forward"] | None = None,
        labels: Tensor | None = None,
        rng: Rows | None = None,
    ) -> dict[str, Tensor]:
        """What the network holds at ``taps``, computed no further than the last of them.

        Args:
            images: (B, 3, H, W) in [0, 1].
            timestep: one int or (B,) int64 in [0, T).
            noise: None feeds the clean image; "forward" feeds x_t and needs ``rng``.
            labels: (B,) int64 for a class-conditional network; None is its null class.

        Returns:
            {tap: float32, as the module returns it: (B, C, h, w), (B, N, C) or (B, C)}.

        Raises:
            UserError: unknown tap, timestep outside [0, T), images of another size.
        """
        run = self._call(images, timestep, noise, labels, rng)
        found = _read(self.module, run, [self.tap(name) for name in taps])
        return {name: feature.float() for name, feature in found.items()}

    @torch.no_grad()
    def predict(self, x: Tensor, timestep: Tensor, labels: Tensor | None = None) -> Tensor:
        """The whole network on x_t already in its own range: its raw prediction, (B, C, H, W)."""
        self.follow(x)
        output = self.module(x, timestep, **self._keywords(labels, x))
        return output if isinstance(output, Tensor) else output[0]

    def checked_timestep(self, timestep: int | Tensor, like: Tensor) -> Tensor:
        """(B,) int64 on the images' device, refused outside [0, T): the network itself would answer nonsense."""
        steps = torch.as_tensor(timestep, device=like.device, dtype=torch.int64).expand(len(like))
        low, high = (int(steps.min()), int(steps.max())) if len(steps) else (0, 0)
        if low < 0 or high >= self.num_train_timesteps:
            worst = low if low < 0 else high
            raise UserError(f"timestep {worst} is outside 0..{self.num_train_timesteps - 1} of {self.name}")
        return steps

    def multiply_adds(self, tap: str | None = None) -> int:
        """Counted multiply-adds for one image: up to ``tap``, or of the full pass."""
        run = self._dry_pass()
        if tap is None:
            return counting.multiply_adds(run)
        until = [self.tap(tap)]  # looked up outside the count: the first look is a full pass
        return counting.multiply_adds(lambda: _read(self.module, run, until))

    def _call(
        self, images: Tensor, timestep: int | Tensor, noise: str | None, labels: Tensor | None, rng: Rows | None
    ) -> Callable[[], Any]:
        steps, x = self.checked_timestep(timestep, images), self.normalise(images)
        self.follow(x)
        if noise == "forward":
            if rng is None:
                raise ValueError("noise='forward' draws: pass rng")
            x = self.schedule.noised(x, rng.normal(*x.shape[1:]).to(x.device), steps)
        return lambda: self.module(x, steps, **self._keywords(labels, x))

    def _keywords(self, labels: Tensor | None, like: Tensor) -> dict[str, Any]:
        if self.num_classes is None:
            return self.call_options
        null = torch.full((len(like),), self.num_classes, device=like.device)
        return {**self.call_options, "class_labels": null if labels is None else labels}

    def _dry_pass(self) -> Callable[[], Any]:
        x = torch.zeros(1, self.in_channels, self.image_size, self.image_size)
        steps = torch.zeros(1, dtype=torch.int64)
        return counting.on_meta(self.module, x, steps, **self._keywords(None, x))


_read = taps.read  # an argument called ``taps`` would hide the module


def load_teacher(reference: str, allow_code: bool = False) -> DiffusionTeacher:
    """Load a frozen diffusion model.

    Args:
        reference: a diffusers folder or Hub id (``google/ddpm-cifar10-32``), a run folder of ours,
            ``python:module:factory`` (a callable that returns any network of (x, timestep), or a DiffusionTeacher),
            or ``random:REFERENCE`` for the same architecture with untrained weights.
        allow_code: ``python:`` runs foreign code and is refused without it.

    Raises:
        UserError: nothing there, a corrupt or truncated file, a pickle that wants to run code.
    """
    kind, _, rest = reference.partition(":")
    if kind == "random":
        return _from_preset(rest) or untrained(load_teacher(rest, allow_code))
    if kind == "python":
        return _from_factory(rest, allow_code)
    unet, scheduler, card = load_unet(reference)
    config = unet.config
    classes = config.get("num_class_embeds")
    if not isinstance(config["sample_size"], int):
        raise UserError(f"{reference}: config.json has sample_size {config['sample_size']}, not one number of pixels")
    return DiffusionTeacher(
        unet,
        name=card.get("name", reference),
        image_size=config["sample_size"],
        in_channels=config["in_channels"],
        schedule=schedule_from_diffusers(scheduler),
        num_classes=classes - 1 if classes else None,
        prediction=scheduler.get("prediction_type", "epsilon"),
        licence=card.get("licence", "unknown"),
        call_options={"return_dict": False},
        labels_seen=card.get("labels_seen"),
    )


def _from_preset(reference: str) -> DiffusionTeacher | None:
    """A published architecture, untrained, without the Hub."""
    with seeded(0, "untrained teacher"):
        built = preset_unet(reference)
    if built is None:
        return None
    unet, licence = built
    size, channels = unet.config["sample_size"], unet.config["in_channels"]
    return DiffusionTeacher(
        unet, f"untrained {reference}", size, channels, licence=licence, call_options={"return_dict": False}
    )


def untrained(teacher: DiffusionTeacher, seed: int = 0) -> DiffusionTeacher:
    """The control every claim needs: the same network before training (each layer's own initialisation)."""
    with seeded(seed, "untrained teacher"):
        for module in teacher.module.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
            elif any(True for _ in module.parameters(recurse=False)):
                raise UserError(f"random: a {type(module).__name__} of {teacher.name} has no reset_parameters()")
    vars(teacher).pop("sha256", None)  # of the trained weights, where it was asked for before
    teacher.name = f"untrained {teacher.name}"
    return teacher


def _from_factory(path: str, allow_code: bool) -> DiffusionTeacher:
    factory = foreign_factory(path, allow_code)
    try:
        made = factory()
    except Exception as error:  # whatever foreign code raises is the foreign code's
        raise UserError(f"python:{path} raised {type(error).__name__}: {error}") from error
    if isinstance(made, DiffusionTeacher):
        return made
    if not isinstance(made, nn.Module):
        raise UserError(f"python:{path} returned a {type(made).__name__}, not a torch module or a DiffusionTeacher")
    size = getattr(made, "image_size", None) or getattr(made, "img_resolution", None)
    if not isinstance(size, int):
        raise UserError(
            f"python:{path}: give the module an attribute image_size (pixels), or return a DiffusionTeacher"
        )
    return DiffusionTeacher(made, f"python:{path}", size, getattr(made, "in_channels", 3))


def schedule_from_diffusers(config: dict[str, Any]) -> NoiseSchedule:
    """The noise schedule that a diffusers ``scheduler_config.json`` describes."""
    steps, name = config.get("num_train_timesteps", 1000), config.get("beta_schedule", "linear")
    start, end = config.get("beta_start", 1e-4), config.get("beta_end", 0.02)
    if config.get("rescale_betas_zero_snr"):
        raise UserError("the scheduler's rescale_betas_zero_snr is not supported: its last timestep has no signal left")
    if config.get("trained_betas") is not None:
        return NoiseSchedule.from_betas(np.asarray(config["trained_betas"], dtype=np.float64))
    if name == "linear":  # diffusers does not scale the ends with T
        return NoiseSchedule.from_betas(np.linspace(start, end, steps, dtype=np.float64))
    if name == "scaled_linear":
        return NoiseSchedule.from_betas(scaled_linear_betas(steps, start, end))
    if name == "squaredcos_cap_v2":
        return NoiseSchedule.from_betas(cosine_betas(steps))
    raise UserError(f"noise schedule '{name}' is not known; valid: linear, scaled_linear, squaredcos_cap_v2")
