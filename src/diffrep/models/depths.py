"""How deep in a network each parameter lies, for rates that fall towards the image (``optim.layer_decay``)."""

from __future__ import annotations

from torch import nn

from diffrep import _torchvision_compat

AFTER_BLOCKS = r"^blocks\.(\d+)"  # what no pattern meets lies behind all others


def layers(backbone: nn.Module) -> list[list[nn.Parameter]]:
    """Parameters by depth: those of the embedding, of each block, and last of the head with the norms before it.

    As the official fine-tuning counts in a ViT (id 0 for tables and patches, i + 1 for block i, depth + 1 for the rest)
    and as timm groups the layers of its other networks; [] for a network that does not say.
    """
    _torchvision_compat.install()
    from timm.models import group_parameters
    from timm.models.vision_transformer import VisionTransformer

    if not hasattr(backbone, "group_matcher"):
        return []
    matcher = backbone.group_matcher(coarse=False)
    if isinstance(backbone, VisionTransformer):
        matcher = matcher | {"blocks": AFTER_BLOCKS}  # timm's would give the last norm to the last block
    names, parameters = group_parameters(backbone, matcher), dict(backbone.named_parameters())
    return [[parameters[name] for name in names[depth]] for depth in sorted(names)]


def tables(backbone: nn.Module) -> list[nn.Parameter]:
    """What weight decay has no business with although it has dimensions: tables of positions, class tokens."""
    spared = backbone.no_weight_decay() if hasattr(backbone, "no_weight_decay") else ()
    return [parameter for name, parameter in backbone.named_parameters() if name in spared]
