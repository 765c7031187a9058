"""A classifier in the place of a diffusion model: the baseline that a supervised teacher of the same images makes.

Its features know no timestep, so every timestep gives the same. Hints, attention transfer and relations from it are
what the official repository's `kd.py` was meant to do, under the same recipe and budget as RepFusion itself.
"""

from __future__ import annotations

from torch import Tensor, nn

from diffrep.errors import UserError
from diffrep.frozen.classifier import ClassifierConfig, ClassifierTeacher, load_classifier
from diffrep.frozen.diffusion import DiffusionTeacher
from diffrep.frozen.references import split_reference


class SupervisedTeacher(DiffusionTeacher):
    """Taps are those of the classifier's network, behind ``network.``."""

    def __init__(self, classifier: ClassifierTeacher, image_size: int) -> None:
        super().__init__(
            Timeless(classifier.module),
            classifier.name,
            image_size,
            classifier.in_chans,
            licence=classifier.licence,
            labels_seen=classifier.labels_seen,
        )
        self.classifier = classifier

    def normalise(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> as the classifier was trained on them."""
        self.check_size(images.shape[-2], images.shape[-1])
        self.classifier.follow(images)
        return self.classifier.normalise(images)


class Timeless(nn.Module):
    """A network of images as one of (x, timestep)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        return self.network(x)


def load_supervised(reference: str, allow_code: bool = False) -> SupervisedTeacher:
    """``REFERENCE?image_size=N``: whatever `diffrep evaluate --classifier` reads, and the pixels it is shown.

    Raises:
        UserError: no such classifier, one whose image size nobody knows, or that does not take it.
    """
    place, options = split_reference(reference)
    options.only(("image_size",), f"classifier:{place}")
    classifier = load_classifier(ClassifierConfig(reference=place), allow_code=allow_code)
    size = options.image_size or classifier.image_size
    if size is None:
        raise UserError(f"classifier:{place}: its image size is not known; say classifier:{place}?image_size=32")
    classifier.multiply_adds(size)  # refuses images it does not take
    return SupervisedTeacher(classifier, size)
