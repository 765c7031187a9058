"""Generators besides plain ones: DiT with its VAE, and text-to-image pipelines with a prompt per class.

A text-to-image pipeline walks by itself, with the scheduler we choose; all others are walked by
:mod:`diffrep.diffusion.sampling`.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffrep import _torchvision_compat, assets, counting
from diffrep.diffusion.sampling import LIBRARY, whole_steps
from diffrep.errors import UserError
from diffrep.files import located, read_json
from diffrep.frozen.base import FrozenModule
from diffrep.frozen.dit import DiTTeacher
from diffrep.frozen.files import library_network, quietly
from diffrep.frozen.generator import DiffusionGenerator, Judge, SamplingConfig
from diffrep.frozen.references import split_reference
from diffrep.frozen.teachers import load_teacher
from diffrep.randomness import stream

# diffusers' own walks; DDPM and DDIM would clip latents, which have no range, unless told not to.
_SCHEDULERS = {"ddpm": "DDPMScheduler", "ddim": "DDIMScheduler"} | {name: kind for name, (kind, _) in LIBRARY.items()}


class LatentGenerator(DiffusionGenerator):
    """A class-conditional network over a VAE's latents (DiT); the walk is not clipped, latents have no range."""

    clips = False

    def __init__(self, network: DiTTeacher) -> None:
        super().__init__(network)
        if network.vae is None:
            raise UserError(f"{network.name} draws latents: name its VAE, {network.name}?vae=FOLDER")
        self.vae = network.vae
        self.noise_shape = (network.in_channels, network.latent_size, network.latent_size)

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
        self._schedule = dict(pipeline.scheduler.config)  # kept: each sampler is made from it, not from the last one
        if "beta_schedule" not in self._schedule:
            raise UserError(f"{name}: its {type(pipeline.scheduler).__name__} is no noise schedule of betas")
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
        self.pipeline.to(device)
        return self._run(prompts, rngs, self._steps(sampling), sampling)

    def _run(self, prompts: list[str], rngs: list[torch.Generator], steps: int, sampling: SamplingConfig) -> Tensor:
        import diffusers

        kind = getattr(diffusers, _SCHEDULERS[sampling.sampler])
        options = {"clip_sample": False} if sampling.sampler in ("ddpm", "ddim") else {}
        self.pipeline.scheduler = kind.from_config(self._schedule, **options)
        eta = {"eta": sampling.eta} if sampling.eta else {}
        made = self.pipeline(
            prompt=prompts, num_inference_steps=steps, guidance_scale=sampling.guidance_scale, generator=rngs,
            output_type="pt", **eta,
        )  # fmt: skip
        return made.images.float().clamp(0, 1)

    def _steps(self, sampling: SamplingConfig) -> int:
        return whole_steps(sampling.sampler, sampling.num_sampling_steps, self._schedule["num_train_timesteps"])

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
        if sampling.guidance_scale < 1:
            raise UserError(f"guidance_scale {sampling.guidance_scale}: {self.name} guides above 1 only; 1 is off")
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
            return counting.multiply_adds(lambda: self._run([self.prompts[0]], rngs, steps, plain))

        one, two = counted(1), counted(2)
        return one + (two - one) * (self.calls(sampling)[0] - 1)


def load_generator(
    reference: str, prompts: Sequence[str] | None = None, allow_code: bool = False
) -> DiffusionGenerator:
    """Load what draws images.

    Args:
        reference: what :func:`diffrep.frozen.teachers.load_teacher` takes, or a text-to-image pipeline of diffusers.
        prompts: of a text-to-image pipeline, one per class.

    Raises:
        UserError: nothing there, a corrupt file, prompts for a generator that reads none, or none for one that does.
    """
    kind = _pipeline_kind(split_reference(reference)[0])
    if kind is None or kind in ("DDPMPipeline", "DDIMPipeline", "DiTPipeline"):
        if prompts:
            raise UserError(f"{reference} is no text-to-image pipeline: it reads no prompt")
        network = load_teacher(reference, allow_code)
        if isinstance(network, DiTTeacher) and (network.vae or network.in_channels not in (1, 3)):
            return LatentGenerator(network)
        return DiffusionGenerator(network)
    if not prompts:
        raise UserError(f"{reference} is a {kind}: give prompt (e.g. 'a photo of a {{}}') and class_names")
    return TextGenerator(_loaded(reference, "AutoPipelineForText2Image"), reference, _licence(reference), prompts)


def _pipeline_kind(reference: str) -> str | None:
    """The class that ``model_index.json`` names; None where there is no such file."""
    index = located(reference) / "model_index.json"
    if index.exists():
        return _named(index)
    if located(reference).exists() or not assets.looks_like_hub_id(reference) or assets.find(reference):
        return None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return _named(Path(hf_hub_download(reference, "model_index.json")))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError):
        return None  # load_teacher says what is wrong


def _named(index: Path) -> str:
    card = read_json(index)
    if not isinstance(card, dict) or "_class_name" not in card:
        raise UserError(f"{index} names no pipeline (_class_name)")
    return str(card["_class_name"])


def _loaded(reference: str, kind: str) -> Any:
    """A diffusers pipeline in float32, every tensor of its networks read from its files."""
    _torchvision_compat.install()
    import diffusers
    from safetensors import SafetensorError

    folder = located(reference)
    try:
        with quietly():
            if not folder.is_dir():
                folder = Path(diffusers.DiffusionPipeline.download(reference, use_safetensors=True))
            return getattr(diffusers, kind).from_pretrained(folder, use_safetensors=True, **_networks(folder))
    except ImportError as error:
        raise UserError(
            f"{reference}: {str(error).strip().splitlines()[0]}; install it with: pip install 'diffrep[text]'"
        ) from None
    except (OSError, ValueError, RuntimeError, TypeError, SafetensorError) as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{reference}: the pipeline cannot be loaded ({why[:160]})") from None


def _networks(folder: Path) -> dict[str, Any]:
    """{part: network}, loaded one by one: only so is it told which tensors a file lacks.

    The part that looks for unsafe images is left out: it would paint them black.
    """
    found: dict[str, Any] = {}
    for part, kind in read_json(folder / "model_index.json").items():
        if part == "safety_checker":
            found[part] = None
        elif isinstance(kind, list) and kind[0] in ("diffusers", "transformers"):
            library = importlib.import_module(kind[0])
            library.utils.logging.disable_progress_bar()
            made = getattr(library, kind[1])
            if isinstance(made, type) and issubclass(made, torch.nn.Module):
                found[part] = library_network(made, folder / part, str(folder / part))
    return found


def _licence(reference: str) -> str:
    known = assets.find(reference)
    return known.licence if known else "see its model card"
