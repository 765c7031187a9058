"""Shipped recipes by name. A recipe's name is its function's name."""

from __future__ import annotations

from collections.abc import Callable

from diffrep.recipes import (
    addp,
    addp_cifar10,
    addp_finetune,
    addp_pretrain,
    addp_released,
    baselines,
    clean_input,
    denoiser,
    dense_digits,
    detect,
    dmkd,
    dmkd_cifar10,
    dmkd_cifar100,
    dmkd_imagenet,
    dmkd_more,
    fast,
    finetune,
    landmark,
    mae,
    mixing,
    quickstart,
    repfusion,
    repfusion_cifar10,
    repfusion_rows,
    roads,
    segment,
)  # fmt: skip
from diffrep.recipes.base import Recipe, Study

ROOMS = (
    quickstart,
    denoiser,
    repfusion,
    repfusion_cifar10,
    repfusion_rows,
    roads,
    dmkd,
    dmkd_cifar10,
    dmkd_cifar100,
    dmkd_imagenet,
    dmkd_more,
    addp,
    addp_cifar10,
    addp_pretrain,
    addp_released,
    addp_finetune,
    mae,
    finetune,
    clean_input,
    fast,
    baselines,
    mixing,
    segment,
    landmark,
    detect,
    dense_digits,
)
RECIPES: dict[str, Callable[[], Recipe | Study]] = {make.__name__: make for room in ROOMS for make in room.RECIPES}
