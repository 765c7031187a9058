"""Students: any timm model, two small networks of ours for 8-pixel digits and the networks for small images of
models/cifar.py and models/mobilenet.py, all in timm's own registry.

A student speaks timm's words: ``forward_features`` (the last map), ``forward_head(x, pre_logits=True)`` (the pooled
vector a classifier would read), ``reset_classifier``. :class:`Student` adds what timm leaves to its caller: it takes
images in [0, 1] and normalises for itself.
Letters: B images, C H W as usual, D width of the pooled vector, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import field_validator
from torch import Tensor, nn

from diffrep import _torchvision_compat, taps
from diffrep.config import Config
from diffrep.errors import UserError, nearest
from diffrep.models import cifar, fast_cnn, mage_vit, mobilenet


def unreserved(options: dict[str, Any]) -> dict[str, Any]:
    """Options of a network, without those that are not theirs to set; the check of every config that has some."""
    reserved = {"num_classes", "pretrained", "checkpoint_path"} & options.keys()
    if reserved:
        raise ValueError(f"{', '.join(sorted(reserved))} is set by the run, not by options")
    return options


class StudentConfig(Config):
    """Which network is trained, and how it sees an image."""

    name: str  # a timm model name, or one of OWN
    options: dict[str, Any] = {}  # passed to timm.create_model, e.g. {"in_chans": 1}
    tap: str | None = None  # dotted module whose map is distilled; None = the last map
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)  # subtracted from images in [0, 1], per channel
    std: tuple[float, ...] = (0.5, 0.5, 0.5)  # then divided by, per channel

    @field_validator("options")
    @classmethod
    def _plain(cls, options: dict[str, Any]) -> dict[str, Any]:
        return unreserved(options)

    @field_validator("mean", "std")
    @classmethod
    def _per_channel(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        if len(values) not in (1, 3):
            raise ValueError(f"has {len(values)} values; give one per channel of RGB, or one for all")
        return values

    @field_validator("std")
    @classmethod
    def _positive(cls, std: tuple[float, ...]) -> tuple[float, ...]:
        if any(s <= 0 for s in std):
            raise ValueError("must be above 0")
        return std


class Student(nn.Module):
    """A timm model behind one door: images (B, 3, H, W) in [0, 1]. The backbone alone is what gets saved."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: StudentConfig, num_classes: int = 0) -> None:
        super().__init__()
        self.config = config
        self.backbone = create(config.name, num_classes, **config.options)
        self.image_size: int | None = None  # pixels of the images it was tried with
        self._taps: dict[str, taps.Tap] | None = None  # found at the first use
        self._swapped = False  # whether its maps are (B, h, w, C); found with the taps
        self.register_buffer("mean", torch.tensor(config.mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config.std).view(1, -1, 1, 1), persistent=False)

    def normalise(self, images: Tensor) -> Tensor:
        x = (images - self.mean) / self.std
        return x.mean(1, keepdim=True) if self.config.options.get("in_chans") == 1 else x

    def forward(self, images: Tensor) -> Tensor:
        """-> logits (B, K)."""
        return self.backbone(self.normalise(images))

    def pooled(self, images: Tensor) -> Tensor:
        """-> (B, D), what a linear classifier reads."""
        features = self.backbone.forward_features(self.normalise(images))
        return self.backbone.forward_head(features, pre_logits=True)

    def feature_map(self, images: Tensor) -> Tensor:
        """-> (B, C, h, w) at the configured tap; tokens (B, N, C) become a square map without prefix tokens."""
        return self.feature_maps(images, [self.config.tap])[0]

    def feature_maps(self, images: Tensor, names: Sequence[str | None]) -> list[Tensor]:
        """The maps at several taps from one pass, in the order of ``names``; None is the last map."""
        x, last = self.normalise(images), list[Tensor]()
        inner = [self._point(x, name) for name in dict.fromkeys(names) if name is not None]
        if not inner:
            feature = self.backbone.forward_features(x)
            return [self._as_map(feature, self._is_channels_last(feature))] * len(names)
        read = taps.read_along if None in names else taps.read
        found = read(self.backbone, lambda: last.append(self.backbone.forward_features(x)), inner)
        return [self._as_map(last[0] if name is None else found[name], self._swapped) for name in names]

    @torch.no_grad()
    def _point(self, x: Tensor, name: str) -> taps.Tap:
        """A tap; how often a pass reaches it is counted once, on one image."""
        if self._taps is None:
            was_training, last = self.training, list[Tensor]()
            self.eval()
            self._taps = taps.list_taps(
                self.backbone, lambda: last.append(self.backbone.forward_features(x[:1])), x.shape[-1]
            )
            self._swapped = self._is_channels_last(last[0])
            self.train(was_training)
        if name not in self._taps:
            taps.find_module(self.backbone, name)  # an unknown name is refused with the nearest
            raise UserError(f"student.tap '{name}' is not reached by {self.config.name}'s features")
        return self._taps[name]

    def try_out(self, image_size: int) -> tuple[int, bool]:
        """Channels of the configured tap's map, and whether every parameter has a part in it.

        Raises:
            UserError: the network does not take images of this size, or these options.
        """
        widths, used = self.try_taps(image_size, [self.config.tap])
        return widths[0], used

    def try_taps(self, image_size: int, names: Sequence[str | None]) -> tuple[list[int], bool]:
        """The same for several taps: channels of each, and whether every parameter has a part in any."""
        was_training = self.training
        try:
            features = self.eval().feature_maps(torch.zeros(1, 3, image_size, image_size), names)
            self.pooled(torch.zeros(1, 3, image_size, image_size))
        except (RuntimeError, AssertionError, AttributeError, ValueError, TypeError) as error:
            if isinstance(error, UserError):
                raise
            what = f"student '{self.config.name}' with options {self.config.options}"
            raise UserError(f"{what} does not take {image_size}-pixel images: {str(error).strip()[:160]}") from None
        self.image_size = image_size
        torch.stack([feature.sum() for feature in features]).sum().backward()
        used = all(p.grad is not None for p in self.parameters())
        self.train(was_training).zero_grad(set_to_none=True)
        return [feature.shape[1] for feature in features], used

    def _as_map(self, feature: Tensor, swapped: bool) -> Tensor:
        if feature.dim() == 4 and swapped:
            feature = feature.permute(0, 3, 1, 2)  # (B, C, h, w)
        if feature.dim() == 3:
            tokens = feature[:, getattr(self.backbone, "num_prefix_tokens", 0) :]
            side = round(tokens.shape[1] ** 0.5)
            feature = tokens.transpose(1, 2).unflatten(2, (side, -1))  # (B, C, h, w)
        if feature.dim() != 4:
            raise UserError(f"student {self.config.name}: its tap gives shape {tuple(feature.shape)}, not a map")
        return feature

    def _is_channels_last(self, feature: Tensor) -> bool:
        """Of the last map: timm says so of Swin and its kin; their width then stands on the last axis.

        Inner taps follow it: their own widths tell nothing.
        """
        if feature.dim() != 4:
            return False
        said = str(getattr(self.backbone, "output_fmt", "NCHW")).upper()
        width = getattr(self.backbone, "num_features", None)
        return said.endswith("NHWC") or (feature.shape[1] != width and feature.shape[-1] == width)


