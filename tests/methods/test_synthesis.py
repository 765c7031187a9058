"""A set is drawn slot by slot, the same whoever draws it: pytest tests/methods/test_synthesis.py"""

import errno
import io
import json
import os
import random
import shutil
import signal
import tarfile
import time
from collections import Counter
from pathlib import Path

import commands
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diffrep import api, files
from diffrep.config import validate
from diffrep.data.shards import check_shards, known_shards, read_manifest
from diffrep.errors import RunError, UserError
from diffrep.frozen.classifier import ClassifierConfig, load_classifier
from diffrep.frozen.generator import HIGH_FIDELITY, LOW_FIDELITY
from diffrep.frozen.judges import margin
from diffrep.frozen.pipelines import load_generator
from diffrep.launch.jobs import close
from diffrep.methods.synthesis import Slot, Synthesis, SynthesisConfig, finish, image_seed, plan

PAINTER, GAUSSIANS = "python:toys:painter", "python:toys:gaussians"
SMALL = {"images": 22, "block_size": 2, "shard_size": 4, "sampling": {"num_sampling_steps": "3"}}  # six shards
WORDS = ("synthesize", PAINTER, "--allow-code", "--images", 22, "--steps", 3, "--block-size", 2, "--shard-size", 4)
RECIPE = {"generator": PAINTER, "seed": 0}


@pytest.fixture(autouse=True)
def no_generator_is_left():
    """One process keeps its last generator open; these tests change what a reference means."""
    close()
    yield
    close()


def opened(generator=PAINTER, seed=0, **changes):
    config = SynthesisConfig.model_validate(SMALL | changes)
    return Synthesis(load_generator(generator, None, True), config, seed, True)


def drawn(out, generator=PAINTER, seed=0, **changes):
    return api.synthesize(generator, SMALL | changes, out, seed, allow_code=True)


