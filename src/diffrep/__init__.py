"""diffrep: diffusion models as teachers. The public names, loaded when they are first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from diffrep.api import evaluate as evaluate
    from diffrep.api import features as features
    from diffrep.api import load_data as load_data
    from diffrep.api import load_teacher as load_teacher
    from diffrep.api import probe as probe
    from diffrep.api import run as run
    from diffrep.api import show as show

__all__ = ["__version__", "evaluate", "features", "load_data", "load_teacher", "probe", "run", "show"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'diffrep' has no attribute '{name}'")
    return getattr(import_module("diffrep.api"), name)
