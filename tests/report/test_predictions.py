"""Predictions beside truth in a report: pytest tests/report/test_predictions.py"""

import json

import pytest
from folders import CHROMIUM, on_a_phone, page, row, rows, words, write_folder
from PIL import Image

from diffrep.errors import UserError
from diffrep.report.compare import _names
from diffrep.report.numbers import MINUS, MISSING
from diffrep.report.values import Entry, role, score_names

SEGMENT = {
    "miou": 61.234,
    "miou_parts": 59.5,
    "pixel_accuracy": 92.0,
    "mean_accuracy": 70.0,
    "classes": {"skin": 90.5, "hair & hat": 80.0, "ear_r": None, "nose": 85.25},
    "best_step": 12,
}
LANDMARK = {
    "nme": 4.603, "fr10": 2.5, "auc10": 53.1,
    "nme_largepose": 7.86, "fr10_largepose": 11.0, "auc10_largepose": 31.0,
    "nme_blur": 5.36, "fr10_blur": 4.0, "auc10_blur": 48.0,
}  # fmt: skip
DETECT = {
    "box_ap": 51.7, "box_ap50": 72.0, "box_ap75": 56.0,
    "box_ap_small": 35.0, "box_ap_medium": 55.0, "box_ap_large": 67.0,
    "mask_ap": 45.9, "mask_ap50": 69.0, "mask_ap75": 50.0, "mask_ap_small": 30.0,
    "box_ar_1": 40.0, "mask_ar_100": 50.0,
    "classes": {"person": {"box_ap": 55.0, "mask_ap": 50.0}, "zebra": {"box_ap": 71.0, "mask_ap": None}},
}  # fmt: skip


def dense_run(folder, task, scores, panels=0, seed=0, **method):
    recipe = {
        "name": f"{task}_debug",
        "seed": seed,
        "kind": "recipe",
        "data": {"source": "celebamask-hq:data/faces"},
        "method": {"kind": task, **method},
        "train": {"steps": 2},
    }
    result = {"scores": scores, "steps": 2, "seed": seed, "licence": "MIT"}
    metrics = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 1.5}]
    write_folder(folder, recipe, result, metrics)
    if panels:
        draw_panels(folder / "samples", panels)
    return folder


def draw_panels(samples, count, metric="mIoU %"):
    samples.mkdir()
    listing = []
    for k in range(count):
        Image.new("RGB", (240, 100), (10 * k, 0, 0)).save(samples / f"prediction_{k:03d}.jpg")
        one = {"file": f"prediction_{k:03d}.jpg", "name": f"face <{k}>.jpg", "score": 1.5 + k, "metric": metric}
        listing.append(one)
    (samples / "predictions.json").write_text(json.dumps(listing))


def embedded(text):
    return text.count("data:image/jpeg;base64,")


def test_pictures_stand_in_the_page_worst_first(tmp_path):
    text, reader = page([dense_run(tmp_path / "run", "segment", SEGMENT, panels=6)], tmp_path)
    assert "Predictions, worst first" in words(reader) and embedded(text) == 6
    captions = [f"{k + 1}. face <{k}>.jpg: mIoU {1.5 + k:.2f}\u00a0%" for k in range(6)]
    places = ["".join(reader.text).index(caption) for caption in captions]
    assert places == sorted(places)
    assert "The next 2" in words(reader)  # four stand open
    assert text.index(captions[3].replace("<", "&lt;").replace(">", "&gt;")) < text.index("<details>")
    assert "Truth and prediction of face <0>.jpg: mIoU 1.50\u00a0%." in reader.alternatives
    assert 'src="http' not in text and 'href="http' not in text


def test_masks_have_their_classes_and_their_words(tmp_path):
    text, reader = page([dense_run(tmp_path / "run", "segment", SEGMENT)], tmp_path)
    assert embedded(text) == 0
    order = [r[0] for r in reader.rows if r and r[0] in SEGMENT["classes"]]
    assert order == ["skin", "nose", "hair & hat", "ear_r"]
    assert row(reader, "nose") == ["nose", "85.2"] and row(reader, "ear_r") == ["ear_r", MISSING]
    assert "mIoU 61.2\u00a0%; mIoU without background 59.5\u00a0%; pixel accuracy 92.0\u00a0%." in "".join(reader.text)
    heads = next(r for r in reader.rows if "mIoU" in r)
    assert "classes" not in heads and "best step" not in heads
    assert "mIoU: large dots are means" in words(reader)  # a word's own capitals stay
    assert "Cross-entropy of the pixels' classes" in words(reader) and "semantic segmentation" not in heads


def test_landmarks_have_their_subsets(tmp_path):
    _, reader = page([dense_run(tmp_path / "run", "landmark", LANDMARK)], tmp_path)
    assert row(reader, "all") == ["all", "4.60", "2.50", "53.10"]
    assert row(reader, "large pose") == ["large pose", "7.86", "11.00", "31.00"]
    assert row(reader, "blur") == ["blur", "5.36", "4.00", "48.00"]
    assert rows(reader, "nme largepose") == []
    (head,) = [r for r in reader.rows if "labels seen in training" in r]
    assert head[4:7] == ["NME", "failure rate", "AUC"] and len(head) == 8


