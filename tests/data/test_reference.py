"""The reference set of scores: pytest tests/data/test_reference.py"""

import json
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from diffrep import _torchvision_compat, cli
from diffrep.data import reference
from diffrep.data.datasets import DataConfig, load_data
from diffrep.data.prepare import prepare
from diffrep.data.reference import content_hash, image_digest, prepare_reference
from diffrep.errors import UserError

# Wider, taller, odd, too small, of the right size already.
SIZES = [(300, 256), (256, 341), (517, 389), (90, 64), (256, 256), (513, 257)]


def photograph(size, seed):
    """Low frequencies with some noise, as JPEG likes it."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    return small.resize(size, Image.Resampling.BICUBIC)


@pytest.fixture
def val(tmp_path):
    folder = tmp_path / "imagenet" / "val"
    folder.mkdir(parents=True)
    for k, size in enumerate(SIZES):
        photograph(size, k).save(folder / f"ILSVRC2012_val_{k + 1:08d}.JPEG", quality=90)
    Image.fromarray(np.full((300, 300), 77, np.uint8)).save(folder / "ILSVRC2012_val_00000007.JPEG")  # a grey one
    return folder


def stored(folder):
    return {f.name: np.asarray(Image.open(f)) for f in sorted(folder.glob("*.png"))}


def test_every_pixel_is_that_of_torchvisions_resize_and_crop(val, tmp_path):
    _torchvision_compat.install()
    from torchvision.transforms import CenterCrop, Compose, Resize

    official = Compose([Resize(256), CenterCrop(256)])
    found = prepare("imagenet-val256", val.parent, tmp_path / "out")
    made = stored(tmp_path / "out")
    assert found.images == found.made == len(made) == 7
    for file in val.iterdir():
        wanted = np.asarray(official(Image.open(file).convert("RGB")))
        assert wanted.shape == (256, 256, 3) and np.array_equal(made[f"{file.stem}.png"], wanted), file.name


def test_the_set_is_a_data_source_and_its_manifest_knows_its_content(val, tmp_path):
    found = prepare_reference(val, tmp_path / "out")
    images = load_data(DataConfig(source=found.source), "train")
    assert images.image_size == (256, 256)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["content_hash"] == found.content_hash and manifest["images"] == 7 and manifest["expected"] == 50_000
    digests = [image_digest(pixels.transpose(2, 0, 1)) for pixels in stored(tmp_path / "out").values()]
    assert content_hash(reversed(digests)) == found.content_hash
    assert content_hash(digests[1:]) != found.content_hash


def test_fewer_images_than_papers_have_are_said_aloud(val, tmp_path, monkeypatch):
    assert "7 of 50000 images" in prepare_reference(val, tmp_path / "out").lines()[-1]
    monkeypatch.setattr(reference, "EXPECTED", 7)
    assert not any(" of 7 images" in line for line in prepare_reference(val, tmp_path / "out").lines())


def test_only_what_is_missing_or_damaged_is_made_again(val, tmp_path):
    out = tmp_path / "out"
    whole, before = prepare_reference(val, out), stored(out)
    kept = {f: f.stat().st_mtime_ns for f in out.glob("*.png")}
    assert prepare_reference(val, out) == reference.Prepared(**{**vars(whole), "made": 0})
    gone, cut, small = sorted(kept)[:3]
    gone.unlink()
    cut.write_bytes(cut.read_bytes()[:-200])
    Image.new("RGB", (8, 8)).save(small)
    again = prepare_reference(val, out)
    assert again.made == 3 and again.content_hash == whole.content_hash
    after = stored(out)
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert all(f.stat().st_mtime_ns == time for f, time in kept.items() if f not in (gone, cut, small))


def test_an_interrupted_set_has_no_manifest_and_goes_on(val, tmp_path, monkeypatch):
    out, real, calls = tmp_path / "out", reference.write_atomic, []

    def dies(path, content):
        calls.append(path)
        if len(calls) == 4:
            raise KeyboardInterrupt
        real(path, content)

    with monkeypatch.context() as broken, pytest.raises(KeyboardInterrupt):
        broken.setattr(reference, "write_atomic", dies)
        prepare_reference(val, out)
    assert len(stored(out)) == 3 and not (out / "manifest.json").exists()
    assert prepare_reference(val, out).made == 4


def test_class_folders_the_official_tar_and_a_flat_folder_give_the_same_set(val, tmp_path):
    flat = prepare_reference(val, tmp_path / "a")
    classes = tmp_path / "classes" / "val"
    for k, file in enumerate(sorted(val.iterdir())):
        target = classes / f"n0{k % 3}" / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    tar = tmp_path / "tars" / "ILSVRC2012_img_val.tar"
    tar.parent.mkdir()
    with tarfile.open(tar, "w") as archive:
        for file in sorted(val.iterdir()):
            archive.add(file, file.name)
    for number, place in enumerate([classes.parent, tar, tar.parent]):
        found = prepare_reference(place, tmp_path / f"b{number}")
        assert found.content_hash == flat.content_hash
        assert stored(tmp_path / f"b{number}").keys() == stored(tmp_path / "a").keys()


def test_refusals_name_the_file(val, tmp_path):
    out = tmp_path / "out"
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no images of ImageNet"):
        prepare_reference(tmp_path / "empty", out)
    with pytest.raises(UserError, match="does not exist"):
        prepare_reference(tmp_path / "nowhere", out)
    out.mkdir()
    (out / "mine.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"mine\.png, which comes from no image of this source"):
        prepare_reference(val, out)
    (val / "ILSVRC2012_val_00000004.JPEG").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"00000004\.JPEG is unreadable"):
        prepare_reference(val, tmp_path / "other")
    (val / "deeper").mkdir()
    Image.new("RGB", (9, 9)).save(val / "deeper" / "ILSVRC2012_val_00000001.png")
    with pytest.raises(UserError, match=r"would both become ILSVRC2012_val_00000001\.png"):
        prepare_reference(val, tmp_path / "third")


def test_an_image_digest_tells_shapes_apart():
    flat = np.arange(24, dtype=np.uint8)
    assert image_digest(flat.reshape(3, 2, 4)) != image_digest(flat.reshape(3, 4, 2))


def test_the_verb_prints_the_count(val, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["diffrep", "data", "prepare", "imagenet-val256", str(val), str(tmp_path / "o")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr().out
    assert ended.value.code == 0 and "7 images (7 made now)" in said and f"folder:{tmp_path / 'o'}" in said
    with pytest.raises(UserError, match="imagenet-val256"):
        prepare("imagenet-val25", val, tmp_path / "p")


def test_photographs_of_imagenet(shared, tmp_path):
    """Class folders of real photographs, one each."""
    place = shared / "fixtures" / "imagenet-sample"
    found = prepare_reference(place, tmp_path / "out")
    assert found.images == len(list(place.rglob("*.JPEG")))
    assert all(pixels.shape == (256, 256, 3) and pixels.std() > 10 for pixels in stored(tmp_path / "out").values())
