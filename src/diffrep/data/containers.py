"""Readers of parquet files (Hugging Face image convention) and of Hugging Face datasets.

Each answers with (class names, parts by official name), like every reader of ``sources``.
"""

from __future__ import annotations

import bisect
import itertools
import json
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from diffrep import _torchvision_compat
from diffrep.data.images import Part, Read, UnreadableError
from diffrep.errors import UserError
from diffrep.files import ROOT_VARIABLE, located

PART_WORDS = {
    "train": "train", "val": "validation", "valid": "validation", "validation": "validation", "dev": "validation",
    "test": "test",
}  # fmt: skip
_IMAGE_COLUMNS = ("image", "img")
_LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "target")
_ROW_GROUPS_KEPT = 4


def existing(location: str) -> Path:
    """The location as a path.

    Raises:
        UserError: nothing is there.
    """
    path = located(location)
    if not path.exists():
        looked = "" if Path(location).is_absolute() else f", neither here nor below ${ROOT_VARIABLE}"
        raise UserError(f"{location} does not exist{looked}; give a folder or file on this machine")
    return path


def torchvision_set(name: str) -> Any:
    """A dataset class of torchvision, imported only now."""
    _torchvision_compat.install()
    import torchvision.datasets

    return getattr(torchvision.datasets, name)


def part_named_in(text: str) -> str | None:
    """The part that a file name speaks of: "data/train-00000-of-00005" -> "train"; None if it names none."""
    return next((PART_WORDS[w] for w in re.split("[^a-z]+", text.lower()) if w in PART_WORDS), None)


def by_part(files: Iterable[tuple[str, Any]], origin: str) -> dict[str, list[Any]]:
    """Sort (name, file) pairs into parts; files that name no part at all are together the train part."""
    named = [(part_named_in(name), name, file) for name, file in files]
    some = any(part for part, _, _ in named)
    parts: dict[str, list[Any]] = {}
    for part, name, file in named:
        if part is None and some:
            raise UserError(f"{origin}: {name} names no part while others do; have train, val or test in every name")
        parts.setdefault(part or "train", []).append(file)
    return parts


def choose_column(found: list[str], preferred: Iterable[str], what: str, origin: str) -> str | None:
    """The preferred column, else the only one; None if there is none.

    Raises:
        UserError: several, and no preferred name among them.
    """
    best = next((name for name in preferred if name in found), None)
    if best is None and len(found) > 1:
        raise UserError(f"{origin}: several {what} columns ({', '.join(found)}); name one {next(iter(preferred))!r}")
    return best or (found[0] if found else None)


def _agreed(named: list[tuple[str, tuple[str, ...]]], origin: str) -> tuple[str, ...]:
    """The class names that all labelled files or parts share; empty where none is labelled."""
    classes = named[0][1] if named else ()
    if odd := next((where for where, names in named if names != classes), None):
        raise UserError(f"{origin}: the class names of {odd} differ from those of {named[0][0]}")
    return classes


def read_parquet(location: str) -> Read:
    """A parquet file or a folder of them: struct{bytes, path} images, integer labels, class names in the schema."""
    origin, base = f"parquet:{location}", existing(location)
    files = [base] if base.is_file() else sorted(base.rglob("*.parquet"))
    if not files:
        raise UserError(f"{origin}: holds no .parquet file")
    relative = {file: str(file.relative_to(base)) if base.is_dir() else file.stem for file in files}
    opened = [(relative[file], _ParquetFile(file)) for file in files]
    classes = _agreed([(str(file.path), file.classes) for _, file in opened if file.label], origin)
    return classes, {part: _parquet_part(chosen) for part, chosen in by_part(opened, origin).items()}


class _ParquetFile:
    """One file's schema: which columns hold images and labels, which classes there are, how its rows are grouped."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.path = path
        try:
            opened = pq.ParquetFile(path)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path} is not a readable parquet file ({str(error).splitlines()[0]})") from None
        schema = opened.schema_arrow
        images = [f.name for f in schema if pa.types.is_struct(f.type) and f.type.get_field_index("bytes") >= 0]
        named = [f for f in schema if f.name in _LABEL_COLUMNS or _class_names(schema, f.name)]
        labels = [f.name for f in named if pa.types.is_integer(f.type)]
        if named and not labels:
            raise UserError(f"{path}: column {named[0].name!r} holds {named[0].type}; labels are integers from 0")
        self.image = choose_column(images, _IMAGE_COLUMNS, "image", str(path))
        self.label = choose_column(labels, _LABEL_COLUMNS, "label", str(path))
        if self.image is None:
            raise UserError(f"{path}: no column of images, struct{{bytes, path}}; columns: {', '.join(schema.names)}")
        self.classes = _class_names(schema, self.label)
        self.group_rows = [opened.metadata.row_group(g).num_rows for g in range(opened.num_row_groups)]

    def column(self, name: str) -> Any:
        import pyarrow.parquet as pq

        return pq.ParquetFile(self.path).read(columns=[name]).column(0).combine_chunks()

    def labels(self) -> torch.Tensor:
        count = sum(self.group_rows)
        if self.label is None:
            return torch.full((count,), -1)
        return torch.tensor(self.column(self.label).fill_null(-1).to_pylist(), dtype=torch.int64)

    def names(self) -> list[str]:
        stored = self.column(f"{self.image}.path").field("path").to_pylist()
        return [name or f"{self.path.name}, row {row}" for row, name in enumerate(stored)]

    def encoded(self, group: int) -> Any:
        import pyarrow.parquet as pq

        table = pq.ParquetFile(self.path).read_row_group(group, columns=[f"{self.image}.bytes"])
        return table.column(0).combine_chunks().field("bytes")


def _class_names(schema: Any, label: str | None) -> tuple[str, ...]:
    """The names in the schema's Hugging Face metadata; empty where there are none."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(features[label]["names"])
    except (KeyError, TypeError, ValueError):
        return ()