def test_objects_have_their_sizes(tmp_path):
    _, reader = page([dense_run(tmp_path / "run", "detect", DETECT)], tmp_path)
    assert row(reader, "boxes") == ["boxes", "51.7", "72.0", "56.0", "35.0", "55.0", "67.0"]
    assert row(reader, "masks") == ["masks", "45.9", "69.0", "50.0", "30.0", MISSING, MISSING]
    assert ["", "box AP", "mask AP"] in reader.rows
    assert row(reader, "zebra") == ["zebra", "71.0", MISSING] and row(reader, "person") == ["person", "55.0", "50.0"]
    assert [r[0] for r in reader.rows if r[0] in ("person", "zebra")] == ["zebra", "person"]


def test_several_runs_lie_side_by_side(tmp_path):
    runs = [dense_run(tmp_path / f"a{seed}", "segment", SEGMENT | {"miou": 60.0 + seed}, 1, seed) for seed in (0, 1)]
    runs.append(dense_run(tmp_path / "b", "segment", SEGMENT | {"classes": {"nose": 12.0}}, 7, init="runs/x"))
    text, reader = page(runs, tmp_path)
    assert embedded(text) == 1 + 4  # of each recipe the first seed, and not more than four pictures
    nose = row(reader, "nose")
    assert nose[1] == "85.2 ± 0.0 (2)" and nose[2] == "12.0"
    assert "60.5 ± 0.7" in words(reader)


def test_a_run_without_predictions_has_no_section(tmp_path):
    run = dense_run(tmp_path / "run", "finetune", {"top1": 90.0})
    _, reader = page([run], tmp_path)
    assert "Predictions" not in words(reader)
    (run / "result.json").unlink()
    _, reader = page([run], tmp_path)
    assert "Predictions" not in words(reader)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{}", "holds no list of predictions"),
        ('[{"name": "x"}]', "holds no list of predictions"),
        ('[{"file": "../../secret.jpg"}]', "holds no list of predictions"),
        ('[{"file": "gone.jpg"}]', "gone.jpg is missing or no readable picture"),
        ('[{"file": "predictions.json"}]', "predictions.json is missing or no readable picture"),
        ("[", "is not readable JSON"),
    ],
)
def test_a_damaged_folder_is_named(tmp_path, content, said):
    run = dense_run(tmp_path / "run", "segment", SEGMENT, panels=1)
    (run / "samples" / "predictions.json").write_text(content)
    with pytest.raises(UserError, match=said):
        page([run], tmp_path)
    assert not (tmp_path / "out").exists()


def test_scores_that_stand_elsewhere_are_no_columns():
    entry = Entry("a", "a", {}, scores={0: SEGMENT}), Entry("b", "b", {}, scores={0: LANDMARK | DETECT})
    found = ["miou", "miou_parts", "pixel_accuracy", "mean_accuracy", "nme", "fr10", "auc10"]
    found += [f"{kind}_ap{end}" for kind in ("box", "mask") for end in ("", "50", "75")]
    assert score_names(entry) == found and sorted(_names(entry)) == sorted(found)


def test_a_study_says_which_start_is_better(tmp_path):
    """Two tasks are two contests, each with its chart; landmarks are better when their error is lower."""
    arms = {
        "seg_scratch": ("segment", {"miou": 50.0}),
        "seg_tuned": ("segment", {"miou": 61.0}),
        "lm_scratch": ("landmark", {"nme": 9.0}),
        "lm_tuned": ("landmark", {"nme": 4.5}),
    }
    stages = {
        name: {"kind": "recipe", "data": {"source": "placed:digits"}, "train": {"steps": 2},
               "method": {"kind": task, "init": "stage:encoder" if "tuned" in name else None}}
        for name, (task, _) in arms.items()
    }  # fmt: skip
    recipe = {"kind": "study", "name": "transfer", "seeds": [0, 1], "stages": stages, "arms": {n: n for n in arms}}
    write_folder(tmp_path / "study", recipe, {"cpu_seconds": 1.0})
    for name, (task, scores) in arms.items():
        for seed in (0, 1):
            one = {key: value + seed for key, value in scores.items()}
            dense_run(tmp_path / "study" / f"{name}-s{seed}", task, one, 2, seed)
    text, reader = page([tmp_path / "study"], tmp_path)
    said = words(reader)
    assert "The task: to name the class of every pixel." in said and "Judged by NME" in said
    assert "Seg_tuned against seg_scratch (mIoU): +11.0 ± 0.0 (2) (better)" in said
    assert f"(NME, lower is better): {MINUS}4.50 ± 0.00 (2) (better)" in said
    assert embedded(text) == 8


def test_roles_of_dense_arms():
    def of(**method):
        steps = method.pop("steps", 9)
        recipe = {"kind": "recipe", "method": {"kind": "segment", **method}, "train": {"steps": steps}}
        return role(Entry("a", "a", recipe), [])

    assert (of(), of(init="stage:x"), of(steps=0)) == ("scratch", "tuned", "untrained")


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
def test_pictures_fit_a_phone(tmp_path):
    text, _ = page([dense_run(tmp_path / "run", "detect", DETECT, panels=5)], tmp_path)
    width, said = on_a_phone(text, tmp_path)
    assert width <= 390 and "CONSOLE" not in said
