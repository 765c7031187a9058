"""Self-supervised learning on the same images, without a teacher or a label: SimCLR, the baseline beside every road.

Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", ICML 2020: two random views of
an image are to be each other's nearest among the views of all images of the batch. The loss is lightly's.
Letters: B images, D width of the projection, u uniform numbers in [0, 1), s strength of the colours.

Deviations from the paper: (1) no blur, as in its CIFAR-10 setting (appendix B.9); (2) a crop too high or too wide is
cut to the image, where theirs is drawn anew; (3) brightness, contrast, saturation and hue come in this order, not in
a random one, and are clamped once at the end; a hue turns around the grey axis of RGB, not in HSV; (4) the optimiser
is the recipe's, theirs was LARS.
"""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from diffrep import _torchvision_compat
from diffrep.config import Config
from diffrep.data.batch import Batch
from diffrep.errors import UserError
from diffrep.methods.base import Method, MethodConfig, save_student
from diffrep.models.students import Student, StudentConfig
from diffrep.randomness import Rows


class ViewConfig(Config):
    """What may differ between two views of an image. Defaults are the paper's for CIFAR-10."""

    smallest_crop: float = Field(0.08, gt=0, le=1)  # share of the image's area; a crop is resized to the whole
    has_flip: bool = True  # whether half of the views are mirrored
    colour_strength: float = Field(0.5, ge=0, le=1)  # s; 0: colours stay, and no view is grey


class ContrastiveConfig(MethodConfig):
    """Pretraining that reads no label. Defaults are the paper's for CIFAR-10."""

    kind: Literal["contrastive"] = "contrastive"
    student: StudentConfig
    views: ViewConfig = ViewConfig()
    temperature: float = Field(0.5, ge=0.001)  # of the cosines
    width: int = Field(128, ge=1)  # D

    def compares_images(self) -> tuple[str, int]:
        return "method 'contrastive'", 2


class Contrastive(Method):
    """Two views, one pass, one loss. The projector is thrown away: what is kept is the network before it."""

    def __init__(self, config: ContrastiveConfig, num_classes: int, image_size: int, allow_code: bool = False) -> None:
        super().__init__()
        need_lightly()
        self.config = config
        self.student = Student(config.student)
        _, self.uses_all_parameters = self.student.try_out(image_size)
        width = pooled_width(self.student, image_size)
        self.projector = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, config.width))

    def forward(self, batch: Batch, rng: Rows, progress: float) -> dict[str, Tensor]:
        # 1. Two views of each image.
        views = two_views(batch.images, rng, self.config.views)

        # 2. One pass for both, so that batch norm does not tell them apart.
        first, second = self.projected(torch.cat(views)).float().chunk(2)  # (B, D) each

        # 3. Each view is to find its partner among all others.
        with torch.autocast(first.device.type, enabled=False):
            loss = nt_xent(first, second, self.config.temperature)
        return {"loss": loss, "pair_cosine": F.cosine_similarity(first, second).mean()}

    def projected(self, images: Tensor) -> Tensor:
        """z = W2 relu(W1 h), (B, D), of the pooled vector h."""
        return self.projector(self.student.pooled(images))

    def dry_step(self, images: Tensor) -> None:
        """Both views; to compare them is little beside it."""
        self.projected(torch.cat([images, images])).sum().backward()

    def export(self, run_dir: Path) -> dict[str, Any]:
        save_student(run_dir, self.student)
        return {}


@torch.no_grad()
def pooled_width(student: Student, image_size: int) -> int:
    """Numbers of the pooled vector; batch statistics are left alone."""
    was_training = student.training
    found = student.eval().pooled(torch.zeros(1, 3, image_size, image_size)).shape[1]
    student.train(was_training)
    return found


# The loss


def need_lightly() -> None:
    """Make ``import lightly`` work.

    Raises:
        UserError: it is not installed.
    """
    if find_spec("lightly") is None:
        raise UserError(
            "method 'contrastive' takes its loss from lightly, which is absent: pip install 'diffrep[selfsup]'"
        )
    _torchvision_compat.install()  # lightly imports torchvision


