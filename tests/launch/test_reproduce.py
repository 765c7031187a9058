"""Published scores again, on stand-ins: pytest tests/launch/test_reproduce.py"""

import json
import shutil

import commands
import pytest

from diffrep import api
from diffrep.assets import ASSETS
from diffrep.errors import UserError
from diffrep.evaluation import inception
from diffrep.evaluation.protocols import Protocol, Score, Scores
from diffrep.files import write_json
from diffrep.frozen.classifier import ClassifierConfig, load_classifier
from diffrep.frozen.token_files import convert
from diffrep.frozen.tokens import LICENCES
from diffrep.launch.reproduce import Reproduced, planned
from diffrep.models.addp_files import RELEASED

SMALL = {"embed_dim": 16, "depth": 1, "num_heads": 2, "decoder_depth": 1, "decoder_num_heads": 2, "init_std": 0.5}
PUBLISHED = {"addp-base": {"FID": 8.9, "IS": 95.3}, "addp-large": {"FID": 7.6, "IS": 105.1}}  # ADDP README


@pytest.fixture(scope="module")
def tiny(token_model):
    return token_model


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """A classifier of digits after two steps."""
    folder = tmp_path_factory.mktemp("judge") / "judge"
    api.run("finetune_debug", out=folder)
    return str(folder)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to work in, and no other place to look."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DIFFREP_DATA", raising=False)
    return tmp_path


def cards(folder, name="addp_vit_base_patch16"):
    """What the networks of a converted file say of themselves, and the room they take, without their values."""
    for kind, official, values in (("addp", name, 0), ("tokenizer", "vqgan_jax_strongaug", 54_515_587)):
        config = RELEASED[kind][official].model_dump(mode="json")
        write_json(folder / kind / "config.json", {"kind": kind, "config": config})
        sparse(folder / kind / "weights.safetensors", 4 * values + 10_000)
    return folder


def prepared(folder):
    write_json(folder / "manifest.json", {"name": "imagenet-val256"})


def sparse(path, size):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.truncate(size)
    return path


def table(text):
    """The rows below the head, by score."""
    lines = text.splitlines()
    first = next(k for k, line in enumerate(lines) if line.startswith("score "))
    rows = [line.split("  ") for line in lines[first + 1 : lines.index("", first)]]
    return {row[0]: [cell.strip() for cell in row[1:] if cell.strip()] for row in rows}


# From end to end


def test_a_stand_in_runs_to_the_table_and_is_no_fid(tiny, judge, here):
    """Without Inception's weights: distances under their own names, and nothing published beside them."""
    wanted = ("reproduce", "addp-base", "--model", tiny, "--reference", "digits", "--features", judge, "--images", 6)
    done = commands.run(here, *wanted, "--out", "out")
    assert done.code == 0, done.err
    rows = table(done.out)
    assert {name.split(" on ")[0] for name in rows} == {"Frechet distance", "kernel distance"}
    for row in rows.values():
        published, _, protocol, count = row
        assert (published, protocol, count) == ("-", "named features", "6 against 1,797")
    assert "not the released networks" in done.out and "16 steps" in done.out and "FID" not in done.out
    again = commands.run(here, *wanted, "--out", "out", "--json")
    found = json.loads(again.out)
    assert found == json.loads((here / "out" / "reproduced.json").read_text())
    assert [row["name"] for row in found["scores"]] == list(rows)
    assert set(found["networks"]) == {"addp", "tokenizer"} and found["images"] == 6
    made = json.loads((here / "out" / "generated.json").read_text())
    assert made["made"] == 0 and len(list((here / "out" / "images").glob("*.png"))) == 6


def test_an_official_file_is_converted_once_and_the_linear_schedule_is_linear(tiny, judge, here):
    convert(str(tiny), here / "stand_in.pth")
    with pytest.raises(UserError, match="heads cannot be seen in a file"):
        api.reproduce("addp-base", model="stand_in.pth", reference="digits", features=judge, images=2, steps=256)
    convert("stand_in.pth", here / "stand_in", heads=[2], decoder_heads=[2])
    before = (here / "stand_in" / "addp" / "weights.safetensors").stat().st_mtime_ns
    found = api.reproduce("addp-base", model="stand_in.pth", reference="digits", features=judge, images=2, steps=256)
    assert found.made["masked"] == [*range(16, 0, -1), 1]  # linear, 16 tokens; the last stays soft
    assert (here / "stand_in" / "addp" / "weights.safetensors").stat().st_mtime_ns == before
    assert found.plan.out.as_posix() == "runs/addp-base-steps256"


