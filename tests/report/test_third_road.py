"""Pages of the third road, on run folders written by hand: pytest tests/report/test_third_road.py"""

import base64
import io
import math
import re
import shutil

import pytest
import yaml
from folders import CHROMIUM, on_a_phone, page, row, rows, words
from PIL import Image
from second_road import write_second_road
from third_road import ARMS, SAID, SIDE, colour, stages, write_stages, write_third_road

from diffrep.recipes import addp, addp_cifar10
from diffrep.report.build import write_figure
from diffrep.report.findings import pairs
from diffrep.report.made import COLUMNS
from diffrep.report.numbers import MISSING
from diffrep.report.reading import read_folder
from diffrep.report.values import Entry, role


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return write_third_road(tmp_path_factory.mktemp("one") / "study", [0])


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    return write_third_road(tmp_path_factory.mktemp("many") / "study", [0, 1, 2])


def test_every_arm_of_the_shipped_study_has_a_role():
    found = addp.addp_digits()
    entries = [Entry(n, found.arms.get(n, n), s.model_dump(mode="json")) for n, s in found.stages.items()]
    roles = {e.name: role(e, entries) for e in entries if e.name in found.arms}
    assert roles == {
        "alternation": "alternation", "predictor_alone": "predictor", "one_step": "at_once",
        "walk_hard": "ablated", "walk_own_target": "ablated",
        "addp": "addp", "hard": "addp", "own_target": "addp",
    }  # fmt: skip


def test_encoders_of_cifar10_have_roles_too():
    found = addp_cifar10.addp_cifar10_small()
    entries = [Entry(n, found.arms.get(n, n), s.model_dump(mode="json")) for n, s in found.stages.items()]
    roles = {e.name: role(e, entries) for e in entries if e.name in addp_cifar10.ENCODERS}
    assert roles == {
        "scratch": "scratch", "untrained": "untrained", "mae": "mae", "mae_tuned": "tuned",
        "token_predictor": "token_predictor", "token_predictor_tuned": "tuned", "addp": "addp", "addp_tuned": "tuned",
    }  # fmt: skip


def test_the_headline_says_how_far_and_in_whose_eyes(study, tmp_path):
    text = words(page([study], tmp_path)[1])
    assert "turning tokens into pixels and back are at a Frechet distance of 5.0 from the real images of digits" in text
    assert "(in the features of the classifier “judge-s0”); drawn all at once, every token for itself, 10.5; by" in text
    assert "by MAGE's token predictor alone, 4.0. Nearest to the real ones on one seed: “MAGE: token" in text
    assert "Judged in judge-s0's pooled features, D = 128, weights 0123456789ab: 1,000 images of each" in text
    assert "against 1,797 images of digits. That classifier names 98.5 % of real test images correctly." in text
    assert SAID in text and text.count(SAID) == 1


def test_a_distance_is_no_percentage_and_no_fid(study, tmp_path):
    _, reader = page([study], tmp_path)
    text = words(reader)
    assert not re.search(r"\bFID\b", text) and not re.search(r"(5\.0|4\.0|10\.5) ?%", text)
    assert "Score of each arm, lower is better (Frechet distance). ADDP: tokens and pixels in turn 5.0;" in " ".join(
        reader.alternatives
    )
    assert "Frechet distance, lower is better" in text and "standard error" not in text and "points" not in text
    assert rows(reader, ARMS["alternation"])[0] == [ARMS["alternation"], "5.0", "0.0500"]
    assert "Scores, lower is better." in text
    svg = write_figure(study, tmp_path / "figure.svg").read_text()
    assert "Frechet distance, lower is better" in svg and "percent" not in svg


def test_several_seeds_have_a_spread_and_low_is_better(seeds, tmp_path):
    _, reader = page([seeds], tmp_path)
    text = words(reader)
    assert "at a Frechet distance of 5.2 ± 0.2 (mean of 3 seeds ± standard deviation) from the real images" in text
    assert "every token for itself, 11.0 ± 0.5; by MAGE's token predictor alone, 4.2 ± 0.2." in text
    # To one step -5.5, -5.5, -6.25: mean -5.75, sd 0.433, half width 4.30 x 0.433 / sqrt(3) = 1.075.
    found = row(reader, f"{ARMS['alternation']} \u2212 {ARMS['one_step']}")
    assert found[1] == "\u22125.8 ± 0.4 (3)" and found[2].startswith("better: higher in 0 of 3 seeds; 95 % interval")
    assert found[2].endswith("\u22126.8 to \u22124.7")
    # To MAGE 1, 1.25, 0.75: half width 0.62.
    assert row(reader, f"{ARMS['alternation']} \u2212 {ARMS['predictor_alone']}")[2].startswith("worse: higher in 3")


def test_rivals_of_the_alternation(study):
    found = {(pair.ours.name, pair.rival.name) for pair in pairs(read_folder(study))}
    assert found == {("alternation", "one_step"), ("alternation", "predictor_alone")}