def check_name(name: str, role: str = "student") -> None:
    """Refuse what is in timm's registry under no name, ours included; ``role`` says in errors whose it is."""
    _torchvision_compat.install()
    import timm

    _register()
    if not timm.is_model(name):
        raise UserError(f"{role} '{name}' is no timm model; {nearest(name, timm.list_models())}")


def create(name: str, num_classes: int, role: str = "student", /, **options: Any) -> nn.Module:
    """A timm model without pretrained weights.

    Raises:
        UserError: timm has no such model, or it does not take these options.
    """
    check_name(name, role)
    import timm

    try:
        return timm.create_model(name, pretrained=False, num_classes=num_classes, **options)
    except (TypeError, ValueError, RuntimeError, AssertionError, LookupError, AttributeError) as error:
        raise UserError(f"{role} '{name}' does not take options {options}: {error}") from None


class ConvSmall(nn.Module):
    """3x3 convolutions with batch norm; where the width grows, the size is halved.

    By default 32, 64 at half size, 64: 55,904 parameters for grey images.
    """

    def __init__(
        self, num_classes: int = 0, in_chans: int = 3, pool: int = 2, widths: Sequence[int] = (32, 64, 64)
    ) -> None:
        super().__init__()
        self.stem = _conv(in_chans, widths[0], stride=1)
        pairs = list(pairwise(widths))
        for number, (before, after) in enumerate(pairs, start=1):
            self.add_module(f"layer{number}", _conv(before, after, stride=2 if after > before else 1))
        self.depth = len(pairs)
        self.pool, self.num_features = pool, widths[-1] * pool * pool
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def get_classifier(self) -> nn.Module:
        return self.head

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for number in range(1, self.depth + 1):
            x = self.get_submodule(f"layer{number}")(x)
        return x  # (B, C, h, w)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = F.adaptive_avg_pool2d(x, self.pool).flatten(1)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


class MLPSmall(ConvSmall):
    """Two hidden layers of 256 with batch norm, the last one read as 64 channels on a 2x2 grid; no idea of space.

    83,456 parameters for grey 8x8 images.
    """

    def __init__(self, num_classes: int = 0, in_chans: int = 3, img_size: int = 8) -> None:
        nn.Module.__init__(self)
        self.layer1 = _linear(in_chans * img_size * img_size, 256)
        self.layer2 = _linear(256, 256)
        self.pool, self.num_features = 2, 256
        self.reset_classifier(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.layer2(self.layer1(x.flatten(1))).unflatten(1, (64, 2, 2))  # (B, 64, 2, 2)


def _conv(width_in: int, width_out: int, stride: int) -> nn.Sequential:
    convolution = nn.Conv2d(width_in, width_out, 3, stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(width_out), nn.ReLU())


def _linear(width_in: int, width_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width_in, width_out), nn.BatchNorm1d(width_out), nn.ReLU())


# The names in timm's registry that are ours -> what builds the network from keywords.
OWN: dict[str, Callable[..., nn.Module]] = {
    "conv_small": ConvSmall,
    "mlp_small": MLPSmall,
    **cifar.ENTRIES,
    **mobilenet.ENTRIES,
    **fast_cnn.ENTRIES,
    **mage_vit.ENTRIES,
}


def _register() -> None:
    """Put our students beside timm's; done at the first use, because importing timm takes two seconds."""
    from timm.models import is_model, register_model

    if is_model("conv_small"):
        return
    for name, build in OWN.items():
        register_model(_entry(name, build))


def _entry(name: str, build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    def entry(pretrained: bool = False, **options: Any) -> nn.Module:
        if pretrained:  # timm's word for its own files; random weights in their place would go unnoticed
            raise UserError(f"{name} is diffrep's: build it without pretrained, and load a file into it")
        return build(**_without_timm_extras(options))

    entry.__name__, entry.__module__ = name, __name__
    return entry


def _without_timm_extras(options: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in options.items() if k not in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")}
