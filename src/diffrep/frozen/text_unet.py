"""A text-to-image U-Net (Stable Diffusion) read for features: image -> latents -> taps, under one prompt.

The prompt is the same for every image, so its embedding is computed once and the text encoder let go; "" is what such
networks are trained on where a text is left out. Letters: B images, N tokens of the prompt, D their width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffrep import _torchvision_compat, counting
from diffrep.diffusion.schedules import NoiseSchedule, schedule_from_diffusers
from diffrep.errors import UserError
from diffrep.files import read_json
from diffrep.frozen.base import FrozenModule
from diffrep.frozen.diffusion import DiffusionTeacher
from diffrep.frozen.dit import load_vae
from diffrep.frozen.files import Opened, library_network, part_of, quietly
from diffrep.frozen.latents import LatentEncoder
from diffrep.frozen.references import SourceOptions

ENCODER = "CLIPTextModel"  # of Stable Diffusion 1 and 2


class TextUNetTeacher(DiffusionTeacher):
    """A diffusers ``UNet2DConditionModel`` as a family of encoders of images in [0, 1], one per timestep.

    vae:       of the latents it was trained on.
    embedding: (N, D) of the prompt, which is told with every image.
    """

    def __init__(
        self,
        unet: nn.Module,
        name: str,
        vae: FrozenModule,
        embedding: Tensor,
        schedule: NoiseSchedule | None = None,
        prediction: str = "epsilon",
        licence: str = "unknown",
    ) -> None:
        config: Any = unet.config
        self.encoder = LatentEncoder(vae, config.sample_size)
        super().__init__(
            unet,
            name,
            image_size=self.encoder.pixels,
            in_channels=config.in_channels,
            schedule=schedule,
            prediction=prediction,
            licence=licence,
            call_options={"return_dict": False},
        )
        self.latent_size, self.embedding = config.sample_size, embedding
        if self.encoder.channels != config.in_channels:
            found = f"{name} reads {config.in_channels} channels, its VAE makes {self.encoder.channels}"
            raise UserError(f"{found}: networks that also read a mask or an image are no teachers")

    @property
    def vae(self) -> FrozenModule:
        return self.encoder.vae

    @cached_property
    def sha256(self) -> str:
        """Of the U-Net, its VAE and the prompt's embedding."""
        prompt = hashlib.sha256(self.embedding.cpu().contiguous().numpy().tobytes()).hexdigest()
        return hashlib.sha256(f"{super().sha256}{self.vae.sha256}{prompt}".encode()).hexdigest()

    def normalise(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> latents (B, C, H / 8, W / 8), scaled."""
        self.check_size(images.shape[-2], images.shape[-1])
        return self.encoder.latents(images, self.passes.memory_mb)

    @property
    def encoder_multiply_adds(self) -> int:
        """Counted multiply-adds of the VAE for one image."""
        return self.encoder.multiply_adds

    def multiply_adds(self, tap: str | None = None) -> int:
        """Counted multiply-adds for one image: up to ``tap``, the VAE with it; or of the U-Net's full pass alone."""
        return super().multiply_adds(tap) + (self.encoder_multiply_adds if tap else 0)

    def peak_bytes(self, taps: Sequence[str]) -> int:
        """Most bytes that one image holds at once, in the VAE or in the network."""
        return max(super().peak_bytes(taps), self.encoder.peak_bytes)

    def _keywords(self, labels: Tensor | None, like: Tensor) -> dict[str, Any]:
        if self.embedding.device != like.device:
            self.embedding = self.embedding.to(like.device)
        told = self.embedding.expand(len(like), -1, -1)  # (B, N, D)
        return {**super()._keywords(labels, like), "encoder_hidden_states": told}

    def _dry_pass(self) -> Callable[[], Any]:
        x = torch.zeros(1, self.in_channels, self.latent_size, self.latent_size)
        steps = torch.zeros(1, dtype=torch.int64)
        return counting.on_meta(self.module, x, steps, **self._keywords(None, x))


# From files


def load_folder(found: Opened, options: SourceOptions) -> TextUNetTeacher:
    """The teacher in a folder with unet/, vae/, text_encoder/, tokenizer/, scheduler/.

    ``options.prompt`` is told with every image, "" where it is not said.

    Raises:
        UserError: a part is not there, damaged or of another kind; a prompt too long; transformers not installed.
    """
    options.only(("prompt",), f"{found.path}, a text-to-image U-Net,")
    inner, kind = part_of(found.path, "unet")
    if kind != "UNet2DConditionModel":
        raise UserError(f"{found.path} holds a {kind}; valid: UNet2DConditionModel")
    _refuse_more_conditions(found.path, read_json(inner / "config.json"))
    _torchvision_compat.install()
    from diffusers import UNet2DConditionModel

    embedding = prompt_embedding(found.path, options.prompt or "")
    vae, scheduler = load_vae(str(found.path / "vae")), found.scheduler
    return TextUNetTeacher(
        library_network(UNet2DConditionModel, inner, str(found.path)),
        found.name,
        vae,
        embedding,
        schedule_from_diffusers(scheduler),
        scheduler.get("prediction_type", "epsilon"),
        found.licence,
    )


def _refuse_more_conditions(folder: Path, config: dict[str, Any]) -> None:
    """What a prompt's embedding alone does not feed (Stable Diffusion XL; upscalers, which read a noise level too)."""
    more = [
        n for n in ("addition_embed_type", "class_embed_type", "num_class_embeds", "encoder_hid_dim") if config.get(n)
    ]
    if more:
        raise UserError(f"{folder}: its U-Net reads more than a prompt ({more[0]}), which is not supported")
    if not isinstance(config.get("sample_size"), int):
        raise UserError(f"{folder}: unet/config.json has sample_size {config.get('sample_size')}, not one number")


def prompt_embedding(folder: Path, prompt: str) -> Tensor:
    """(1, N, D) float32: what the folder's text encoder makes of ``prompt``, padded as in training.

    Raises:
        UserError: transformers is not installed, a part is not there or another one, a prompt too long.
    """
    try:
        import transformers
    except ImportError:
        raise UserError(f"{folder}: a text encoder needs transformers: pip install 'diffrep[text]'") from None
    kind = next(iter(read_json(folder / "text_encoder" / "config.json").get("architectures") or [None]))
    if kind != ENCODER:
        raise UserError(f"{folder}: its text encoder is a {kind}; valid: {ENCODER}")
    tokens = _tokens(transformers, folder, prompt)
    transformers.utils.logging.disable_progress_bar()
    encoder = library_network(getattr(transformers, ENCODER), folder / "text_encoder", f"{folder}/text_encoder").eval()
    is_masked = getattr(encoder.config, "use_attention_mask", False)  # as diffusers' pipeline asks
    with torch.no_grad():
        return encoder(tokens.input_ids, attention_mask=tokens.attention_mask if is_masked else None)[0]


def _tokens(transformers: Any, folder: Path, prompt: str) -> Any:
    try:
        with quietly():
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError) as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{folder}: its tokenizer cannot be loaded ({why[:160]})") from None
    longest = tokenizer.model_max_length
    with quietly():
        found = tokenizer(prompt, padding="max_length", max_length=longest, return_tensors="pt")
    if found.input_ids.shape[1] > longest:
        count = found.input_ids.shape[1]
        raise UserError(f"prompt '{prompt[:40]}...' has {count} tokens; {folder.name} reads {longest} at most")
    return found
