"""The report room, on tiny made-up run folders: pytest tests/report/test_report.py"""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml
from folders import CHROMIUM, ENVIRONMENT, on_a_phone, page, row, rows, words
from PIL import Image

from diffrep.assets import is_non_commercial
from diffrep.errors import UserError
from diffrep.report.build import write_figure, write_report
from diffrep.report.numbers import T95, Paired, binomial_se, compact, paired, shown
from diffrep.report.scores import score_words
from diffrep.report.teachers import early_mass
from diffrep.report.values import flat, references

HOSTILE = "CNN: <script>alert('arm')</script> $x^ & \"q\""
TIMESTEPS = [0, 100, 900]
SCORES = {"untrained": 80.0, "uniform": 85.5, "policy": 88.25, "scratch": 84.0, "tuned": 90.0}


def method(name: str) -> dict:
    if name in ("scratch", "tuned"):
        return {"kind": "finetune", "init": "stage:policy" if name == "tuned" else None}
    select = "policy" if name == "policy" else "list"
    chosen = {"select": select, "values": TIMESTEPS}
    return {"kind": "repfusion", "teacher": "stage:teacher", "tap": "mid_block", "timestep": chosen}


def arm(name: str) -> dict:
    return {
        "name": f"a_{name}",
        "seed": 0,
        "kind": "recipe",
        "data": {"source": "digits", "labels": 50, "label_seed": None},
        "method": method(name),
        "train": {"steps": 0 if name == "untrained" else 20},
        "evaluate": {"probe_labels": [50]},
    }


def study_recipe(seeds: list[int], about: str = "A study of nothing.") -> dict:
    teacher = {
        "name": "teacher",
        "seed": 0,
        "kind": "recipe",
        "data": {"source": "digits"},
        "method": {"kind": "denoiser"},
        "train": {"steps": 20},
        "evaluate": {"samples": 4},
    }
    grid = {"taps": ["mid_block"], "timesteps": TIMESTEPS, "labels": 50, "draws": 5, "split": "test"}
    sweep = {"name": "sweep", "seed": 0, "kind": "probe", "teacher": "stage:teacher", "sweep": grid}
    labels = {"untrained": "CNN: untrained", "uniform": "CNN: uniform t", "policy": "CNN: learned policy"}
    return {
        "name": "little",
        "about": about,
        "kind": "study",
        "seeds": seeds,
        "stages": {"teacher": teacher, "sweep": sweep, **{name: arm(name) for name in SCORES}},
        "arms": {**labels, "scratch": HOSTILE, "tuned": "CNN: policy, then fine-tuned"},
        "headline": "linear_probe_50",
        "next_commands": ["diffrep recipes && echo <b>"],
    }


def scores_of(name: str, seed: int) -> dict:
    return {"linear_probe_50": SCORES[name] + 1.5 * seed, "knn_50": 70.125 + seed, "test_images": 400}


def result_of(name: str, recipe: dict, seed: int) -> dict:
    base = {"name": recipe["name"], "kind": recipe["kind"], "seed": seed, "cpu_seconds": 1.5, "licence": "Apache-2.0"}
    if name == "sweep":
        rows = [{"tap": "pixels", "timestep": None, "mean": 70.0, "sd": 1.0}]
        rows += [{"tap": "mid_block", "timestep": t, "mean": 85 - t / 100, "sd": 0.5} for t in TIMESTEPS]
        return base | {"rows": rows, "labels_seen": {"probe": 50}, "images_seen": 30, "multiply_adds": 1000}
    seen = {"policy": {"task head": 50, "policy (through its reward)": 50}, "scratch": {"student": 50}}
    return base | {
        "data": {"licence": "CC BY-NC 4.0"},
        "labels_seen": seen.get(name, {}),
        "parameters": 123,
        "multiply_adds": 12_345_678_901,
        "steps": 20,
        "images_seen": 1280,
        "scores": scores_of(name, seed) if name in SCORES else {},
    }


def metrics_of(name: str) -> list[dict]:
    lines = [{"step": s, "loss": 1 / s, "kd_loss": 2 / s} for s in (10, 20)]
    if name == "policy":
        lines[0]["policy_probs"], lines[1]["policy_probs"] = [0.3, 0.3, 0.4], [0.7, 0.2, 0.1]
    return lines


