"""A backbone as a stack of maps, finest first: what the heads of dense tasks read.

Any network of :mod:`diffrep.models.students`, read at its stages or at named taps (:mod:`diffrep.taps`), under the
names it has as a student; what lies behind the last map is let go, so that everything that trains has a gradient.
Sources: mmsegmentation's ViT for MAE (blocks that are read, no last norm, a position table resized bicubically without
antialiasing); mmpose's HRNet (four branches, upsampled bilinearly where they are fused).
Letters: B images, C H W as usual, N tokens, D width of a token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffrep import _torchvision_compat, taps
from diffrep.errors import UserError, nearest
from diffrep.models.mage_vit import MAGEVit
from diffrep.models.students import StudentConfig, create
from diffrep.models.vqgan import whole_precision

STRIDES = (4, 8, 16, 32)  # of the stages that published heads read
TRIAL_SIDE = 256  # pixels of the image that a network of any size is tried with, on paper
# Blocks that are read, from 0: mmsegmentation's for ViT-B; for ViT-L the usual choice, which its configs do not state.
VIT_BLOCKS = {12: (3, 5, 7, 11), 24: (7, 11, 15, 23)}

FuseUpsample = Literal["nearest", "bilinear"]


class MapBackbone(nn.Module):
    """images (B, 3, H, W) in [0, 1] -> maps [(B, C, H / stride, W / stride), ...], finest first.

    net: the network under timm's names, without a classifier and without what no map needs.
    names, widths, strides: of each map.
    unneeded: tensors that the whole network has and ``net`` does without.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, config: StudentConfig, names: Sequence[str] = (), fuse_upsample: FuseUpsample = "nearest"
    ) -> None:
        """names: taps; () = the stages of 1/4, 1/8, 1/16 and 1/32 or all there are, or four blocks of a ViT.

        Raises:
            UserError: no such network or tap, or one that gives no map.
        """
        super().__init__()
        self.config = config
        with torch.device("meta"):
            plan = _planned(config, names)
        self.net = create(config.name, 0, **plan.options)
        _let_go(self.net, plan.idle)
        _fuse_by(self.net, fuse_upsample, config.name)
        self.names, self.widths, self.strides = plan.names, plan.widths, plan.strides
        self.unneeded, self._taps = plan.unneeded, plan.taps
        self.register_buffer("mean", torch.tensor(config.mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config.std).view(1, -1, 1, 1), persistent=False)

    @property
    def backbone(self) -> nn.Module:
        """``net``, as a :class:`~diffrep.models.students.Student` calls it."""
        return self.net

    def normalise(self, images: Tensor) -> Tensor:
        x = (images - self.mean) / self.std
        return x.mean(1, keepdim=True) if self.config.options.get("in_chans") == 1 else x

    def forward(self, images: Tensor) -> list[Tensor]:
        self._check_sides(*images.shape[-2:])
        return _maps(self.net, self.normalise(images), self._taps)

    def _check_sides(self, height: int, width: int) -> None:
        patch = _patch(self.net)
        if height % patch or width % patch:
            raise UserError(f"{self.config.name}: pictures are {height}x{width}; it takes multiples of {patch} pixels")


def vit_blocks(depth: int) -> tuple[int, ...]:
    """Which four blocks of a ViT are read: the published ones, else evenly to the last; a short one repeats some."""
    return VIT_BLOCKS.get(depth) or tuple(max(0, math.ceil(depth * k / 4) - 1) for k in (1, 2, 3, 4))


# What is built, and what is kept of it


@dataclass(frozen=True)
class _Plan:
    """What :class:`MapBackbone` keeps; idle: parameters that no map depends on."""

    options: dict[str, Any]  # what builds the network
    names: tuple[str, ...]
    taps: tuple[taps.Tap, ...]  # () for a network that answers with its maps
    widths: tuple[int, ...]
    strides: tuple[int, ...]
    idle: frozenset[str]
    unneeded: frozenset[str]


def _options(config: StudentConfig, whole: nn.Module) -> dict[str, Any]:
    """What builds the network for maps; ``whole``: as a student has it."""
    from timm.models.vision_transformer import VisionTransformer

    if _is_hrnet(config.name):  # without feature_location timm answers with the wider maps of ImageNet's classifier
        return {"features_only": True, "feature_location": "", "out_indices": (1, 2, 3, 4), **config.options}
    any_size = {"dynamic_img_size": True} if isinstance(whole, VisionTransformer) else {}
    return {**any_size, **config.options}


