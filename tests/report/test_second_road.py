"""Pages of the second road, on run folders written by hand: pytest tests/report/test_second_road.py"""

import json
import re
import shutil

import pytest
import yaml
from folders import CHROMIUM, on_a_phone, page, row, rows, words, write_folder
from second_road import ARMS, pupil, recipe_of, result, stages, training, write_second_road

from diffrep.recipes import base, dmkd, repfusion_cifar10
from diffrep.report.build import write_figure
from diffrep.report.findings import pairs
from diffrep.report.reading import read_folder
from diffrep.report.values import Entry, references, role


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return write_second_road(tmp_path_factory.mktemp("one") / "study", [0])


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    return write_second_road(tmp_path_factory.mktemp("many") / "study", [0, 1, 2])


def test_references_are_those_that_a_study_resolves():
    for stage in dmkd.dmkd_digits().stages.values():
        assert references(stage.model_dump(mode="json")) == base.references(stage)
    assert references({"source": "synthetic:stage:set", "other": "folder:stage:set"}) == ["set"]


def test_every_arm_of_the_shipped_study_has_a_role():
    found = dmkd.dmkd_digits()
    entries = [Entry(n, n, s.model_dump(mode="json")) for n, s in found.stages.items()]
    assert {e.name: role(e, entries) for e in entries if e.name in found.arms} == {
        "classifier": "teacher",
        "real_labels": "scratch",
        "real_pupil": "real",
        "set_pupil": "drawn",
        "set_labels": "drawn_labels",
        "photographs_pupil": "photographs",
        "one_image_pupil": "one_image",
        "noise_pupil": "noise",
    }


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        (pupil("folder:synthetic"), "real"),
        (pupil("synthetic:stage:set") | {"train": {"steps": 0}}, "untrained"),
        (training("t", "synthetic:stage:set", {"kind": "finetune", "init": "stage:p"}), "tuned"),
        (training("t", "digits", {"kind": "dmkd", "teacher": {"reference": "random:stage:c"}}), "random"),
        (training("t", "digits", {"kind": "denoiser"}), "other"),
    ],
)
def test_roles_follow_method_and_source(recipe, expected):
    assert role(Entry("x", "x", recipe), []) == expected


def test_the_headline_says_what_was_seen_and_by_whom(study, tmp_path):
    text = words(page([study], tmp_path)[1])
    assert (
        "The student that never saw a real image scores 97.0 % by top-1. The same network scores 97.5 % taught on"
        in text
    )
    assert "real images, 96.0 % trained on 1,000 real labels alone and 20.0 % taught on noise." in text
    assert "Its teacher scores 98.0 %." in text and "those labels" not in text
    assert "its teacher learned from 1,000 labelled ones, the generator that drew for it from 800 labelled ones" in text
    assert "The student itself was shown none of them, and no label." in text
    assert "change its score by \u22120.5 points (lower, within the noise of the test set; one seed)." in text


def test_what_is_not_recorded_is_not_claimed(study, tmp_path):
    folder = tmp_path / "study"
    shutil.copytree(study, folder)
    file = folder / "set_pupil-s0" / "result.json"
    found = json.loads(file.read_text())
    file.write_text(json.dumps(found | {"labels_behind": {"teacher: student": 1000}, "labels_seen": {"student": 54}}))
    text = words(page([folder], tmp_path)[1])
    assert "from 1,000 labelled ones, the generator that drew for it from real ones, how many is not recorded." in text
    assert "shown none of them, of labels it was given those of 54 drawn images." in text


