"""What a classifier says to every augmented view of every image: asked at each step, or stored once and replayed.

Both answer alike; the store is the soft-label store of FKD (Shen and Xing 2022). From float32 a replay equals asking,
bit for bit where the store's blocks are as large as the batches; from float16 it is rounded; ``top_k`` keeps the
largest logits and spreads the rest of the probability evenly over the other classes.

Letters: B images of a batch, V views, N images of the set, K classes, k kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from diffrep.config import Config
from diffrep.console import Report
from diffrep.data.batch import Batch
from diffrep.errors import UserError
from diffrep.files import read_json
from diffrep.frozen import stores
from diffrep.frozen.classifier import ClassifierConfig, ClassifierTeacher, load_classifier


class AnswerConfig(Config):
    """How a classifier's logits are kept."""

    dtype: Literal["float16", "float32"] = "float16"
    top_k: Annotated[int, Field(ge=1)] | None = None  # None: all classes
    block_size: int = Field(64, ge=1)  # images per pass; part of the result, because rounding depends on it


def store_settings(
    teacher: ClassifierTeacher, config: AnswerConfig, num_images: int, num_views: int, source: dict[str, Any]
) -> dict[str, Any]:
    """What decides a store's content.

    Raises:
        UserError: ``top_k`` larger than the number of classes.
    """
    if config.top_k and config.top_k > teacher.num_classes:
        raise UserError(f"answers.top_k = {config.top_k}: {teacher.name} has {teacher.num_classes} classes")
    return {
        "teacher": teacher.name,
        "teacher_sha256": teacher.sha256,
        "teacher_labels_seen": teacher.labels_seen,
        "licence": teacher.licence,
        "num_classes": teacher.num_classes,
        "source": source,
        "num_images": num_images,
        "num_views": num_views,
        **config.model_dump(mode="json"),
    }


def write_answers(
    folder: Path,
    teacher: ClassifierTeacher,
    settings: dict[str, Any],
    images: Callable[[int, Tensor], Tensor],
    progress: Report = lambda *_: None,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Fill ``folder`` with the answers to every view of every image; returns the manifest (see stores.fill).

    Args:
        settings: of :func:`store_settings`.
        images: (view, index (B,) int64) -> (B, 3, H, W) float32 in [0, 1].
    """

    def make(place: stores.Place) -> dict[str, np.ndarray]:
        view, rows = place
        shown = images(view, torch.arange(rows.start, rows.stop))
        return _kept(teacher.logits(shown).cpu(), settings["top_k"], settings["dtype"])

    size, total = settings["block_size"], settings["num_images"]
    rows = [slice(first, min(first + size, total)) for first in range(0, total, size)]
    places = [(view, r) for view in range(settings["num_views"]) for r in rows]
    return stores.fill(folder, settings, arrays(settings), places, make, progress, stop)


def arrays(settings: dict[str, Any]) -> stores.Arrays:
    """The store's arrays: axes (view, image, class)."""
    lead, k, dtype = (settings["num_views"], settings["num_images"]), settings["top_k"], settings["dtype"]
    if k is None:
        return {"logits": (dtype, (*lead, settings["num_classes"]))}
    return {"logits": (dtype, (*lead, k)), "classes": ("int32", (*lead, k)), "rest": ("float32", lead)}


def _kept(logits: Tensor, top_k: int | None, dtype: str) -> dict[str, np.ndarray]:
    if top_k is None:
        return {"logits": logits.numpy().astype(dtype)}
    top, classes = logits.topk(top_k, 1)
    others = logits.scatter(1, classes, -torch.inf).logsumexp(1)
    rest = torch.where(others.isinf(), 0.0, others)  # nothing is left over where all classes are kept
    return {"logits": top.numpy().astype(dtype), "classes": classes.int().numpy(), "rest": rest.numpy()}


class LiveAnswers:
    """The classifier itself, asked for each batch."""

    def __init__(self, config: ClassifierConfig, allow_code: bool) -> None:
        self.network = load_classifier(config, allow_code=allow_code)
        self.name, self.licence, self.num_classes = self.network.name, self.network.licence, self.network.num_classes
        self.labels_seen = self.network.labels_seen

    def check_data(self, fingerprint: str, augment: str) -> None:
        """Any images will do."""

    def logits(self, batch: Batch) -> Tensor:
        """(B, K) float32 without gradient."""
        return self.network.logits(batch.images)

    def multiply_adds(self, image_size: int) -> int:
        """Per image and step."""
        return self.network.multiply_adds(image_size)


class StoredAnswers:
    """A store in the classifier's place, which is not even loaded."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not (self.folder / stores.MANIFEST).exists():
            raise UserError(f"method.answers: {folder} is no finished store of answers (no {stores.MANIFEST})")
        self.settings = read_json(self.folder / stores.MANIFEST)
        if "num_classes" not in self.settings:
            raise UserError(f"method.answers: {folder} is no store of a classifier's answers")
        self.name, self.licence = self.settings["teacher"], self.settings["licence"]
        self.num_classes: int = self.settings["num_classes"]
        self.labels_seen: dict[str, int] = self.settings["teacher_labels_seen"]
        self._held: dict[torch.device, dict[str, Tensor]] = {}

    def check_data(self, fingerprint: str, augment: str) -> None:
        """Refuse other images, or other views of them, than the store was written from."""
        stores.check_source(self.folder, self.settings["source"], fingerprint, augment)

    def logits(self, batch: Batch) -> Tensor:
        """(B, K) float32 without gradient."""
        view = torch.zeros_like(batch.index) if batch.view is None else batch.view
        found = {name: self._take(name, view, batch.index, batch.images.device) for name in arrays(self.settings)}
        if self.settings["top_k"] is None:
            return found["logits"].float()
        others = max(self.num_classes - self.settings["top_k"], 1)
        base = (found["rest"] - math.log(others))[:, None].expand(-1, self.num_classes)
        return base.scatter(1, found["classes"].long(), found["logits"].float())

    def _take(self, name: str, view: Tensor, index: Tensor, device: torch.device) -> Tensor:
        if (held := self._resident(device)) is not None:
            return held[name][view, index]
        array = stores.mapped(self.folder / f"{name}.npy")
        return torch.from_numpy(array[view.cpu().numpy(), index.cpu().numpy()]).to(device)

    def _resident(self, device: torch.device) -> dict[str, Tensor] | None:
        """All arrays on ``device``, if they are small enough."""
        if device not in self._held:
            opened = {name: stores.mapped(self.folder / f"{name}.npy") for name in arrays(self.settings)}
            if sum(array.nbytes for array in opened.values()) > stores.RESIDENT_BYTES:
                return None
            self._held[device] = {name: torch.from_numpy(np.array(a)).to(device) for name, a in opened.items()}
        return self._held[device]

    def multiply_adds(self, image_size: int) -> int:
        """None: writing the store had its own budget."""
        return 0
