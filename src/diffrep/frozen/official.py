"""Official files of guided-diffusion and DiT: one file of tensors, read strictly and without running anything in it.

What such a file cannot tell (image size, heads, order of q, k and v, noise schedule) is known by the published file's
name, or said behind the reference's ``?``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from diffrep import assets
from diffrep.config import validate
from diffrep.diffusion.schedules import NoiseSchedule, schedule_from_diffusers
from diffrep.errors import UserError, nearest
from diffrep.files import read_json
from diffrep.frozen import dit
from diffrep.frozen.diffusion import DiffusionTeacher
from diffrep.frozen.files import Opened, folder_weights, part_of
from diffrep.frozen.references import SourceOptions
from diffrep.models import guided_diffusers
from diffrep.models.convert import unwrap
from diffrep.models.guided_files import PRESETS, GuidedPreset, GuidedUnseen, build, guided_config, looks_like_guided
from diffrep.models.guided_unet import GuidedUNet, GuidedUNetConfig
from diffrep.models.stored import read_checkpoint

UNSEEN = ("like", "image_size", "num_heads", "head_width", "attention_order", "noise_schedule", "label")

# What else people keep in files of tensors, by names that only it has.
OTHERS = {
    "model.diffusion_model.": "a Stable Diffusion checkpoint (give its diffusers folder)",
    "down_blocks.": "a diffusers U-Net without its config (give its folder)",
    "transformer_blocks.": "a diffusers transformer without its config (give its folder)",
    "decoder_blocks.": "a masked autoencoder of MAGE or ADDP (diffrep convert, diffrep generate)",
    "vqgan.": "a file of MAGE or ADDP (diffrep convert, diffrep generate)",
    "quantize.": "a VQGAN",
    "layer1.0.": "a ResNet classifier (diffrep evaluate FILE --classifier)",
    "blocks.0.attn.qkv.": "a vision transformer",
    "model.map_noise.": "an EDM network (python:module:factory)",
    "map_noise.": "an EDM network (python:module:factory)",
}


Guided = tuple[GuidedUNetConfig, dict[str, Tensor], GuidedUnseen]


def load(found: Opened, options: SourceOptions) -> DiffusionTeacher:
    """The teacher in an official file.

    Raises:
        UserError: a damaged file, a pickle that wants to run code, another architecture (which it looks like),
            something that has to be said and was not.
    """
    checkpoint = read_checkpoint(found.path)
    if dit.is_checkpoint(checkpoint):
        return dit.load_file(found, checkpoint, options)
    guided = named_guided(found, checkpoint, options)
    if guided is None:
        state = unwrap(checkpoint, str(found.path))
        raise UserError(f"{found.path} is neither of guided-diffusion nor a DiT; {_looks_like(state)}")
    config, state, unseen = guided
    return _teacher(build(config, state), NoiseSchedule.named(unseen.noise_schedule), found.name, found.licence)


def named_guided(found: Opened, checkpoint: Any, options: SourceOptions) -> Guided | None:
    """Config, weights and what was said besides, of a guided-diffusion file; None for another file."""
    state = unwrap(checkpoint, str(found.path))
    if not looks_like_guided(state):
        return None
    options.only(UNSEEN, f"{found.path}, a guided-diffusion U-Net,")
    unseen = _unseen(found, options)
    return guided_config(state, unseen, str(found.path)), state, unseen


def _looks_like(state: Mapping[str, Any]) -> str:
    known = next((words for mark, words in OTHERS.items() if any(mark in name for name in state)), None)
    return f"by its names it is {known}" if known else f"its first tensor is {next(iter(state))}"


def _teacher(network: GuidedUNet, schedule: NoiseSchedule, name: str, licence: str) -> DiffusionTeacher:
    config = network.config
    return DiffusionTeacher(
        network,
        name,
        config.image_size,
        config.in_channels,
        schedule,
        num_classes=config.num_classes,
        licence=licence,
        null_class=False,
    )


def _unseen(found: Opened, options: SourceOptions) -> GuidedUnseen:
    """By the file's name, by the published file it is like, or as said; what is said wins."""
    preset = _preset(found, options)
    known = preset.unseen.model_dump(exclude_none=True) if preset else {}
    names = {"image_size": "image_size", "attention_order": "attention_order", "noise_schedule": "noise_schedule"}
    names |= {"num_heads": "num_heads", "head_width": "num_head_channels"}
    said = {ours: getattr(options, name) for name, ours in names.items() if getattr(options, name) is not None}
    if said.keys() & {"num_heads", "num_head_channels"}:
        known = {name: value for name, value in known.items() if name not in ("num_heads", "num_head_channels")}
    values = known | said
    missing = [n for n in ("image_size", "attention_order", "noise_schedule") if n not in values]
    missing += [] if values.keys() & {"num_heads", "num_head_channels"} else ["num_heads or head_width"]
    if missing:
        how = f"say {found.name}?like=adm-64, or all: {found.name}?image_size=64&head_width=64&attention_order=new"
        raise UserError(f"{found.path}: {', '.join(missing)} cannot be seen in a file; {how}&noise_schedule=cosine")
    return validate(GuidedUnseen, values, str(found.path))


def _preset(found: Opened, options: SourceOptions) -> GuidedPreset | None:
    if options.like is None:
        known = assets.find(found.name)
        return PRESETS.get(known.key) if known else None
    if options.like not in PRESETS:
        raise UserError(f"like={options.like} is no published guided-diffusion file; {nearest(options.like, PRESETS)}")
    return PRESETS[options.like]


def load_converted(found: Opened) -> DiffusionTeacher:
    """A diffusers folder that `diffrep convert` made of a guided-diffusion file, as that file's own network.

    diffusers' class would insist on a class label for each image.
    """
    inner, _ = part_of(found.path, "unet")
    config, order = read_json(inner / "config.json"), found.card["attention_order"]
    ours, state = guided_diffusers.from_diffusers(config, folder_weights(inner, str(inner)), str(found.path), order)
    return _teacher(build(ours, state), schedule_from_diffusers(found.scheduler), found.name, found.licence)


def preset(reference: str) -> DiffusionTeacher | None:
    """A published architecture as it is initialised; None where no preset has this name."""
    known = assets.find(reference)
    if known is None or known.key not in PRESETS:
        return dit.preset(known.key) if known else None
    found = PRESETS[known.key]
    schedule = NoiseSchedule.named(found.noise_schedule)
    return _teacher(GuidedUNet(found.config), schedule, reference, known.licence)
