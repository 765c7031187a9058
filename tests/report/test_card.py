"""The page of a data card, from numbers that were made up: pytest tests/report/test_card.py"""

import copy
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from diffrep.report import card_pictures
from diffrep.report.card import card_page, write_card
from diffrep.report.card_words import alarms, doubts, far, findings, lines, verdict
from diffrep.report.page import render

PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="
)
HOSTILE = "<script>alert('class')</script> & \"q\""
ROW = {"class": None, "images": 60, "agreement": 91.25, "confidence": 97.5, "margin": -0.125}
NEAR = {"images": 60, "real_images": 539, "threshold": 19.75, "count": 0, "share": 0.0, "expected": 1.0, "noise": 1.4}


def pair(distance):
    return {"images": ["set:7", "training image 9"], "distance": distance, "png": [PIXEL, PIXEL]}


def space(name="pixels", unit="grey levels", **near):
    ramp = [k / 4 for k in range(101)]
    against = NEAR | {"train_images": 1078, "pairs": [pair(1.5)], "quantiles": {"drawn": ramp, "held_out": ramp}} | near
    return {"name": name, "unit": unit, "width": 192, "within": {"images": 60, "pairs": [pair(12.25)], "equal": NEAR},
            "against": against}  # fmt: skip


@pytest.fixture
def found():
    sampling = {"sampler": "ddim", "num_sampling_steps": "20", "guidance_scale": 1.5, "guidance_interval": [0.1, 2.0]}
    doubted = {"png": PIXEL, "image": "set:3", "asked": HOSTILE, "said": "two", "confidence": 99.5, "margin": -0.99}
    rows = [ROW | {"class": name, "real": None} for name in (HOSTILE, "two")]
    measured = [("the set, real training images", 1078, 1.32), ("half", 536, 1.58), ("floor: halves", 536, 0.29)]
    return {
        "set": {"name": "s0", "reference": "synthetic:s0", "images": 60, "image_size": [8, 8], "licence": "MIT",
                "classes": [HOSTILE, "two"], "counts": [40, 20], "without_label": 0, "pixels_sha256": "ab" * 32},
        "made": {"content_hash": "cd" * 32, "calls_per_image": 20,
                 "settings": {"seed": 4, "synthesis": {"sampling": sampling}},
                 "generator": {"name": "a generator", "sha256": "ef" * 32, "labels_seen": {"condition": 1078}},
                 "cost": {"cpu_seconds": 65.0, "network_calls": 1200, "multiply_adds": 12_300_000_000}},
        "teacher": {"name": "judge", "sha256": "12" * 32, "licence": "CC BY-NC 4.0", "num_classes": 2,
                    "labels_seen": {"student": 50}, "pooled": 128},
        "real": {"reference": "digits", "licence": "CC BY 4.0", "fingerprint": "34" * 32, "train_images": 1078,
                 "held_out_images": 539, "held_out_split": "test"},
        "said": ["judge was trained on something else."],
        "sheet": {"classes": 2, "columns": 10, "rows": [{"name": n, "png": PIXEL} for n in (HOSTILE, "two")]},
        "opinion": {"all": ROW, "real": ROW | {"agreement": 98.3}, "confidence": 97.5, "rows": rows,
                    "doubted": [doubted]},
        "repeats": {"repeated": 0, "most": 1, "copies": 0},
        "spaces": [space(), space("judge's pooled features", "cosine distance", threshold=0.0019)],
        "frechet": {"name": "Frechet distance on judge's pooled features", "width": 128, "is_matched": True,
                    "left_out": [],
                    "rows": [{"what": w, "images": n, "value": v, "is_reliable": True} for w, n, v in measured]},
    }  # fmt: skip


class Page(HTMLParser):
    """Checks that elements close in order; keeps text, images without words, and addresses that would be loaded."""

    VOID = {"meta", "link", "br", "img", "wbr"}

    def __init__(self, html):
        super().__init__()
        self.open, self.words, self.loaded, self.tags = [], [], [], []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.open += [] if tag in self.VOID else [tag]
        self.loaded += [v for k, v in attributes if k in ("src", "href") and not v.startswith("data:")]

    def handle_startendtag(self, tag, attributes):
        self.loaded += [v for k, v in attributes if k in ("src", "href") and not v.startswith("data:")]

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", "".join(self.words))


def shown(found):
    return Page(render(card_page(found)))


def test_the_page_is_whole_loads_nothing_and_escapes_names(found, tmp_path):
    html = write_card(found, tmp_path / "card.html").read_text()
    page = Page(html)
    assert page.loaded == [] and "script" not in page.tags and "<script>alert" in page.text
    assert html.count('role="img" aria-label="') == len(re.findall(r"<figure>", html)) >= 7
    for wanted in (
        "ddim, 20 steps", "scale 1.5, only for sigma in [0.1, 2.0]", "1 min 5 s of CPU, 1,200 network calls, 12.3 G",
        "a generator", "cdcdcdcdcdcdcdcd…", "Non-commercial use only (the teacher: CC BY-NC 4.0)",
        "judge was trained on", "\u22120.12", "N of each", "1,078", "0.29",
    ):  # fmt: skip
        assert wanted in page.text, wanted


def test_sentences_of_a_set_without_fault(found, tmp_path):
    said = dict(findings(found))
    assert "in 91.2 % of the images; of held-out real images it gets 98.3 % right" in said["Labels"]
    assert said["Repeats within the set"].startswith("No two images are equal. Suspiciously near to another: 0.0 %")
    assert "0.0 % in judge's pooled features (no more than chance)" in said["Memorisation"]
    distance = said["Frechet distance on judge's pooled features"]
    assert distance == "1.32 (N = 1,078 of each); at N = 536 1.58, where two real halves have 0.29."
    assert alarms(found) == [] and lines(found, tmp_path)[1] == "judge was trained on something else."