def test_images_and_their_walk_are_on_the_page(study, tmp_path):
    html, reader = page([study], tmp_path)
    alternatives = " ".join(reader.alternatives)
    assert (
        "The first 20 images of each arm. ADDP: tokens and pixels in turn, Frechet distance 5.0; MAGE:" in alternatives
    )
    assert "tokens still masked, step by step: 16 9 1." in alternatives
    assert "The pixels between the steps of “ADDP: tokens and pixels in turn”." in words(reader)
    assert html.count("image-rendering:pixelated") == 3 + 3 + 1  # strips, contact sheets, film
    pictures = re.findall(r'<image href="data:image/png;base64,([^"]+)"', html)
    for arm, content in zip(ARMS, pictures, strict=False):
        strip = Image.open(io.BytesIO(base64.b64decode(content)))
        assert strip.getpixel((0, 0)) == colour(arm, 0)
        assert strip.getpixel((SIDE + 1, SIDE + 1)) == colour(arm, COLUMNS + 1)  # second row, second column


def test_networks_say_where_they_stand(study, tmp_path):
    _, reader = page([study], tmp_path)
    text = words(reader)
    # Means of the logged 0.5 and 0.25; 25 % and 12.5 %; 3 and 1.5.
    assert "mean squared error 0.375 of pixels between 0 and 1; 75 % of its 32 codes are in use" in text
    assert "names 18.8 % of hidden tokens (guessing among 32 codes: 3.1 %)" in text
    assert f"loss 2.25 (guessing evenly among 32 codes: {math.log(32):.2f}); linear probe, 50 labels: 79.4 %" in text
    assert "None of them is shown a label." in text and "no gain over raw pixels is to be expected" in text
    assert rows(reader, "addp")[1] == ["addp", "79.4", MISSING] and rows(reader, "classifier")[0][-1] == "98.5"
    alternatives = " ".join(reader.alternatives)
    assert "mean squared error from the first to the last logged step. tokenizer tokenizer: 0.5 to 0.25" in alternatives
    assert "% of hidden tokens named from the first to the last logged step." in alternatives
    assert ": 25 to 12.5." in alternatives


def test_what_is_true_of_digits_is_not_said_of_others(tmp_path):
    text = words(page([write_third_road(tmp_path / "study", [0], "cifar10")], tmp_path)[1])
    assert "The networks behind the images" in text and "raw pixels" not in text


def test_images_that_are_gone_leave_the_numbers(study, tmp_path):
    folder = tmp_path / "study"
    shutil.copytree(study, folder)
    for arm in ARMS:
        shutil.rmtree(folder / f"{arm}-s0" / "images")
        for name in ("grid.png", "film.png"):
            (folder / f"{arm}-s0" / name).unlink()
    text = words(page([folder], tmp_path)[1])
    assert "The images that were made" not in text and "at a Frechet distance of 5.0" in text


def test_an_arm_that_is_not_made_yet_waits_in_its_chart(study, tmp_path):
    folder = tmp_path / "study"
    shutil.copytree(study, folder)
    (folder / "result.json").unlink()
    shutil.rmtree(folder / "one_step-s0")
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    del recipe["headline"]
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    _, reader = page([folder], tmp_path)
    text = words(reader)
    assert "Still to come: ADDP: all tokens at once (not started)" in text and "to come" in text
    assert len([a for a in reader.alternatives if a.startswith("Score of each arm")]) == 1
    assert "drawn all at once" not in text


def test_two_roads_on_one_page_have_a_chart_each(tmp_path):
    folder = write_second_road(tmp_path / "study", [0])
    every = {name: stage for name, stage in stages().items() if name != "classifier"}
    write_stages(folder, every, [0])
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["stages"] |= every
    recipe["arms"] |= ARMS
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    _, reader = page([folder], tmp_path)
    text, charts = words(reader), [a for a in reader.alternatives if a.startswith("Score of each arm")]
    assert [c.partition(".")[0] for c in charts] == [
        "Score of each arm in percent (top-1)",
        "Score of each arm, lower is better (Frechet distance)",
    ]
    assert "Judged by Frechet distance" in text and "are at a Frechet distance of 5.0" in text
    assert "The student that never saw a real image scores 97.0 % by top-1." in text
    assert "(in points where the score is in percent)" in text
    assert text.index("never saw a real image scores") < text.index("at a Frechet distance of 5.0")
    ids = [a["id"] for _, a in reader.tags if "id" in a]
    assert len(ids) == len(set(ids))


def test_runs_of_the_third_road_side_by_side(study, tmp_path):
    folders = [study / f"{name}-s0" for name in ("alternation", "tokenizer")]
    _, reader = page(folders, tmp_path)
    text = words(reader)
    assert "Scores, lower is better; over several seeds" in text and "The images that were made" in text
    assert any(a.startswith("Score, lower is better (Frechet distance).") for a in reader.alternatives)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_a_phone_shows_the_third_road_without_sideways_scrolling(seeds, tmp_path):
    width, console = on_a_phone(page([seeds], tmp_path)[0], tmp_path)
    assert width <= 390 and "CONSOLE" not in console