def samples(folder):
    """{key: {"png": bytes, "json": note, "cls": label}}, in the order of the shards."""
    found = {}
    for shard in sorted(folder.glob("shard-*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                key, _, kind = member.name.partition(".")
                content = tar.extractfile(member).read()
                found.setdefault(key, {})[kind] = content if kind in ("png", "webp") else json.loads(content)
    return found


def pixels(folder):
    """(N, H, W, 3) int."""
    images = [np.array(Image.open(io.BytesIO(sample["png"]))) for sample in samples(folder).values()]
    return np.stack(images).astype(int)


def content(folder):
    return {p.name: p.read_bytes() for p in folder.glob("shard-*.tar")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The set of SMALL, unbroken."""
    folder = tmp_path_factory.mktemp("sets") / "whole"
    drawn(folder)
    return folder


# What a set consists of


@given(st.lists(st.integers(0, 5), min_size=1, max_size=5).filter(any))
@settings(max_examples=30, deadline=None)
def test_every_class_gets_what_was_asked_and_the_classes_take_turns(counts):
    slots = plan(SynthesisConfig(class_counts=counts), len(counts)).tolist()
    assert sorted(slots) == [[k, i] for k, count in enumerate(counts) for i in range(count)]
    assert [i for _, i in slots] == sorted(i for _, i in slots)


@given(st.integers(1, 40), st.integers(1, 7))
@settings(max_examples=30, deadline=None)
def test_images_are_spread_evenly_and_a_larger_set_begins_as_a_smaller_one(count, classes):
    slots = plan(SynthesisConfig(images=count), classes)
    found = np.bincount(slots[:, 0], minlength=classes)
    assert found.sum() == count and found.max() - found.min() <= 1
    assert (plan(SynthesisConfig(images=count + 9), classes)[:count] == slots).all()


def test_what_was_drawn_is_what_was_asked(tmp_path):
    found = drawn(tmp_path / "set", images=None, class_counts=[2, 5], classes=[2, 0], class_names=["two", "none"])
    assert Counter(s["cls"] for s in samples(tmp_path / "set").values()) == {0: 2, 1: 5}
    _, manifest = read_manifest(tmp_path / "set")
    assert manifest["classes"] == ["two", "none"] and manifest["counts"] == found["counts"] == {"0": 2, "1": 5}
    assert manifest["images"] == 7 and manifest["generator"]["licence"] == found["licence"] == "MIT"
    assert [s["json"]["index"] for s in samples(tmp_path / "set").values()] == [0, 0, 1, 1, 2, 3, 4]


def test_a_generator_without_classes_draws_images_without_labels(tmp_path):
    found = drawn(tmp_path / "set", "python:toys:nameless")
    assert found["counts"] == {"-1": 22}
    assert all(s.keys() == {"png", "json"} and "label" not in s["json"] for s in samples(tmp_path / "set").values())


# The noise of an image


def test_a_seed_is_of_run_class_and_index_alone():
    config, slot = SynthesisConfig(images=9), Slot(5, 2, 1)
    for same in (SynthesisConfig(images=700, block_size=3), SynthesisConfig(class_counts=(0, 1, 2), shard_size=2)):
        assert image_seed(same, 4, Slot(0, 2, 1)) == image_seed(config, 4, slot)
    assert image_seed(SynthesisConfig(images=9, classes=(7, 2)), 4, Slot(0, 1, 1)) == image_seed(config, 4, slot)
    others = [(5, slot, 0), (4, Slot(5, 1, 1), 0), (4, Slot(5, 2, 2), 0), (4, slot, 1)]
    assert len({image_seed(config, *other) for other in [(4, slot, 0), *others]}) == 5


def test_a_class_keeps_its_images_in_a_set_of_fewer_classes(tmp_path, whole):
    drawn(tmp_path / "set", images=6, classes=[2, 1])
    everything = {(s["cls"], s["json"]["index"]): s["png"] for s in samples(whole).values()}
    for sample in samples(tmp_path / "set").values():
        assert sample["png"] == everything[[2, 1][sample["cls"]], sample["json"]["index"]]


@pytest.mark.parametrize("noise", ["own", "shared"])
def test_shared_noise_starts_equal_in_all_classes_and_own_does_not(noise):
    synthesis, starts = opened(images=6, block_size=6, noise=noise), []
    synthesis.generator.network.module.register_forward_pre_hook(lambda _, args: starts.append(args[0].clone()))
    synthesis._draw(synthesis.slots(range(6)), 0, "cpu")
    first, second = starts[0][:3], starts[0][3:]  # index 0 of the three classes, then index 1
    equal = [torch.equal(block[0], block[k]) for block in (first, second) for k in (1, 2)]
    assert equal == [noise == "shared"] * 4
    assert not torch.equal(first[0], second[0])


# Any order, any worker, any number of times


def test_a_smaller_set_has_the_same_bytes_whatever_fills_up_its_last_block(tmp_path, whole):
    drawn(tmp_path / "set", images=9, shard_size=9)  # its last block holds one image
    mine, all_of_them = samples(tmp_path / "set"), samples(whole)
    assert len(mine) == 9 and all(all_of_them[key] == sample for key, sample in mine.items())


def test_every_call_is_of_a_whole_block(tmp_path):
    """Also the last one of a shard, and a second attempt at a few of its images."""
    margin = {"teacher": {"reference": "python:toys:quarters"}, "margin": 0.83, "tries": 2}
    synthesis, sizes = opened(GAUSSIANS, images=9, block_size=4, shard_size=9, margin=margin), []
    synthesis.generator.network.module.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    note = synthesis.make_shard(tmp_path, 0)
    assert set(sizes) == {4} and sum(sizes) == note["drawn"] * 3 > 12 * 3


@given(st.lists(st.integers(0, 5), max_size=3), st.permutations(range(6)))
@settings(max_examples=6, deadline=None)
def test_shards_made_in_any_order_and_more_than_once_are_one_set(tmp_path_factory, whole, twice, order):
    folder, synthesis = tmp_path_factory.mktemp("set"), opened()
    assert synthesis.begin(folder) == list(range(6))
    for number in (*twice, *order):
        synthesis.make_shard(folder, number)
    manifest, cost = finish(folder, synthesis, RECIPE)
    assert manifest["content_hash"] == read_manifest(whole)[1]["content_hash"] and content(folder) == content(whole)
    assert cost["network_calls"] == 22 * 3
    assert synthesis.begin(folder) == []


def test_a_set_that_lacks_a_shard_is_not_finished(tmp_path):
    synthesis = opened()
    for number in synthesis.begin(tmp_path)[:-1]:
        synthesis.make_shard(tmp_path, number)
    with pytest.raises(RunError, match="shard 5 is missing or damaged; the same command makes it again"):
        finish(tmp_path, synthesis, RECIPE)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A class-conditional model of digits that has learnt something, in two CPU seconds."""
    out = tmp_path_factory.mktemp("digits") / "generator"
    changes = ["method.conditional=true", "train.steps=80", "train.batch_size=32", "train.checkpoint_every=80"]
    changes += ["train.ema_decay=0.95", "train.log_every=20", "optim.lr=0.003", "evaluate.samples=1"]
    api.run("denoiser_debug", changes, out)
    losses = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.5 * losses[0], losses
    return str(out)


def test_another_block_size_changes_only_rounding(digits, tmp_path):
    walk, sets = {"num_sampling_steps": "10", "guidance_scale": 1.5}, {}
    for size in (20, 7, 1):
        found = drawn(tmp_path / str(size), digits, images=20, block_size=size, shard_size=20, sampling=walk)
        sets[size] = pixels(tmp_path / str(size))
        assert found["network_calls"] == -(-20 // size) * size * 20  # what fills up a block is computed too
    for size in (7, 1):
        assert np.abs(sets[size] - sets[20]).max() <= 1
        assert (sets[size] != sets[20]).mean() < 0.02
    assert sets[20].std() > 30  # and images they are


# Killed at any moment


def finished(folder):
    """{name: (inode, time)} of the shards that have their note."""
    notes = {f"shard-{p.stem}.tar" for p in (folder / ".shards").glob("[0-9]*.json")}
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.glob("shard-*.tar") if p.name in notes}


def killed(folder, wait, **slow):
    """Start, kill at some moment, look: what was finished before is untouched, and at most one shard lacks its note."""
    before = finished(folder / "set")
    command = commands.Command(folder, *WORDS, "--out", "set", **slow)
    wait(command)
    command.send(signal.SIGKILL)
    ended, after = command.wait().code, finished(folder / "set")
    assert ended in (-signal.SIGKILL, 0) and before.items() <= after.items()
    assert len(list((folder / "set").glob("shard-*.tar"))) - len(after) <= 1
    return ended


def goes_on(folder, whole):
    """To the end: only what is missing is made, and the set is that of an unbroken run."""
    before = finished(folder / "set")
    done = commands.run(folder, *WORDS, "--out", "set")
    assert done.code == 0, done.err
    left = 22 - sum(2 if name == "shard-000005.tar" else 4 for name in before)
    assert f"to make: {left} of 22 images, {left * 3} network calls" in done.err
    assert before.items() <= finished(folder / "set").items()
    assert content(folder / "set") == content(whole)
    assert read_manifest(folder / "set")[1]["content_hash"] == read_manifest(whole)[1]["content_hash"]
    assert not [p.name for p in (folder / "set").rglob("*.part") if p.name[1:] in content(whole)]


def test_three_kills_in_mid_shard(whole, tmp_path):
    rng = random.Random(3)
    for count in (0, 1, 3):

        def in_mid_shard(command, count=count):
            command.until(
                lambda: (tmp_path / "set/settings.json").exists() and len(finished(tmp_path / "set")) >= count
            )
            time.sleep(rng.uniform(0, 0.1))

        assert killed(tmp_path, in_mid_shard, TOY_SECONDS="0.04") == -signal.SIGKILL
    goes_on(tmp_path, whole)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_twenty_kills_at_any_time(whole, tmp_path, seed):
    rng = random.Random(seed)
    for _ in range(20):
        if killed(tmp_path, lambda _: time.sleep(rng.uniform(0.05, 0.6)), TOY_SECONDS="0.05") == 0:
            break
    goes_on(tmp_path, whole)


# Made again from its manifest alone


def test_a_manifest_makes_its_set_again(whole, tmp_path):
    (tmp_path / "manifest.json").write_bytes((whole / "manifest.json").read_bytes())
    found = api.regenerate(tmp_path / "manifest.json", tmp_path / "again", allow_code=True)
    assert found["equal"] and content(tmp_path / "again") == content(whole)
    with pytest.raises(UserError, match="is the set itself; choose another"):
        api.regenerate(whole, whole, allow_code=True)


def test_a_set_of_many_settings_is_made_again(tmp_path):
    classifier = {"reference": "python:toys:quarters"}
    walk = {
        "sampler": "ddim",
        "num_sampling_steps": "ddim4",
        "eta": 0.5,
        "guidance_scale": [1, 3],
        "guided_channels": 2,
    }
    more = {"margin": {"teacher": classifier, "margin": 0.2, "tries": 2}, "noise": "shared", "image_format": "webp"}
    drawn(tmp_path / "set", GAUSSIANS, 7, images=None, class_counts=[3, 1, 0, 4], sampling=walk, **more)
    found = api.regenerate(tmp_path / "set", tmp_path / "again", allow_code=True)
    assert found["equal"] and len(content(tmp_path / "again")) == 2
    scales = [s["json"]["guidance_scale"] for s in samples(tmp_path / "set").values()]
    assert all(1 <= s <= 3 for s in scales) and len(set(scales)) == 4  # by index: shared noise shares the scale


def test_other_weights_are_no_way_to_make_a_set_again(whole, tmp_path, monkeypatch):
    monkeypatch.setenv("TOY_SEED", "1")
    with pytest.raises(UserError, match="python:toys:painter has other weights than the generator of the set"):
        api.regenerate(whole, tmp_path / "again", allow_code=True)
    assert not (tmp_path / "again").exists()


def test_other_bytes_from_the_same_weights_are_said_aloud(whole, tmp_path, monkeypatch):
    monkeypatch.setenv("TOY_SHIFT", "0.1")
    told = "is whole, but not equal to .*: other bytes, first in shard-000000.tar; what is known of the two machines"
    with pytest.raises(RunError, match=told):
        api.regenerate(whole, tmp_path / "again", allow_code=True)


def test_every_setting_is_part_of_the_content_hash(tmp_path):
    """Also one that leaves the pixels as they are."""
    found = {drawn(tmp_path / "0", images=2)["content_hash"]}
    for k, change in enumerate([{"block_size": 3}, {"shard_size": 5}, {"class_names": list("abc")}, {"images": 3}], 1):
        found.add(drawn(tmp_path / str(k), **{"images": 2, **change})["content_hash"])
    found.add(drawn(tmp_path / "seed", seed=1, images=2)["content_hash"])
    assert len(found) == 6


def test_the_settings_of_the_paper_have_names():
    def sampling(**values):
        return validate(SynthesisConfig, {"images": 1, "sampling": values}, "synthesize").sampling

    assert sampling(fidelity="low") == LOW_FIDELITY and sampling(fidelity="high") == HIGH_FIDELITY
    assert (LOW_FIDELITY.sampler, LOW_FIDELITY.num_sampling_steps, LOW_FIDELITY.guidance_scale) == ("ddpm", "100", 2)
    assert (HIGH_FIDELITY.sampler, HIGH_FIDELITY.num_sampling_steps, HIGH_FIDELITY.guidance_scale) == ("ddpm", "250", 4)
    assert LOW_FIDELITY.guided_channels == HIGH_FIDELITY.guided_channels == 3
    assert sampling(fidelity="low", guidance_scale=3) == LOW_FIDELITY.model_copy(update={"guidance_scale": 3.0})
    for wrong in ("hihg", ["low"], None):
        with pytest.raises(UserError, match=r"fidelity '.*': (did you mean|valid:)"):
            sampling(fidelity=wrong)


# A teacher's say


def test_a_slot_whose_image_the_teacher_doubts_is_drawn_again(tmp_path):
    classifier = {"reference": "python:toys:quarters"}
    few = {"images": 40, "shard_size": 40, "block_size": 8, "sampling": {"num_sampling_steps": "5"}}
    drawn(tmp_path / "plain", GAUSSIANS, **few)
    plain = samples(tmp_path / "plain")
    teacher = load_classifier(ClassifierConfig(**classifier), allow_code=True)

    def margins(folder):
        images = torch.tensor(pixels(folder)).permute(0, 3, 1, 2) / 255
        labels = torch.tensor([s["cls"] for s in samples(folder).values()])
        return margin(teacher.logits(images), labels)

    bound = float(margins(tmp_path / "plain").quantile(0.35))
    asked = {"teacher": classifier, "margin": bound, "tries": 3}
    found = drawn(tmp_path / "sure", GAUSSIANS, **few, margin=asked)
    sure, kept = samples(tmp_path / "sure"), margins(tmp_path / "sure")
    attempts = [s["json"].get("attempt", 0) for s in sure.values()]
    assert Counter(s["cls"] for s in sure.values()) == dict.fromkeys(range(4), 10)
    assert {0, 1, 2} == set(attempts) and float((kept >= bound).float().mean()) > 0.85
    for (key, sample), attempt, value in zip(sure.items(), attempts, kept.tolist(), strict=True):
        assert (sample["png"] == plain[key]["png"]) == (attempt == 0)
        assert attempt == 2 or value >= bound - 0.02  # the last draw is kept as it is; the others were sure
    assert found["network_calls"] > 40 * 5 and found["network_calls"] % (8 * 5) == 0


def test_hard_steers_a_walk_and_no_weight_is_its_control(tmp_path):
    student, teacher = {"reference": "python:toys:unsure"}, {"reference": "python:toys:quarters"}
    asked = {"images": 8, "shard_size": 8, "block_size": 8, "sampling": {"num_sampling_steps": "10"}}
    judge = load_classifier(ClassifierConfig(**student), allow_code=True)

    def entropy(name, **weights):
        hard = {"hard": {"student": student, "teacher": teacher, **weights}} if weights else {}
        drawn(tmp_path / name, GAUSSIANS, **asked, **hard)
        logits = judge.logits(torch.tensor(pixels(tmp_path / name)).permute(0, 3, 1, 2) / 255)
        return float(torch.distributions.Categorical(logits=logits).entropy().mean())

    plain, hard = entropy("plain"), entropy("hard", entropy_weight=20, class_weight=0)
    assert hard > plain + 0.05
    assert np.abs(pixels(tmp_path / "hard") - pixels(tmp_path / "plain")).max() > 5
    assert entropy("sure", entropy_weight=0, class_weight=20) < plain - 0.02
    entropy("control", entropy_weight=0, class_weight=0)
    assert np.abs(pixels(tmp_path / "control") - pixels(tmp_path / "plain")).max() <= 1


# Bad input: one line that says what, where and what would be valid, its own exit code, and nothing lost


def refused(folder, *arguments, code=2, **environment):
    done = commands.run(folder, "synthesize", *arguments, **environment)
    assert done.code == code, done
    return done.line


ONE = ("--allow-code", "--images", 4, "--out", "set")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((PAINTER, "--classes", "0,7"), "classes: 7 is outside 0..2 of painter"),
        (("python:toys:nameless", "--guidance", 2), "painter knows no classes: it takes neither labels nor guidance"),
        (("python:toys:nameless", "--classes", 0), "painter knows no classes: leave out classes and give images"),
        ((GAUSSIANS, "--margin", "python:toys:pairs:0.2"), "knows 2 classes; the set has 4 classes, the generator 4"),
        (("python:toys:nameless", "--margin", "python:toys:pairs:0.2"), "painter knows no classes: margin and hard"),
        ((PAINTER, "--steps", "ddim300"), "'ddim300': no integer stride over 1000 timesteps gives 300 steps"),
        ((PAINTER, "--steps", 2000), "'2000': a section of 1000 timesteps cannot give 2000 steps"),
        ((PAINTER, "--sampler", "unipc", "--steps", 2000), "'2000': the noise schedule has 1000 timesteps"),
        ((PAINTER, "--guided-channels", 4, "--guidance", 2), "guided_channels 4: painter has 3 channels"),
        ((PAINTER, "--class-names", "a,b"), "painter has 3 classes, class_names names 2; say which with classes"),
        ((PAINTER, "--fidelity", "medium"), "fidelity 'medium': valid: high, low"),
        ((PAINTER, "--prompt", "a {}", "--class-names", "a,b,c"), "is no text-to-image pipeline"),
    ],
    ids=lambda value: None if isinstance(value, str) else "_".join(map(str, value[1:])),
)
def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path, arguments, told):
    line = refused(tmp_path, *arguments, *ONE)
    assert line.startswith("diffrep: ") and told in line
    assert not (tmp_path / "set").exists()


