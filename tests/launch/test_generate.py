"""Images of token models, whoever makes them: pytest tests/launch/test_generate.py"""

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys

import commands
import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diffrep import api
from diffrep.diffusion.masking import AlternationConfig, ImageDraws, masked_after
from diffrep.errors import UserError
from diffrep.frozen.tokens import load_predictor, load_tokenizer, read_network, write_network
from diffrep.launch import film, generation_cost
from diffrep.launch.generate import Generation, GenerationConfig
from diffrep.launch.generation_cost import counted, decoder_multiply_adds, encoder_multiply_adds, estimate
from diffrep.methods.addp import alternate, as_uint8
from diffrep.methods.token_predictor import mage, mage_counts
from diffrep.models.addp_vit import ADDPVit, ADDPVitConfig
from diffrep.models.vqgan import VQGAN, VQGANConfig

SMALL = {"embed_dim": 16, "depth": 1, "num_heads": 2, "decoder_depth": 1, "decoder_num_heads": 2, "init_std": 0.5}
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "diffrep")


@pytest.fixture(scope="module")
def model(token_model):
    return str(token_model)


@pytest.fixture(scope="module")
def seven(model, tmp_path_factory):
    """Seeds 0 to 6, made one after the other in one process."""
    folder = tmp_path_factory.mktemp("seven") / "seven"
    api.generate(model, folder, seeds=range(7))
    return folder