def test_a_dry_run_costs_and_writes_nothing(tiny, judge, here):
    plan = api.reproduce("addp-large", dry_run=True, model=str(tiny), reference="digits", features=judge)
    assert plan.cost["images"] == 50_000 and plan.cost["seconds"] > 0
    told = "\n".join(plan.lines())
    assert "50,000 images" in told and "cosine" in told and "nothing was written" in told
    assert not list(here.iterdir())


# Files


@pytest.mark.parametrize("name, key", [("addp-base", "addp-vit-base-16"), ("addp-large", "addp-vit-large-16")])
def test_what_is_missing_is_one_line(here, name, key):
    done = commands.run(here, "reproduce", name)
    assert done.code == 2 and done.out == ""
    for words in (f"weights/{key}.pth", "Changyao/ADDP", "CC BY-NC 4.0", "diffrep data prepare imagenet-val256"):
        assert words in done.line
    assert not list(here.iterdir())


def test_inceptions_weights_are_asked_for_before_any_image(tiny, here):
    pytest.importorskip("torch_fidelity")
    with pytest.raises(UserError, match=r"no nowhere\.pth, or name it with --inception"):
        api.reproduce("addp-base", model=str(tiny), reference="digits", inception="nowhere.pth", images=2)
    assert not list(here.iterdir())


@pytest.mark.parametrize("name, size", [("addp-base", 1_392_478_000), ("addp-large", 3_500_693_749)])
def test_a_file_is_known_by_its_size(here, name, size):
    """Published: 3,500,693,749 bytes, and 1.39 GB, of them 1,392,226,652 of tensors."""
    file = here / "weights" / f"{name.replace('-', '-vit-')}-16.pth"
    prepared(here / "data" / "imagenet-val256")
    sparse(file, size)
    plan = planned(name)
    assert plan.unlike == "" and plan.model.resolve() == file and plan.reference == "folder:data/imagenet-val256"
    assert any("to be converted into" in line for line in plan.lines())
    sparse(file, size - 2_000_000)
    with pytest.raises(UserError, match=f"it has {size - 2_000_000:,} bytes, the released file"):
        planned(name)


def test_a_converted_folder_is_known_by_its_networks(here, monkeypatch):
    root = here / "root"
    monkeypatch.setenv("DIFFREP_DATA", str(root))
    prepared(root / "data" / "imagenet-val256")
    folder = cards(root / "weights" / "addp-vit-base-16")
    sparse(root / "weights" / "addp-vit-base-16.pth", 3)  # the folder comes first
    plan = planned("addp-base")
    assert plan.model == folder and plan.unlike == ""
    cards(folder, "addp_vit_large_patch16")
    with pytest.raises(UserError, match=r"its ADDP network has not the released size \(width 768, depth 12\)"):
        planned("addp-base")
    assert planned("addp-base", model=str(folder)).unlike
    sparse(cards(folder) / "tokenizer" / "weights.safetensors", 4 * 54_515_580)
    with pytest.raises(UserError, match="its tokenizer has not the released size"):
        planned("addp-base")
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(UserError, match="it holds no tokenizer"):
        planned("addp-base")


