"""Read a named point inside any network, and stop the network there.

A tap is a dotted module path (``mid_block``, ``up_blocks.1``); its feature is what that module returns. A module
that is called several times in one pass leaves its LAST output, as a hook on a full pass would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from diffrep.errors import UserError, nearest


@dataclass(frozen=True)
class Tap:
    """One readable point. shape: of its feature without the batch axis; calls: how often a pass reaches it."""

    name: str
    shape: tuple[int, ...]
    stride: int | None  # pixels of the input per cell of the feature; None where it is no map
    calls: int = 1


class _Reached(Exception):  # noqa: N818 - it is the good end
    """Ends a forward pass as soon as the deepest tap was read."""


def find_module(network: nn.Module, name: str) -> nn.Module:
    """The sub-module called ``name``; an unknown name is refused with the nearest ones."""
    modules = dict(network.named_modules())
    if not name or name not in modules:
        names = [n for n in modules if n]
        raise UserError(f"tap '{name}' does not exist in {type(network).__name__}; {nearest(name, names)}")
    return modules[name]


def list_taps(network: nn.Module, run: Callable[[], Any], image_size: int) -> dict[str, Tap]:
    """Every tap that one full pass ``run()`` reaches, in the order of its last call."""
    found: dict[str, Tap] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            feature = _first_tensor(output)
            if feature is not None and feature.dim() >= 2:
                before = found.pop(name, None)
                shape = tuple(feature.shape[1:])
                stride = image_size // shape[-1] if len(shape) == 3 and shape[-1] else None
                found[name] = Tap(name, shape, stride, 1 + (before.calls if before else 0))

        return hook

    handles = [m.register_forward_hook(note(n)) for n, m in network.named_modules() if n]
    try:
        run()
    finally:
        _release(handles)
    return found


def read(network: nn.Module, run: Callable[[], Any], taps: Sequence[Tap]) -> dict[str, Tensor]:
    """The features at ``taps`` of one pass ``run()``, which ends at the last of them: nothing behind it is computed."""
    return _read(network, run, taps, _stop)


def read_along(network: nn.Module, run: Callable[[], Any], taps: Sequence[Tap]) -> dict[str, Tensor]:
    """The features at ``taps`` of one pass ``run()`` that goes on to its end."""
    return _read(network, run, taps, lambda: None)


def _read(
    network: nn.Module, run: Callable[[], Any], taps: Sequence[Tap], when_all_are_read: Callable[[], None]
) -> dict[str, Tensor]:
    features: dict[str, Tensor] = {}
    waiting = {tap.name: tap.calls for tap in taps}

    def take(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            features[name] = _first_tensor(output)
            waiting[name] -= 1
            if not any(count > 0 for count in waiting.values()):
                when_all_are_read()

        return hook

    handles = [find_module(network, tap.name).register_forward_hook(take(tap.name)) for tap in taps]
    try:
        run()
    except _Reached:
        pass
    finally:
        _release(handles)
    return features


def _stop() -> None:
    raise _Reached


def drop_unreached(network: nn.Module, run: Callable[[], Any]) -> bool:
    """Put a placeholder, which cannot be called, for every part of ``network`` that ``run()`` does not call.

    A part may be used without a call, its weights or its length; it would be missed, and then all parts come back.

    Returns:
        Whether the network does without them.
    """
    reached: set[nn.Module] = set()
    handles = [m.register_forward_pre_hook(lambda module, _inputs: reached.add(module)) for m in network.modules()]
    try:
        run()
    finally:
        _release(handles)
    dropped = [(parent, name, part) for parent, name, part in _unreached(network, reached)]
    for parent, name, _ in dropped:
        setattr(parent, name, _Dropped().eval())
    try:
        run()
    except Exception:  # whatever a network does with a part that is not there
        for parent, name, part in dropped:
            setattr(parent, name, part)
        return False
    return True


def _unreached(network: nn.Module, reached: set[nn.Module]) -> Iterable[tuple[nn.Module, str, nn.Module]]:
    """(parent, name, part) of the largest parts that were not called; a list of parts is looked into."""
    for name, part in network.named_children():
        if part in reached or any(inner in reached for inner in part.modules()):
            yield from _unreached(part, reached)
        elif next(part.parameters(), None) is not None:
            yield network, name, part


class _Dropped(nn.Module):
    """Stands where a part was that nobody reads."""

    def forward(self, *inputs: Any, **named: Any) -> Any:
        raise RuntimeError("this part of the network was let go: only taps before it can be read")


def _first_tensor(output: Any) -> Any:
    """Blocks that return (hidden, skips) mean the first."""
    while isinstance(output, tuple | list) and output:
        output = output[0]
    return output if isinstance(output, Tensor) else None


def _release(handles: Iterable[Any]) -> None:
    for handle in handles:
        handle.remove()
