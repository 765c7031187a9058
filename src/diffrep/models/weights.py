"""Tensors on disk: safetensors in, safetensors out, never a pickle."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from diffrep.errors import UserError
from diffrep.files import write_atomic


def read_weights(path: Path) -> Mapping[str, Tensor]:
    """A safetensors file; a missing, corrupt or truncated one is named in one line."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: this run kept no student") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is corrupt or truncated ({error})") from None


def write_weights(path: Path, state: Mapping[str, Tensor]) -> None:
    """Tensors to one safetensors file, whole or not at all."""
    from safetensors.torch import save

    write_atomic(path, save({name: value.detach().cpu().contiguous() for name, value in state.items()}))
