"""A frozen diffusion model asked for features: (images, timestep) -> features at taps.

Letters: B images, C channels, T timesteps. Images come in [0, 1]; the network sees [-1, 1]. The published method
feeds the clean image and lets only the time embedding speak of t (``noise=None``); ``noise="forward"`` feeds x_t.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from diffrep import counting, taps
from diffrep.diffusion.schedules import NoiseSchedule
from diffrep.errors import UserError
from diffrep.frozen.base import FrozenModule
from diffrep.frozen.passes import Compiled, PassConfig, compiled_blocks, running, swapped_in
from diffrep.randomness import Rows
from diffrep.taps import Tap


class DiffusionTeacher(FrozenModule):
    """A denoiser read as a family of encoders, one per timestep.

    module:       any network of (x, timestep) or, with num_classes, of (x, timestep, class_labels=...).
    num_classes:  None for an unconditional network; else the label ``num_classes`` is the null class, where there is
                  one (``null_class``); a network without one is told no class at all (``class_labels=None``).
    given_class:  told in place of the null class when nobody gives labels.
    prediction:   what the network returns: ``epsilon`` or ``v_prediction`` (only a generator asks).
    labels_seen:  how many labels its training read, by part, where a run of ours says so.
    call_options: further keywords for each call (diffusers: ``return_dict=False``).
    """

    takes_noise = True  # whether it may be asked about noised images

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
        null_class: bool = True,
        given_class: int | None = None,
    ) -> None:
        super().__init__(module, name, licence)
        self.null_class, self.given_class = null_class, given_class
        self.passes = PassConfig()
        self.kept: tuple[str, ...] | None = None  # the taps that everything behind was let go for
        self.labels_seen = labels_seen or {}
        self.call_options = call_options or {}
        self.image_size, self.in_channels, self.num_classes = image_size, in_channels, num_classes
        self.schedule = schedule or NoiseSchedule.named("linear")
        self.prediction = prediction

    @property
    def num_train_timesteps(self) -> int:
        return len(self.schedule)

    def run_as(self, passes: PassConfig) -> None:
        """Precision, layout, compilation and memory of every pass from here on."""
        self.passes = passes
        layout = torch.channels_last if passes.channels_last else torch.contiguous_format
        for parameter in self.module.parameters():
            if parameter.dim() == 4:
                parameter.data = parameter.data.contiguous(memory_format=layout)

    def keep_only(self, taps: Sequence[str]) -> None:
        """Let go of every part that no pass up to the last of ``taps`` reaches: a decoder nobody reads.

        Its hash stays that of the whole network. From here on nothing behind the taps can be asked. A network that
        uses parts without calling them keeps all of them.
        """
        found = [self.tap(name) for name in taps]
        _ = self.sha256  # of all weights: asked while they are there
        if _drop_unreached(self.module, lambda: _read(self.module, self._dry_pass(), found)):
            self.kept = tuple(taps)

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

    def check_noise(self, noise: str | None) -> None:
        """Refuse to noise images for a network that was trained to read clean ones."""
        if noise is not None and not self.takes_noise:
            raise UserError(f"{self.name} was trained to read clean images: noise '{noise}' is not for it; valid: null")

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
        self.check_noise(noise)
        found = [self.tap(name) for name in taps]
        steps, x = self.checked_timestep(timestep, images), self.normalise(images)
        self.follow(x)
        if noise == "forward":
            if rng is None:
                raise ValueError("noise='forward' draws: pass rng")
            x = self.schedule.noised(x, rng.normal(*x.shape[1:]).to(x.device), steps)
        named, size = self._keywords(labels, x), self.split_size(taps, len(x))
        parts = [self._part(x, steps, named, slice(k, k + size), found) for k in range(0, len(x), size)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _part(self, x: Tensor, steps: Tensor, named: dict[str, Any], rows: slice, taps: list[Tap]) -> dict[str, Tensor]:
        named = {key: value[rows] if isinstance(value, Tensor) else value for key, value in named.items()}
        layout = torch.channels_last if self.passes.channels_last else torch.contiguous_format
        part = x[rows].contiguous(memory_format=layout)
        with running(self.passes, x.device), swapped_in(self._compiled(taps)):
            found = _read(self.module, lambda: self.module(part, steps[rows], **named), taps)
        return {name: feature.float() for name, feature in found.items()}

    def _compiled(self, taps: list[Tap]) -> Compiled:
        names = tuple(tap.name for tap in taps)
        if not self.passes.compile:
            return {}
        if names not in self._by_taps:
            self._by_taps[names] = compiled_blocks(self.module, names)
        return self._by_taps[names]

    @cached_property
    def _by_taps(self) -> dict[tuple[str, ...], Compiled]:
        return {}

    def split_size(self, taps: Sequence[str], batch: int) -> int:
        """How many images go through at once, so that what they hold fits ``passes.memory_mb``; at least one."""
        if self.passes.memory_mb is None:
            return max(batch, 1)
        key = (*taps, self.passes.attention)
        if key not in self._peaks:
            self._peaks[key] = self.peak_bytes(taps)
        return min(max(batch, 1), max(1, self.passes.memory_mb * 1_000_000 // self._peaks[key]))

    @cached_property
    def _peaks(self) -> dict[tuple[str, ...], int]:
        return {}

    def peak_bytes(self, taps: Sequence[str]) -> int:
        """Most bytes that one image holds at once on its way to the last of ``taps``; float32, without weights."""
        found, run = [self.tap(name) for name in taps], self._dry_pass()
        return counting.peak_bytes(lambda: _read(self.module, run, found), self.passes.attention == "fused")

    @torch.no_grad()
    def predict(self, x: Tensor, timestep: Tensor, labels: Tensor | None = None) -> Tensor:
        """The whole network on x_t already in its own range: its raw prediction, (B, C, H, W)."""
        if self.kept is not None:
            raise RuntimeError(f"{self.name} kept only what {', '.join(self.kept)} need: the rest was let go")
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

    def _keywords(self, labels: Tensor | None, like: Tensor) -> dict[str, Any]:
        if self.num_classes is None:
            return self.call_options
        if labels is None:
            told = self.num_classes if self.null_class and self.given_class is None else self.given_class
            labels = None if told is None else torch.full((len(like),), told, device=like.device)
        else:
            self.check_labels(labels)
            labels = labels.to(like.device)
        return {**self.call_options, "class_labels": labels}

    def check_labels(self, labels: Tensor) -> None:
        """Refuse classes that the network does not have; its null class, where there is one, is one of them."""
        assert self.num_classes is not None
        beyond = labels[(labels < 0) | (labels >= self.num_classes + self.null_class)]
        if len(beyond):
            null = f", null class {self.num_classes}" if self.null_class else ", no null class"
            raise UserError(f"class {int(beyond[0])} is outside 0..{self.num_classes - 1} of {self.name}{null}")

    def _dry_pass(self) -> Callable[[], Any]:
        x = torch.zeros(1, self.in_channels, self.image_size, self.image_size)
        steps = torch.zeros(1, dtype=torch.int64)
        told = None if self.num_classes is None else steps  # some class: what embeds it is reached
        return counting.on_meta(self.module, x, steps, **self._keywords(told, x))


_read = taps.read  # an argument called ``taps`` would hide the module
_drop_unreached = taps.drop_unreached
