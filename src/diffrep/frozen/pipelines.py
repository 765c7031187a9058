"""Generators that are whole diffusers pipelines: DiT with its VAE, and text-to-image with a prompt per class.

A text-to-image pipeline walks by itself, with the scheduler we choose; all others are walked by
:mod:`diffrep.diffusion.sampling`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffrep import _torchvision_compat, assets, counting
from diffrep.diffusion.sampling import LIBRARY
from diffrep.errors import UserError
from diffrep.files import located, read_json
from diffrep.frozen.base import FrozenModule
from diffrep.frozen.diffusion import DiffusionTeacher, load_teacher, schedule_from_diffusers
from diffrep.frozen.generator import DiffusionGenerator, Judge, SamplingConfig
from diffrep.randomness import stream

_SCHEDULERS = {"ddpm": "DDPMScheduler", "ddim": "DDIMScheduler"} | {name: kind for name, (kind, _) in LIBRARY.items()}


class LatentGenerator(DiffusionGenerator):
    """A class-conditional network over a VAE's latents (DiT); the walk is not clipped, latents have no range."""

    clips = False

    def __init__(self, network: DiffusionTeacher, vae: FrozenModule) -> None:
        super().__init__(network)
        self.vae = vae

    @property
    def sha256(self) -> str:
        return hashlib.sha256(f"{self.network.sha256}{self.vae.sha256}".encode()).hexdigest()

    def decode(self, x: Tensor) -> Tensor:
        """Latents (B, 4, h, w) as the network has them -> images (B, 3, H, W) in [0, 1]."""
        self.vae.follow(x)
        pixels = self.vae.module.decode(x / self.vae.module.config.scaling_factor, return_dict=False)[0]
        return (pixels / 2 + 0.5).clamp(0, 1)

    def decoder_multiply_adds(self) -> int:
        latents = torch.zeros(1, *self.noise_shape, device="meta")
        vae = self.vae.module
        decoder = torch.nn.Sequential(*[m for m in (vae.post_quant_conv, vae.decoder) if m is not None])
        return counting.multiply_adds(counting.on_meta(decoder, latents))


class TextGenerator(DiffusionGenerator):
    """A text-to-image pipeline of diffusers with one prompt per class."""

    def __init__(self, pipeline: Any, name: str, licence: str, prompts: Sequence[str]) -> None:
        pipeline.set_progress_bar_config(disable=True)
        self.pipeline, self.prompts = pipeline, tuple(prompts)
        self._name, self._licence = name, licence
        self._parts = [
            FrozenModule(part, key) for key, part in pipeline.components.items() if isinstance(part, torch.nn.Module)
        ]
        self._sha256 = hashlib.sha256("".join(part.sha256 for part in self._parts).encode()).hexdigest()

    @property
    def name(self) -> str:
        return self._name

    @property
    def licence(self) -> str:
        return self._licence

    @property
    def sha256(self) -> str:
        return self._sha256

    @property
    def num_classes(self) -> int | None:
        return len(self.prompts)

    @property
    def labels_seen(self) -> dict[str, int]:
        return {}

    @torch.no_grad()
    def sample(
        self,
        labels: Tensor | None,
        seeds: Sequence[int],
        sampling: SamplingConfig,
        device: torch.device | str = "cpu",
        judge: Judge | None = None,
    ) -> Tensor:
        """As :meth:`DiffusionGenerator.sample`; every image is drawn from a generator of its own."""
        if judge is not None or labels is None:
            raise UserError(f"{self.name}: a text-to-image pipeline draws classes only, and cannot be steered (hard)")
        self.check(labels, sampling)
        rngs = [stream(seed, f"noise of {self.sha256}") for seed in seeds]
        prompts = [self.prompts[label] for label in labels.tolist()]
        return self._run(prompts, rngs, self._steps(sampling), sampling, device)

    def _run(
        self, prompts: list[str], rngs: list[torch.Generator], steps: int, sampling: SamplingConfig, device: Any
    ) -> Tensor:
        import diffusers

        kind = getattr(diffusers, _SCHEDULERS[sampling.sampler])
        self.pipeline.to(device)
        self.pipeline.scheduler = kind.from_config(self.pipeline.scheduler.config)
        eta = {"eta": sampling.eta} if sampling.eta else {}
        made = self.pipeline(
            prompt=prompts, num_inference_steps=steps, guidance_scale=sampling.guidance_scale, generator=rngs,
            output_type="pt", **eta,
        )  # fmt: skip
        return made.images.float().clamp(0, 1)

    def _steps(self, sampling: SamplingConfig) -> int:
        asked = sampling.num_sampling_steps
        if not asked.isdigit() or not int(asked):
            raise UserError(f"num_sampling_steps '{asked}': {self.name} takes one number of steps")
        return int(asked)

    def check(self, labels: Tensor | None, sampling: SamplingConfig) -> None:
        """Refuse what the pipeline's own walk cannot do."""
        beyond = [k for k in (labels.tolist() if labels is not None else ()) if not 0 <= k < len(self.prompts)]
        if beyond:
            raise UserError(f"class {beyond[0]} is outside 0..{len(self.prompts) - 1}, the classes with a prompt")
        for field in ("guided_channels", "guidance_interval"):
            if getattr(sampling, field) is not None:
                raise UserError(f"{field}: {self.name} is a text-to-image pipeline, which guides in its own way")
        if isinstance(sampling.guidance_scale, tuple):
            raise UserError(f"guidance_scale: {self.name} takes one scale for all images of a call, not a range")
        self._steps(sampling)

    def calls(self, sampling: SamplingConfig) -> tuple[int, int]:
        steps = self._steps(sampling)
        calls = 2 * steps - 1 if sampling.sampler == "heun" else steps
        return calls, calls if isinstance(sampling.guidance_scale, float) and sampling.guidance_scale > 1 else 0

    def multiply_adds(self, sampling: SamplingConfig) -> int:
        """Counted in a walk of one step and one of two: their difference is a step."""
        plain = sampling.model_copy(update={"sampler": "ddim", "eta": 0.0})

        def counted(steps: int) -> int:
            rngs = [stream(0, "count")]
            return counting.multiply_adds(lambda: self._run([self.prompts[0]], rngs, steps, plain, "cpu"))

        one, two = counted(1), counted(2)
        return one + (two - one) * (self.calls(sampling)[0] - 1)