@pytest.fixture
def own(whole, tmp_path):
    """A copy of the whole set in tmp_path/set, and its files."""
    shutil.copytree(whole, tmp_path / "set")
    return tmp_path / "set"


def half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flipped(path):
    found = bytearray(path.read_bytes())
    found[1000] ^= 1
    path.write_bytes(found)


@pytest.mark.parametrize("damage", [half, flipped, Path.unlink])
@pytest.mark.parametrize("notes", [True, False], ids=["", "copied without notes"])
def test_a_damaged_shard_is_refused_by_readers_and_made_again_by_its_command(own, whole, damage, notes):
    damage(own / "shard-000002.tar")
    if not notes:
        for note in (own / ".shards").iterdir():
            note.unlink()
    with pytest.raises(
        UserError, match=r"shard-000002.tar is .*: the command that made the set makes this shard again"
    ):
        check_shards(*read_manifest(own))
    synthesis, said = opened(), []
    assert synthesis.begin(own) == [2] and not synthesis.is_made(own, 2) and synthesis.is_made(own, 3) == notes
    found = api.synthesize(PAINTER, SMALL, own, allow_code=True, say=said.append)
    assert said[0]["images"] == 4 and found["content_hash"] == read_manifest(whole)[1]["content_hash"]
    assert content(own) == content(whole)
    assert read_manifest(own)[1] == read_manifest(whole)[1]


