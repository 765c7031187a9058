"""Broken recipes by the hundred: a valid task or one line, never another error: pytest tests/recipes/test_fuzz.py"""

import copy
import json

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from diffrep.errors import UserError
from diffrep.recipes import RECIPES
from diffrep.recipes.base import Recipe, Study, recipe_hash, to_yaml
from diffrep.recipes.loading import load


def plain(name):
    """A shipped recipe as plain values; of a study only a few stages, or parsing takes most of the time."""
    values = json.loads(json.dumps(RECIPES[name]().model_dump(mode="json")))
    if values["kind"] == "study":
        kept = ("teacher", "sweep", "hints", "conv_policy") if name == "quickstart" else list(values["stages"])[:3]
        values["stages"] = {stage: values["stages"][stage] for stage in kept}
        values["arms"] = {kept[-1]: "an arm"}
    elif "timestep" in values["method"] and len(values["method"]["timestep"]["values"]) > 20:
        values["method"]["timestep"]["values"] = [0, 50, 999]
    return values


BASES = {name: plain(name) for name in sorted(RECIPES)}


def places(value, path=()):
    """Every path to a part of nested values."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        yield from places(part, (*path, key))


PLACES = {name: [p for p in places(values) if p] for name, values in BASES.items()}
# Any two kinds and parts may be swapped for each other.
DONORS = [
    part for values in BASES.values() for key in ("method", "data", "optim", "train") if (part := values.get(key))
]

WORDS = ["", "\n", "a\nb", "\0", "\u2028", "\x85", "\ud83d\ude00", "\ufeff", "=", "1e3", "0x1F", "~", "on", "stage:"]
REFERENCES = [
    "stage:teacher",
    "random:",
    "python:os:system",
    "../../x",
    "a.yaml",
    "folder:/",
    "parquet:",
    "shift:99999",
]
LONG = ["x" * 3000, "%s{}", "'\"", "9" * 400]
TEXT = st.text(max_size=12) | st.sampled_from([*WORDS, *REFERENCES, *LONG])
NUMBER = (
    st.integers()
    | st.sampled_from([-1, 0, 2**31, 2**63 - 1, 2**63, -(2**64), 10**400, True, False])
    | st.floats(allow_nan=True, allow_infinity=True)
)
SCALAR = st.none() | NUMBER | TEXT
GARBAGE = st.recursive(
    SCALAR, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=6
)


@st.composite
def mutated(draw):
    """A shipped recipe with one to three parts deleted, replaced, renamed, duplicated or swapped."""
    name = draw(st.sampled_from(sorted(BASES)))
    values = copy.deepcopy(BASES[name])
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(PLACES[name]))
        above = values
        for key in path[:-1]:
            above = above[key] if isinstance(above, dict) and key in above else None
        if not isinstance(above, dict) or path[-1] not in above:
            continue  # an earlier change took it away
        change = draw(st.sampled_from(["delete", "garbage", "scalar", "rename", "extra", "swap", "wrap", "kind"]))
        if change == "delete":
            del above[path[-1]]
        elif change == "rename":
            above[draw(TEXT)] = above.pop(path[-1])
        elif change == "extra":
            above[draw(TEXT)] = draw(GARBAGE)
        elif change == "wrap":
            above[path[-1]] = [above[path[-1]]]
        elif change == "kind":
            above["kind"] = draw(st.sampled_from(["recipe", "study", "finetune", "repfusion", "denoiser", "probe"]))
        else:
            source = {"garbage": GARBAGE, "scalar": SCALAR, "swap": st.sampled_from(DONORS)}[change]
            above[path[-1]] = copy.deepcopy(draw(source))
    return values


def attempt(path, *overrides):
    """Load, and hold what is promised of either outcome."""
    try:
        task = load(str(path), overrides)
    except UserError as error:
        message = str(error)
        assert message.strip() and len(message.splitlines()) == 1, message
        message.encode()  # can be printed
        return
    assert isinstance(task, Recipe | Study)
    again = to_yaml(task)
    path.with_suffix(".yml").write_text(again, encoding="utf-8")
    assert load(str(path.with_suffix(".yml"))) == task  # what was accepted can be written down and hashed
    assert len(recipe_hash(task)) == 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def examples(count):
    return settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck))


@examples(220)
@given(mutated())
@example({"kind": "study", "name": "x", "stages": None})
@example({"kind": ["study"]})
@example({})
def test_mutated_yaml(folder, values):
    file = folder / "fuzz.yaml"
    file.write_bytes(yaml.safe_dump(values, allow_unicode=True).encode("utf-8", "surrogatepass"))
    attempt(file)


@examples(300)
@given(mutated(), st.booleans())
def test_mutated_json(folder, values, ascii_only):
    file = folder / "fuzz.json"
    file.write_bytes(json.dumps(values, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass"))
    attempt(file)


KEYS = ["base: finetune_debug\n", "base: ", "kind: study\n", "name: x\n", "stages:\n", "method:\n  kind: finetune\n"]
SIGNS = ["a", ": ", "\n", "  ", "- ", *"[]{}'\"\\~#\t\ufeff", "&x ", "*x", "? ", "<<: ", "|\n", ">\n", "---\n", "...\n"]
TAGS = ["!!int ", "!!float ", "!!bool ", "!!binary ", "!!timestamp ", "!!set ", "!!omap ", "!!pairs ", "!!null "]
ODD = ["!!python/name:os.system ", "%YAML 9.9\n", "1:60", "0o9", "1_0", ".inf", "2026-13-99", "2001-01-01 99:99:99"]
YAML_PIECES = st.sampled_from([*KEYS, *SIGNS, *TAGS, *ODD])


@examples(200)
@given(st.lists(YAML_PIECES | st.text(max_size=3), max_size=14).map("".join))
def test_pieces_of_yaml(folder, text):
    file = folder / "pieces.yaml"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    attempt(file)


@examples(60)
@given(st.binary(max_size=60))
def test_bytes(folder, content):
    for suffix in (".yaml", ".json"):
        file = folder / f"bytes{suffix}"
        file.write_bytes(content)
        attempt(file)


@examples(80)
@given(st.data())
def test_overrides(folder, data):
    name = data.draw(st.sampled_from(["finetune_debug", "repfusion_debug", "denoiser_debug", "quickstart_debug"]))
    path = data.draw(st.sampled_from(PLACES[name]))
    dotted = ".".join(str(p) for p in path) + data.draw(st.sampled_from(["", ".x", "x", ".0"]))
    value = data.draw(GARBAGE.map(lambda v: yaml.safe_dump(v, default_flow_style=True)) | st.text(max_size=8))
    file = folder / "base.yaml"
    file.write_text(yaml.safe_dump(BASES[name]))
    override = f"{dotted}={value}"
    try:
        task = load(str(file), [override])
    except UserError as error:
        assert str(error).strip()
    else:
        assert len(recipe_hash(task)) == 8
