"""Where classifiers come from: run folders of ours, weight files, timm, torchvision.

Each function says what is known before a network is built or fetched, so that what cannot fit is refused at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from diffrep import _torchvision_compat
from diffrep.errors import UserError, nearest
from diffrep.files import located, read_json
from diffrep.models import convert, stored, students


@dataclass(frozen=True)
class Source:
    """One classifier, not yet built. trained, untrained: build it for a number of classes; None: nobody said."""

    name: str
    num_classes: int | None
    trained: Callable[[int], nn.Module]
    untrained: Callable[[int], nn.Module]
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    image_size: int | None = None
    in_chans: int = 3
    licence: str = "unknown"
    labels_seen: dict[str, int] = field(default_factory=dict)


def built(architecture: str, options: dict[str, Any], num_classes: int) -> nn.Module:
    """An untrained network: a name of timm's registry, which knows ours too, or ``torchvision:NAME``."""
    library, _, name = architecture.rpartition(":")
    if library != "torchvision":
        return students.create(architecture, num_classes, "teacher", **options)
    try:
        return _torchvision_models(name).get_model(name, weights=None, num_classes=num_classes, **options)
    except (TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"teacher '{architecture}' does not take options {options}: {_first_line(error)}") from None


# Files


def find(reference: str) -> Path:
    """A run folder or a weights file; the weights of a run stand for their folder."""
    path = located(reference)
    if not path.exists():
        forms = "a run folder, a weights file, timm:NAME, torchvision:NAME or python:MODULE:FACTORY"
        raise UserError(f"teacher '{reference}' does not exist here; a classifier is {forms}")
    is_of_run = path.name == "weights.safetensors" and (path.parent / "config.json").exists()
    return path.parent if is_of_run else path


def of_run(folder: Path) -> Source:
    """The student that a finished run of ours kept."""
    if not (folder / "config.json").exists():
        raise UserError(f"{folder} holds no classifier (no config.json): is the run finished, and one of a student?")
    if not (folder / "result.json").exists():
        raise UserError(f"{folder} is a run that has not finished (no result.json): run its command again first")
    result, student = read_json(folder / "result.json"), stored.fresh_student(folder)
    if not isinstance(result, dict):
        raise UserError(f"{folder / 'result.json'} was not written by diffrep")
    num_classes, look = getattr(student.backbone, "num_classes", 0), student.config
    if not num_classes:
        raise UserError(f"{folder} holds a student without a classifier: fine-tune it with labels first")
    return Source(
        folder.name,
        num_classes,
        lambda _: stored.load_student(folder / "weights.safetensors").backbone,
        partial(built, look.name, look.options),
        mean=look.mean,
        std=look.std,
        image_size=stored.shown_size(folder),
        in_chans=look.options.get("in_chans", 3),
        licence=result.get("licence", "unknown"),
        labels_seen=result.get("labels_seen", {}) | result.get("labels_behind", {}),
    )


def of_file(path: Path, architecture: str | None, options: dict[str, Any]) -> Source:
    """Weights that others wrote; ``architecture`` None: as their names tell."""
    state = convert.unwrap(stored.read_checkpoint(path), str(path))
    if architecture is None:
        architecture, options = _recognised(path, state, options)
    return Source(
        path.name,
        _num_classes(path, state, architecture, options),
        partial(_with_state, path, state, architecture, options),
        partial(built, architecture, options),
        in_chans=options.get("in_chans", 3),
    )


