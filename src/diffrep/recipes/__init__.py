"""Shipped recipes by name. A recipe's name is its function's name."""

from __future__ import annotations

from collections.abc import Callable

from diffrep.recipes import denoiser, dmkd, finetune, quickstart, repfusion
from diffrep.recipes.base import Recipe, Study

RECIPES: dict[str, Callable[[], Recipe | Study]] = {
    function.__name__: function for room in (quickstart, denoiser, repfusion, dmkd, finetune) for function in room.RECIPES
}
