"""``diffrep export``: a run's student as others take it, a folder for timm and, if asked for, an ONNX file.

FOLDER/model.safetensors  the backbone's state dict under timm's names
FOLDER/config.json        as timm reads it: timm.create_model("local-dir:FOLDER", pretrained=True)
FOLDER/model.onnx         images (B, 3, H, W) in [0, 1], any B -> logits (B, K), or features (B, D) without classifier
"""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from diffrep.errors import UserError
from diffrep.files import folder_aside, read_json, write_json
from diffrep.models import students
from diffrep.models.stored import load_student, student_card
from diffrep.models.students import Student
from diffrep.models.weights import write_weights

WEIGHTS, CARD, GRAPH = "model.safetensors", "config.json", "model.onnx"
ONNX_PACKAGES = ("onnx", "onnxscript")


@dataclass(frozen=True)
class Exported:
    """What was written."""

    run: str
    out: str
    architecture: str
    in_timm: bool  # timm has it; otherwise diffrep builds it
    num_classes: int
    tensors: int
    parameters: int
    files: tuple[str, ...]
    image_size: int | None  # pixels that the ONNX file takes
    licence: str | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        what = f"{self.num_classes} classes" if self.num_classes else "no classifier"
        load = f'timm.create_model("local-dir:{self.out}", pretrained=True)'
        if not self.in_timm:
            load = f'diffrep.models.stored.load_student(Path("{self.out}/{WEIGHTS}")); timm has no {self.architecture}'
        graph = [f"{GRAPH}: images (B, 3, {self.image_size}, {self.image_size}) in [0, 1]"] if self.image_size else []
        return [
            f"{self.architecture}, {what}: {self.parameters} parameters in {self.tensors} tensors",
            f"load: {load}",
            *graph,
            *([f"licence: {self.licence}"] if self.licence else []),
            f"written: {self.out} ({', '.join(self.files)})",
        ]


def export(run: str | Path, out: str | Path, onnx: bool = False, image_size: int | None = None) -> Exported:
    """Write the student of ``run`` to the folder ``out``, whole or not at all.

    Args:
        run: a run folder, or another with a student's ``weights.safetensors`` and ``config.json``.
        onnx: write ``model.onnx`` too; normalising is part of it.
        image_size: of its images, pixels; default what the run says.

    Raises:
        UserError: no student there, ``out`` exists, the packages or the image size for ONNX are not there, or torch
            cannot write this network as ONNX.
    """
    source, target = Path(run), Path(out)
    if target.exists():
        raise UserError(f"{out} exists already and would be replaced; choose another --out")
    if onnx and (absent := [name for name in ONNX_PACKAGES if find_spec(name) is None]):
        raise UserError(f"--onnx needs {' and '.join(absent)}: pip install 'diffrep[export]'")
    student = _student(source)
    student.image_size = image_size or _trained_size(source)
    licence = read_json(source / "result.json").get("licence") if (source / "result.json").exists() else None
    card, state = student_card(student, licence), student.backbone.state_dict()
    with folder_aside(target) as aside:
        write_weights(aside / WEIGHTS, state)
        write_json(aside / CARD, card)
        if onnx:
            write_onnx(student, aside / GRAPH)
    return Exported(
        run=str(run), out=str(out), architecture=student.config.name, in_timm=student.config.name not in students.OWN,
        num_classes=card["num_classes"], tensors=len(state),
        parameters=sum(p.numel() for p in student.backbone.parameters()),
        files=(WEIGHTS, CARD, *([GRAPH] if onnx else [])), licence=licence,
        image_size=student.image_size if onnx else None,
    )  # fmt: skip


def _student(folder: Path) -> Student:
    weights = folder / "weights.safetensors"
    if not weights.exists():
        missing = "no such folder" if not folder.is_dir() else "no weights.safetensors"
        raise UserError(f"{folder} holds no student ({missing}): is the run finished, and one of a student?")
    return load_student(weights).eval()


def _trained_size(folder: Path) -> int | None:
    """Pixels of the images a run was trained on, as far as its folder says."""
    seen = read_json(folder / CARD).get("pretrained_cfg", {}).get("input_size")
    if seen:
        return int(seen[-1])
    recipe = folder / "recipe.yaml"
    return yaml.safe_load(recipe.read_text(encoding="utf-8"))["data"].get("image_size") if recipe.exists() else None


class _Answer(nn.Module):
    """Logits, or the pooled vector of a student without classifier."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.student = student
        self.name = "logits" if getattr(student.backbone, "num_classes", 0) else "features"

    def forward(self, images: Tensor) -> Tensor:
        return self.student(images) if self.name == "logits" else self.student.pooled(images)


def write_onnx(student: Student, path: Path) -> None:
    """One file with its weights inside: images (B, 3, H, W) in [0, 1] -> ``logits`` (B, K) or ``features`` (B, D).

    Raises:
        UserError: the network does not take images of its ``image_size``, or torch cannot write it.
    """
    size = student.image_size
    if size is None:
        raise UserError("--onnx: the run does not say how large its images were; say it with --image-size")
    student.eval().try_out(size)
    answer, images = _Answer(student), torch.zeros(2, 3, size, size)
    try:
        with warnings.catch_warnings(action="ignore"):
            torch.onnx.export(
                answer, (images,), str(path), dynamo=True, external_data=False, verbose=False,
                input_names=["images"], output_names=[answer.name],
                dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
            )  # fmt: skip
    except (torch.onnx.OnnxExporterError, RuntimeError) as error:
        why = str(error).strip().splitlines()[0][:160]
        raise UserError(f"--onnx: torch cannot write {student.config.name} as ONNX: {why}") from None
