"""What a computation takes, multiply-adds and memory, without computing anything (meta tensors)."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


def multiply_adds(run: Callable[[], Any]) -> int:
    """Multiply-adds of the matrix products and convolutions in ``run()``; a backward pass inside is counted too."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() // 2  # torch counts a multiply-add as two operations


def on_meta(network: nn.Module, *inputs: Any, **named: Any) -> Callable[[], Any]:
    """A call of ``network`` on shapes alone: weights and inputs stand on the meta device, hooks still fire."""
    state = {n: t.to("meta") for n, t in [*network.named_parameters(), *network.named_buffers()]}
    meta = [i.to("meta") if isinstance(i, torch.Tensor) else i for i in inputs]
    kwargs = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in named.items()}
    return lambda: torch.func.functional_call(network, state, tuple(meta), kwargs)


def peak_bytes(run: Callable[[], Any], fused_attention: bool = True) -> int:
    """Most bytes of tensors that ``run()`` makes and holds at once; a library's own work space is not seen.

    fused_attention: attention holds no table of all pairs of positions, as the fused kernels do not.
    """
    with _Living() as living, _Fused() if fused_attention else contextlib.nullcontext():
        run()
    return living.peak


class _Fused(TorchFunctionMode):
    """Attention as a kernel that makes its output alone; on shapes alone torch would write it out."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return self._output(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _output(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return query.new_empty(*query.shape[:-1], value.shape[-1])


class _Living(TorchDispatchMode):
    """Watches every storage from the operation that makes it until nobody holds it."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and id(tensor.untyped_storage()) not in given:
                self._note(tensor.untyped_storage())
        return made

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage not in self._known:
            self._known.add(storage)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, storage.nbytes())

    def _gone(self, size: int) -> None:
        self.now -= size