def _is_hrnet(name: str) -> bool:
    _torchvision_compat.install()
    from timm.models import get_arch_name, is_model_in_modules

    return is_model_in_modules(get_arch_name(name), ["hrnet"])


def _planned(config: StudentConfig, names: Sequence[str]) -> _Plan:
    """Tried on paper: which maps there are, and what they depend on."""
    whole = create(config.name, 0, **config.options)
    options = _options(config, whole)
    net = create(config.name, 0, **options).eval()
    side = _trial_side(net)
    x = torch.zeros(1, config.options.get("in_chans", 3), side, side)
    try:
        read = _chosen(net, x, names, config.name)
        maps = _maps(net, x, read)
    except (RuntimeError, AssertionError, AttributeError, ValueError, TypeError, IndexError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{config.name} gives no maps of {side}-pixel images: {str(error).strip()[:160]}") from None
    torch.stack([found.sum() for found in maps]).sum().backward()
    idle = frozenset(name for name, p in net.named_parameters() if p.requires_grad and p.grad is None)
    _let_go(net, idle)
    strides = tuple(round(side / found.shape[-1]) for found in maps)
    shown = tuple(tap.name for tap in read) or tuple(f"1/{stride}" for stride in strides)
    if list(strides) != sorted(strides):
        told = ", ".join(f"{name} 1/{stride}" for name, stride in zip(shown, strides, strict=True))
        raise UserError(f"method.maps: name the finest first ({told})")
    unneeded = frozenset(whole.state_dict()) - frozenset(net.state_dict())
    return _Plan(options, shown, read, tuple(found.shape[1] for found in maps), strides, idle, unneeded)


def _chosen(net: nn.Module, x: Tensor, names: Sequence[str], name: str) -> tuple[taps.Tap, ...]:
    """The taps to read, with how often a pass reaches each."""
    if _is_hrnet(name):
        if names:
            raise UserError(f"method.maps: {name} answers with its four branches; leave maps empty")
        return ()
    with torch.no_grad():
        reached = taps.list_taps(net, lambda: _run(net, x), x.shape[-1])
    wanted = names or _stages(net, reached)
    for tap in wanted:
        if tap not in reached:
            near = nearest(tap, [n for n, found in reached.items() if len(found.shape) > 1])
            raise UserError(f"method.maps: {name} has no map '{tap}'; {near}")
    if not wanted:
        raise UserError(f"{name} does not say where its stages are; name them in method.maps: {nearest('', reached)}")
    return tuple(reached[tap] for tap in wanted)


def _stages(net: nn.Module, reached: dict[str, taps.Tap]) -> list[str]:
    """Where a network is read when nobody says: see :class:`MapBackbone`."""
    blocks = getattr(net, "blocks", None)
    if blocks is not None and f"blocks.{len(blocks) - 1}" in reached and _is_tokens(reached["blocks.0"]):
        return [f"blocks.{number}" for number in vit_blocks(len(blocks))]
    info = getattr(net, "feature_info", None) or []
    places = {place["reduction"]: place["module"] for place in info if place["module"] in reached}
    if all(stride in places for stride in STRIDES):
        return [places[stride] for stride in STRIDES]
    if info:
        return [place["module"] for place in info[1:] if place["module"] in reached]
    return [name for name, _ in net.named_children() if name.startswith(("stem", "layer")) and name in reached]


def _is_tokens(tap: taps.Tap) -> bool:
    return len(tap.shape) == 2


def _trial_side(net: nn.Module) -> int:
    if isinstance(net, MAGEVit):
        return math.isqrt(net.token_emb.position_embeddings.num_embeddings - 1) * _patch(net)
    size = getattr(getattr(net, "patch_embed", None), "img_size", None)
    return size[0] if size else TRIAL_SIDE


def _let_go(net: nn.Module, idle: frozenset[str], inside: str = "") -> None:
    """Parts of which every parameter is idle go; what is left of idle ones stays as it is, and does not train."""
    for name, part in list(net.named_children()):
        own = {f"{inside}{name}.{inner}" for inner, _ in part.named_parameters()}
        if own and own <= idle:
            setattr(net, name, nn.Identity())
        elif own & idle:
            _let_go(part, idle, f"{inside}{name}.")
    for name, parameter in net.named_parameters(recurse=False):
        if inside + name in idle:
            parameter.requires_grad_(False)


def _fuse_by(net: nn.Module, mode: FuseUpsample, name: str) -> None:
    """How HRNet brings its coarser branches to the size of a finer one; timm's and mmcls' way is "nearest"."""
    resizes = [module for module in net.modules() if isinstance(module, nn.Upsample)]
    if mode == "nearest":
        return
    if not resizes:
        raise UserError(f"method.fuse_upsample '{mode}': {name} fuses no branches; leave it at 'nearest'")
    for module in resizes:
        module.mode, module.align_corners = mode, False


# A pass


def _maps(net: nn.Module, x: Tensor, read: Sequence[taps.Tap]) -> list[Tensor]:
    if not read:
        return list(net(x))
    found = taps.read(net, lambda: _run(net, x), read)
    return [_as_map(net, found[tap.name], x) for tap in read]


def _run(net: nn.Module, x: Tensor) -> Any:
    """One pass through the features, for images of any size where the position table can be resized."""
    from timm.models.vision_transformer import VisionTransformer

    if isinstance(net, MAGEVit):
        return net.norm(net.blocks(_mage_tokens(net, x)))
    if isinstance(net, VisionTransformer) and type(net)._pos_embed is VisionTransformer._pos_embed:
        return net.norm(net.blocks(net.norm_pre(net.patch_drop(_vit_tokens(net, net.patch_embed(x))))))
    return net.forward_features(x)


def _vit_tokens(net: Any, x: Tensor) -> Tensor:
    """(B, h, w, D) -> (B, prefix + h w, D), positions added; as timm, whose resizing is another."""
    tokens, prefix = x.flatten(1, 2), [t for t in (net.cls_token, net.reg_token) if t is not None]
    first = [t.expand(len(x), -1, -1) for t in prefix]
    if net.pos_embed is None:
        return torch.cat([*first, tokens], 1)
    skipped = 0 if net.no_embed_class else net.num_prefix_tokens
    table = resized(net.pos_embed, net.patch_embed.grid_size, (x.shape[1], x.shape[2]), skipped)
    if net.no_embed_class:
        return net.pos_drop(torch.cat([*first, tokens + table], 1))
    return net.pos_drop(torch.cat([*first, tokens], 1) + table)


def _mage_tokens(net: MAGEVit, x: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, 1 + h w, D): :meth:`MAGEVit.forward_features` up to its blocks."""
    with torch.no_grad(), whole_precision(x.device):
        ids = net.tokenizer.encode(x.float())
    ids, embedding = F.pad(ids, (1, 0), value=net.vocabulary.class_id), net.token_emb
    table = embedding.position_embeddings.weight[None]
    side = math.isqrt(table.shape[1] - 1)
    table = resized(table, (side, side), (x.shape[-2] // _patch(net), x.shape[-1] // _patch(net)), 1)
    return embedding.dropout(embedding.LayerNorm(embedding.word_embeddings(ids) + table))


def resized(table: Tensor, old: tuple[int, int], new: tuple[int, int], prefix: int) -> Tensor:
    """Positions (1, prefix + old grid, D) of another grid: bicubic, no antialiasing, prefix kept."""
    _torchvision_compat.install()
    from timm.layers import resample_abs_pos_embed

    return resample_abs_pos_embed(table, list(new), list(old), prefix, antialias=False)


def _patch(net: nn.Module) -> int:
    """Pixels per token; 1 for a network that has none."""
    if isinstance(net, MAGEVit):
        return net.tokenizer.config.stride
    size = getattr(getattr(net, "patch_embed", None), "patch_size", None)
    return size[0] if size else 1


def _as_map(net: nn.Module, feature: Tensor, x: Tensor) -> Tensor:
    """(B, prefix + N, D) or (B, h, w, C) -> (B, C, h, w)."""
    if feature.dim() == 4 and str(getattr(net, "output_fmt", "NCHW")).upper().endswith("NHWC"):
        return feature.permute(0, 3, 1, 2)
    if feature.dim() == 3:
        tokens = feature[:, getattr(net, "num_prefix_tokens", 0) :]
        rows = round((tokens.shape[1] * x.shape[-2] / x.shape[-1]) ** 0.5)
        return tokens.transpose(1, 2).unflatten(2, (rows, -1))
    if feature.dim() != 4:
        raise UserError(f"method.maps: a tap of {type(net).__name__} gives {tuple(feature.shape)}, which is no map")
    return feature
