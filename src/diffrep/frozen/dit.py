"""A frozen DiT read for features, of latents behind a VAE or of pixels.

``blocks.i`` is the block's output as its reader sees it: LayerNorm without weights, then the shift and scale of the
layer that comes next (DiTF, arXiv 2505.18584). A few channels of a DiT are huge on every patch whatever the image
("massive"): they are zero in the result, as in DiTF, and here they are also left out of the LayerNorm's mean and
variance. Left in, their size would shift all other channels and shrink them to almost nothing, and what remains is the
layer's shift, the same for every patch. ``blocks.i@raw`` is the output itself. Tokens come as maps.
Letters: B images, C channels, h w the grid of tokens, D width.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffrep import _torchvision_compat, counting, taps
from diffrep.diffusion.schedules import NoiseSchedule, schedule_from_diffusers
from diffrep.errors import UserError
from diffrep.files import read_json
from diffrep.frozen.base import FrozenModule
from diffrep.frozen.diffusion import DiffusionTeacher
from diffrep.frozen.files import Opened, folder_weights, library_network, opened, part_of
from diffrep.frozen.latents import LatentEncoder
from diffrep.frozen.references import SourceOptions
from diffrep.models.dit import EPS, DiT, modulated
from diffrep.models.dit_files import PRESETS, build, dit_config, dit_weights, from_diffusers, looks_like_dit
from diffrep.randomness import stream
from diffrep.taps import Tap

RAW = "@raw"
# Our rule, DiTF's being unknown: a channel is massive whose mean |a| exceeds that of the median channel so often.
MASSIVE, MOST_MASSIVE, PROBES = 20.0, 4, 8


class DiTTeacher(DiffusionTeacher):
    """A DiT as a family of encoders; see the page's first lines for its taps.

    vae:     diffusers' ``AutoencoderKL``, for a network of latents; None for one of pixels.
    massive: {"blocks.i": channels}, found at a tap's first reading on inputs of pure noise: they are the network's
             own and no batch changes them.
    """

    module: DiT

    def __init__(
        self,
        network: DiT,
        name: str,
        vae: FrozenModule | None = None,
        schedule: NoiseSchedule | None = None,
        prediction: str = "epsilon",
        licence: str = "unknown",
        labels_seen: dict[str, int] | None = None,
    ) -> None:
        config, encoder = network.config, LatentEncoder(vae, network.config.input_size) if vae else None
        super().__init__(
            network,
            name,
            image_size=encoder.pixels if encoder else config.input_size,
            in_channels=config.in_channels,
            schedule=schedule,
            num_classes=config.num_classes,
            prediction=prediction,
            licence=licence,
            labels_seen=labels_seen,
            null_class=config.has_null_class,
        )
        self.vae, self.encoder, self.massive = vae, encoder, dict[str, list[int]]()
        if encoder is not None and encoder.channels != config.in_channels:
            found = f"{encoder.vae.name} makes latents of {encoder.channels} channels"
            raise UserError(f"{found}, and {name} reads {config.in_channels}: give the VAE it was trained with")

    @property
    def latent_size(self) -> int:
        """Cells per side of what the network itself reads and a sampler walks on."""
        return self.module.config.input_size

    @cached_property
    def sha256(self) -> str:
        """Of the network, and of its VAE where there is one."""
        network = super().sha256
        return hashlib.sha256(f"{network}{self.vae.sha256}".encode()).hexdigest() if self.vae else network

    # Images

    def normalise(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> latents (B, 4, H / 8, W / 8), scaled; or pixels in [-1, 1] without a VAE."""
        if self.encoder is None and self.in_channels not in (1, 3):
            raise UserError(f"{self.name} reads latents: name its VAE, {self.name}?vae=FOLDER")
        if self.encoder is None:
            return super().normalise(images)
        self.check_size(images.shape[-2], images.shape[-1])
        return self.encoder.latents(images, self.passes.memory_mb)

    @property
    def encoder_multiply_adds(self) -> int:
        """Counted multiply-adds of the VAE for one image; 0 without one."""
        return self.encoder.multiply_adds if self.encoder else 0

    # Taps

    @cached_property
    def _taps(self) -> dict[str, Tap]:
        """As the module calls them, and every block twice.

        What stands inside the timestep embedder sees each distinct timestep once, not each image: it is no tap.
        """
        found: dict[str, Tap] = {}
        for name, tap in super()._taps.items():
            shape = self._map_shape(tap.shape)
            stride = self.image_size // shape[-1] if len(shape) == 3 else None
            for shown in (f"{name}{RAW}", name) if _is_block(name) else (name,):
                if not name.startswith("t_embedder."):
                    found[shown] = Tap(shown, shape, stride, tap.calls)
        return found

    def _map_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """(N, C) -> (C, h, w) where there is one row per token."""
        h, w = self.module.grid
        return (shape[1], h, w) if len(shape) == 2 and shape[0] == h * w else shape

    def _part(self, x: Tensor, steps: Tensor, named: dict[str, Any], rows: slice, taps: list[Tap]) -> dict[str, Tensor]:
        """What the modules behind ``taps`` return, as a map, and where asked as the next layer reads it."""
        self._find_massive([tap.name for tap in taps if _is_block(tap.name)])
        modules = dict.fromkeys(_module(tap.name) for tap in taps)
        modules |= dict.fromkeys(("t_embedder", "y_embedder"))  # their sum is c, which every block is told
        found = super()._part(x, steps, named, rows, [self.tap(name) for name in modules])
        c = found["t_embedder"] + found["y_embedder"]
        return {tap.name: self._as_map(self._shown(tap.name, found[_module(tap.name)], c)) for tap in taps}

    def _shown(self, name: str, feature: Tensor, c: Tensor) -> Tensor:
        if not _is_block(name):
            return feature
        shift, scale = self.module.modulation_after(_index(name), c)
        return as_read(feature, shift, scale, self.massive[name])

    def _as_map(self, feature: Tensor) -> Tensor:
        """(B, N, C) -> (B, C, h, w) where there is one row per token."""
        if feature.dim() != 3:
            return feature
        shape = self._map_shape(tuple(feature.shape[1:]))
        return feature.transpose(1, 2).reshape(-1, *shape) if len(shape) == 3 else feature

    def _find_massive(self, names: Sequence[str]) -> None:
        """Of blocks not read before: on noise, at the middle timestep, of the null class where there is one."""
        new = [self.tap(name) for name in names if name not in self.massive]
        if new:
            seen = [self._probe(k, new) for k in range(PROBES)]
            sizes = {tap.name: torch.stack([found[tap.name] for found in seen]).mean(0) for tap in new}
            self.massive |= {name: massive_channels(size) for name, size in sizes.items()}

    def _probe(self, k: int, taps: list[Tap]) -> dict[str, Tensor]:
        """Mean |a| of each channel (D,) for one input, alone: no batch and no precision of a pass has a say in it."""
        config, device = self.module.config, self.module.pos_embed.device
        x = torch.randn(1, self.in_channels, *[self.latent_size] * 2, generator=stream(0, "massive channels", k))
        label = config.num_classes if config.has_null_class else k % config.num_classes
        given = x, torch.tensor([self.num_train_timesteps // 2]), torch.tensor([label])
        found = _read(self.module, lambda: self.module(*(g.to(device) for g in given)), taps)
        return {name: tokens.float().abs().mean((0, 1)) for name, tokens in found.items()}

    # What a pass costs

    def multiply_adds(self, tap: str | None = None) -> int:
        """Counted multiply-adds for one image: up to ``tap``, the VAE with it; or of the network's full pass alone."""
        if tap is None:
            return super().multiply_adds()
        reading = 2 * self.module.config.hidden_size**2 if _is_block(tap) else 0  # shift and scale of the next layer
        return super().multiply_adds(_module(self.tap(tap).name)) + reading + self.encoder_multiply_adds

    def peak_bytes(self, taps: Sequence[str]) -> int:
        """Most bytes that one image holds at once, in the VAE or in the network."""
        network = super().peak_bytes([_module(self.tap(name).name) for name in taps])
        return max(network, self.encoder.peak_bytes) if self.encoder else network

    def keep_only(self, taps: Sequence[str]) -> None:
        """As :meth:`DiffusionTeacher.keep_only`; of the layer that reads a block its modulation stays."""
        readers = {}
        for name in filter(_is_block, taps):
            place = self.module.reader_of(_index(name))
            readers[place] = self.module.get_submodule(place).adaLN_modulation
        both = ("t_embedder", "y_embedder")  # read in every pass
        super().keep_only([*(_module(self.tap(name).name) for name in taps), *both])
        for place, modulation in readers.items():
            self.module.get_submodule(place).adaLN_modulation = modulation
        self.kept = tuple(taps)

    def _dry_pass(self) -> Callable[[], Any]:
        x = torch.zeros(1, self.in_channels, self.latent_size, self.latent_size)
        label = torch.zeros(1, dtype=torch.int64)
        return counting.on_meta(self.module, x, label, class_labels=label)


_read = taps.read  # an argument called ``taps`` would hide the module


def _is_block(name: str) -> bool:
    return re.fullmatch(r"blocks\.\d+", name) is not None


def _index(block: str) -> int:
    return int(block.removeprefix("blocks."))


def _module(tap: str) -> str:
    """The module that a tap reads."""
    return tap.removesuffix(RAW)


# The feature


def as_read(tokens: Tensor, shift: Tensor, scale: Tensor, massive: Sequence[int]) -> Tensor:
    """LayerNorm(tokens) (1 + scale) + shift over the channels that are not massive; the others are zero.

    Args:
        tokens: (B, N, D); shift, scale: (B, D).
        massive: channels in 0..D-1.

    Returns:
        (B, N, D).
    """
    kept = torch.ones(tokens.shape[-1], dtype=torch.bool, device=tokens.device)
    kept[list(massive)] = False
    found, inside = torch.zeros_like(tokens), tokens[..., kept]
    found[..., kept] = modulated(F.layer_norm(inside, inside.shape[-1:], eps=EPS), shift[:, kept], scale[:, kept])
    return found


def massive_channels(size: Tensor) -> list[int]:
    """The largest channels of ``size`` (D,), their mean |a|: above 20 times the median, and at most 4."""
    found = size.topk(min(MOST_MASSIVE, len(size)))
    return sorted(found.indices[found.values > MASSIVE * size.median()].tolist())


# From files


def load_vae(reference: str) -> FrozenModule:
    """diffrep's door to diffusers' ``AutoencoderKL``: a folder, one with ``vae/`` in it, or a Hub id.

    Raises:
        UserError: nothing there, another network, damaged weights.
    """
    found = opened(reference)
    if found.path.is_file():
        raise UserError(f"vae={reference} is a file; a VAE is a diffusers folder or a Hub id")
    inner, kind = part_of(found.path, "vae")
    if kind != "AutoencoderKL":
        raise UserError(f"vae={reference} holds a {kind}; valid: AutoencoderKL")
    _torchvision_compat.install()
    from diffusers import AutoencoderKL

    return FrozenModule(library_network(AutoencoderKL, inner, str(found.path)), found.name, found.licence)


def is_checkpoint(checkpoint: Any) -> bool:
    """Whether these are the weights of an official DiT, plain or in a training checkpoint."""
    try:
        return looks_like_dit(dit_weights(checkpoint, "file"))
    except UserError:
        return False


def load_file(found: Opened, checkpoint: Any, options: SourceOptions) -> DiTTeacher:
    """The teacher in an official file.

    Raises:
        UserError: tensors that do not fit, heads that nobody said, a VAE that is not there.
    """
    origin = str(found.path)
    options.only(("num_heads", "sinusoid", "vae", "label"), f"{origin}, a DiT,")
    state = dit_weights(checkpoint, origin)
    config = dit_config(state, options.num_heads, options.sinusoid or "official", origin)
    vae = load_vae(options.vae) if options.vae else None
    return DiTTeacher(build(config, state, origin), found.name, vae, licence=found.licence)


def load_folder(found: Opened, options: SourceOptions) -> DiTTeacher:
    """The teacher in a diffusers folder of a ``DiTPipeline``, or of its transformer alone.

    Raises:
        UserError: damaged weights, such as do not fit their config, a VAE that is not there.
    """
    options.only(("sinusoid", "vae", "label"), f"{found.path}, a DiT of diffusers,")
    inner, _ = part_of(found.path, "transformer")
    weights = folder_weights(inner, str(inner))
    card = read_json(inner / "config.json")
    config, state = from_diffusers(card, weights, options.sinusoid or "official", str(inner))
    beside = str(found.path / "vae") if (found.path / "vae").is_dir() else None
    place, scheduler = options.vae or beside, found.scheduler
    return DiTTeacher(
        build(config, state, str(inner)),
        found.name,
        load_vae(place) if place else None,
        schedule_from_diffusers(scheduler),
        scheduler.get("prediction_type", "epsilon"),
        found.licence,
    )


def preset(key: str) -> DiTTeacher | None:
    """A published architecture as it is initialised, without VAE; None where no preset has this key."""
    found = PRESETS.get(key)
    return DiTTeacher(DiT(found.config), key, licence=found.licence) if found else None
