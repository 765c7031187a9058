"""A network that is loaded and only read."""

from __future__ import annotations

import hashlib
from functools import cached_property

import torch
from torch import Tensor, nn


class FrozenModule:
    """Holds a network in eval mode, without gradients, outside every registered module.

    It is no ``nn.Module`` on purpose: neither optimiser nor checkpoint nor DDP (which would overwrite its buffers)
    can see it. It follows its input from device to device and normalises for itself: images come in [0, 1].

    name:    what it was loaded from, for people.
    licence: the licence its weights travel under; "unknown" where nobody said.
    """

    def __init__(self, module: nn.Module, name: str, licence: str = "unknown") -> None:
        self.module = module.eval().requires_grad_(False)
        self.name, self.licence = name, licence

    def follow(self, tensor: Tensor) -> None:
        """Move to where ``tensor`` is; nothing happens when it is already there."""
        here = next(self.module.parameters(), None)
        if here is not None and here.device != tensor.device:
            self.module.to(tensor.device)

    @cached_property
    def sha256(self) -> str:
        """Of names, shapes and values of all weights and buffers; equal networks have equal hashes."""
        digest = hashlib.sha256()
        for name, value in sorted(self.module.state_dict().items()):
            array = value.detach().cpu().contiguous()
            digest.update(f"{name}{tuple(array.shape)}{array.dtype}".encode())
            digest.update(array.flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.module.parameters())