def _recognised(path: Path, state: dict[str, Tensor], options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    known = convert.recognise(state)
    if known is None:
        raise UserError(f"{path}: no network known here has its keys ({convert.some(state)}): set architecture")
    if known.doubt and not options:
        raise UserError(f"{path}: {known.doubt}")
    return known.architecture, known.options | options


def _num_classes(path: Path, state: dict[str, Tensor], architecture: str, options: dict[str, Any]) -> int:
    """As many as the classifier's weight has rows."""
    empty = built(architecture, options, 1)
    name = f"{_classifier_name(empty)}.weight"
    weight = state.get(name, convert.rename(state).get(name))
    if weight is None or not weight.dim():
        convert.fitted(state, empty.state_dict(), f"{path} does not fit {architecture}")
        raise UserError(f"{path}: {architecture} has no classifier whose rows could be counted")
    return len(weight)


def _classifier_name(network: nn.Module) -> str:
    """Of the layer that gives logits: timm says it, torchvision's is the last linear one."""
    if hasattr(network, "get_classifier"):
        last = network.get_classifier()
    else:
        last = next((m for m in reversed(list(network.modules())) if isinstance(m, nn.Linear)), None)
    return next((name for name, module in network.named_modules() if module is last), "")


def _with_state(
    path: Path, state: dict[str, Tensor], architecture: str, options: dict[str, Any], num_classes: int
) -> nn.Module:
    network = built(architecture, options, num_classes)
    network.load_state_dict(convert.fitted(state, network.state_dict(), f"{path} does not fit {architecture}"))
    return network


# Libraries


def of_timm(name: str, options: dict[str, Any]) -> Source:
    """timm's pretrained weights, from the Hub; a name without any is good for an untrained control alone."""
    students.check_name(name, "teacher")
    import timm

    card = timm.get_pretrained_cfg(name) if timm.is_model_pretrained(name) else None
    about = {"mean": card.mean, "std": card.std, "image_size": card.input_size[-1]} if card else {}
    return Source(
        f"timm:{name}",
        card.num_classes if card else None,
        partial(_fetched_from_timm, name, options),
        partial(built, name, options),
        in_chans=options.get("in_chans", 3),
        licence=(card and card.license) or "unknown",
        **about,
    )


def _fetched_from_timm(name: str, options: dict[str, Any], num_classes: int) -> nn.Module:
    import timm
    from huggingface_hub.errors import HfHubHTTPError

    if not timm.is_model_pretrained(name):
        architecture = name.partition(".")[0]
        near = nearest(name, timm.list_pretrained(f"{architecture}*"))
        raise UserError(f"timm has no weights called '{name}' ({near}); give a file and architecture={architecture}")
    try:
        return timm.create_model(name, pretrained=True, **options)
    except (OSError, HfHubHTTPError) as error:
        raise _unreachable(f"timm:{name}", error) from None
    except (TypeError, ValueError, RuntimeError, AssertionError, LookupError) as error:
        raise UserError(f"teacher 'timm:{name}' does not take options {options}: {_first_line(error)}") from None


def of_torchvision(name: str) -> Source:
    """torchvision's default weights for ImageNet."""
    weights = _torchvision_models(name).get_model_weights(name).DEFAULT
    view = weights.transforms()
    return Source(
        f"torchvision:{name}",
        len(weights.meta["categories"]),
        partial(_fetched_from_torchvision, name, weights),
        partial(built, f"torchvision:{name}", {}),
        mean=tuple(view.mean),
        std=tuple(view.std),
        image_size=view.crop_size[0],
    )


def _torchvision_models(name: str) -> Any:
    """torchvision's page of models, with ``name`` among them."""
    _torchvision_compat.install()
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        raise UserError(f"teacher 'torchvision:{name}': no such classifier; {nearest(name, known)}")
    return models


def _fetched_from_torchvision(name: str, weights: Any, num_classes: int) -> nn.Module:
    try:
        return _torchvision_models(name).get_model(name, weights=weights, progress=False)
    except (OSError, RuntimeError) as error:  # RuntimeError: what came has another hash
        raise _unreachable(f"torchvision:{name}", error) from None


def _unreachable(reference: str, error: Exception) -> UserError:
    instead = "without a network give a weights file and its architecture"
    return UserError(f"cannot fetch {reference} ({type(error).__name__}: {_first_line(error)}); {instead}")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
