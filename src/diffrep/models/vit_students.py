"""The encoders of ADDP and of MAE as what they are in timm's words: plain ViTs that read whole images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from diffrep.models.addp_vit import MEAN, STD
from diffrep.models.students import Student, StudentConfig


class Sizes(Protocol):
    """What a network of ours says of its encoder."""

    @property
    def embed_dim(self) -> int: ...
    @property
    def depth(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def mlp_ratio(self) -> float: ...


def vit_student(image_size: int, patch_size: int, sizes: Sizes, pre_norm: bool) -> StudentConfig:
    """pre_norm: with the norm behind the embeddings. The mean of the patches is the vector."""
    options: dict[str, Any] = {
        "img_size": image_size, "patch_size": patch_size, "embed_dim": sizes.embed_dim, "depth": sizes.depth,
        "num_heads": sizes.num_heads, "mlp_ratio": sizes.mlp_ratio, "global_pool": "avg", "pre_norm": pre_norm,
    }  # fmt: skip
    return StudentConfig(name="vit_base_patch16_224", options=options, mean=MEAN, std=STD)


def filled(config: StudentConfig, state: Mapping[str, Tensor]) -> Student:
    """The ViT with these weights; the norm behind the mean, which no encoder has, is fresh."""
    student = Student(config)
    fresh = {n: v for n, v in student.backbone.state_dict().items() if n.startswith("fc_norm.")}
    student.backbone.load_state_dict({**state, **fresh})
    return student