def test_several_seeds_are_read_as_intervals(seeds, tmp_path):
    _, reader = page([seeds], tmp_path)
    text = words(reader)
    # set_pupil 97, 97.5, 96.75: mean 97.083, sd 0.382. Differences to real_pupil -0.5, 0.5, -0.5: mean -0.167,
    # sd 0.577, half width 4.30 x 0.577 / sqrt(3) = 1.433.
    assert "scores 97.1 ± 0.4 % by top-1 (mean of 3 seeds ± standard deviation)" in text
    assert (
        "by \u22120.2 ± 0.6 (3) points (not told apart: higher in 1 of 3 seeds; 95 % interval \u22121.6 to +1.3)"
        in text
    )
    # To the labels of drawn images 3, 3.25, 3.25: mean 3.167, sd 0.144.
    assert row(reader, "drawn images + KD \u2212 drawn images, labels")[1] == "+3.2 ± 0.1 (3)"
    assert "Drawn images + KD against drawn images, labels (top-1): +3.2 ± 0.1 (3) (better)." in text


def test_rivals_of_drawn_images_are_all_the_others(study):
    found = {(pair.ours.name, pair.rival.name) for pair in pairs(read_folder(study))}
    others = set(ARMS) - {"set_pupil", "classifier"}
    assert found == {("set_pupil", name) for name in others}


def test_tables_of_scores_costs_and_labels(study, tmp_path):
    _, reader = page([study], tmp_path)
    head = ["", "top-1", "top-5", "calibration error", "agreement with the teacher", "top-1 of the held-out choice"]
    assert head in [[cell.strip() for cell in r] for r in reader.rows]
    ours = rows(reader, "drawn images + KD")
    assert ours[0] == ["drawn images + KD", "97.0", "99.5", "1.2", "98.5", "96.5"]
    # Itself, answers, classifier, set and generator: five times 10^9 multiply-adds.
    assert ours[1] == ["drawn images + KD", "20", "640", "1.00 G", "5.00 G", "2.0", "none"]
    assert rows(reader, "drawn images, labels")[1][-1] == "54 drawn"
    behind = next(r for r in reader.rows if r[-1].strip() == "student: drawn images + KD")
    assert [cell.strip() for cell in behind[:2]] == ["none", "800: diffusion model (as its condition); 1,000: teacher"]
    text = words(reader)
    assert "lower is better" in text and "noise + KD: learns what the teacher answers to pure noise." in text
    assert "real labels: the teacher itself" in text


def test_the_chart_marks_drawn_images_alone(study, tmp_path):
    text = words(page([study], tmp_path)[1])
    assert "Orange diamonds: drawn images." in text and "a score near the middle (95 %)" in text
    figure = write_figure(study, tmp_path / "figure.svg").read_text()
    assert "student: noise + KD 20.0" in figure and figure.count("97.0</text>") == 1 and "% correct, top-1" in figure


def test_curves_have_names_and_shares_are_percent(study, tmp_path):
    _, reader = page([study], tmp_path)
    alternatives = " ".join(reader.alternatives)
    assert "% agreement from the first to the last logged step. student real images + KD: 50 to 25;" in alternatives
    assert "kd_loss from the first to the last logged step. student real images + KD: 4 to 2;" in alternatives
    assert "student drawn images, labels: 0.2 to 0.1" in alternatives


def test_arms_of_both_roads_have_a_chart_each(study, tmp_path):
    folder = tmp_path / "both"
    shutil.copytree(study, folder)
    first = training("first", "digits", {"kind": "finetune"}, "features") | {"evaluate": {"probe_labels": [50]}}
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    del recipe["arms"]["classifier"]
    recipe["stages"]["probed"], recipe["headline"] = first, "linear_probe_50"
    recipe["arms"] = recipe["arms"] | {"probed": "MLP: from scratch"}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    probed = {"scores": {"linear_probe_50": 81.0, "top1": 80.0, "test_images": 400}, "labels_seen": {"student": 50}}
    write_folder(folder / "probed-s0", first | {"seed": 0}, probed)
    _, reader = page([folder], tmp_path)
    text, charts = words(reader), [a for a in reader.alternatives if a.startswith("Score of each arm")]
    assert charts[0] == "Score of each arm in percent (linear probe, 50 labels). MLP: from scratch 81.0."
    assert charts[1].startswith("Score of each arm in percent (top-1). student: real images + KD 97.5;")
    assert text.index("With 50 labels, the MLP trained on those labels alone scores 81.0 %") < text.index(
        "Judged by top-1"
    )
    assert "The student that never saw a real image scores 97.0 % by top-1." in text
    assert rows(reader, "from scratch")[0] == ["from scratch", "81.0", "80.0"]
    assert rows(reader, "classifier")[0][:2] == ["classifier", "98.0"]  # no arm, and judged by top-1 too
    assert "All scores by linear probe" in text and "All scores by top-1" in text
    ids = [a["id"] for _, a in reader.tags if "id" in a]
    assert len(ids) == len(set(ids))


