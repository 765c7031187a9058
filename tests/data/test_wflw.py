"""WFLW as text and as JSON, and the line a wrong file prints: pytest tests/data/test_wflw.py"""

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toy_faces import blank, text_line, wflw_entries

from diffrep.data.datasets import DataConfig
from diffrep.data.dense import load_dense
from diffrep.data.wflw import EYE_CORNERS, MIRRORED, NAMES, SUBSETS, box, faults, read_wflw
from diffrep.errors import UserError

CENTERS = [(482.5, 164.5), (769, 347.5), (786.5, 787), (507.5, 388.5)]  # of the fixture's faces
SCALES = [0.425, 0.455, 0.56, 0.375]
LIST = "face_landmarks_wflw_{}.json"
FLAGS = [(0, 0, 0, 0, 0, 0), (1, 0, 1, 0, 0, 0), (1, 0, 0, 0, 0, 1), (0, 1, 0, 1, 1, 0)]


@pytest.fixture
def fixture(shared):
    return shared / "fixtures/wflw"


@pytest.fixture
def text(fixture, tmp_path):
    """The fixture in the official text layout, beside links to its photographs; two faces train, four test."""
    lists = tmp_path / "WFLW_annotations/list_98pt_rect_attr_train_test"
    lists.mkdir(parents=True)
    lines = [text_line(e, f"event/{f}", flags) for (e, f), flags in zip(wflw_entries(fixture), FLAGS, strict=True)]
    (lists / "list_98pt_rect_attr_test.txt").write_text("\n".join(lines) + "\n")
    (lists / "list_98pt_rect_attr_train.txt").write_text("\n".join(lines[:2]) + "\n")
    (tmp_path / "WFLW_images").mkdir()
    (tmp_path / "WFLW_images/event").symlink_to(fixture / "images")
    return tmp_path


def entry(points=None, **changed):
    """One annotation: 98 points in a square of 40 pixels from (10, 20), or those given."""
    if points is None:
        points = [(10 + 40 * k / 97, 20 + 40 * (k % 2)) for k in range(98)]
    made = {"id": 1, "image_id": 7, "keypoints": [v for x, y in points for v in (x, y, 1)], "iscrowd": 0}
    return {k: v for k, v in (made | changed).items() if v is not ...}


def folder(tmp_path, entries, images=None, part="test", name=None):
    """A folder in the JSON layout; entries may also be a whole content."""
    images = [{"id": 7, "file_name": "a.png", "width": 100, "height": 80}] if images is None else images
    content = {"images": images, "annotations": entries} if isinstance(entries, list) else entries
    file = tmp_path / "annotations" / (name or LIST.format(part))
    file.parent.mkdir(exist_ok=True)
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    blank(tmp_path / "images/a.png", (100, 80))
    return tmp_path


def refused(place):
    with pytest.raises(UserError) as caught:
        part = read_wflw(str(place), "landmark").parts["test"]
        [part.truth(k) for k in range(len(part))]
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400
    return message


# What is read


def test_the_real_sample(fixture):
    found = read_wflw(str(fixture), "landmark")
    part = found.parts["test"]
    assert list(found.parts) == ["test"] and len(part) == 4 and not part.subsets
    faces = [part.truth(k) for k in range(4)]
    assert [tuple(f.center.tolist()) for f in faces] == CENTERS and [f.scale for f in faces] == SCALES
    for face in faces:
        center, scale = box(face.points)
        assert torch.equal(center, face.center) and scale == pytest.approx(face.scale, abs=1e-12)
        assert face.points.shape == (98, 2) and face.points.dtype == torch.float64 and face.visible.all()
    assert found.facts == {"normaliser": EYE_CORNERS} and len(set(found.classes)) == 98
    assert part.image(0)[:2] == b"\xff\xd8"  # a JPEG file
    assert sorted({name.split(",")[0] for name in part.names}) == sorted(p.name for p in fixture.glob("images/*"))
    assert len(set(part.names)) == 4  # a row is a face; two of them share a photograph


def test_text_and_json_are_two_spellings(fixture, text):
    told, said = read_wflw(str(text), "landmark"), read_wflw(str(fixture), "landmark")
    assert {name: len(part) for name, part in told.parts.items()} == {"train": 2, "test": 4}
    for k in range(4):
        ours, theirs = told.parts["test"].truth(k), said.parts["test"].truth(k)
        assert torch.equal(ours.points, theirs.points) and torch.equal(ours.center, theirs.center)
        assert ours.scale == pytest.approx(theirs.scale, abs=1e-12) and torch.equal(ours.visible, theirs.visible)
        assert told.parts["test"].image(k) == said.parts["test"].image(k)
    assert told.classes == said.classes and told.mirrored == said.mirrored


