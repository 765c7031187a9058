"""The manual tells the truth: its commands run, its names exist, README's Python runs."""

from __future__ import annotations

import re
import shlex
import sys
import types
from pathlib import Path

import pytest

from diffrep import cli
from diffrep.recipes import RECIPES

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def commands(page: Path) -> list[str]:
    lines = [line for block in blocks(page, "console") for line in block.splitlines()]
    return [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]


@pytest.mark.parametrize("page", [p for p in PAGES if commands(p)], ids=lambda p: p.stem)
def test_commands_of_a_page_run_from_top_to_bottom(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for command in commands(page):
        monkeypatch.setattr(sys, "argv", shlex.split(command))
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 0, f"{command}: {capsys.readouterr().err}"


def test_readme_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = blocks(ROOT / "README.md", "python")
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert tuple(names["images"].shape) == (3, 3, 8, 8)
    assert names["features"].shape[0] == 3 and names["run"]["steps"] == 2


def test_any_network_teaches_in_under_ten_lines(tmp_path, monkeypatch, capsys, tiny_denoiser):
    monkeypatch.setitem(sys.modules, "my_models", types.SimpleNamespace(unet=tiny_denoiser))
    (code,) = blocks(ROOT / "docs" / "teachers.md", "python")
    assert len([line for line in code.splitlines() if line.strip()]) < 10
    names: dict = {}
    exec(compile(code, "teachers.md", "exec"), names)
    assert tuple(names["features"].shape) == (8, 8, 4, 4) and "mid" in capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    lines = [line for block in blocks(ROOT / "docs" / "teachers.md", "sh") for line in block.splitlines()]
    for line in [line for line in lines if "my_models" in line]:
        short = [*shlex.split(line), "--out", line.split()[1]] + (["--set", "train.steps=2"] if " run " in line else [])
        monkeypatch.setattr(sys, "argv", short)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 0, capsys.readouterr().err


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_recipes_named_after_run_or_show_exist(page):
    named = re.findall(r"diffrep (?:run|show) ([a-z][a-z0-9_]+)(?![\w./])", page.read_text())
    assert not [name for name in named if name not in RECIPES]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_no_machine_and_no_registry_is_named(page):
    assert not re.search(r"/root/|/work/|/tmp/|pypi\.org|registry\.npmjs", page.read_text())


def test_every_linked_file_exists():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+?)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