def test_an_unfinished_second_road_has_its_chart_all_the_same(study, tmp_path):
    folder = tmp_path / "study"
    shutil.copytree(study, folder)
    (folder / "result.json").unlink()
    for name in ("set_pupil", "set", "set_answers"):
        shutil.rmtree(folder / f"{name}-s0")
    text = words(page([folder], tmp_path)[1])
    assert "student: drawn images + KD (not started)" in text and "to come" in text
    assert "“student: real images + KD” scores" not in text
    assert "The student taught on real images scores 97.5 % by top-1." in text


def test_a_study_judged_by_calibration_prefers_low_values(tmp_path):
    every = {name: stage for name, stage in stages().items() if name in ("classifier", "real_pupil", "set_pupil")}
    arms = {name: ARMS[name] for name in ("real_pupil", "set_pupil")}
    folder = write_folder(tmp_path / "study", recipe_of(arms, every, [0]) | {"headline": "ece"}, {"arms": {}})
    for name, error in (("real_pupil", 4.0), ("set_pupil", 2.0)):
        found = result(name, every[name], 0)
        found["scores"]["ece"] = error
        write_folder(folder / f"{name}-s0", every[name] | {"seed": 0}, found)
    text = words(page([folder], tmp_path)[1])
    assert "calibration error in %, lower is better" in text
    assert "by \u22122.0 points (lower; one seed)" in text  # how noisy it is cannot be told from a number of images
    assert "near the middle" not in text


def test_the_terminal_shows_a_score_once():
    from diffrep.api import _study_words

    by_seed = {"set_pupil": {"0": {"top1": 98.1}, "1": {"top1": 97.1}}}
    found = _study_words(dmkd.dmkd_digits(), {"arms": by_seed})
    assert found["columns"] == ["top1"] and found["table"] == [("student: drawn images + KD", ["97.6 ± 0.7"])]


def test_runs_of_the_second_road_side_by_side(study, tmp_path):
    folders = [study / f"{name}-s0" for name in ("set_pupil", "set_labels", "set", "set_answers", "generator")]
    _, reader = page(folders, tmp_path)
    text = words(reader)
    assert "builds on teacher: student: 1,000, generator: diffusion model (as its condition): 800" in text
    assert "What the set looks like" in text and re.search(r"Distillation of a classifier \(DM-KD\)", text)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_a_phone_shows_the_second_road_without_sideways_scrolling(seeds, tmp_path):
    width, console = on_a_phone(page([seeds], tmp_path)[0], tmp_path)
    assert width <= 390 and "CONSOLE" not in console


def test_every_arm_of_the_first_roads_study_has_a_role():
    found = repfusion_cifar10.repfusion_cifar10_small()
    entries = [Entry(n, n, s.model_dump(mode="json")) for n, s in found.stages.items()]
    roles = {e.name: role(e, entries) for e in entries if e.name in found.arms}
    tuned = {name for name, word in roles.items() if word == "tuned"}
    assert tuned == {name for name in roles if name.endswith("_tuned")}
    assert {name: word for name, word in roles.items() if name not in tuned} == {
        "scratch": "scratch",
        "scratch_2000": "scratch",
        "scratch_4000": "scratch",
        "random": "random",
        "supervised": "supervised",
        "answers": "real",
        "contrastive": "contrastive",
        "uniform": "uniform_each",
        "policy": "policy",
        "fixed": "fixed",
        "probed": "probed",
        "clean": "clean",
        "mixed": "mixed",
    }