def test_faults_cannot_be_overlooked(found):
    found["repeats"] = {"repeated": 1234, "most": 56, "copies": 78}
    found["spaces"][0]["within"]["equal"] = NEAR | {"share": 60.0}
    assert len(alarms(found)) == 2
    page = shown(found)
    assert "1,234 images equal an earlier one pixel for pixel; one occurs 56 times." in page.text
    assert "78 images equal a training image pixel for pixel." in page.text and "far more than chance" in page.text


@pytest.mark.parametrize(
    ("share", "noise", "words"),
    [(3.0, 1.0, "no more than chance"), (3.1, 1.0, "more than chance"), (9.9, 4.45, "no more than chance"),
     (10.0, 1.0, "far more than chance"), (0.0, 0.1, "no more than chance")],
)  # fmt: skip
def test_two_standard_errors_decide(share, noise, words):
    assert verdict({"share": share, "expected": 1.0, "noise": noise}) == words


def test_a_distance_says_why_it_is_not_to_be_trusted(found):
    frechet = found["frechet"]
    assert doubts(frechet) == []
    frechet |= {"is_matched": False, "left_out": [str(k) for k in range(8)]}
    frechet["rows"][1] |= {"is_reliable": False, "images": 99}
    assert len(doubts(frechet)) == 3 and "99 images for 128 features" in doubts(frechet)[1]
    assert "0, 1, 2, 3, 4 and 3 more" in doubts(frechet)[2]
    assert "too few images" in shown(found).text


def test_what_is_unknown_leaves_its_section_out(found):
    found |= {"made": None, "teacher": None, "real": None, "opinion": None, "frechet": None, "said": []}
    found["set"] |= {"counts": None, "classes": []}
    found["sheet"] = {"classes": 0, "columns": 10, "rows": [{"name": "", "png": PIXEL}]}
    found["spaces"] = [{"name": "pixels", "unit": "grey levels", "width": 3, "within": {"images": 1, "pairs": []}}]
    page = shown(found)
    assert "no manifest" in page.text and "teacher" not in page.text.split("What this page cannot tell")[0]
    assert [name for name, _ in findings(found)] == ["Repeats within the set"]


def test_a_set_whose_labels_nobody_judges_tells_confidence_alone(found):
    nothing = {"class": None, "images": 0, "agreement": None, "confidence": None, "margin": None}
    doubted = found["opinion"]["doubted"][0] | {"asked": None, "margin": None, "said": "its class 3"}
    found["opinion"] |= {"all": nothing, "rows": [], "real": nothing, "doubted": [doubted]}
    page = shown(found)
    assert "97.5 % on average" in page.text and "smallest confidence" in page.text and "asked" not in page.text


def test_a_thousand_classes_fold(found):
    names = [f"class {k}" for k in range(1000)]
    found["set"] |= {"classes": names, "counts": list(range(1000))}
    found["opinion"]["rows"] = [ROW | {"class": name} for name in names]
    page = shown(found)
    assert "Between 0 and 999 of a class. 1 classes have no image." in page.text
    assert page.text.count("All 1000 classes") == 2 and 'class="bars"' not in render(card_page(found))


def test_distances_are_named_with_their_unit(found):
    assert far(16.44, found["spaces"][0]) == "16.4 grey levels"
    assert far(0.00191, found["spaces"][1]) == "cosine distance 0.0019"


# Pictures


def points(svg):
    """x and y of every line's points, and the texts."""
    root = ElementTree.fromstring(str(svg))
    lines = [
        [tuple(map(float, p.split(","))) for p in line.get("points").split()]
        for line in root.iter("{http://www.w3.org/2000/svg}polyline")
    ]
    return lines, [t.text for t in root.iter("{http://www.w3.org/2000/svg}text")]


def test_a_distribution_rises_from_left_to_right():
    ramp = [10 + k / 2 for k in range(101)]
    lines, texts = points(card_pictures.distributions({"set": ramp, "real": ramp[::-1][::-1]}, 12.0, "grey levels"))
    curve = max(lines, key=len)
    assert len(curve) > 90 and curve == sorted(curve, key=lambda p: (p[0], -p[1]))
    assert {"set", "real", "20", "50", "100 %", "grey levels"} <= set(texts)


@pytest.mark.parametrize("threshold", [0.0, 1e-7, 20.0])
@pytest.mark.parametrize("values", [[0.0] * 101, [0.0] * 60 + [5.0] * 41, [7.0] * 101, [1e-6 * k for k in range(101)]])
def test_any_distances_can_be_drawn(values, threshold):
    lines, _ = points(card_pictures.distributions({HOSTILE: values, "real": [3.0] * 101}, threshold, "unit"))
    assert all(0 <= x <= 440 and 0 <= y <= 400 for line in lines for x, y in line)


def test_long_names_stand_above_their_row_and_are_cut():
    _, short = points(card_pictures.sheet([("0", PIXEL), ("1", PIXEL)], 10, 1.0, True))
    svg = card_pictures.sheet([("0", PIXEL), ("a" * 200, PIXEL)], 10, 1.0, True)
    assert short == ["0", "1"] and points(svg)[1][1].endswith("…") and len(points(svg)[1][1]) < 80
    assert 'width="440.0"' in svg and 'width="440.0"' not in card_pictures.sheet([("0", PIXEL)], 10, 1.0, True)


def test_large_images_are_smoothed_and_small_ones_are_not(found):
    assert "pixelated" in render(card_page(found)).split("</style>")[1]
    large = copy.deepcopy(found)
    large["set"]["image_size"] = [96, 128]
    assert "pixelated" not in render(card_page(large)).split("</style>")[1]
