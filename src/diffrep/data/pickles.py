"""Pickles of plain data, read without letting them run anything.

A pickle is a program that may call whatever it names. Here every name it can reach is a stand-in of this page, which
builds an array of numbers or refuses: neither NumPy's own constructors nor anything else of Python is within reach.
"""

from __future__ import annotations

import io
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from diffrep.errors import UserError

_NUMBERS = ("b1", "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8")


def read_plain(path: Path) -> dict[str, Any]:
    """The dict that a pickle holds: under text, numpy arrays of numbers, int, str, bytes, or lists and dicts of them.

    Text of Python 2 becomes str, also where its keys are bytes.

    Raises:
        UserError: it holds or calls anything else, is damaged, or goes on after its end.
    """
    content = io.BytesIO(path.read_bytes())
    try:
        found = {_text(key): _plain(value) for key, value in _Harmless(content, encoding="latin1").load().items()}
    except _RefusedError as error:
        valid = "only arrays, numbers, text, lists and dicts are read"
        raise UserError(f"{path}: refused, it holds {_line(error)}; {valid}") from None
    except Exception as error:  # damaged bytes make an unpickler raise nearly anything
        raise UserError(f"{path} is not a readable pickle ({_line(error)})") from None
    if rest := len(content.read()):
        raise UserError(f"{path}: {rest} bytes stand after the end of the pickle")
    return found


def _line(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:100]


class _RefusedError(Exception):
    """Something that is no plain data; the text names it."""


def _text(key: str | bytes) -> str:
    return key.decode("latin1") if isinstance(key, bytes) else str(key)


def _plain(value: Any) -> Any:
    if isinstance(value, _Array):
        return value.numbers()
    if isinstance(value, list | dict | int | str | bytes):
        return value
    raise _RefusedError(f"a value of type {type(value).__name__.strip('_')}")


def _load_bytearray(unpickler: Any) -> None:
    """As bytes are loaded: the original makes room for a damaged length before it looks for that much."""
    (length,) = struct.unpack("<Q", unpickler.read(8))
    unpickler.append(bytearray(unpickler.read(length)))


# The one written in Python: damaged positions in the memo make the one written in C fill gigabytes.
class _Harmless(pickle._Unpickler):
    dispatch = {**pickle._Unpickler.dispatch, pickle.BYTEARRAY8[0]: _load_bytearray}

    def find_class(self, module: str, name: str) -> Any:
        found = _STAND_INS.get(f"{module.replace('numpy._core', 'numpy.core')}.{name}")
        if found is None:
            raise _RefusedError(f"{module}.{name}")
        return found


class _StandIn:
    """A name that a pickle may call; it has no attributes that a pickle could change."""

    __slots__ = ("_build",)
    _build: Callable[..., Any]

    def __init__(self, build: Callable[..., Any]) -> None:
        object.__setattr__(self, "_build", build)

    def __setattr__(self, name: str, value: Any) -> None:
        raise _RefusedError(f"an assignment to {name!r}")

    def __call__(self, *args: Any) -> Any:
        return self._build(*args)


class _Type:
    """numpy.dtype of a pickle: the code of a number and its byte order."""

    __slots__ = ("code", "order")

    def __init__(self, code: Any, *_: Any) -> None:
        self.code, self.order = code, "<"

    def __setstate__(self, state: Any) -> None:
        self.order = "=" if state[1] == "|" else state[1]

    def numpy(self) -> np.dtype[Any]:
        if self.code not in _NUMBERS or self.order not in ("<", ">", "="):
            raise _RefusedError(f"an array of {str(self.code)[:20]!r}")
        return np.dtype(self.code).newbyteorder(self.order)


class _Array:
    """numpy.ndarray of a pickle: shape, type and bytes, looked at only when the pickle has been read."""

    __slots__ = ("content", "dtype", "is_fortran", "shape")

    def __init__(self, content: Any = b"", dtype: Any = None, shape: Any = (), order: Any = "C") -> None:
        self.content, self.dtype, self.shape, self.is_fortran = content, dtype, shape, order == "F"

    def __setstate__(self, state: Any) -> None:
        _, self.shape, self.dtype, self.is_fortran, self.content = state

    def numbers(self) -> Any:
        if not isinstance(self.dtype, _Type):
            raise _RefusedError("an array without a type")
        content = self.content.encode("latin1") if isinstance(self.content, str) else self.content
        found = np.frombuffer(content, self.dtype.numpy())
        return found.reshape(self.shape, order="F" if self.is_fortran else "C")


def _scalar(dtype: Any, content: Any = b"") -> Any:
    return _Array(content, dtype).numbers().item()


def _encoded(text: str, encoding: str) -> bytes:
    """How pickles before protocol 3 spell bytes."""
    if encoding != "latin1":
        raise _RefusedError(f"bytes in the encoding {encoding[:20]!r}")
    return text.encode("latin1")


_STAND_INS = {
    "numpy.ndarray": _StandIn(lambda *_: _Array()),
    "numpy.dtype": _StandIn(_Type),
    "numpy.core.multiarray._reconstruct": _StandIn(lambda *_: _Array()),
    "numpy.core.multiarray.scalar": _StandIn(_scalar),
    "numpy.core.numeric._frombuffer": _StandIn(_Array),
    "_codecs.encode": _StandIn(_encoded),
}