def write_run(folder: Path, name: str, recipe: dict, seed: int = 0, finished: bool = True) -> Path:
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"seed": seed}, sort_keys=False))
    (folder / "environment.json").write_text(json.dumps(ENVIRONMENT))
    if name != "sweep":
        lines = [json.dumps(line) for line in metrics_of(name)]
        (folder / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 30, "loss": NaN}', '{"step": 40, "lo']))
    if name == "teacher":
        (folder / "samples").mkdir()
        Image.new("L", (17, 8), 200).save(folder / "samples" / "grid.png")
    if finished:
        (folder / "result.json").write_text(json.dumps(result_of(name, recipe, seed)))
    return folder


def write_study(folder: Path, seeds: list[int], about: str = "A study of nothing.", finished: bool = True) -> Path:
    recipe = study_recipe(seeds, about)
    for seed in seeds:
        for name, stage in recipe["stages"].items():
            write_run(folder / f"{name}-s{seed}", name, stage, seed, finished or name == "teacher")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    (folder / "environment.json").write_text(json.dumps(ENVIRONMENT))
    arms = {name: {str(s): scores_of(name, s) for s in seeds} for name in SCORES}
    if finished:
        (folder / "result.json").write_text(json.dumps({"recipe_hash": "abcd1234", "arms": arms, "cpu_seconds": 12.0}))
    return folder


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    return write_study(tmp_path_factory.mktemp("one") / "study", [0])


@pytest.fixture(scope="module")
def seeds(tmp_path_factory) -> Path:
    return write_study(tmp_path_factory.mktemp("many") / "study", [0, 1, 2])


@pytest.mark.parametrize("which", ["study", "seeds"])
def test_the_page_stands_alone_and_has_words_for_every_picture(which, request, tmp_path):
    text, reader = page([request.getfixturevalue(which)], tmp_path)
    assert text.startswith("<!DOCTYPE html>") and len(text) < 1_500_000
    loads = [a.get(k) for _, a in reader.tags for k in ("src", "href", "xlink:href") if a.get(k)]
    assert all(address.startswith(("data:", "#")) for address in loads)
    assert not [tag for tag, _ in reader.tags if tag == "script"] and "@import" not in text
    assert reader.figures >= 5 and len(reader.alternatives) == reader.figures
    assert all(len(alt) > 30 and re.search(r"\d", alt) for alt in reader.alternatives)
    assert reader.headings[0] == "h1" and reader.headings.count("h1") == 1
    assert ("html", {"lang": "en"}) in reader.tags
    assert not re.search(r"\b([Nn]a[Nn]|inf|None|null)\b", " ".join(reader.text))
    ids = [a["id"] for _, a in reader.tags if "id" in a]
    assert len(ids) == len(set(ids))


def test_the_table_holds_the_numbers_of_the_results(study, tmp_path):
    _, reader = page([study], tmp_path)
    assert rows(reader, "learned policy")[:2] == [
        ["learned policy", "88.2", "70.1"],
        ["learned policy", "20", "1,280", "12.3 G", "24.7 G", "1.5", "50"],
    ]
    assert rows(reader, "uniform t")[1][-1] == "none"
    assert row(reader, "50: task head, policy (through its reward)")[-1] == "CNN: learned policy"
    text = words(reader)
    assert "the CNN that imitated a diffusion model at the timesteps a learned policy chose scores 88.2" in text
    assert "80.0 % untrained" in text
    assert "Best of 3 points: mid_block at t = 0, 85.0 %" in text and "give 70.0 % (dashed)" in text
    assert "at the end 90 % of its choices fall on t ≤ 300 (no preference would give 67 %)" in text
    assert "diffrep run study/recipe.yaml --out study-again" in text and "diffrep recipes && echo <b>" in text
    assert "Non-commercial use only: CC BY-NC 4.0." in text
    assert f"{binomial_se(85.55, 400):.1f} points (standard error)" in text


def test_several_seeds_give_spread_and_paired_differences(seeds, tmp_path):
    _, reader = page([seeds], tmp_path)
    assert row(reader, "learned policy")[1] == "89.8 ± 1.5 (3)"  # 88.25, 89.75, 91.25
    compared = row(reader, "learned policy \u2212 uniform t")
    assert compared[1] == "+2.8 ± 0.0 (3)" and compared[2].startswith("better: higher in 3 of 3 seeds")


def test_what_a_recipe_says_is_shown_and_never_run(tmp_path):
    folder = write_study(tmp_path / "study", [0], about="<script>alert('about')</script><img src=x onerror=y>")
    text, reader = page([folder], tmp_path)
    assert "alert('about')" in "".join(reader.text) and "alert('arm')" in "".join(reader.text)
    assert not [tag for tag, _ in reader.tags if tag == "script"]
    assert not [a for _, a in reader.tags if "onerror" in a] and "<script" not in text
    figure = write_figure(folder, tmp_path / "figure.svg").read_text()
    assert "<script" not in figure


def test_unfinished_runs_and_studies_say_so(tmp_path):
    folder = write_study(tmp_path / "study", [0], finished=False)
    shutil.rmtree(folder / "tuned-s0")
    text = "".join(page([folder], tmp_path)[1].text)
    assert "This study is not finished" in text and "CNN: policy, then fine-tuned (not started)" in text
    assert "CNN: learned policy (unfinished, step 40 of 20)" not in text  # the last line was cut off by a kill
    assert "CNN: learned policy (unfinished, step 30 of 20)" in text
    text = "".join(page([folder / "policy-s0"], tmp_path)[1].text)
    assert "Not finished: a_policy (unfinished, step 30 of 20)." in text


def test_runs_side_by_side(seeds, tmp_path):
    folders = [seeds / f"{name}-s{s}" for name in ("policy", "uniform") for s in (0, 1)]
    _, reader = page([*folders, seeds / "teacher-s0", seeds / "sweep-s0"], tmp_path)
    assert row(reader, "a_policy")[:5] == ["a_policy", "repfusion", "0, 1", "finished", "89.0 ± 1.1 (2)"]
    assert ["method.timestep.select", "policy", "a_policy"] in [[c.strip() for c in r] for r in reader.rows]
    text = "".join(reader.text)
    assert "4 recipes compared" in text and "Non-commercial use only" in text and "a processor" in text


def test_a_study_among_runs_brings_its_arms(study, seeds, tmp_path):
    _, reader = page([study, seeds / "policy-s1"], tmp_path)
    assert row(reader, "CNN: learned policy")[4] == "88.2" and row(reader, "a_policy")[4] == "89.8"
    other = study.parent / "other"
    shutil.copytree(study, other, dirs_exist_ok=True)
    _, reader = page([study, other], tmp_path)
    assert row(reader, "CNN (study): learned policy") and row(reader, "CNN (other): learned policy")


def test_arms_that_were_recorded_before_come_from_the_studys_result(tmp_path):
    folder = write_study(tmp_path / "study", [0])
    result = json.loads((folder / "result.json").read_text())
    evidence = {"seed": 0, "scores": result["arms"]["policy"]["0"], "cpu_seconds": 7.0, "labels_seen": {}}
    (folder / "result.json").write_text(json.dumps(result | {"recorded": {"policy-s0": evidence}}))
    for name in ("policy", "teacher", "sweep"):
        shutil.rmtree(folder / f"{name}-s0")
    _, reader = page([folder], tmp_path)
    assert row(reader, "learned policy")[1] == "88.2" and "not finished" not in "".join(reader.text)


@pytest.mark.parametrize("content", [None, "a: [", "[1, 2]", "kind: study\nstages: 3\n"])
def test_a_folder_that_is_no_run_is_named_in_one_line(content, tmp_path):
    folder = tmp_path / "empty"
    folder.mkdir()
    if content is not None:
        (folder / "recipe.yaml").write_text(content)
    with pytest.raises(UserError, match="empty") as error:
        write_report([folder], tmp_path / "report.html")
    assert "\n" not in str(error.value) and not (tmp_path / "report.html").exists()
    with pytest.raises(UserError):
        write_report([tmp_path / "nowhere"], tmp_path / "report.html")
    with pytest.raises(UserError):
        write_report([], tmp_path / "report.html")


def test_a_damaged_result_is_named(tmp_path):
    folder = write_run(tmp_path / "run", "policy", arm("policy"))
    (folder / "result.json").write_text('{"scores": ')
    with pytest.raises(UserError, match=r"result\.json is not readable JSON"):
        write_report([folder], tmp_path / "report.html")


def test_the_figure_is_an_svg_of_its_own(seeds, tmp_path):
    file = write_figure(seeds, tmp_path / "docs" / "figure.svg")
    root = ElementTree.fromstring(file.read_text(encoding="utf-8"))
    words = {child.tag.rpartition("}")[2]: child.text for child in root}
    assert "CNN: learned policy 89.8 ± 1.5 (3)" in words["desc"] and words["title"] == "little: scores of all arms"
    assert file.read_text() == write_figure(seeds, tmp_path / "again.svg").read_text()
    with pytest.raises(UserError, match="holds no study"):
        write_figure(seeds / "policy-s0", tmp_path / "none.svg")


def test_reading_a_report_loads_no_torch(study, tmp_path):
    code = (
        "import sys; from pathlib import Path; from diffrep.report.build import write_report\n"
        f"write_report([Path({str(study)!r})], Path({str(tmp_path / 'r.html')!r})); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_numbers_in_words():
    assert [compact(n) for n in (0, 999, 1000, 12.34e9, 999.7e6, 1.7e12)] == [
        "0",
        "999",
        "1.00 k",
        "12.3 G",
        "1.00 G",
        "1.70 T",
    ]
    assert shown([]) == "\u2013" and shown([91.28]) == "91.3" and shown([90.0, 92.0]) == "91.0 ± 1.4 (2)"
    assert binomial_se(90, 900) == pytest.approx(1.0)  # 100 sqrt(0.9 x 0.1 / 900)
    assert score_words("linear_probe_1078") == "linear probe, 1,078 labels" and score_words("top1").startswith("top-1")
    assert flat({"name": "x", "method": {"name": "y", "values": [1, 2], "init": None}}) == {
        "method.name": "y",
        "method.values": "1, 2",
        "method.init": "none",
    }
    assert references({"a": "random:stage:t", "b": ["stage:h", "stage:t"], "c": "stages"}) == ["t", "h"]
    assert early_mass([0.5, 0.3, 0.2], [0, 300, 301]) == pytest.approx(80)


def test_a_difference_is_believed_only_when_its_interval_leaves_out_zero():
    # Mean 1, sd 1, n = 3: half width 4.30 / sqrt(3) = 2.48.
    half = Paired((0.0, 1.0, 2.0)).half_width()
    assert half == pytest.approx(T95[1] / math.sqrt(3)) and Paired((0.0, 1.0, 2.0)).word() == "not told apart"
    assert Paired((1.0, 1.1, 0.9)).word() == "better" and Paired((-1.0, -1.1, -0.9)).word() == "worse"
    one = paired({0: 91.0, 1: 3.0}, {0: 90.0}, 400)
    assert one is not None and one.differences == (1.0,) and one.word() == "higher, within the noise"
    assert paired({0: 1.0}, {1: 1.0}, 400) is None


@pytest.mark.parametrize(
    ("text", "closed"),
    [("CC BY-NC 4.0", True), ("Non-Commercial research", True), ("Apache-2.0", False), ("ANC", False)],
)
def test_non_commercial_licences_are_recognised(text, closed):
    assert is_non_commercial(text) is closed


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_a_phone_shows_the_page_without_sideways_scrolling(seeds, tmp_path):
    width, console = on_a_phone(page([seeds], tmp_path)[0], tmp_path)
    assert width <= 390 and "CONSOLE" not in console


def test_a_comparison_says_which_labels_a_run_builds_on(tmp_path):
    study = write_study(tmp_path / "study", [0])
    folder = study / "policy-s0"
    result = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps(result | {"labels_behind": {"teacher: diffusion model": 1078}}))
    _, reader = page([folder], tmp_path)
    assert "builds on teacher: diffusion model: 1,078" in "".join(reader.text)
