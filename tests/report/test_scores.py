"""Words for scores, and tables that fit: pytest tests/report/test_scores.py"""

import pytest

from diffrep.evaluation.classify import classifier_scores
from diffrep.evaluation.protocols import OF_INCEPTION
from diffrep.report.numbers import Paired, paired
from diffrep.report.page import Table
from diffrep.report.scores import (
    MEANING,
    WORDS,
    average_of,
    axis_words,
    best,
    meanings,
    score_words,
    short_words,
    unit_words,
    valued,
)
from diffrep.report.values import Entry


def test_every_score_of_a_classifier_has_words_and_a_meaning():
    names = [name for name in classifier_scores.__doc__.split("``") if name.isidentifier()]
    assert {"top1", "top5", "ece", "agreement"} <= set(names) and set(names) <= set(WORDS) & set(MEANING)


def test_words():
    assert score_words("linear_probe_1078") == "linear probe, 1,078 labels" and short_words("knn_50") == "k-NN"
    assert axis_words("top1") == "% correct, top-1" and "lower is better" in axis_words("ece")
    assert axis_words("agreement").startswith("% alike")
    assert score_words("made_up") == "made up" and meanings(["made_up"]) == ""
    assert meanings(["knn_50", "knn_100", "top1"]) == f"{MEANING['knn']} {MEANING['top1']}"


def test_the_best_of_a_score_that_should_be_low_is_the_lowest():
    arms = [Entry(str(v), str(v), {}, scores={0: {"ece": v, "top1": v}}) for v in (2.0, 1.0, 3.0)]
    assert (best(arms, "ece").name, best(arms, "top1").name) == ("1.0", "3.0")


@pytest.mark.parametrize(("low", "word"), [(False, "better"), (True, "worse")])
def test_a_difference_is_good_or_bad_by_the_score(low, word):
    assert Paired((1.0, 1.1, 0.9), is_low_better=low).word() == word


def test_noise_that_is_not_known_is_not_named():
    one = paired({0: 91.0}, {0: 90.0}, 0)
    assert one is not None and one.reading() == "higher; one seed"
    known = paired({0: 91.0}, {0: 90.0}, 400)
    assert known is not None and known.reading() == "higher, within the noise of the test set; one seed"


def test_a_table_takes_the_room_that_its_cells_need():
    # 22 characters for the names; each column its longest cell or head word and 3; 80 fit.
    assert not Table("", ["", *["head"] * 6], [["x", *["1.0"] * 6]]).is_wide  # 22 + 6 x 8 = 70
    assert Table("", ["", *["head"] * 8], [["x", *["1.0"] * 8]]).is_wide  # 86
    assert Table("", ["", *["head"] * 4], [["group"], ["x", *["98.1 ± 0.3 (5)"] * 4]]).is_wide  # 22 + 4 x 17 = 90
    assert not Table("", ["", *["a long head"] * 4], [["x", *["1.0"] * 4]]).is_wide
    assert not Table("", ["", *["head"] * 8], [["x", *["1.0"] * 8]], prose=True).is_wide


def test_a_distance_has_no_unit_and_a_percentage_has():
    assert valued("frechet", [8.94]) == "8.9" and valued("kernel", [0.13801]) == "0.1380"
    assert valued("top1", [98.0, 97.0]) == "97.5 ± 0.7\u00a0%" and average_of("top1", [98.0, 97.0]) == "97.5\u00a0%"
    assert valued("top1", []) == average_of("frechet", []) == "not known yet"
    assert axis_words("frechet") == "Frechet distance, lower is better" and "higher is better" in axis_words("is")
    assert unit_words(["top1"]) == " in percent" and unit_words(["frechet", "kernel"]) == ", lower is better"
    assert unit_words(["top1", "frechet"]) == " in percent, but Frechet distance"


def test_the_least_distance_is_the_best():
    arms = [Entry(str(v), str(v), {}, scores={0: {"frechet": v}}) for v in (2.0, 1.0, 3.0)]
    assert best(arms, "frechet").name == "1.0"


@pytest.mark.parametrize("name", OF_INCEPTION)
def test_names_of_inceptions_scores_say_whose_they_are(name):
    assert "Inception" in score_words(name.lower())


def test_a_difference_is_printed_as_finely_as_its_score():
    found = paired({0: 0.125}, {0: 0.1125}, 0, True, 4)
    assert found is not None and found.shown() == "+0.0125"