def test_subsets_are_the_flags_of_the_text(text):
    subsets = read_wflw(str(text), "landmark").parts["test"].subsets
    assert tuple(subsets) == SUBSETS
    assert torch.equal(torch.stack(list(subsets.values()), 1), torch.tensor(FLAGS).bool())


def test_subsets_beside_json_are_found_by_their_points(fixture, tmp_path):
    content = json.loads((fixture / "annotations" / LIST.format("test")).read_text())
    (tmp_path / "images").symlink_to(fixture / "images")
    notes = tmp_path / "annotations"
    notes.mkdir()
    (notes / LIST.format("test")).write_text(json.dumps(content))
    chosen = [dict(content["annotations"][k], id=100 + k) for k in (3, 1)]  # other ids, another order
    (notes / LIST.format("test_blur")).write_text(json.dumps(content | {"annotations": chosen}))
    part = read_wflw(str(tmp_path), "landmark").parts["test"]
    assert {name: belongs.tolist() for name, belongs in part.subsets.items()} == {"blur": [False, True, False, True]}
    chosen[0]["keypoints"] = [v + 1 for v in chosen[0]["keypoints"]]
    (notes / LIST.format("test_blur")).write_text(json.dumps(content | {"annotations": chosen}))
    assert "1 of its faces are not in" in refused(tmp_path)


def test_what_the_converter_of_mmpose_writes(fixture, tmp_path):
    """``is_crowd``, a float centre, a scale of whole pixels, images below WFLW_images."""
    points = [(10.25 + 40 * k / 97, 20.5 + 30 * (k % 2)) for k in range(98)]
    place = folder(tmp_path, [entry(points, iscrowd=..., is_crowd=0, center=[30.25, 35.5], scale=41 / 200)])
    (tmp_path / "images").rename(tmp_path / "WFLW_images")
    face = read_wflw(str(place), "landmark").parts["test"].truth(0)
    assert face.center.tolist() == [30.25, 35.5] and face.scale == 41 / 200  # as it stands there
    folder(tmp_path, [entry(points, iscrowd=..., is_crowd=0)])
    face = read_wflw(str(place), "landmark").parts["test"].truth(0)
    assert face.center.tolist() == [(10 + 51) / 2, (20 + 51) / 2] and face.scale == 41 / 200  # by the rule


@pytest.mark.parametrize("key", ["iscrowd", "is_crowd"])
def test_crowds_are_no_faces(tmp_path, key):
    place = folder(tmp_path, [entry(iscrowd=...), entry(**{"iscrowd": ..., key: 1})])
    assert len(read_wflw(str(place), "landmark").parts["test"]) == 1


def test_points_that_are_not_visible_have_no_part_in_the_box(tmp_path):
    made = entry()
    made["keypoints"][:3] = [99.0, 79.0, 0]
    face = read_wflw(str(folder(tmp_path, [made])), "landmark").parts["test"].truth(0)
    assert not face.visible[0] and int(face.visible.sum()) == 97
    assert torch.equal(face.center, box(face.points[1:])[0])


def test_the_pairs_of_a_mirror_image():
    partner = dict(MIRRORED) | {b: a for a, b in MIRRORED}
    assert len(MIRRORED) == 44 and len(partner) == 88
    assert set(range(98)) - set(partner) == {16, 51, 52, 53, 54, 57, 79, 85, 90, 94}
    assert partner[60] == 72 and partner[96] == 97 and partner[33] == 46 and partner[68] == 64 and partner[95] == 93
    assert all(NAMES[a].split()[0] == NAMES[b].split()[0] for a, b in MIRRORED)  # brow with brow


@pytest.mark.golden(of=lambda case: "outputs/wflw_flip_pairs" in case.keys)
def test_pairs_are_the_official_ones(golden_case):
    assert torch.equal(torch.tensor(MIRRORED), golden_case.get("outputs/wflw_flip_pairs"))


