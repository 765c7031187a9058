"""The house keeps itself tidy: who may import whom, and how long a page may be."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "diffrep"
FILES = sorted(PACKAGE.rglob("*.py"))

BOTTOM = {
    "errors", "config", "files", "randomness", "taps", "losses", "counting", "console", "assets",
    "_torchvision_compat", "wordnet",
}  # fmt: skip
# The top: may import any room.
FREE = {
    "", "__main__", "assemble", "dense", "rehearsal", "stages", "generation", "studies", "transfer", "api", "words",
    "doctor", "cli",
}  # fmt: skip
# Room -> what its files may import besides the bottom and their own room. A dot names one page of a room.
TABLE = {
    "diffusion": set(),
    "models": set(),
    "data": set(),
    "frozen": {"models", "diffusion", "data.batch"},
    "launch": {
        "methods.synthesis",
        "methods.addp",
        "methods.token_predictor",
        "models.addp_vit",
        "frozen",
        "diffusion",
        "data",
    },
    "methods": {
        "methods.base",
        "methods.dense",
        "frozen",
        "models",
        "diffusion",
        "data.batch",
        "data.shards",
        "data.timm_views",
        "data.dense",
        "data.segment_views",
        "data.landmark_views",
        "data.detect_views",
    },
    "training": {"training", "methods.base", "data"},
    "evaluation": {"data", "models", "frozen", "diffusion.schedules"},
    "recipes": {"methods", "data", "training", "evaluation", "frozen", "models", "diffusion.masking"},
    "report": set(),
}
OWN_ROOM = {"diffusion", "models", "data", "frozen", "evaluation", "recipes", "report", "training", "launch"}
HEAVY = {"timm", "diffusers", "transformers"}  # seconds each: imported inside the functions that need them
NO_TORCH = {"report"}  # and nothing that imports it


def page(file: Path) -> str:
    """``training.trainer`` for src/diffrep/training/trainer.py; a room's own page is the room."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


PAGES = {page(file) for file in FILES}


def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def imported(node: ast.AST) -> list[str]:
    """Full dotted names that one import statement reaches."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert not node.level, "imports are written in full"
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


def pages_used(file: Path) -> set[str]:
    """Our own pages that ``file`` imports anywhere, also inside functions and for type checkers."""
    found = set()
    for node in ast.walk(tree(file)):
        for name in imported(node):
            if name == "diffrep" or name.startswith("diffrep."):
                inner = name.removeprefix("diffrep").removeprefix(".")
                while inner and inner not in PAGES:
                    inner = inner.rpartition(".")[0]
                found.add(inner)
    return found


def allowed(user: str, used: str) -> bool:
    room, target = user.partition(".")[0], used.partition(".")[0]
    if target in ("api", "cli"):
        return room in ("cli", "__main__", "")
    if used in BOTTOM or room in FREE:
        return True
    if room in BOTTOM:
        return False
    if room in OWN_ROOM and target == room:
        return True
    return target in TABLE[room] or used in TABLE[room]


# Pages that break the table today; each has to be mended or the table's owner asked, then it goes from here.
@pytest.mark.parametrize("file", FILES, ids=page)
def test_import_table(file):
    wrong = sorted(used for used in pages_used(file) if not allowed(page(file), used) and used != page(file))
    # ``from diffrep import __version__`` reaches the package's own page, which imports nothing.
    wrong = [used for used in wrong if used != ""]
    assert not wrong, f"{page(file)} may not import {wrong}"


def test_the_table_knows_every_room():
    rooms = {p.partition(".")[0] for p in PAGES}
    assert rooms - FREE - BOTTOM - TABLE.keys() == set()
    assert {"training.trainer", "methods.base", "data.batch"} <= PAGES


def test_the_table_refuses():
    """The test above can fail."""
    for user, used in [
        ("methods.repfusion", "methods.finetune"),
        ("methods.repfusion", "training.optim"),
        ("methods.repfusion", "data.datasets"),
        ("training.trainer", "methods.repfusion"),
        ("models.students", "frozen.base"),
        ("losses", "data.batch"),
        ("report.page", "training.run"),
        ("studies", "api"),
    ]:
        assert not allowed(user, used), (user, used)


def module_level(file: Path) -> set[str]:
    """Top packages imported when the file is, not inside functions or for type checkers alone."""
    found, waiting = set(), list(tree(file).body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        found |= {name.partition(".")[0] for name in imported(node)}
        waiting += list(ast.iter_child_nodes(node))
    return found


@pytest.mark.parametrize("file", FILES, ids=page)
def test_heavy_packages_are_imported_at_the_door(file):
    assert not module_level(file) & HEAVY


def test_light_pages_stay_without_torch():
    """What ``diffrep --help`` and a report read: nothing that takes seconds to import, however deep."""

    def reach(name: str, seen: set[str]) -> set[str]:
        if name in seen:
            return seen
        seen.add(name)
        file = next(f for f in FILES if page(f) == name)
        for node in tree(file).body:
            for used in imported(node):
                inner = used.removeprefix("diffrep").removeprefix(".") if used.startswith("diffrep") else None
                while inner and inner not in PAGES:
                    inner = inner.rpartition(".")[0]
                if inner:
                    reach(inner, seen)
        return seen

    light = {p for p in PAGES if p.partition(".")[0] in {*NO_TORCH, "cli", "errors", "assets"}}
    for name in light:
        for reached in reach(name, set()):
            file = next(f for f in FILES if page(f) == reached)
            assert "torch" not in module_level(file), f"{name} imports torch through {reached}"


@pytest.mark.parametrize("file", FILES, ids=page)
def test_no_page_is_long(file):
    lines = len(file.read_text(encoding="utf-8").splitlines())
    limit = 150 if page(file) == "training.trainer" else 400
    assert lines <= limit
    functions = [n for n in ast.walk(tree(file)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    long = {f.name: f.end_lineno - f.lineno + 1 for f in functions if f.end_lineno - f.lineno + 1 > 80}
    assert not long


@pytest.mark.parametrize("file", FILES, ids=page)
def test_every_page_says_what_it_is(file):
    assert ast.get_docstring(tree(file)) or not file.read_text().strip()


def test_no_page_names_a_folder_of_one_machine():
    pattern = re.compile(r"[\"'`\s(=](/(?:work|home|root|Users|mnt|workspace)/\w)")
    texts = [*FILES, *ROOT.glob("tests/**/*.py"), *ROOT.glob("docs/**/*.md"), ROOT / "README.md"]
    found = {
        f"{file.relative_to(ROOT)}:{number}"
        for file in texts
        if file.exists() and file != Path(__file__)
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if pattern.search(line)
    }
    assert not found


def test_nothing_pickles_and_nothing_asserts_the_users_input():
    for file in FILES:
        for node in ast.walk(tree(file)):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                if called == "torch.load" and any(ast.unparse(k) == "weights_only=True" for k in node.keywords):
                    continue
                if called == "torch.save" and page(file) == "models.stored":
                    continue  # diffrep convert gives the authors' code a file back, and it reads no safetensors
                assert called not in ("torch.load", "torch.save", "pickle.load", "pickle.loads", "eval", "exec"), file


def test_this_python_reads_the_package():
    assert sys.version_info >= (3, 11)
    for file in FILES:
        compile(file.read_text(encoding="utf-8"), str(file), "exec")