def test_a_folder_of_another_generator_keeps_its_images(own, whole, monkeypatch):
    monkeypatch.setenv("TOY_SEED", "1")  # the same reference, other weights
    with pytest.raises(UserError, match="set holds images of another generator; choose another --out"):
        drawn(own)
    (own / "settings.json").unlink()  # the manifest alone says it too
    with pytest.raises(UserError, match="set holds images of another generator; choose another --out"):
        drawn(own)
    assert content(own) == content(whole) and read_manifest(own)[1] == read_manifest(whole)[1]


@pytest.mark.parametrize("change", [{"seed": 1}, {"images": 21}, {"sampling": {"num_sampling_steps": "4"}}])
def test_other_settings_in_one_folder_are_refused(own, whole, change):
    with pytest.raises(UserError, match=r"set belongs to another recipe .*; choose another --out"):
        drawn(own, **change)
    (own / "recipe.yaml").unlink()
    with pytest.raises(UserError, match="set is not empty and holds no run; choose another --out"):
        drawn(own, **change)
    synthesis = opened(seed=change.get("seed", 0), **{k: v for k, v in change.items() if k != "seed"})
    with pytest.raises(UserError, match=r"set holds images of (another seed|other settings); choose another --out"):
        synthesis.begin(own)
    assert content(own) == content(whole) and read_manifest(own)[1] == read_manifest(whole)[1]