def test_mirrored_points_lie_across_the_real_faces(fixture):
    """On every sample face the line between partners runs as the one between the eye corners, in either direction."""
    part = read_wflw(str(fixture), "landmark").parts["test"]
    for k in range(4):
        points = part.truth(k).points
        across = torch.stack([points[b] - points[a] for a, b in MIRRORED])
        eyes = points[72] - points[60]
        agree = torch.nn.functional.cosine_similarity(across, eyes.expand_as(across), dim=1)
        assert float(agree.median()) > 0.9 and bool((agree.abs() > 0.7).float().mean() > 0.95)


def test_a_split_of_the_training_list_is_held_out(text):
    lines = (text / "WFLW_annotations/list_98pt_rect_attr_train_test/list_98pt_rect_attr_train.txt").read_text()
    file = text / "WFLW_annotations/list_98pt_rect_attr_train_test/list_98pt_rect_attr_train.txt"
    file.write_text(lines * 10)  # 20 faces
    config = DataConfig(source=f"wflw:{text}")
    train, held_out = (load_dense(config, split, "landmark") for split in ("train", "validation"))
    assert (len(train), len(held_out)) == (18, 2) and not set(train.positions) & set(held_out.positions)
    assert len(load_dense(config, "train", "landmark", holds_out=False)) == 20
    assert len(load_dense(config, "test", "landmark")) == 4
    image, face = train[0]
    assert image.shape[0] == 3 and image.dtype == torch.uint8 and face.points.shape == (98, 2)


def test_changed_annotations_are_another_set(text):
    config = DataConfig(source=f"wflw:{text}")
    before = load_dense(config, "test", "landmark").fingerprint
    assert load_dense(config, "test", "landmark").fingerprint == before
    file = text / "WFLW_annotations/list_98pt_rect_attr_train_test/list_98pt_rect_attr_test.txt"
    file.write_text(file.read_text().replace(" 0 ", " 00 ", 1).replace(" 00 ", " 1  ", 1))
    assert load_dense(config, "test", "landmark").fingerprint != before


# What is refused


def test_a_folder_without_lists(tmp_path):
    assert "no list of faces" in refused(tmp_path)
    folder(tmp_path, [entry()])
    (tmp_path / "images/a.png").unlink()
    (tmp_path / "images").rmdir()
    assert "no folder WFLW_images or images" in refused(tmp_path)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ([], "lists no face"),
        ({"annotations": []}, "not COCO's form"),
        ({"images": {}, "annotations": []}, "not COCO's form"),
        ({"images": [], "annotations": [3]}, "not COCO's form"),
        ('"faces"', "not COCO's form"),
        ([entry(image_id=8)], "annotation 1: image_id 8 names no entry of 'images'"),
        ([entry(image_id=[])], "annotation 1: image_id [] names no entry"),
        ([entry(keypoints=[1.0] * 293)], "annotation 1: keypoints: 293 numbers; 98 points (x, y, v) take 294"),
        ([entry(keypoints=...)], "annotation 1: keypoints: no list"),
        ([entry(keypoints=["x"] * 294)], "annotation 1: 'x' stands where a finite number is needed"),
        ([entry(keypoints=[float("nan")] * 294)], "'nan' stands where"),
        ([entry(keypoints=[0] * 294)], "no point is visible"),
        ([entry([(5, 5)] * 98)], "all points are one"),
        ([entry(center=[1, 2], scale=0)], "annotation 1: center and scale [1.0, 2.0, 0.0]"),
        ([entry(center=[1], scale=1)], "two numbers, and one above 0"),
        ([entry(center=3, scale=[1])], "annotation 1, center and scale: '[1]' stands where"),
    ],
)
def test_json_that_is_not_cocos(tmp_path, content, told):
    message = refused(folder(tmp_path, content))
    assert told in message and (LIST.format("test") in message)


@pytest.mark.parametrize("shift", [(-60, 0), (0, -70), (75, 0), (0, 60), (1e6, 0)])
def test_points_outside_the_image(tmp_path, shift):
    points = [(10 + 40 * k / 97 + shift[0], 20 + 40 * (k % 2) + shift[1]) for k in range(98)]
    message = refused(folder(tmp_path, [entry(points)]))
    assert "annotation 1: point" in message and "lies outside a.png, which is 100x80" in message


def test_a_cut_face_may_reach_a_little_beyond_the_edge(tmp_path):
    points = [(40 * k / 97 - 5, 20 + 40 * (k % 2)) for k in range(98)]  # 5 of its 40 pixels
    place = folder(tmp_path, [entry(points)])
    assert len(read_wflw(str(place), "landmark").parts["test"]) == 1
    said = list(faults(str(place)))
    assert len(said) == 1 and said[0].startswith("note: ") and "points lie beyond the edge of a.png" in said[0]


