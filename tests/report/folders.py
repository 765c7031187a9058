"""Run folders written by hand, and a reader of the pages made from them."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import yaml

from diffrep.report.build import write_report

ENVIRONMENT = {"packages": {"diffrep": "0.1.0", "torch": "2.13.0"}, "python": "3.11.7", "device": "a processor"}


def write_folder(folder: Path, recipe: dict, result: dict | None, metrics: list[dict] = ()) -> Path:
    """What a run or a study leaves behind; ``result`` None: not finished."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    (folder / "environment.json").write_text(json.dumps(ENVIRONMENT))
    if metrics:
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, metrics)))
    if result is not None:
        (folder / "result.json").write_text(json.dumps(result))
    return folder


class Reader(HTMLParser):
    """Collects what the tests ask about; complains about tags that do not match."""

    VOID = {"meta", "link", "img", "br", "wbr", "hr", "input"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.tags, self.rows, self.text, self.figures = [], [], [], [], 0
        self.in_figure, self.alternatives, self.headings = False, [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list) -> None:
        found = dict(attributes)
        self.tags.append((tag, found))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "figure":
            self.in_figure, self.figures = True, self.figures + 1
        if self.in_figure and found.get("role") == "img":
            self.alternatives.append(found.get("aria-label", ""))
        if tag in ("h1", "h2", "h3"):
            self.headings.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attributes: list) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag
        if tag == "figure":
            self.in_figure = False

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if {"td", "th"} & set(self.open) and self.rows:
            self.rows[-1][-1] += data


def page(folders: list[Path], tmp_path: Path) -> tuple[str, Reader]:
    text = write_report(folders, tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    return text, Reader(text)


def rows(reader: Reader, name: str) -> list[list[str]]:
    """Every table's rows of that name."""
    return [[cell.strip() for cell in r] for r in reader.rows if r and r[0].strip() == name]


def row(reader: Reader, name: str) -> list[str]:
    """The first of them."""
    return rows(reader, name)[0]


def words(reader: Reader) -> str:
    """All text of a page, white space made single."""
    return " ".join("".join(reader.text).split())


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def on_a_phone(text: str, folder: Path) -> tuple[int, str]:
    """How wide a page is in a window of 390 pixels with everything unfolded, and what the browser said."""
    unfolded = text.replace("</head>", "<base target=_self></head>").replace("<details>", "<details open>")
    (folder / "page.html").write_text(unfolded)
    frame = (
        "<iframe id=f width=390 height=800 style='border:0' src=page.html></iframe><script>onload=()=>{"
        "const d=document.getElementById('f').contentDocument.documentElement;"
        "document.body.setAttribute('data-width', d.scrollWidth)}</script>"
    )
    (folder / "frame.html").write_text(frame)
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    command += ["--enable-logging=stderr", "--host-resolver-rules=MAP * ~NOTFOUND", "--allow-file-access-from-files"]
    command += ["--virtual-time-budget=2000", f"--user-data-dir={folder / 'profile'}"]
    command += ["--dump-dom", f"file://{folder / 'frame.html'}"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    width = re.search(r'data-width="(\d+)"', found.stdout)
    assert width is not None
    return int(width[1]), found.stderr
