"""The wheel is the package: built, installed elsewhere, run outside the repository."""

import importlib.util
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = {str(p.relative_to(ROOT / "src")) for p in (ROOT / "src" / "diffrep").rglob("*") if p.suffix in (".py", ".j2")}


def command(*arguments, **options):
    done = subprocess.run([str(a) for a in arguments], capture_output=True, text=True, timeout=1200, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The built wheel, a file."""
    for needed in ("build", "hatchling"):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"{needed} is not installed: pip install 'diffrep[dev]' hatchling")
    out = tmp_path_factory.mktemp("wheel")
    command(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT)
    (built,) = out.glob("*.whl")
    return built


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    inside = set(zipfile.ZipFile(wheel).namelist())
    packaged = {name for name in inside if not name.split("/")[0].endswith(".dist-info")}
    assert packaged - {"diffrep/py.typed"} == SOURCE
    assert "diffrep/report/template.html.j2" in packaged
    assert any(name.endswith("licenses/LICENSE") for name in inside)


SAY = """
import diffrep, json, sys
from diffrep.training.run import environment
print(json.dumps([diffrep.__file__, environment()["commit"], environment()["packages"]["diffrep"]]))
import runpy
sys.argv = ["diffrep", "recipes"]
runpy.run_module("diffrep", run_name="__main__")
"""


def test_it_runs_outside_the_repository(wheel, tmp_path):
    target, elsewhere = tmp_path / "project" / "target", tmp_path / "project" / "elsewhere"
    elsewhere.mkdir(parents=True)
    command("git", "init", "-q", tmp_path / "project")  # the user's repository, which is not where diffrep comes from
    git = ["git", "-C", tmp_path / "project", "-c", "user.name=a", "-c", "user.email=a@b.c"]
    command(*git, "commit", "-q", "--allow-empty", "-m", "theirs")
    command(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", target, wheel)
    path = os.pathsep.join([str(target), sysconfig.get_path("purelib")])
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)}
    # -S: no site-packages of its own accord, so no .pth file brings the editable install back.
    said = command(sys.executable, "-S", "-c", SAY, cwd=elsewhere, env=environment)
    first, _, ledger = said.partition("\n")
    where, commit, version = __import__("json").loads(first)
    assert Path(where) == target / "diffrep" / "__init__.py"
    assert commit is None  # and not that of the repository around it
    assert version == wheel.name.split("-")[1]
    assert "repfusion_cifar10_resnet18" in ledger
    assert list(elsewhere.iterdir()) == []


@pytest.mark.slow
def test_a_full_install_in_an_empty_environment_runs_a_recipe(wheel, tmp_path):
    """Needs a package index (and, for a small download, torch's CPU index in PIP_EXTRA_INDEX_URL)."""
    command(sys.executable, "-m", "venv", tmp_path / "venv")
    scripts = tmp_path / "venv" / "bin"
    try:
        command(scripts / "python", "-m", "pip", "install", "-q", wheel)
    except AssertionError as error:
        if "No matching distribution" in str(error) or "connection" in str(error).lower():
            pytest.skip("no package index can be reached")
        raise
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    said = command(scripts / "diffrep", "run", "denoiser_debug", "--out", "run", cwd=tmp_path, env=environment)
    assert "run folder: run" in said