def test_missing_images_are_counted_and_named(tmp_path):
    images = [{"id": 7, "file_name": "a.png"}, {"id": 8, "file_name": "event/b.png"}]
    place = folder(tmp_path, [entry(), entry(id=2, image_id=8)], images)
    assert "1 of 2 images are missing, first event/b.png" in refused(place)


@pytest.mark.parametrize("name", ["x\0y.png", "a" * 300 + ".png", "../../none.png"])
def test_odd_file_names_are_missing_images(tmp_path, name):
    assert "images are missing" in refused(folder(tmp_path, [entry()], [{"id": 7, "file_name": name}]))


def lines_of(text):
    return text / "WFLW_annotations/list_98pt_rect_attr_train_test/list_98pt_rect_attr_test.txt"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda fields: fields[2:], "line 2: 205 fields"),
        (lambda fields: ["1.0", *fields], "line 2: 208 fields"),
        (lambda fields: ["x", *fields[1:]], "line 2: 'x' stands where a finite number is needed"),
        (lambda fields: ["inf", *fields[1:]], "line 2: 'inf' stands"),
        (lambda fields: [*fields[:200], "2", *fields[201:]], "line 2: flag '2'"),
        (lambda fields: [*fields[:206], "event/none.jpg"], "1 of 3 images are missing, first event/none.jpg"),
        (lambda fields: ["-500", *fields[1:]], "line 2: point 0 at (-500,"),
        (lambda fields: ["5"] * 196 + fields[196:], "line 2: all points are one"),
    ],
)
def test_lines_that_are_no_faces(text, change, told):
    lines = lines_of(text).read_text().splitlines()
    lines[1] = " ".join(change(lines[1].split()))
    lines_of(text).write_text("\n".join(lines))
    assert told in refused(text)


def test_a_list_that_is_no_text(text):
    lines_of(text).write_bytes(b"\xff\xfe\x00")
    assert "cannot be read (UnicodeDecodeError)" in refused(text)


# What is found on disk


def test_nothing_is_wrong_with_the_real_sample(fixture, text):
    assert not list(faults(str(fixture)))
    assert not list(faults(str(text)))


def test_every_fault_is_named(tmp_path):
    images = [{"id": k, "file_name": f"{k}.png", "width": 100, "height": 80} for k in range(7)]
    corners = entry(id=5, image_id=5)
    for k in EYE_CORNERS:
        corners["keypoints"][3 * k : 3 * k + 2] = [30, 30]
    entries = [entry(id=k, image_id=k) for k in range(5)] + [corners, entry(id=6, image_id=6, keypoints=[1])]
    place = folder(tmp_path, entries, images)
    for k in range(7):
        blank(place / f"images/{k}.png", (100, 80) if k != 1 else (90, 80))
    (place / "images/2.png").write_bytes(b"no picture")
    (place / "images/3.png").unlink()
    said = list(faults(str(place)))
    assert len(said) == 5
    for part in (
        "annotation 1: 1.png is 90x80, the list says 100x80",
        "2.png is no image (UnidentifiedImageError)",
        "3.png is missing",
        "annotation 5: both eye corners are one point",
        "annotation 6: keypoints: 1 numbers",
    ):
        assert sum(part in line for line in said) == 1, part


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_stands_in_an_entry_gives_one_line_or_a_face(tmp_path, data):
    anything = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
        max_leaves=4,
    )
    made = entry(center=[30, 40], scale=0.2)
    key = data.draw(st.sampled_from(["id", "image_id", "keypoints", "center", "scale", "iscrowd", "point"]))
    if key == "point":
        made["keypoints"][data.draw(st.integers(0, 293))] = data.draw(anything)
    else:
        made[key] = data.draw(anything)
    image = {"id": 7, "file_name": "a.png", "width": 100, "height": 80}
    image[data.draw(st.sampled_from(["id", "file_name", "width", "height", "other"]))] = data.draw(anything)
    place = folder(tmp_path, [made], [image])
    try:
        part = read_wflw(str(place), "landmark").parts["test"]
        assert all(part.truth(k).points.isfinite().all() for k in range(len(part)))
    except UserError as error:
        assert "\n" not in str(error)
    assert all("\n" not in line for line in faults(str(place)))
