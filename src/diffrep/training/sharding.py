"""FSDP: what is trained, its gradients and the optimiser's state lie in equal shares on the processes.

torch's second FSDP (`fully_shard`, DTensors), called here and not through accelerate, which takes it to GPUs alone:
this one runs, and is tested, on CPUs. The method is one unit: a step gathers its weights, and scatters its gradients,
once; in between every process holds 1/N of both and of the optimiser's state. Units of a block each would hold less
during a step too, but methods read parts of blocks (models/some_rows.py), which then were not there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from diffrep.errors import UserError
from diffrep.methods.base import Method

WHOLE_TENSORS = ("lars", "muon")  # whose step looks at a whole matrix: its norm, its directions


def check(optimizer: str, method: Method) -> None:
    """Refuse what would give something else than without shards, or wait for ever.

    Raises:
        UserError: an optimiser that looks at whole matrices, or a method whose processes may differ in what they reach.
    """
    if optimizer in WHOLE_TENSORS:
        raise UserError(f"train.sharding 'fsdp': optim.name '{optimizer}' needs whole matrices; sgd or adamw do not")
    if not method.uses_all_parameters:
        raise UserError("train.sharding 'fsdp': some parameters of this method get no gradient; set it to null")


class _Unit(nn.Module):
    """What `fully_shard` puts its hooks on, so that the method stays what it was."""

    def __init__(self, method: Method, accelerator: Accelerator) -> None:
        super().__init__()
        self.method, self.autocast = method, accelerator.autocast

    def forward(self, *given: Any) -> dict[str, Tensor]:
        with self.autocast():
            return {name: value.float() for name, value in self.method(*given).items()}

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """For all micro-batches but the last: gradients are summed here and exchanged later."""
        self.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self.set_requires_gradient_sync(True)


def sharded(method: Method, accelerator: Accelerator) -> nn.Module:
    """What is called in ``method``'s place; its parameters become shares, so an optimiser is made of them anew."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    accelerator.free_memory()  # the optimiser of whole weights holds them
    unit = _Unit(method.to(accelerator.device), accelerator)
    fully_shard(unit, mesh=init_device_mesh(accelerator.device.type, (accelerator.num_processes,)))
    return unit


def is_share(value: Any) -> bool:
    """Whether it is a DTensor, by its looks: to import the class takes half a second, of every command."""
    return hasattr(value, "full_tensor")


def full(value: Any) -> Tensor:
    """A whole tensor of its shares; all processes ask at once."""
    return value.full_tensor() if is_share(value) else value


def share_of(value: Tensor, like: Any) -> Tensor:
    """This process's share of a whole ``value`` that all of them have, where ``like`` is one."""
    if not is_share(like):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def gather(method: nn.Module) -> Callable[[], None]:
    """Put whole parameters in place of shares, on all processes; returns what puts the shares back."""
    shares = []
    for module in method.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if is_share(parameter):
                shares.append((module, name, parameter))
                whole = nn.Parameter(full(parameter).detach(), parameter.requires_grad)
                setattr(module, name, whole)

    def put_back() -> None:
        for module, name, parameter in shares:
            setattr(module, name, parameter)

    return put_back


@contextlib.contextmanager
def whole(method: nn.Module) -> Iterator[None]:
    """Whole parameters for a while, to be read."""
    put_back = gather(method)
    try:
        yield
    finally:
        put_back()


def finite(parameter: Any) -> Tensor:
    """Whether all of this process's share is, a bool of no dimensions."""
    return torch.isfinite(parameter.to_local() if is_share(parameter) else parameter).all()
