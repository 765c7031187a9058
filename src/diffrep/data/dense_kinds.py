"""The sources of masks, points and objects by name, ``KIND:LOCATION`` as in :mod:`diffrep.data.sources`."""

from __future__ import annotations

from diffrep.data.dense import DenseKind

DENSE_KINDS: dict[str, DenseKind] = {}