def load_generator(
    reference: str, prompts: Sequence[str] | None = None, allow_code: bool = False
) -> DiffusionGenerator:
    """Load what draws images.

    Args:
        reference: a diffusers folder or Hub id (a U-Net, a ``DiTPipeline``, a text-to-image pipeline), a run folder of
            ours with a diffusion model, or ``python:module:factory``.
        prompts: of a text-to-image pipeline, one per class.

    Raises:
        UserError: nothing there, a corrupt file, prompts for a generator that reads none, or none for one that does.
    """
    kind = _pipeline_kind(reference)
    if kind == "DiTPipeline":
        return _dit(reference)
    if kind is None or kind in ("DDPMPipeline", "DDIMPipeline"):
        if prompts:
            raise UserError(f"{reference} is no text-to-image pipeline: it reads no prompt")
        return DiffusionGenerator(load_teacher(reference, allow_code))
    if not prompts:
        raise UserError(f"{reference} is a {kind}: give prompt (e.g. 'a photo of a {{}}') and class_names")
    return TextGenerator(_loaded(reference, "AutoPipelineForText2Image"), reference, _licence(reference), prompts)


def _pipeline_kind(reference: str) -> str | None:
    """The class that ``model_index.json`` names; None where there is no such file."""
    index = located(reference) / "model_index.json"
    if index.exists():
        return read_json(index).get("_class_name")
    if located(reference).exists() or not assets.looks_like_hub_id(reference) or assets.find(reference):
        return None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return read_json(Path(hf_hub_download(reference, "model_index.json"))).get("_class_name")
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError):
        return None  # load_teacher says what is wrong


def _loaded(reference: str, kind: str) -> Any:
    _torchvision_compat.install()
    import diffusers

    try:
        return getattr(diffusers, kind).from_pretrained(located(reference), use_safetensors=True, safety_checker=None)
    except ImportError as error:
        raise UserError(f"{reference}: {str(error).strip().splitlines()[0]}; pip install transformers") from None
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{reference}: the pipeline cannot be loaded ({why[:160]})") from None


def _dit(reference: str) -> LatentGenerator:
    pipeline = _loaded(reference, "DiTPipeline")
    config = pipeline.transformer.config
    network = DiffusionTeacher(
        pipeline.transformer,
        name=Path(reference).name,
        image_size=config.sample_size,
        in_channels=config.in_channels,
        schedule=schedule_from_diffusers(dict(pipeline.scheduler.config)),
        num_classes=config.num_embeds_ada_norm,
        licence=_licence(reference),
        call_options={"return_dict": False},
    )
    return LatentGenerator(network, FrozenModule(pipeline.vae, f"{reference}/vae"))


def _licence(reference: str) -> str:
    known = assets.find(reference)
    return known.licence if known else "see its model card"
