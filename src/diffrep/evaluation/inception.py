"""What torch-fidelity knows: Inception as TensorFlow had it, and FID, IS, KID, precision and recall.

Nothing is fetched: where Inception's weights are absent, one line says which file to put where.
Letters: N and M images, D width of the features, K classes.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffrep import _torchvision_compat
from diffrep.data.datasets import ImageSet
from diffrep.errors import UserError
from diffrep.evaluation.distances import subset_size
from diffrep.evaluation.survey import Witness
from diffrep.files import located, sha256_of
from diffrep.frozen.classifier import ClassifierTeacher

WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"  # the last eight digits begin its SHA-256
WEIGHTS_PAGE = "https://github.com/toshas/torch-fidelity/releases/tag/v0.2.0"
WIDTH = 2048
RESIZE = "to 299 as TensorFlow 1 did it (bilinear, not antialiased), inside the network"
NEIGHBOURS, SPLITS, SUBSETS = 3, 10, 100  # torch-fidelity's own


def need_torch_fidelity() -> None:
    """Make ``import torch_fidelity`` work.

    Raises:
        UserError: it is not installed.
    """
    if find_spec("torch_fidelity") is None:
        raise UserError("these scores are computed by torch-fidelity, which is absent: pip install 'diffrep[scores]'")
    _torchvision_compat.install()  # torch-fidelity imports torchvision


# The network


def find_weights(path: str | None = None) -> Path:
    """Inception's weights: at ``path``, or where torch-fidelity itself would keep them.

    Raises:
        UserError: they are absent, or other ones. The hash is looked at because torch-fidelity unpickles the file.
    """
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    file = located(path) if path else cache / WEIGHTS
    file = file / WEIGHTS if file.is_dir() else file
    if not file.is_file():
        where = f"no {path}" if path else f"Inception's weights are absent: put {WEIGHTS} into {cache}"
        advice = f"or name it with --inception ({WEIGHTS_PAGE}); without it, compare in another space: --features"
        raise UserError(f"{where}, {advice}")
    wanted = Path(WEIGHTS).stem.rpartition("-")[2]
    if not (met := sha256_of(file)).startswith(wanted):
        raise UserError(f"{file} is not torch-fidelity's Inception: SHA-256 {met[:8]}..., not {wanted}...; get it anew")
    return file


def inception(weights: Path, device: torch.device) -> nn.Module:
    """(B, 3, H, W) uint8 -> (pooled (B, 2048), logits without their bias (B, 1008)), both float32."""
    need_torch_fidelity()
    from torch_fidelity.utils import create_feature_extractor

    layers, given = ["2048", "logits_unbiased"], {"feature_extractor_weights_path": str(weights), "verbose": False}
    return create_feature_extractor("inception-v3-compat", layers, cuda=False, **given).to(device)


def known_to_torch_fidelity(teacher: ClassifierTeacher) -> str:
    """Make a classifier's pooled features known to torch-fidelity; returns their name for ``feature_extractor``.

    ``torch_fidelity.calculate_metrics(feature_extractor=NAME, fid=True, ...)`` then computes its numbers in this
    space; what it calls FID is a Frechet distance on these features, and never FID.
    """
    need_torch_fidelity()
    from torch_fidelity import FeatureExtractorBase, register_feature_extractor
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

    class Pooled(FeatureExtractorBase):
        def __init__(self, name: str, features_list: list[str], **_: Any) -> None:
            super().__init__(name, features_list)
            self.witness = Witness(teacher)

        def forward(self, images: Tensor) -> tuple[Tensor, ...]:
            logits, pooled = self.witness(images.float() / 255)
            return tuple({"logits": logits, "pooled": pooled}[layer] for layer in self.features_list)

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return "pooled", "logits"

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            return "logits" if metric == "isc" else "pooled"

        @staticmethod
        def can_be_compiled() -> bool:
            return False

    name = f"diffrep-{teacher.sha256[:16]}"
    if name not in FEATURE_EXTRACTORS_REGISTRY:
        register_feature_extractor(name, Pooled)
    return name


# The numbers


Moments = tuple[np.ndarray, np.ndarray]  # mean (D,) and covariance (D, D)


def moments(features: Tensor) -> Moments:
    """(N, D) float32 -> as torch-fidelity computes them, the mean widened to float64."""
    need_torch_fidelity()
    from torch_fidelity.metric_fid import fid_features_to_statistics

    found = fid_features_to_statistics(features)
    return found["mu"].astype(np.float64), found["sigma"]


def fid(first: Moments, second: Moments) -> float:
    """The Frechet distance of two Gaussians of Inception features (Heusel et al. 2017)."""
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    one, other = ({"mu": mu, "sigma": sigma} for mu, sigma in (first, second))
    return float(fid_statistics_to_metric(one, other, verbose=False)[KEY_METRIC_FID])


def inception_score(logits: Tensor) -> tuple[float, float, int]:
    """(N, K) -> mean, standard deviation and number of splits (Salimans et al. 2016)."""
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

    splits = min(SPLITS, len(logits))
    found = isc_features_to_metric(logits, splits)
    return found[KEY_METRIC_ISC_MEAN], found[KEY_METRIC_ISC_STD], splits


def kid(first: Tensor, second: Tensor) -> tuple[float, float, int]:
    """(N, D), (M, D) -> mean, standard deviation over the subsets, and their size (Binkowski et al. 2018)."""
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    size = subset_size(len(first), len(second))
    how = {"kid_subsets": SUBSETS, "kid_subset_size": size, "verbose": False}
    found = kid_features_to_metric(first.double(), second.double(), **how)
    return found[KEY_METRIC_KID_MEAN], found[KEY_METRIC_KID_STD], size


def precision_recall(first: Tensor, second: Tensor) -> tuple[float, float]:
    """Generated (N, D), real (M, D), N and M above ``NEIGHBOURS`` -> shares in [0, 1] (Kynkaanniemi et al. 2019)."""
    need_torch_fidelity()
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    how = {"prc_neighborhood": NEIGHBOURS, "save_cpu_ram": True, "verbose": False}  # else N x M distances in memory
    found = prc_features_to_metric(first, second, **how)
    return found[KEY_METRIC_PRECISION], found[KEY_METRIC_RECALL]


# A reference that is only known by its statistics


@dataclass(frozen=True)
class Statistics:
    """Mean and covariance of Inception features from a file. images: those that stand beside them, None = none."""

    moments: Moments
    images: ImageSet | None
    sha256: str


def is_statistics(reference: str) -> bool:
    return reference.endswith((".npz", ".pt")) and located(reference).is_file()


def read_statistics(reference: str, with_images: bool = False) -> Statistics:
    """``.npz`` with mu and sigma, as they are handed round, or a ``...-stat-fid-2048.pt`` of torch-fidelity's cache.

    Args:
        with_images: read the images of the file too (``arr_0`` of ADM's, (N, H, W, 3) uint8).

    Raises:
        UserError: a damaged file, or one without the moments of 2048 features.
    """
    path = located(reference)
    try:
        content = _npz(path, with_images) if path.suffix == ".npz" else _cached(path)
        mean, covariance = (np.asarray(content[key], dtype=np.float64) for key in ("mu", "sigma"))
    except Exception as error:  # damaged archives and pickles make their readers raise nearly anything
        holds = f"{type(error).__name__}: {error}".splitlines()[0][:120]
        raise UserError(f"{reference}: no mu and sigma can be read from it ({holds})") from None
    if mean.shape != (WIDTH,) or covariance.shape != (WIDTH, WIDTH):
        found = f"mu {mean.shape} and sigma {covariance.shape}"
        raise UserError(f"{reference}: {found} are not those of Inception's {WIDTH} features")
    pixels = content.get("arr_0")
    return Statistics((mean, covariance), None if pixels is None else _images(reference, pixels), sha256_of(path))


def _npz(path: Path, with_images: bool) -> dict[str, np.ndarray]:
    if not zipfile.is_zipfile(path):
        raise ValueError("not an .npz archive")
    with np.load(path, allow_pickle=False) as archive:
        wanted = ["mu", "sigma", *(["arr_0"] if with_images and "arr_0" in archive else [])]
        return {name: archive[name] for name in wanted}


def _cached(path: Path) -> dict[str, Any]:
    """Two arrays in a pickle, and nothing that runs."""
    rebuild = np.empty(0).__reduce__()[0]  # has another name in pickles of numpy 1
    kinds = [np.ndarray, np.dtype, np.dtypes.Float32DType, np.dtypes.Float64DType]
    known = [*kinds, *((rebuild, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core"))]
    with torch.serialization.safe_globals(known):
        found = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(found, dict):
        raise ValueError("features; their statistics end in -stat-fid-2048.pt")
    return found


def _images(reference: str, pixels: np.ndarray) -> ImageSet:
    if pixels.ndim != 4 or pixels.shape[3] != 3 or pixels.dtype != np.uint8:
        raise UserError(f"{reference}: arr_0 is {pixels.dtype} {pixels.shape}, not images (N, H, W, 3) of uint8")
    return ImageSet(reference, "whole", (), "unknown", torch.from_numpy(pixels).permute(0, 3, 1, 2), None)
