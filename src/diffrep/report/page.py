"""What a page is made of; ``template.html.j2`` knows how each block looks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from markupsafe import Markup, escape


@dataclass(frozen=True)
class Text:
    """A paragraph; style ``lead`` (large), ``note`` (small), ``warning`` (framed) or none."""

    block: ClassVar[str] = "text"
    text: str
    style: str = ""


@dataclass(frozen=True)
class Notes:
    """A list of (name, text), the name in bold."""

    block: ClassVar[str] = "notes"
    rows: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Picture:
    """An inline SVG, or ``source`` (a data address) of pixels; alt says what it shows, with numbers."""

    block: ClassVar[str] = "picture"
    alt: str
    caption: str
    svg: Markup | None = None
    source: str = ""


FITS, NAME, LONG = 80, 22, 24  # characters: of a table as wide as the text, of its first column, of a cell that wraps


@dataclass(frozen=True)
class Table:
    """Rows of text, the first cell of each its name; a row of one cell is a heading. prose: text, not numbers."""

    block: ClassVar[str] = "table"
    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    prose: bool = False

    @property
    def is_wide(self) -> bool:
        """Whether a row, head words broken and long cells wrapped, wants more than the width of the text."""
        rows = [row for row in self.rows if len(row) == len(self.head)]
        columns = [
            (max(map(len, re.split(r"[\s-]", name))), *cells) for name, *cells in zip(self.head, *rows, strict=True)
        ]
        wanted = sum(max(word, *(min(len(c), LONG) for c in cells), 5) + 3 for word, *cells in columns[1:])
        return not self.prose and NAME + wanted > FITS


@dataclass(frozen=True)
class Bars:
    """(name, length in percent, printed value) each."""

    block: ClassVar[str] = "bars"
    rows: Sequence[tuple[str, float, str]]


@dataclass(frozen=True)
class Commands:
    """Lines to type."""

    block: ClassVar[str] = "commands"
    lines: Sequence[str]


@dataclass(frozen=True)
class Folded:
    """Blocks behind a line to open."""

    block: ClassVar[str] = "folded"
    title: str
    blocks: Sequence[Block]


Block = Text | Notes | Picture | Table | Bars | Commands | Folded


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it."""

    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Page:
    """title: of the window and the first heading."""

    title: str
    about: str
    sections: Sequence[Section]
    footer: str = "Made by diffrep from run folders alone. One file; it loads nothing from the network."


def render(page: Page) -> str:
    """The whole HTML file. Everything but our own SVG is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    room = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    room.filters["breakable"] = breakable
    return room.get_template("template.html.j2").render(page=page)


def breakable(text: str) -> Markup:
    """``text`` escaped, with leave to break long names after ``_``, ``.`` and ``/``."""
    safe = str(escape(text))
    return Markup(re.sub(r"(?<=[^\s\d][_./])(?=\S)", "<wbr>", safe))