def test_a_full_disk_in_mid_shard_keeps_what_is_finished(whole, tmp_path, monkeypatch):
    def full(descriptor, fsync=os.fsync):
        if "shard-000003" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    out = tmp_path / "set"
    with monkeypatch.context() as patched:
        patched.setattr(files.os, "fsync", full)
        with pytest.raises(
            RunError, match=r"cannot write .*shard-000003.tar: No space left on device; free some space"
        ):
            drawn(out)
    assert sorted(content(out)) == [f"shard-{k:06d}.tar" for k in range(3)] and len(finished(out)) == 3
    assert not list(out.rglob("*.part")) and not (out / "manifest.json").exists() and known_shards(out) == {}
    with pytest.raises(UserError, match=r"is no finished synthetic set \(no manifest.json\)"):
        read_manifest(out)
    said = []
    api.synthesize(PAINTER, SMALL, out, allow_code=True, say=said.append)
    assert said[0]["images"] == 10 and content(out) == content(whole)


def test_a_full_disk_is_exit_3(tmp_path):
    done = commands.run(tmp_path, *WORDS, "--out", "set", TEST_FILE_LIMIT="9000")
    begun, line = done.err.splitlines()
    assert done.code == 3 and begun.startswith("to make: 22 of 22 images")
    assert "cannot write" in line and "shard-000000.tar: File too large; free some space" in line