def _parquet_part(files: list[_ParquetFile]) -> Part:
    names = [name for file in files for name in file.names()]
    sizes = tuple((file.path.name, file.path.stat().st_size) for file in files)
    return Part(names, _RowGroups(files), torch.cat([file.labels() for file in files]), sizes)


class _RowGroups:
    """Row i of several parquet files; only the row groups read last stay in memory."""

    def __init__(self, files: list[_ParquetFile]) -> None:
        self._groups = [(file, g) for file in files for g in range(len(file.group_rows))]
        rows = (count for file in files for count in file.group_rows)
        self._starts = [0, *itertools.accumulate(rows)]
        self._recent: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, row: int) -> bytes:
        group = bisect.bisect_right(self._starts, row) - 1
        content = self._encoded(group)[row - self._starts[group]].as_py()
        if content is None:
            raise UnreadableError("the file holds no bytes for it")
        return content

    def _encoded(self, group: int) -> Any:
        with self._lock:
            if group not in self._recent:
                file, number = self._groups[group]
                self._recent[group] = file.encoded(number)
                if len(self._recent) > _ROW_GROUPS_KEPT:
                    self._recent.popitem(last=False)
            return self._recent[group]


def read_hub(location: str) -> Read:
    """Whatever ``datasets.load_dataset`` finds under a name or in a folder (or ``save_to_disk`` left there)."""
    loaded = _load_hub(location)
    parts = {PART_WORDS[name]: rows for name, rows in loaded.items() if name in PART_WORDS}
    if not parts:
        raise UserError(f"hf:{location}: no split is called train, validation or test; it has {', '.join(loaded)}")
    found = {part: _hub_part(rows, f"hf:{location}") for part, rows in parts.items()}
    classes = _agreed([(part, names) for part, (names, _) in found.items() if names], f"hf:{location}")
    return classes, {part: read for part, (_, read) in found.items()}


def _load_hub(location: str) -> dict[str, Any]:
    _torchvision_compat.install()
    try:
        import datasets
    except ImportError:
        raise UserError(f"hf:{location}: needs the package datasets: pip install datasets") from None
    folder = Path(location).expanduser()
    is_saved = any((folder / name).exists() for name in ("dataset_dict.json", "state.json"))
    try:
        loaded = datasets.load_from_disk(str(folder)) if is_saved else datasets.load_dataset(str(folder))
    except Exception as error:  # the hub client has dozens of error classes
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"hf:{location}: cannot be loaded ({reason}); offline, name a folder on this machine") from None
    return dict(loaded) if isinstance(loaded, dict) else {"train": loaded}


def _hub_part(rows: Any, origin: str) -> tuple[tuple[str, ...], Part]:
    import datasets

    images = [n for n, f in rows.features.items() if isinstance(f, datasets.Image)]
    labels = [n for n, f in rows.features.items() if n in _LABEL_COLUMNS or isinstance(f, datasets.ClassLabel)]
    image = choose_column(images, _IMAGE_COLUMNS, "image", origin)
    label = choose_column(labels, _LABEL_COLUMNS, "label", origin)
    if image is None:
        raise UserError(f"{origin}: no column of type Image; columns: {', '.join(rows.features)}")
    encoded = rows.cast_column(image, datasets.Image(decode=False))
    classes = tuple(getattr(rows.features[label], "names", ())) if label else ()
    numbers = [-1 if k is None else k for k in rows[label]] if label else [-1] * len(rows)
    if not all(isinstance(k, int) for k in numbers):
        raise UserError(f"{origin}: column {label!r} holds {rows.features[label]}; labels are integers from 0")
    files = tuple((Path(f["filename"]).name, os.path.getsize(f["filename"])) for f in rows.cache_files)

    def read(row: int) -> bytes:
        cell = encoded[row][image]
        return cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()

    return classes, Part([f"row {i}" for i in range(len(rows))], read, torch.tensor(numbers), files)
