"""What the three dense tasks share: a backbone that starts somewhere, heads on its maps, and how the whole is kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from torch import nn

from diffrep.errors import UserError
from diffrep.files import read_json, write_json
from diffrep.frozen.start import begin
from diffrep.methods.base import Method, MethodConfig
from diffrep.models import depths
from diffrep.models.maps import FuseUpsample, MapBackbone
from diffrep.models.stored import Fit
from diffrep.models.students import StudentConfig
from diffrep.models.weights import read_weights, write_weights

CARD = "config.json"


class DenseConfig(MethodConfig):
    """The backbone of a dense task, and where it starts."""

    kind: Literal["segment", "landmark", "detect"]
    views: Any  # of its task: how a picture is brought before the network
    student: StudentConfig
    maps: tuple[str, ...] = ()  # taps of the backbone that heads read, finest first; () = its stages
    fuse_upsample: FuseUpsample = "nearest"  # of HRNet's branches, where they are fused
    # a finished run, a folder with an ADDP network, or an official checkpoint (prefix student.backbone.)
    init: str | None = None
    init_skip: tuple[str, ...] = ()  # tensors of init that are left there
    # best/ keeps the best by a held-out part of train; "test" (landmarks): by the test set, as published
    select: Literal["last", "held_out", "test"] = "last"

    def label_readers(self) -> tuple[str, ...]:
        return ("student",)


class DenseMethod(Method):
    """A network on pictures with masks, points or objects; subclasses build ``network`` around ``backbone``."""

    task: str
    network: nn.Module
    image_size: int  # side of the square pictures that a step is counted with: those of training
    facts: dict[str, Any]  # what belongs beside the weights: classes, label order
    opinion: Callable[[], float] | None = None  # of the network on held-out pictures, larger is better
    loaded: Fit | None = None

    def hold(self, backbone: MapBackbone) -> None:
        """Remember the backbone, which is a part of ``network``, without being its module a second time: a checkpoint
        would hold it twice."""
        self._held = (backbone,)

    @property
    def backbone(self) -> MapBackbone:
        return self._held[0]

    def start(self, config: DenseConfig) -> None:
        """Bring the backbone to ``init``, whose licence and labels this run inherits."""
        if config.init is None:
            return
        found = begin(self.backbone, config.init, config.init_skip)
        self.loaded, self.notes, self.labels_behind = found.fit, (found.note,), found.labels_behind
        self.licence = found.licence or self.licence

    def held_out_score(self) -> float | None:
        return self.opinion() if self.opinion else None

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """``student``: the backbone; ``head``: everything on top of it."""
        own = {id(p) for p in self.backbone.parameters()}
        parameters = [p for p in self.network.parameters() if p.requires_grad]
        return {
            "student": [p for p in parameters if id(p) in own],
            "head": [p for p in parameters if id(p) not in own],
        }

    def depths(self) -> tuple[list[list[nn.Parameter]], list[nn.Parameter]]:
        layers = depths.layers(self.backbone.net)
        own = {id(p) for layer in layers for p in layer}
        rest = [p for p in self.network.parameters() if id(p) not in own]
        return [*layers, rest] if layers else [], depths.tables(self.backbone.net)

    def export(self, run_dir: Path) -> dict[str, Any]:
        write_weights(run_dir / "weights.safetensors", self.network.state_dict())
        write_json(run_dir / CARD, {"task": self.task, **self.facts})
        return {"loaded": asdict(self.loaded) if self.loaded else None}

    def load(self, run_dir: Path) -> None:
        """The weights of a finished run of the same recipe.

        Raises:
            UserError: no such run, or weights that do not fit.
        """
        card = read_json(run_dir / CARD)
        if card.get("task") != self.task:
            raise UserError(f"{run_dir} holds no network of the task '{self.task}'")
        try:
            self.network.load_state_dict(read_weights(run_dir / "weights.safetensors"))
        except RuntimeError as error:
            raise UserError(
                f"{run_dir}: weights do not fit its recipe: {str(error).splitlines()[-1].strip()}"
            ) from None