@pytest.fixture
def photo(tmp_path):
    pixels = torch.randint(0, 256, (8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    Image.fromarray(pixels.numpy()).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def images(folder):
    return {p.name: p.read_bytes() for p in (folder / "images").glob("seed-*.png")}


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def repaired(model, out, photo, seeds=(0,), **how):
    """The pixels of each seed."""
    api.generate(model, out, {"repair": {"image": str(photo), **how}}, seeds=seeds)
    return [pixels(out / "images" / f"seed-{seed:06d}.png") for seed in seeds]


# One image per seed


def test_a_file_is_what_its_seed_says(model, seven):
    generation = Generation(model, GenerationConfig(), range(1))
    ids, mask = torch.zeros(1, 16, dtype=torch.int64), torch.ones(1, 16, dtype=torch.bool)
    config = AlternationConfig(steps=16)
    drawn = alternate(generation.network.module, generation.tokenizer, config, ImageDraws([5], 16), ids, mask)
    assert np.array_equal(pixels(seven / "images" / "seed-000005.png"), as_uint8(drawn)[0].movedim(0, 2).numpy())
    assert len(set(images(seven).values())) == 7


def test_any_number_in_any_order_gives_the_same_bytes(model, seven, tmp_path):
    whole = images(seven)
    api.generate(model, tmp_path / "one", seeds=[3])
    api.generate(model, tmp_path / "other", seeds=[6, 2, 0])
    assert images(tmp_path / "one") == {"seed-000003.png": whole["seed-000003.png"]}
    assert images(tmp_path / "other").items() <= whole.items()
    kept = (tmp_path / "one" / "images" / "seed-000003.png").stat().st_mtime_ns
    found = api.generate(model, tmp_path / "one", seeds=range(7))
    assert images(tmp_path / "one") == whole and found["made"] == 6
    assert (tmp_path / "one" / "images" / "seed-000003.png").stat().st_mtime_ns == kept
    assert api.generate(model, tmp_path / "one", seeds=range(7))["made"] == 0


def test_a_block_changes_rounding_only(model, seven, tmp_path):
    api.generate(model, tmp_path / "block", {"block_size": 3}, seeds=range(4))
    for name in images(tmp_path / "block"):
        assert np.abs(pixels(tmp_path / "block" / "images" / name) - pixels(seven / "images" / name)).max() <= 1
    with pytest.raises(UserError, match="images of another block_size than 1"):
        api.generate(model, tmp_path / "block", seeds=range(4))


def test_two_processes(model, seven, tmp_path):
    done = commands.run(tmp_path, "generate", model, "--out", "two", "--images", 7, "--jobs", 2)
    assert done.code == 0 and "licence, that of the networks: MIT" in done.out, done.err
    assert images(tmp_path / "two") == images(seven)
    for name in ("grid.png", "film.png", "film.gif", "index.html"):
        assert (tmp_path / "two" / name).read_bytes() == (seven / name).read_bytes()


def test_torchrun_with_two(model, seven, tmp_path):
    done = subprocess.run(
        [*TORCHRUN, "generate", model, "--out", "two", "--images", "7"],
        cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=90,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.count("licence") == 1, done.stderr
    assert images(tmp_path / "two") == images(seven)


def test_ray(model, seven, tmp_path):
    done = commands.run(tmp_path, "generate", model, "--out", "two", "--images", 7, "--ray", "local")
    assert done.code == 0 and done.out.count("licence") == 1, done.err
    assert images(tmp_path / "two") == images(seven)


def test_a_killed_command_goes_on(model, seven, tmp_path):
    out = tmp_path / "out"
    command = commands.Command(tmp_path, "generate", model, "--out", "out", "--images", 200)
    command.until(lambda: len(images(out)) >= 3)
    command.send(signal.SIGKILL)
    assert command.wait().code == -signal.SIGKILL
    assert len(images(out)) < 200 and not (out / "generated.json").exists()
    torn = out / "images" / "seed-000001.png"
    torn.write_bytes(torn.read_bytes()[:50])  # as a failing disk leaves it
    done = commands.run(tmp_path, "generate", model, "--out", "out", "--images", 7)
    assert done.code == 0 and "of them there already" in done.out, done.err
    assert images(seven).items() <= images(out).items()
    assert not list(out.rglob("*.part"))


def test_ctrl_c_ends_after_the_image(model, seven, tmp_path):
    command = commands.Command(tmp_path, "generate", model, "--out", "out", "--images", 2000)
    command.until(lambda: len(images(tmp_path / "out")) >= 3)
    command.send(signal.SIGINT)
    done = command.wait()
    assert done.code == 130 and "the same command goes on from here" in done.line
    assert all(images(seven).get(name, content) == content for name, content in images(tmp_path / "out").items())


def test_a_folder_takes_one_model_and_one_way(model, seven, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(seven, out)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    with pytest.raises(UserError, match=r"images of other settings \(alternation\); choose another --out"):
        api.generate(model, out, {"alternation": {"steps": 4}})
    with pytest.raises(UserError, match="images of another model"):
        api.generate(model, out, {"by": "predictor"})
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before
    (out / "settings.json").unlink()
    with pytest.raises(UserError, match="nothing says how they were made"):
        api.generate(model, out)


def test_what_the_folder_says(model, seven):
    found, settings = (json.loads((seven / name).read_text()) for name in ("generated.json", "settings.json"))
    assert found["masked"] == [16, *masked_after(AlternationConfig(steps=16), 16)] and found["seeds"] == list(range(7))
    assert settings["alternation"]["steps"] == 16 and settings["block_size"] == 1  # 20 where there are as many tokens
    assert set(settings["model"]) == {"addp", "tokenizer"} and settings["repair"] is None
    strip = film.stored(seven / "steps" / "seed-000000.png")
    walk = film.frames(strip)
    assert len(walk) == 16 - found["first_step"] and len(list((seven / "steps").iterdir())) == 4
    assert np.array_equal(walk[-1][:, :8].movedim(0, 2).numpy(), pixels(seven / "images" / "seed-000000.png"))
    blue = (walk[-1][:, 8:] == torch.tensor(film.MASKED, dtype=torch.uint8).view(3, 1, 1)).all(0)
    assert blue.sum() == 4  # one token of 2x2 pixels stays soft
    assert film.spread(5, 20) == [0, 1, 2, 3, 4] and film.spread(256, 4) == [0, 85, 170, 255]
    with Image.open(seven / "film.gif") as moving:
        assert moving.n_frames == len(walk)


# Repairs


def test_what_is_visible_stays_and_what_is_hidden_is_not_read(model, photo, tmp_path):
    box = (2, 2, 6, 6)
    generation = Generation(model, GenerationConfig(repair={"image": str(photo), "box": box}), range(1))
    ids, mask = generation.repair.ids, generation.repair.mask([0])
    assert mask.view(4, 4).nonzero().tolist() == [[1, 1], [1, 2], [2, 1], [2, 2]]
    pixels_of = torch.from_numpy(np.asarray(Image.open(photo)).copy())
    for level in range(1, 40):  # a change of hidden pixels that leaves the visible ids as they are
        changed = pixels_of.clone()
        changed[3:5, 3:5] = (changed[3:5, 3:5].int() + level).clamp(max=255).byte()
        Image.fromarray(changed.numpy()).save(tmp_path / "other.png")
        other = Generation(model, GenerationConfig(repair={"image": str(tmp_path / "other.png"), "box": box}), range(1))
        if torch.equal(other.repair.ids[~mask], ids[~mask]):
            break
    else:
        raise AssertionError("no such change was found")
    assert not torch.equal(changed, pixels_of)
    assert torch.equal(generation.draw([4]), other.draw([4]))
    assert not torch.equal(generation.draw([4]), generation.draw([5]))


def test_kept_tokens_stay_kept(model, photo):
    generation = Generation(model, GenerationConfig(repair={"image": str(photo), "ratio": 0.5}), range(3))
    masks = [generation.repair.mask([seed])[0] for seed in range(3)]
    assert all(int(mask.sum()) == 8 for mask in masks) and not torch.equal(masks[0], masks[1])
    seen = []
    watch = film.Watch(range(3), generation.grid, 2)
    generation.draw([0, 1, 2], watch=lambda images, mask: (seen.append(mask.clone()), watch(images, mask)))
    assert torch.equal(seen[0], torch.stack(masks)) and all(bool((mask <= seen[0]).all()) for mask in seen)
    assert torch.equal(watch.frames[0][0, :, :8], generation.repair.image)  # the film begins with the image


def test_regions(model, photo, tmp_path):
    white = Image.new("L", (8, 8))
    white.paste(255, (2, 2, 6, 6))
    white.save(tmp_path / "white.png")
    by_mask = repaired(model, tmp_path / "mask", photo, mask=str(tmp_path / "white.png"))[0]
    by_box = repaired(model, tmp_path / "box", photo, box=(2, 2, 6, 6))[0]
    assert np.array_equal(by_mask, by_box)
    assert np.array_equal(repaired(model, tmp_path / "box", photo, (0, 1), box=(2, 2, 6, 6))[0], by_box)  # goes on
    with pytest.raises(UserError, match="images of another repair"):
        repaired(model, tmp_path / "box", photo, box=(2, 2, 6, 8))
    whole = {"repair": {"image": str(photo), "box": (0, 0, 8, 8)}}
    from_masks, covered = (Generation(model, GenerationConfig(**how), range(1)).draw([0]) for how in ({}, whole))
    assert torch.equal(from_masks, covered)  # everything hidden is a blank image
    one = Generation(model, GenerationConfig(repair={"image": str(photo), "box": (3, 3, 4, 4)}), range(1))
    assert one.masked == 1 and len(one.counts) == 1  # a token is painted whole, in as many steps as there are tokens
    out = Generation(model, GenerationConfig(repair={"image": str(photo), "box": (0, 0, 3, 8), "outside": True}), [0])
    assert out.repair.mask([0]).view(4, 4).tolist() == [[False, True, True, True]] * 4


def test_paste_puts_the_own_pixels_back(model, photo, tmp_path):
    own = pixels(photo)
    plain = repaired(model, tmp_path / "plain", photo, box=(3, 3, 6, 6))[0]
    pasted = repaired(model, tmp_path / "pasted", photo, box=(3, 3, 6, 6), paste=True)[0]
    inside = np.zeros((8, 8), bool)
    inside[3:6, 3:6] = True
    assert np.array_equal(pasted[inside], plain[inside]) and np.array_equal(pasted[~inside], own[~inside])
    assert not np.array_equal(plain[~inside], own[~inside])
    for seed, found in enumerate(repaired(model, tmp_path / "ratio", photo, (0, 1), ratio=0.25, paste=True)):
        kept = (found == own).all(2).reshape(4, 2, 4, 2).all((1, 3))
        assert kept.sum() >= 12, seed


# MAGE, the rival


def test_counts_of_mage():
    counts = mage_counts(AlternationConfig(), 256)
    assert counts[:4] == [255, 252, 248, 243] and counts[-2:] == [20, 0] and len(counts) == 20
    assert all(b < a for a, b in zip([256, *counts], counts, strict=False))  # every step reveals a token
    assert counts[10] == math.floor(256 * math.cos(math.pi * 11 / 40))
    assert mage_counts(AlternationConfig(steps=16), 16) == [*range(15, 0, -1), 0]
    with pytest.raises(UserError, match="17: there are 16 tokens"):
        mage_counts(AlternationConfig(steps=17), 16)


@torch.no_grad()
def test_mage_reads_tokens_alone_and_ends_with_hard_ids(token_networks):
    vq = load_tokenizer(token_networks)
    predictor, seen = load_predictor(token_networks, vq), []
    ids = torch.arange(16)[None] % 11
    mask = torch.arange(16)[None] >= 6
    config, watch = AlternationConfig(steps=4), lambda *step: seen.append(step)
    found = mage(predictor, vq, config, ImageDraws([3], 16), ids, mask, (4, 4), watch)
    last = seen[-1][1]
    assert torch.equal(found, vq.decode(vq.lookup(last), (4, 4))) and not seen[-1][2].any()
    assert all(torch.equal(drawn[~mask], ids[~mask]) for _, drawn, _ in seen)
    assert [int(left.sum()) for _, _, left in seen] == mage_counts(config, 10)
    hidden = torch.where(mask, (ids + 1) % 11, ids)
    assert torch.equal(found, mage(predictor, vq, config, ImageDraws([3], 16), hidden, mask, (4, 4)))


def test_generation_with_the_predictor_alone(token_networks, tmp_path):
    found = api.generate(token_networks, tmp_path / "mage", {"by": "predictor"}, seeds=range(2))
    assert found["masked"][-1] == 0 and found["image_size"] == [8, 8] and len(images(tmp_path / "mage")) == 2
    with pytest.raises(UserError, match="no ADDP network"):
        api.generate(token_networks, tmp_path / "addp")
    with pytest.raises(UserError, match="finish belongs to ADDP"):
        api.generate(token_networks, tmp_path / "addp", {"by": "predictor", "alternation": {"finish": True}})
    assert not (tmp_path / "addp").exists()


# Cost


def test_multiply_adds_of_the_specification():
    with torch.device("meta"):
        base = ADDPVit(ADDPVitConfig())
    assert round(encoder_multiply_adds(base) / 1e9, 2) == 23.20
    published = {0: 16.07, 64: 20.28, 128: 24.60, 255: 33.46}
    for visible, added in published.items():
        embedded = 0 if visible else 257 * 768**2  # the specification embeds features also where all are masked
        assert round((decoder_multiply_adds(base, visible) + embedded) / 1e9, 2) == added


@contextlib.contextmanager
def counted_for_real():
    """Torch's counter knows no fused attention of a CPU."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        yield counter


@pytest.mark.parametrize("how", [{}, {"alternation": {"steps": 5, "schedule": "linear"}}, {"by": "predictor"}])
def test_what_is_counted_is_what_is_computed(model, how):
    generation = Generation(model, GenerationConfig(**how), range(1))
    with counted_for_real() as counter:
        generation.draw([0])
    assert sum(n for _, n in counted(generation).values()) == counter.get_total_flops() // 2


def test_a_repair_is_counted_with_its_image(model, photo):
    generation = Generation(model, GenerationConfig(repair={"image": str(photo), "ratio": 0.5}), range(1))
    with counted_for_real() as counter:
        generation.draw([0])
    distances = 16 * 11 * 4  # of latents to codes
    assert sum(n for _, n in counted(generation).values()) + distances == counter.get_total_flops() // 2


def test_dry_run_writes_nothing(model, tmp_path):
    done = commands.run(tmp_path, "generate", model, "--images", 50, "--dry-run", "--json")
    found = json.loads(done.out)
    assert found["images"] == 50 and found["parts"]["decoder"]["calls"] == 50 * (1 + 16 - 4)  # one table for all masked
    assert found["seconds"] > 0 and found["memory_bytes"] > 1e6 and not list(tmp_path.iterdir())
    assert "nothing was written" in commands.run(tmp_path, "generate", model, "--dry-run").out


def test_a_long_walk_is_timed_on_two_steps(model, monkeypatch):
    monkeypatch.setattr(generation_cost, "TIMED", 0)
    generation = Generation(model, GenerationConfig(), range(3))
    found = estimate(generation, "cpu")
    assert found["steps"] == 16 and found["seconds"] > 0 and len(generation.counts) == 16
    assert found["multiply_adds"] == 3 * sum(n for _, n in counted(generation).values())


# Bad input


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--steps", "17"], "steps 17: there are 16 tokens to reveal, so at most 16 steps"),
        (["--image", "PHOTO", "--box", "2,2,4,4", "--steps", "2"], "there are 1 tokens to reveal, so at most 1"),
        (["--image", "PHOTO"], "nothing says what to paint anew: give one of mask, box, ratio"),
        (["--image", "PHOTO", "--box", "2,2,4,4", "--mask", "BLACK"], "mask and box at once: give one of"),
        (["--image", "PHOTO", "--box", "4,2,4,4"], "--box 4,2,4,4: X0,Y0,X1,Y1 must lie in 0,0,8,8"),
        (["--image", "PHOTO", "--box", "1,2"], "--box 1,2: four numbers are needed"),
        (["--image", "PHOTO", "--mask", "BLACK"], "nothing is left to paint anew"),
        (["--image", "PHOTO", "--box", "0,0,8,8", "--outside"], "nothing is left to paint anew"),
        (["--image", "PHOTO", "--ratio", "0.01"], "--ratio 0.01 of 16 tokens: nothing is left"),
        (["--image", "PHOTO", "--ratio", "0.5", "--outside"], "outside belongs to a mask or a box"),
        (["--image", "PHOTO", "--mask", "LARGE"], "LARGE has 10x6 pixels, the image is 8x8"),
        (["--image", "LARGE", "--ratio", "0.5"], "LARGE has 10x6 pixels, the model's images are 8x8"),
        (["--image", "TEXT", "--ratio", "0.5"], "--image TEXT is unreadable (not an image)"),
        (["--image", "nowhere.png", "--ratio", "0.5"], "--image nowhere.png does not exist; name an image file"),
        (["--mask", "BLACK"], "--mask says what of an image is painted anew: name it with --image"),
        (["--seeds", "1,2", "--images", "2"], "--seeds names every image"),
        (["--seeds", "1,2,1"], "seed 1 was given twice"),
        (["--images", "0"], "--images 0: at least 1"),
        (["--schedule", "cosin"], "alternation.schedule = 'cosin'"),
        (["--with", "mage"], "by = 'mage'"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_written(model, photo, tmp_path, monkeypatch, options, said, capsys):
    from diffrep import cli

    Image.new("L", (8, 8)).save(tmp_path / "black.png")
    Image.new("L", (10, 6), 255).save(tmp_path / "large.png")
    (tmp_path / "text.png").write_text("no image")
    names = {word: str(tmp_path / f"{word.lower()}.png") for word in ("PHOTO", "BLACK", "LARGE", "TEXT")}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys, "argv", ["diffrep", "generate", model, "--out", "out", *(names.get(o, o) for o in options)]
    )
    with pytest.raises(SystemExit) as ended:
        cli.main()
    told = capsys.readouterr().err
    for word, path in names.items():
        told = told.replace(path, word)
    assert ended.value.code == 2 and said in told and len(told.splitlines()) == 1, told
    assert not (tmp_path / "out").exists()


def test_models_that_cannot_draw_are_refused(model, token_networks, tmp_path):
    with torch.random.fork_rng():
        nine = VQGAN(VQGANConfig(ch=32, ch_mult=(1, 1), num_res_blocks=1, z_channels=4, num_codes=9))
        blind = VQGAN(VQGANConfig(ch=32, ch_mult=(1, 1), num_res_blocks=1, z_channels=4, num_codes=11, decoder=False))
    network, _ = read_network(model, "addp")
    for name, tokenizer, said in (("nine", nine, "knows 11 codes"), ("blind", blind, "has no decoder")):
        write_network(tmp_path / name, "addp", network, "tiny", "MIT")
        write_network(tmp_path / name, "tokenizer", tokenizer, name, "MIT")
        with pytest.raises(UserError, match=said):
            api.generate(str(tmp_path / name), tmp_path / "out")
    write_network(tmp_path / "alone", "addp", network, "tiny", "MIT")
    with pytest.raises(UserError, match="no tokenizer"):
        api.generate(str(tmp_path / "alone"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_half_precision_is_part_of_the_settings_and_gives_other_images(model, seven, tmp_path):
    api.generate(model, tmp_path / "half", {"precision": "bfloat16"}, seeds=range(2))
    found, known = images(tmp_path / "half"), images(seven)
    assert found.keys() < known.keys() and all(found[name] != known[name] for name in found)
    with pytest.raises(UserError, match="other settings"):
        api.generate(model, tmp_path / "half", seeds=range(2))