def nt_xent(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """NT-Xent (equation 1 of the paper), () mean over the 2B views: -log softmax of the partner's cosine among all.

    Args:
        first, second: (B, D) projections of two views. With several processes each compares its own with everybody's,
            so the mean over the processes is the loss of the whole batch, and so is its gradient.
    """
    from lightly.loss import NTXentLoss

    return NTXentLoss(temperature, gather_distributed=torch.distributed.is_available())(first, second)


# The views: functions of an image and of its own random numbers

CROP_DRAWS, COLOUR_DRAWS = 5, 6  # random numbers of a view
RATIO = 4 / 3  # of a crop's sides, at most; so in torchvision's RandomResizedCrop
JITTERED, GREY = 0.8, 0.2  # probabilities; appendix A of the paper
LARGEST_CHANGE, LARGEST_TURN = 0.8, 0.2  # of brightness, contrast and saturation; of hue, in turns; both times s
LUMA = (0.299, 0.587, 0.114)  # grey of red, green and blue (ITU-R BT.601)


@torch.no_grad()
def two_views(images: Tensor, rng: Rows, config: ViewConfig) -> tuple[Tensor, Tensor]:
    """images (B, 3, H, W) in [0, 1] -> twice the same shape; a view depends on its image and its row's draws alone."""
    drawn = rng.uniform(2, CROP_DRAWS + COLOUR_DRAWS).to(images.device)
    with torch.autocast(images.device.type, enabled=False):  # places in an image need more than bf16's eight bits
        first, second = (_view(images, drawn[:, number], config) for number in (0, 1))
    return first, second


def _view(images: Tensor, u: Tensor, config: ViewConfig) -> Tensor:
    shown = cropped(images, u[:, :CROP_DRAWS], config.smallest_crop, config.has_flip)
    return recoloured(shown, u[:, CROP_DRAWS:], config.colour_strength) if config.colour_strength else shown


def cropped(images: Tensor, u: Tensor, smallest: float, has_flip: bool) -> Tensor:
    """A box of each image, bilinearly enlarged to (B, C, H, W): u (B, 5) are area, ratio, row, column and mirror.

    The area is uniform in [smallest, 1], the ratio of the sides in its logarithm.
    """
    area, ratio = smallest + (1 - smallest) * u[:, 0], RATIO ** (2 * u[:, 1] - 1)
    height, width = ((area / ratio).sqrt().clamp(max=1), (area * ratio).sqrt().clamp(max=1))  # shares of the sides
    row, column = (2 * u[:, 2] - 1) * (1 - height), (2 * u[:, 3] - 1) * (1 - width)  # the box's middle, in [-1, 1]
    facing = torch.where((u[:, 4] < 0.5) & has_flip, -1.0, 1.0)
    nought = torch.zeros_like(row)
    boxes = torch.stack([facing * width, nought, column, nought, height, row], 1).view(-1, 2, 3)
    grid = F.affine_grid(boxes, list(images.shape), align_corners=False)  # (B, H, W, 2)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def recoloured(images: Tensor, u: Tensor, strength: float) -> Tensor:
    """Other brightness b, contrast c, saturation and hue, or grey: u (B, 6) are jitter or not, these four, grey or not.

    With m the mean grey of an image, x -> R S (c b x + (1 - c) b m): S draws colours to their grey, R turns them.
    """
    jittered = u[:, 0] < JITTERED
    swing = torch.where(jittered[:, None], 2 * u[:, 1:5] - 1, 0.0)  # (B, 4) in [-1, 1)
    brightness, contrast, saturation = (1 + LARGEST_CHANGE * strength * swing[:, :3]).unbind(1)
    saturation = torch.where(u[:, 5] < GREY, 0.0, saturation)
    turned = hue_turns(LARGEST_TURN * strength * swing[:, 3]) @ saturations(saturation)  # (B, 3, 3)
    grey = torch.einsum("c,bchw->b", images.new_tensor(LUMA), images) / (images.shape[2] * images.shape[3])
    scaled = torch.einsum("bdc,bchw->bdhw", turned * (contrast * brightness)[:, None, None], images)
    return (scaled + ((1 - contrast) * brightness * grey)[:, None, None, None]).clamp(0, 1)


def saturations(factor: Tensor) -> Tensor:
    """(B,) -> (B, 3, 3): a pixel on its way from its grey (0) to itself (1), and beyond."""
    to_grey = factor.new_tensor(LUMA).expand(3, 3)
    return factor[:, None, None] * torch.eye(3, device=factor.device) + (1 - factor)[:, None, None] * to_grey


def hue_turns(turns: Tensor) -> Tensor:
    """(B,) -> (B, 3, 3): rotations around the grey axis; a third of a turn makes red green, green blue, blue red."""
    cosine, sine = (2 * math.pi * turns).cos()[:, None, None], (2 * math.pi * turns).sin()[:, None, None]
    across = turns.new_tensor([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    return cosine * torch.eye(3, device=turns.device) + (1 - cosine) / 3 + sine * across
