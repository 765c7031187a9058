"""ImageNet in folders and in its official tar files: pytest tests/data/test_imagenet.py"""

import csv
import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from diffrep.data.datasets import DataConfig, load_data
from diffrep.data.sources import read_source
from diffrep.errors import UserError

IDS = ["n01440764", "n01698640", "n02077923"]  # the 1st, 51st and 151st of the 1,000: labels.csv of the fixture
LABELS = [0, 50, 150]


def jpeg(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG")
    return buffer.getvalue()


TRAIN = {wnid: {f"{wnid}_{k}.JPEG": jpeg(10 * n + k) for k in range(4)} for n, wnid in enumerate(IDS)}
VAL = {f"ILSVRC2012_val_{k:08d}.JPEG": jpeg(100 + k) for k in range(1, 7)}
VAL_IDS = [IDS[2], IDS[0], IDS[0], IDS[1], IDS[2], IDS[1]]
VAL_LABELS = [150, 0, 0, 50, 150, 50]


def write_tar(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def write_files(root, files: dict[str, bytes]):
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def train_folders(root):
    return write_files(root, {f"train/{w}/{f}": content for w, files in TRAIN.items() for f, content in files.items()})


def train_tar(root):
    """Classes and images out of order, a folder in between."""
    inner = {f"{w}.tar": write_tar(dict(reversed(TRAIN[w].items()))) for w in (IDS[1], IDS[2], IDS[0])}
    return write_files(root, {"ILSVRC2012_img_train.tar": write_tar(inner)})


def val_flat(root):
    return write_files(root, {f"val/{name}": content for name, content in VAL.items()})


def val_tar(root):
    return write_files(root, {"ILSVRC2012_img_val.tar": write_tar(dict(reversed(VAL.items())))})


def listed(labels):
    return "".join(f"{name} {label}\n" for name, label in zip(VAL, labels, strict=True)).encode()


def devkit():
    """Two of its classes are no leaves; its own numbers are not in the order of the WordNet ids."""
    rows = [(3, IDS[0], 0), (1, IDS[1], 0), (2, IDS[2], 0), (1001, "n00001740", 2), (1002, "n00001930", 2)]
    synsets = np.zeros(len(rows), dtype=[("ILSVRC2012_ID", object), ("WNID", object), ("num_children", object)])
    synsets[:] = rows
    meta, own = io.BytesIO(), {wnid: number for number, wnid, _ in rows}
    savemat(meta, {"synsets": synsets[:, None]})
    truth = "".join(f"{own[wnid]}\n" for wnid in VAL_IDS).encode()
    return {"ILSVRC2012_validation_ground_truth.txt": truth, "meta.mat": meta.getvalue()}


def as_archive(files):
    members = {f"ILSVRC2012_devkit_t12/data/{name}": content for name, content in files.items()}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        tar.addfile(tarfile.TarInfo("ILSVRC2012_devkit_t12/readme.txt"))
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def meta(part, rows):
    """meta/PART.txt of (path, class index) pairs, as the official code splits it, in no order."""
    return {f"meta/{part}.txt": "".join(f"{path} {label}\n" for path, label in reversed(rows)).encode()}


TRAIN_ROWS = [(f"{w}/{f}", label) for (w, files), label in zip(TRAIN.items(), LABELS, strict=True) for f in files]
VAL_ROWS = list(zip(VAL, VAL_LABELS, strict=True))


def load(source, split="test", **settings):
    return load_data(DataConfig(source=source, **settings), split)


def all_pixels(images):
    return images.gather(torch.arange(len(images)))


def refused(source):
    with pytest.raises(UserError) as caught:
        read_source(source)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_labels_are_positions_among_the_1000_ids(shared):
    folder = shared / "fixtures/imagenet-sample"
    with open(folder / "labels.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    images = load(f"imagenet:{folder}", image_size=32)
    assert images.labels.tolist() == [int(row["index"]) for row in rows]
    assert len(images.classes) == 1000 and all(images.classes[int(row["index"])] == row["wnid"] for row in rows)
    as_folder = load(f"folder:{folder}", "validation", image_size=32)
    assert torch.equal(all_pixels(images), all_pixels(as_folder))


def test_val_is_the_test_split_and_validation_is_held_out_of_train(tmp_path):
    write_files(val_flat(train_folders(tmp_path)), {"val.txt": listed(VAL_LABELS)})
    sets = [load(f"imagenet:{tmp_path}", split) for split in ("train", "validation", "test")]
    assert [len(s) for s in sets] == [11, 1, 6]
    assert sets[2].labels.tolist() == VAL_LABELS
    assert sum(s.labels.bincount(minlength=1000)[LABELS] for s in sets[:2]).tolist() == [4, 4, 4]


def test_tar_files_are_read_in_place_and_are_the_same_set(tmp_path):
    folders = write_files(val_flat(train_folders(tmp_path / "f")), {"val.txt": listed(VAL_LABELS)})
    tars = write_files(val_tar(train_tar(tmp_path / "t")), {"val.txt": listed(VAL_LABELS)})
    before = sorted(f.name for f in tars.iterdir())
    for split in ("train", "validation", "test"):
        assert load(f"imagenet:{folders}", split).fingerprint == load(f"imagenet:{tars}", split).fingerprint
    parts = [read_source(f"imagenet:{root}").parts["train"] for root in (folders, tars)]
    assert parts[0].names == parts[1].names and parts[1].read(5) == TRAIN[IDS[1]][f"{IDS[1]}_1.JPEG"]
    assert sorted(f.name for f in tars.iterdir()) == before


@pytest.mark.parametrize(
    "tables",
    [
        {"val.txt": listed(VAL_LABELS)},
        {"val.txt": b"\n".join(f"val/{n} {w}".encode() for n, w in zip(VAL, VAL_IDS, strict=True))},
        {"LOC_val_solution.csv": ("ImageId,PredictionString\n" + "".join(
            f"{n.removesuffix('.JPEG')},{w} 1 2 3 4 {w} 5 6 7 8\n" for n, w in zip(VAL, VAL_IDS, strict=True)
        )).encode()},
        devkit(),
        {f"ILSVRC2012_devkit_t12/data/{name}": content for name, content in devkit().items()},
        {"ILSVRC2012_devkit_t12.tar.gz": as_archive(devkit())},
    ],
    ids=["list", "list of ids", "Kaggle", "devkit files", "devkit folder", "devkit archive"],
)  # fmt: skip
@pytest.mark.parametrize("place", [val_flat, val_tar])
def test_every_table_gives_the_same_labels(tmp_path, place, tables):
    images = load(f"imagenet:{write_files(place(tmp_path), tables)}")
    assert images.labels.tolist() == VAL_LABELS
    expected = [np.asarray(Image.open(io.BytesIO(content))) for content in VAL.values()]
    assert np.array_equal(all_pixels(images).permute(0, 2, 3, 1).numpy(), np.stack(expected))


def test_the_list_may_stand_among_the_images(tmp_path):
    root = write_files(val_flat(tmp_path), {"val/val.txt": listed(VAL_LABELS)})
    assert load(f"imagenet:{root}").labels.tolist() == VAL_LABELS


@pytest.mark.parametrize("prefix", ["", "{}/", "./{}/"])
def test_lists_of_the_official_layout_are_the_same_set_as_class_folders(tmp_path, prefix):
    folders = write_files(val_flat(train_folders(tmp_path / "f")), {"val.txt": listed(VAL_LABELS)})
    root = val_flat(train_folders(tmp_path / "m"))
    for part, rows in (("train", TRAIN_ROWS), ("val", VAL_ROWS)):
        write_files(root, meta(part, [(prefix.format(part) + path, label) for path, label in rows]))
    for split in ("train", "validation", "test"):
        sets = [load(f"imagenet:{place}", split) for place in (folders, root)]
        assert sets[0].fingerprint == sets[1].fingerprint and sets[0].labels.tolist() == sets[1].labels.tolist()
    names = [read_source(f"imagenet:{place}").parts["train"].names for place in (folders, root)]
    assert names[0] == [name.removeprefix("./") for name in names[1]]


def test_a_list_comes_before_folders_and_its_names_may_hold_blanks(tmp_path):
    root = train_folders(tmp_path)
    write_files(root, {"my pictures/a fish 3.JPEG": jpeg(7), **meta("train", [("my pictures/a fish 3.JPEG", 151)])})
    part = read_source(f"imagenet:{root}").parts["train"]
    assert (part.names, part.labels.tolist(), part.read(0)) == (["my pictures/a fish 3.JPEG"], [151], jpeg(7))


def test_of_two_files_of_one_name_the_one_beside_the_list_is_meant(tmp_path):
    files = {"a.JPEG": jpeg(1), "train/a.JPEG": jpeg(2), **meta("train", [("a.JPEG", 5)])}
    part = read_source(f"imagenet:{write_files(tmp_path, files)}").parts["train"]
    assert part.names == ["a.JPEG"] and part.read(0) == jpeg(1)


def test_a_class_list_chooses_among_lists_and_shards_too(tmp_path):
    (tmp_path / "two.txt").write_text(f"{IDS[2]}\n{IDS[0]}\n")
    lists = write_files(train_folders(tmp_path / "m"), meta("train", TRAIN_ROWS))
    for root in (lists, as_shards(tmp_path / "s")):
        part = read_source(f"imagenet:{root}@{tmp_path / 'two.txt'}").parts["train"]
        assert part.labels.tolist() == [0] * 4 + [1] * 4
        assert part.read(4) == TRAIN[IDS[2]][f"{IDS[2]}_0.JPEG"]


def as_shards(root):
    """The names that timm's copy has; the key of a sample is its path up to the first dot."""
    samples = [(path, label, TRAIN[path[:9]][path[10:]]) for path, label in TRAIN_ROWS]
    for number in range(3):
        members = {}
        for path, label, content in samples[4 * number : 4 * number + 4]:
            members |= {path.lower().replace("jpeg", "jpg"): content, path.replace("JPEG", "cls"): str(label).encode()}
        write_files(root, {f"imagenet1k-train-{number:04d}.tar": write_tar(members)})
    members = {}
    for number, ((_, content), label) in enumerate(zip(VAL.items(), VAL_LABELS, strict=True)):
        members |= {f"{number:06d}.jpg": content, f"{number:06d}.json": b'{"label": %d}' % label}
    return write_files(root, {"imagenet1k-validation-00.tar": write_tar(members)})


def test_webdataset_shards_are_the_same_images(tmp_path):
    folders = write_files(val_flat(train_folders(tmp_path / "f")), {"val.txt": listed(VAL_LABELS)})
    shards = as_shards(tmp_path / "s")
    for split in ("train", "validation", "test"):
        sets = [load(f"imagenet:{place}", split) for place in (folders, shards)]
        assert sets[0].fingerprint == sets[1].fingerprint and len(sets[1].classes) == 1000


def test_a_class_list_chooses_and_numbers_the_classes(tmp_path):
    root = write_files(val_flat(train_tar(tmp_path / "in@net")), {"val.txt": listed(VAL_LABELS)})
    (tmp_path / "two.txt").write_text(f"{IDS[2]}\n\n{IDS[0]}\n")
    source = f"imagenet:{root}@{tmp_path / 'two.txt'}"
    assert load(source).classes == (IDS[0], IDS[2]) and load(source).labels.tolist() == [1, 0, 0, 1]
    assert read_source(source).parts["train"].labels.tolist() == [0] * 4 + [1] * 4
    assert len(load(f"imagenet:{root}").classes) == 1000  # an @ in the folder's own name


def test_imagenet100_of_the_field_is_a_class_list(shared, tmp_path):
    """The list's order is not that of the labels: they follow the sorted ids."""
    lines = (shared / "lists/imagenet100.txt").read_text().split()
    one = jpeg(0)
    root = write_files(tmp_path, {f"val/{wnid}/a.JPEG": one for wnid in [*lines, *IDS]})
    source = read_source(f"imagenet:{root}@{shared / 'lists/imagenet100.txt'}")
    assert source.classes == tuple(sorted(lines)) != tuple(lines)
    assert source.parts["test"].labels.tolist() == list(range(100))


NO_TARS = write_tar({f"{IDS[0]}.tar": b"x" * 999})


def break_list(text):
    def write(root):
        return f"imagenet:{root}@{write_files(root, {'list.txt': text}) / 'list.txt'}"

    return write


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (lambda r: f"imagenet:{r}/nowhere", "does not exist"),
        (lambda r: f"imagenet:{write_files(r / 'x', {'a.txt': b''})}", "holds none of train/, ILSVRC2012_img_train"),
        (lambda r: f"imagenet:{write_files(r, meta('train', [('a b.JPEG', 0), ('c.JPEG', 1000)]))}",
         "meta/train.txt, line 1: class index '1000'; valid: 0 to 999"),
        (lambda r: f"imagenet:{write_files(train_folders(r), meta('train', [*TRAIN_ROWS, ('a b/c.JPEG', 0)]))}",
         "1 of 13 images are missing, first train/a b/c.JPEG (looked for in"),
        (lambda r: f"imagenet:{write_files(r, meta('val', [(f'{k}.JPEG', 0) for k in range(30)]))}",
         "30 of 30 images are missing, first 0.JPEG"),
        (lambda r: f"imagenet:{write_files(r, meta('val', [('x' * 999 + '.JPEG', 0)]))}", "1 of 1 images are missing"),
        (lambda r: f"imagenet:{write_files(r, {'meta/val.txt': b''})}", "meta/val.txt: the list is empty"),
        (lambda r: f"imagenet:{write_files(r, {'my-train-0.tar': write_tar({'a.jpg': jpeg(0)})})}",
         "image 'my-train-0.tar:a' has label -1; valid: 0 to 999, in .cls or .json"),
        (lambda r: f"imagenet:{write_files(r, {'val.tar': write_tar({'a.jpg': jpeg(0), 'a.cls': b'1000'})})}",
         "image 'val.tar:a' has label 1000; valid: 0 to 999"),
        (lambda r: f"imagenet:{write_files(r, {'mine.tar': write_tar({'a.jpg': jpeg(0)})})}", "tar shards called"),
        (lambda r: f"imagenet:{r}@{r}/nowhere.txt", "nowhere.txt does not exist"),
        (lambda r: f"imagenet:{r}@", "is not a readable list"),
        (break_list(b"n01440764\nn00000001\n"), "'n00000001' is none of the 1,000 WordNet ids"),
        (break_list(b"n01440764\nn01440764\n"), "n01440764 stands there more than once"),
        (break_list(b"\n"), "the list is empty"),
        (break_list(b"\xff\xfe"), "is not a readable list"),
        (break_list(b"n01440764\nn01443537\n"), "train has no image of 1 listed classes, first n01443537"),
        (lambda r: f"imagenet:{write_files(r, {'train/n00000001/a.JPEG': b''})}", "'n00000001' is none of the 1,000"),
        (lambda r: f"imagenet:{val_flat(r)}", "have no labels; add one of val.txt"),
        (lambda r: f"imagenet:{write_files(val_tar(r), {'val.txt': listed([1000] * 6)})}", "label '1000'; valid: 0"),
        (lambda r: f"imagenet:{write_files(val_tar(r), {'val.txt': listed(['x'] * 6)})}", "label 'x'; valid: 0 to 999"),
        (lambda r: f"imagenet:{write_files(val_tar(r), {'val.txt': b'a.JPEG 1'})}", "6 images of val have no label"),
        (
            lambda r: f"imagenet:{write_files(val_flat(r), {'val.txt': listed(VAL_LABELS) + b'b.JPEG 1'})}",
            "1 of 7 images are missing, first val/b.JPEG",
        ),
        (
            lambda r: f"imagenet:{write_files(val_tar(r), {'val.txt': listed(VAL_LABELS) + b'b.JPEG 1'})}",
            "1 of 7 images are missing in ILSVRC2012_img_val.tar, first b.JPEG",
        ),
        (lambda r: f"imagenet:{write_files(r, {'ILSVRC2012_img_train.tar': b'x' * 999})}", "not a readable tar file"),
        (lambda r: f"imagenet:{write_files(r, {'ILSVRC2012_img_train.tar': NO_TARS})}", "not a readable tar file"),
        (
            lambda r: f"imagenet:{write_files(val_flat(r), {'ILSVRC2012_devkit_t12.tar.gz': b'x'})}",
            "is not the development kit",
        ),
        (
            lambda r: f"imagenet:{write_files(val_flat(r), devkit() | {'meta.mat': b'x' * 300})}",
            "the development kit cannot be read",
        ),
        (
            lambda r: f"imagenet:{write_files(val_flat(r), dict([*devkit().items()][:1]))}",
            "put the development kit's meta.mat beside it",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named_in_one_line(tmp_path, source, words):
    train_folders(tmp_path) if words.startswith("train has") else None
    assert words in refused(source(tmp_path))


@pytest.mark.parametrize("length", [700, 3000, 20_000])
def test_a_tar_file_cut_off_is_refused(tmp_path, length):
    content = (train_tar(tmp_path) / "ILSVRC2012_img_train.tar").read_bytes()
    assert length < len(content) - 10_240
    write_files(tmp_path, {"ILSVRC2012_img_train.tar": content[:length]})
    assert "is not a readable tar file" in refused(f"imagenet:{tmp_path}")