def test_torchrun_does_not_convert(tiny, judge, here, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    convert(str(tiny), here / "file.pth")
    with pytest.raises(UserError, match=r"first diffrep convert file\.pth --out file"):
        api.reproduce("addp-base", model="file.pth", reference="digits", features=judge, images=2)


def test_engines_are_those_of_generate_and_other_processes_of_torchrun_say_nothing(tiny, judge, here, monkeypatch):
    asked = []
    monkeypatch.setattr(api, "generate", lambda *given: asked.append(given) or {})
    how = {"model": str(tiny), "reference": "digits", "features": judge, "out": "out", "images": 5}
    assert api.reproduce("addp-base", jobs=3, ray="local", **how) is None
    ((model, out, settings, seeds, jobs, ray),) = asked
    assert (model, str(out), seeds, jobs, ray) == (str(tiny), "out", range(5), 3, "local")
    assert settings == {"alternation": {"schedule": "cosine"}}


@pytest.mark.parametrize(
    "wanted, words",
    [
        ({"name": "addp-bse"}, "did you mean 'addp-base'"),
        ({"steps": 50}, r"--steps 50: the released scripts take 20 \(cosine\) or 256 \(linear\)"),
        ({"images": 1}, "a score needs 2 at least"),
        ({"model": "nowhere"}, "--model nowhere does not exist"),
    ],
)
def test_what_cannot_be_asked_is_one_line(here, wanted, words):
    with pytest.raises(UserError, match=words):
        planned(**({"name": "addp-base"} | wanted))


# The table


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_numbers_stand_beside_those_of_inception_alone(here, name):
    key = name.replace("-", "-vit-") + "-16"
    cards(here / "weights" / key, key.replace("-16", "-patch16").replace("-", "_"))
    prepared(here / "data" / "imagenet-val256")
    plan = planned(name, out="out")
    write_json(here / "out" / "settings.json", {"model": {"addp": "1a", "tokenizer": "2b"}})
    protocol = Protocol("inception-val", 50_000, "folder:val", "1a" * 32, 50_000, "Inception", "to 299")
    values = {"FID": 9.5, "IS": 90.25, "KID": 0.002}
    scores = Scores(tuple(Score(n, v, protocol, 1.5 if n == "IS" else None) for n, v in values.items()), ())
    made = {"name": "x", "masked": [256] * 21, "licences": {"network": "L"}}
    told = "\n".join(Reproduced(plan, made, scores).lines())
    published = {n: str(v) for n, v in PUBLISHED[name].items()} | {"KID": "-"}
    ours = {"FID": "9.5", "IS": "90.25 ± 1.5", "KID": "0.002"}
    same = ["inception-val", "50,000 against 50,000"]
    assert table(told) == {n: [published[n], ours[n], *same] for n in values}
    assert "is not stated" in told and "20 steps" in told
    kept = Reproduced(plan, made, scores).kept().to_json()
    assert [row["published"] for row in kept["scores"]] == [*PUBLISHED[name].values(), None]
    assert json.loads((here / "out" / "reproduced.json").read_text()) == kept


def test_nothing_published_stands_beside_another_protocol(here):
    cards(here / "weights" / "addp-vit-base-16")
    plan = planned("addp-base", reference="folder:mine")
    protocol = Protocol("inception", 50_000, "folder:mine", "1a" * 32, 50_000, "Inception", "to 299")
    made = {"name": "x", "masked": [256] * 21, "licences": {"network": "L"}}
    told = "\n".join(Reproduced(plan, made, Scores((Score("FID", 9.5, protocol),), ())).lines())
    assert table(told) == {"FID": ["-", "9.5", "inception", "50,000 against 50,000"]}
    assert "published numbers are of inception-val" in told


def test_inception_stands_in_the_table_where_its_weights_are(tiny, judge, here, monkeypatch):
    """With a small classifier in Inception's place, and a folder that says it is the reference set."""
    pytest.importorskip("torch_fidelity")
    from diffrep.evaluation import generation

    small = load_classifier(ClassifierConfig(reference=judge))
    monkeypatch.setattr(inception, "find_weights", lambda path=None: here)
    monkeypatch.setattr(inception, "inception", lambda weights, device: generation.pooled_features(small, (8, 8)))
    found = api.reproduce("addp-base", model=str(tiny), reference="digits", images=4, out="out")
    assert [score.name for score in found.scores.scores] == ["FID", "IS", "KID"]
    rows = table("\n".join(found.lines()))
    assert all(row[0] == "-" for row in rows.values())  # a stand-in: what was published is not of it
    assert {row[3] for row in rows.values()} == {"4 against 1,797"} and {row[2] for row in rows.values()} == {
        "inception"
    }


def test_the_licence_is_the_one_that_travels_with_the_files():
    assert {ASSETS[k].licence for k in ("addp-vit-base-16", "addp-vit-large-16")} == {LICENCES["addp"]}
    assert ASSETS["mage-vitb-1600"].licence == LICENCES["mage"]
    assert ASSETS["vqgan_jax_strongaug"].licence == LICENCES["tokenizer"]
