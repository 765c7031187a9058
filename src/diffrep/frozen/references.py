"""What a teacher's reference says: a place, and behind a ``?`` what cannot be seen there.

``64x64_diffusion.pt``                                 a file known by its name
``mine.pt?like=adm-64``                                a file like a published one
``mine.pt?image_size=64&head_width=32&attention_order=new&noise_schedule=cosine``
``DiT-XL-2-256x256.pt?vae=weights/sd-vae-ft-mse``      latents need their VAE
``stable-diffusion?prompt=a photo of a dog``           a text-to-image model
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from diffrep.config import Config, validate
from diffrep.errors import UserError


class SourceOptions(Config):
    """Named behind the ``?``; which of them a place takes depends on what lies there."""

    like: str | None = None  # key of a published file of the same architecture (`diffrep assets`)
    image_size: int | None = Field(None, ge=1)  # pixels
    num_heads: int | None = Field(None, ge=1)  # of attention: heads everywhere,
    head_width: int | None = Field(None, ge=1)  # or channels per head
    attention_order: Literal["legacy", "new"] | None = None  # of q, k and v in a guided-diffusion file
    noise_schedule: Literal["linear", "cosine"] | None = None
    sinusoid: Literal["official", "diffusers"] | None = None  # of a DiT's timesteps
    vae: str | None = None  # folder or Hub id
    prompt: str | None = None
    label: str | None = None  # class that every image is said to be of: a number, or a WordNet id

    def only(self, allowed: tuple[str, ...], what: str) -> SourceOptions:
        """Itself, or a refusal of the first option that ``what`` does not take."""
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        strange = [name for name in given if name not in allowed]
        if strange:
            valid = ", ".join(allowed) or "none"
            raise UserError(f"{what} takes no option '{strange[0]}'; valid behind its '?': {valid}")
        return self


def split_reference(reference: str) -> tuple[str, SourceOptions]:
    """``PLACE?name=value&name=value`` -> place and options.

    Raises:
        UserError: no ``name=value``, an unknown name (with the nearest one), a value of another kind.
    """
    place, mark, query = reference.partition("?")
    pairs = [pair.partition("=") for pair in query.split("&")] if mark else []
    if not all(equals for _, equals, _ in pairs):
        raise UserError(f"{reference}: behind '?' stand name=value, joined by '&'")
    return place, validate(SourceOptions, {name: value for name, _, value in pairs}, f"{place}?")
