"""The door that every diffusion model comes in by: a reference in, a frozen teacher out.

What a reference may be is in :func:`load_teacher`; each family's own page builds it.
"""

from __future__ import annotations

from torch import nn

from diffrep import assets
from diffrep.diffusion.schedules import schedule_from_diffusers
from diffrep.errors import UserError
from diffrep.files import located
from diffrep.frozen import dit, edm, official, text_unet
from diffrep.frozen.clean import is_extractor, load_extractor
from diffrep.frozen.diffusion import DiffusionTeacher
from diffrep.frozen.files import Opened, foreign_factory, load_unet, opened, part_of, preset_unet
from diffrep.frozen.mixed import is_mix, load_mix
from diffrep.frozen.references import SourceOptions, split_reference
from diffrep.frozen.supervised import is_encoder, load_encoder, load_supervised
from diffrep.models import dit_files, guided_files
from diffrep.randomness import seeded
from diffrep.wordnet import label_of


def load_teacher(reference: str, allow_code: bool = False) -> DiffusionTeacher:
    """Load a frozen diffusion model.

    Args:
        reference: a diffusers folder or Hub id (a U-Net, a DiT, a text-to-image model), an official file of
            guided-diffusion or DiT, a run folder of ours, ``python:module:factory`` (a callable that returns any
            network of (x, timestep), an EDM-style network of (x, sigma), or a DiffusionTeacher), ``random:REFERENCE``
            for the same architecture with untrained weights, or ``classifier:REFERENCE`` for a supervised teacher in
            a diffusion model's place; so stands a run folder of ours that kept a student. Behind a ``?`` stands what
            the place cannot tell: see :mod:`diffrep.frozen.references`.
        allow_code: ``python:`` runs foreign code and is refused without it.

    Raises:
        UserError: nothing there, a corrupt or truncated file, a pickle that wants to run code, another architecture.
    """
    kind, _, rest = reference.partition(":")
    if kind == "random":
        return _from_preset(rest) or _fresh_encoder(rest) or untrained(load_teacher(rest, allow_code))
    if kind == "python":
        return _from_factory(rest, allow_code)
    if kind == "classifier":
        return load_supervised(rest, allow_code)
    place, options = split_reference(reference)
    if is_mix(place):
        return load_mix(place, options, lambda mixed: load_teacher(mixed, allow_code))
    if is_extractor(place):
        return load_extractor(place, options, lambda original: load_teacher(original, allow_code))
    if is_encoder(place):
        return load_encoder(place, options)
    found = opened(place)
    teacher = official.load(found, options) if found.path.is_file() else _from_folder(found, options)
    if options.label is not None:
        if teacher.num_classes is None:
            raise UserError(f"{place} knows no classes: leave out label={options.label}")
        teacher.given_class = label_of(options.label, teacher.num_classes)
    return teacher


def _from_folder(found: Opened, options: SourceOptions) -> DiffusionTeacher:
    _, kind = part_of(found.path, "unet", "transformer")
    if kind == "DiTTransformer2DModel":
        return dit.load_folder(found, options)
    if kind == "UNet2DConditionModel":
        return text_unet.load_folder(found, options)
    return _unet(found, options)


def _unet(found: Opened, options: SourceOptions) -> DiffusionTeacher:
    options.only(("label",), f"{found.path}, a diffusers U-Net,")
    if "attention_order" in found.card:  # `diffrep convert` wrote it
        return official.load_converted(found)
    unet = load_unet(found)
    config, scheduler, null = unet.config, found.scheduler, found.card.get("null_class", True)
    classes = config.get("num_class_embeds")
    if not isinstance(config["sample_size"], int):
        raise UserError(f"{found.path}: config.json has sample_size {config['sample_size']}, not one number of pixels")
    return DiffusionTeacher(
        unet,
        name=found.name,
        image_size=config["sample_size"],
        in_channels=config["in_channels"],
        schedule=schedule_from_diffusers(scheduler),
        num_classes=classes - null if classes else None,
        prediction=scheduler.get("prediction_type", "epsilon"),
        licence=found.licence,
        call_options={"return_dict": False},
        labels_seen=found.card.get("labels_seen"),
        null_class=null,
    )


def _from_preset(reference: str) -> DiffusionTeacher | None:
    """A published architecture, untrained, without its file; None where the file is here or the name unknown."""
    known = assets.find(reference)
    if located(reference).exists() or known is None or assets.local(known):
        return None
    with seeded(0, "untrained teacher"):
        teacher, built = official.preset(reference), preset_unet(reference)
    if built is None:
        return untrained(teacher) if teacher else None
    unet, licence = built
    size, channels = unet.config["sample_size"], unet.config["in_channels"]
    return DiffusionTeacher(
        unet, f"untrained {reference}", size, channels, licence=licence, call_options={"return_dict": False}
    )


def _fresh_encoder(reference: str) -> DiffusionTeacher | None:
    place, options = split_reference(reference)
    return load_encoder(place, options, is_trained=False) if is_encoder(place) else None


def has_preset(known: assets.Asset) -> bool:
    """Whether ``random:KEY`` builds its architecture without its file."""
    return bool(known.unet) or known.key in guided_files.PRESETS or known.key in dit_files.PRESETS


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
    if isinstance(teacher, dit.DiTTeacher):
        teacher.massive.clear()
    teacher.name = f"untrained {teacher.name}"
    return teacher


def _from_factory(path: str, allow_code: bool) -> DiffusionTeacher:
    factory = foreign_factory(path, allow_code)
    try:
        made = factory()
    except Exception as error:  # whatever foreign code raises is the foreign code's
        raise UserError(f"python:{path} raised {type(error).__name__}: {error}") from error
    if isinstance(made, DiffusionTeacher):
        return _tried(made)
    if not isinstance(made, nn.Module):
        raise UserError(f"python:{path} returned a {type(made).__name__}, not a torch module or a DiffusionTeacher")
    size = getattr(made, "image_size", None) or getattr(made, "img_resolution", None)
    if not isinstance(size, int):
        raise UserError(
            f"python:{path}: give the module an attribute image_size (pixels), or return a DiffusionTeacher"
        )
    if edm.is_preconditioned(made):
        return _tried(edm.edm_teacher(made, size, name=f"python:{path}"))
    return _tried(DiffusionTeacher(made, f"python:{path}", size, getattr(made, "in_channels", 3)))


def _tried(teacher: DiffusionTeacher) -> DiffusionTeacher:
    """Foreign code, after one pass on shapes alone, which is how taps are listed and costs counted."""
    try:
        teacher.taps()
    except Exception as error:  # as above
        why = " ".join(str(error).split())[:160]
        how = "it must take (x, timestep) and may not look at values (.item(), if on a tensor)"
        raise UserError(
            f"{teacher.name}: a pass on shapes alone failed ({type(error).__name__}: {why}); {how}"
        ) from None
    return teacher
