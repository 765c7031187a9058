"""How long nothing takes: what is imported, asked and waited for before any work is done."""

import json
import resource
import subprocess
import sys

import pytest

PYTHON = [sys.executable]


def spent(*command):
    """CPU seconds of a process, and how it ended."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([*PYTHON, *command], capture_output=True, text=True, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done


def seconds(*arguments, code, words, limit):
    """CPU seconds of ``python -m diffrep ARGUMENTS``: the least of up to three runs, the others being the machine's."""
    best = float("inf")
    for _ in range(3):
        found, done = spent("-m", "diffrep", *arguments)
        assert done.returncode == code and words in done.stdout + done.stderr, done
        best = min(best, found)
        if best < limit:
            break
    return best


@pytest.fixture(scope="module")
def slowness():
    """How much longer than usual (1.5 s) this machine takes for torch alone, at least 1."""
    return max(1.0, spent("-c", "import torch")[0] / 1.5)


@pytest.mark.parametrize(
    ("arguments", "code", "words"), [(["--help"], 0, "diffrep run quickstart"), (["rnu"], 2, "No such command")]
)
def test_help_and_a_wrong_verb_come_at_once(arguments, code, words):
    assert seconds(*arguments, code=code, words=words, limit=0.5) < 0.5


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["recipes"], 0, "denoiser_digits"),
        (["show", "quickstart"], 0, "stages:"),
        (["run", "denoiser_digits", "--set", "optm.lr=1"], 2, "did you mean 'optim'"),
    ],
)
def test_what_needs_no_network_does_not_wait_for_one(slowness, arguments, code, words):
    assert seconds(*arguments, code=code, words=words, limit=3 * slowness) < 3 * slowness


# What runs before diffrep: any socket is an error, and reads of the environment are noted with who made them.
WATCH = """
import json, os, socket, sys, time

def refuse(*_, **__):
    raise AssertionError("a socket was opened")

socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
asked = []

def note(key):
    frame = sys._getframe(2)
    while frame is not None and "/os.py" in frame.f_code.co_filename or "_collections_abc" in frame.f_code.co_filename:
        frame = frame.f_back
    asked.append((frame.f_globals.get("__name__", ""), key))

class Watched(type(os.environ)):
    def __getitem__(self, key):
        note(key)
        return super().__getitem__(key)

os.environ.__class__ = Watched
began = time.process_time()
"""

IMPORT = (
    WATCH
    + """
import diffrep
taken, modules = time.process_time() - began, set(sys.modules)
from diffrep import api, cli, doctor, stages, studies, words
import pkgutil, importlib
for found in pkgutil.walk_packages(diffrep.__path__, "diffrep."):
    if not found.name.endswith("__main__"):
        importlib.import_module(found.name)
os.environ.get("WITNESS")
print(json.dumps({"seconds": taken, "modules": sorted(modules), "asked": asked, "all": sorted(sys.modules)}))
"""
)


@pytest.fixture(scope="module")
def imported():
    done = subprocess.run([*PYTHON, "-c", IMPORT], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_import_diffrep_is_light(imported):
    assert imported["seconds"] < 1.5
    heavy = {"torch", "numpy", "pydantic", "timm", "diffusers", "typer", "PIL", "matplotlib"}
    assert not heavy & set(imported["modules"])


def test_no_page_of_ours_reads_an_environment_variable_when_imported(imported):
    assert ["__main__", "WITNESS"] in imported["asked"]  # the watch sees what it should see
    assert not [entry for entry in imported["asked"] if entry[0].startswith("diffrep")]


def test_importing_every_page_loads_no_heavy_package(imported):
    """And no socket was opened, or the fixture had failed."""
    assert "diffrep.training.trainer" in imported["all"]
    assert not {"timm", "diffusers", "transformers", "tensorboard", "datasets"} & set(imported["all"])


def test_help_opens_no_network():
    script = (
        WATCH
        + """
sys.argv = ["diffrep", "--help"]
import runpy
runpy.run_module("diffrep", run_name="__main__")
"""
    )
    done = subprocess.run([*PYTHON, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "quickstart" in done.stdout, done.stderr
    refused = subprocess.run(
        [*PYTHON, "-c", WATCH + "socket.create_connection(('localhost', 1))"], capture_output=True, text=True
    )
    assert "a socket was opened" in refused.stderr  # the watch can refuse


def test_public_names_stay_functions_after_their_rooms_were_imported():
    script = "import diffrep, diffrep.report; assert all(callable(getattr(diffrep, n)) for n in diffrep.__all__[1:])"
    assert subprocess.run([*PYTHON, "-c", script], capture_output=True, timeout=60).returncode == 0
