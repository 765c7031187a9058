"""Pretraining without a teacher or a label: pytest tests/methods/test_contrastive.py"""

import importlib
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file

from diffrep import _torchvision_compat, api, counting
from diffrep.data.batch import Batch
from diffrep.data.datasets import ImageSet
from diffrep.errors import Interrupted, UserError
from diffrep.evaluation.classify import load_student, student_scores
from diffrep.methods import contrastive
from diffrep.methods.contrastive import Contrastive, ContrastiveConfig, ViewConfig, nt_xent, two_views
from diffrep.models.students import StudentConfig
from diffrep.randomness import Rows, seeded, stream
from diffrep.recipes.loading import load

CONV = StudentConfig(name="conv_small", options={"widths": [8, 16]})
GREY = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)


def images(count=6, size=8, low=0.0, high=1.0, seed=0):
    made = torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))
    return low + (high - low) * made


def shown(count=6, labels=None):
    return Batch(images(count), labels, torch.arange(count))


def rows(total, chosen=None, seed=0, step=0):
    return Rows(stream(seed, "step", step), total, chosen)


def built(student=CONV, size=8, **settings):
    with seeded(0, "test"):
        return Contrastive(ContrastiveConfig(student=student, **settings), 3, size)


# The loss


def by_hand(first, second, temperature):
    """Equation 1 of the paper, one view after the other, in Python's floats."""
    views = [[float(x) for x in z] for z in (*first, *second)]
    views = [[x / math.hypot(*z) for x in z] for z in views]
    count, each = len(first), []
    for i, z in enumerate(views):
        near = [math.exp(sum(a * b for a, b in zip(z, other, strict=True)) / temperature) for other in views]
        each.append(-math.log(near[(i + count) % (2 * count)] / (sum(near) - near[i])))
    return sum(each) / len(each)


def test_the_loss_is_that_of_the_paper():
    contrastive.need_lightly()
    first = torch.tensor([[3.0, 4.0], [0.0, 2.0], [1.0, -1.0]])
    second = torch.tensor([[1.0, 0.0], [5.0, 5.0], [-2.0, 1.0]])
    for temperature in (0.1, 0.5, 2.0):
        expected = by_hand(first, second, temperature)
        assert float(nt_xent(first, second, temperature)) == pytest.approx(expected, rel=1e-5)
    # Two images, each pair in one direction, at right angles: log(1 + 2 exp(-1 / temperature)).
    assert float(nt_xent(torch.eye(2), torch.eye(2), 0.5)) == pytest.approx(math.log(1 + 2 * math.exp(-2)), rel=1e-6)


def test_a_step_compares_the_projections_of_both_views():
    method, batch = built(temperature=0.3).eval(), shown()
    parts = method(batch, rows(6), 0.0)
    first, second = (method.projected(v) for v in two_views(batch.images, rows(6), ViewConfig()))
    assert float(parts["loss"].detach()) == pytest.approx(by_hand(first.detach(), second.detach(), 0.3), rel=1e-4)
    cosines = torch.nn.functional.cosine_similarity(first, second)
    torch.testing.assert_close(parts["pair_cosine"], cosines.mean())
    parts["loss"].backward()
    assert all(p.grad is not None and p.grad.any() for p in method.parameters())


def test_in_bf16_the_loss_itself_is_float32():
    method = built().eval()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = method(shown(), rows(6), 0.0)["loss"]
    assert rounded.dtype == torch.float32
    assert float(rounded.detach()) == pytest.approx(float(method(shown(), rows(6), 0.0)["loss"].detach()), rel=0.02)


# The views


def test_a_view_is_a_function_of_seed_step_and_row():
    first, second = two_views(images(), rows(6), ViewConfig())
    assert first.shape == second.shape == (6, 3, 8, 8) and first.min() >= 0 and first.max() <= 1
    again = two_views(images(), rows(6), ViewConfig())
    assert torch.equal(first, again[0]) and torch.equal(second, again[1]) and not torch.equal(first, second)
    part = two_views(images()[[4, 1]], rows(6, [4, 1]), ViewConfig())
    for whole, few in zip((first, second), part, strict=True):
        torch.testing.assert_close(few, whole[[4, 1]])
    for other in (rows(6, seed=1), rows(6, step=1), rows(6, [1, 2, 3, 4, 5, 0])):
        changed = two_views(images(), other, ViewConfig())[0]
        assert ((changed - first).abs().amax((1, 2, 3)) > 1e-3).all()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(two_views(images(), rows(6), ViewConfig())[0], first)


def test_the_whole_image_in_its_own_colours_is_the_image():
    whole = torch.tensor([[1.0, 0.5, 0.3, 0.7, 0.9]]).expand(6, -1)  # all of the area, sides as they are, not mirrored
    torch.testing.assert_close(contrastive.cropped(images(), whole, 0.08, True), images())
    flat = images(50, size=1).expand(-1, -1, 8, 8)
    for view in two_views(flat, rows(50), ViewConfig(colour_strength=0)):
        torch.testing.assert_close(view, flat)


def test_a_crop_shows_its_box_enlarged():
    """The upper right quarter of a picture that is linear in both directions; two pixels of the image are four."""
    ramp = (torch.arange(8.0)[:, None] * 0.1 + torch.arange(8.0) * 0.01).expand(1, 3, 8, 8)
    quarter = torch.tensor([[(0.25 - 0.2) / 0.8, 0.5, 0.0, 1.0, 0.9]])  # area 0.2 + 0.8 u, ratio 1, top, right
    found = contrastive.cropped(ramp, quarter, 0.2, True)[0, 0]
    places = (torch.arange(8) + 0.5) / 2 - 0.5
    expected = places[:, None] * 0.1 + (4 + places) * 0.01
    torch.testing.assert_close(found[1:, :7], expected[1:, :7])  # beyond the image's own edge nothing is invented
    mirrored = contrastive.cropped(ramp, torch.cat([quarter[:, :4], torch.tensor([[0.1]])], 1), 0.2, True)[0, 0]
    torch.testing.assert_close(mirrored, found.flip(1))
    kept = contrastive.cropped(ramp, torch.cat([quarter[:, :4], torch.tensor([[0.1]])], 1), 0.2, False)[0, 0]
    torch.testing.assert_close(kept, found)


@pytest.mark.parametrize("position, name", [(1, "brightness"), (2, "contrast"), (3, "saturation")])
def test_colours_change_as_torchvision_changes_them(position, name):
    _torchvision_compat.install()
    from torchvision.transforms.v2 import functional

    calm, drawn = images(1, low=0.3, high=0.6), torch.full((1, 6), 0.5)  # no change, and not grey
    torch.testing.assert_close(contrastive.recoloured(calm, drawn, 0.5), calm)
    drawn[0, position] = 0.9
    factor = 1 + 0.8 * 0.5 * (2 * 0.9 - 1)
    expected = getattr(functional, f"adjust_{name}")(calm, factor)
    torch.testing.assert_close(contrastive.recoloured(calm, drawn, 0.5), expected, atol=2e-4, rtol=0)  # 0.2989


def test_hue_turns_and_grey_leaves_no_hue():
    red_green_blue = torch.tensor([0.2, 0.5, 0.7])
    turned = contrastive.hue_turns(torch.tensor([0.0, 1 / 3, 2 / 3])) @ red_green_blue
    torch.testing.assert_close(turned, torch.stack([red_green_blue.roll(k) for k in (0, 1, 2)]))
    drawn = torch.tensor([[0.9, 0.9, 0.9, 0.9, 0.9, 0.1]])  # not jittered, grey
    grey = contrastive.recoloured(images(1), drawn, 0.5)
    torch.testing.assert_close(grey, (images(1) * GREY).sum(1, keepdim=True).expand(-1, 3, -1, -1))


def test_views_are_as_often_grey_and_mirrored_as_the_paper_says():
    count = 4000
    tinted = torch.tensor([0.6, 0.4, 0.3]).view(1, 3, 1, 1).expand(count, 3, 2, 2).clone()
    tinted[..., 1] += 0.1  # the right is brighter
    view = two_views(tinted, rows(count), ViewConfig())[0]
    is_grey = (view.amax(1) - view.amin(1)).amax((1, 2)) < 1e-5
    is_mirrored = view.sum(1)[..., 0].sum(1) > view.sum(1)[..., 1].sum(1)
    spread = 4 * math.sqrt(0.25 / count)
    assert abs(float(is_grey.float().mean()) - 0.2) < spread and abs(float(is_mirrored.float().mean()) - 0.5) < spread


# What is learnt


def planted(count, seed):
    """Five patterns, faint under a brightness and a tint of each image's own."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 5
    coarse = torch.randn(5, 1, 4, 4, generator=torch.Generator().manual_seed(3))
    patterns = coarse.repeat_interleave(2, 2).repeat_interleave(2, 3)
    tint = 0.3 + 0.4 * torch.rand(count, 3, 1, 1, generator=rng)
    pixels = (tint + 0.05 * patterns[labels] + 0.02 * torch.randn(count, 3, 8, 8, generator=rng)).clamp(0, 1)
    return ImageSet("planted", "train", tuple("abcde"), "none", (255 * pixels).to(torch.uint8), labels)


def test_pairs_find_each_other_and_the_probe_rises():
    train, test = planted(200, 0), planted(200, 1)
    method = built(views=ViewConfig(smallest_crop=0.6, has_flip=False)).train()

    def score():
        found = student_scores(method.student, train, test, (25,), 1, 0, torch.device("cpu"))["linear_probe_25"]
        method.train()
        return found

    before = score()
    optimizer, losses = torch.optim.Adam(method.parameters(), 3e-3), []
    for step in range(80):
        index = torch.randperm(200, generator=stream(0, "order", step))[:64]
        batch = Batch(train.gather(index).float() / 255, None, index)
        parts = method(batch, rows(64, step=step), step / 80)
        optimizer.zero_grad()
        parts["loss"].backward()
        optimizer.step()
        losses.append(float(parts["loss"].detach()))
    assert losses[-1] < losses[0] - 0.5
    assert score() > before + 10


def test_no_label_has_a_part():
    assert ContrastiveConfig(student=CONV).label_readers() == () and built().labels_behind == {}
    losses = [built()(shown(labels=labels), rows(6), 0.0)["loss"] for labels in (None, torch.arange(6), -torch.ones(6))]
    assert torch.equal(losses[0], losses[1]) and torch.equal(losses[0], losses[2])


def test_a_run_without_labels_is_scored_and_begins_a_finetuning(tmp_path):
    result = api.run("contrastive_debug", out=tmp_path / "run")
    assert result["labels_seen"] == {} and result["labels_behind"] == {} and "linear_probe_50" in result["scores"]
    kept = load_student(str(tmp_path / "run")).backbone.state_dict()
    tuned = api.run("finetune_debug", [f"method.init={tmp_path / 'run'}", "train.steps=0"], out=tmp_path / "tuned")
    assert tuned["loaded"]["matched"] == len(kept) and not any(name.startswith("projector") for name in kept)
    begun = load_file(tmp_path / "tuned" / "weights.safetensors")
    assert all(torch.equal(begun[name], value) for name, value in kept.items())


def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path):
    def trainer(name):
        student = StudentConfig(name="conv_small", options={"widths": [8], "pool": 1})
        optim = tiny.ADAM.model_copy(update={"group_lr": {}})
        return tiny.trainer(tmp_path / name, built(student, 4), optim, "none", steps=4, checkpoint_every=2)

    whole, broken, again = trainer("whole"), trainer("broken"), trainer("broken")
    whole.fit()
    with pytest.raises(Interrupted, match="stopped at step 1 of 4"):
        broken.fit(stop=lambda: True)
    again.fit()
    assert not tiny.same(tiny.weights(broken.method), tiny.weights(whole.method))
    assert tiny.same(tiny.weights(again.method), tiny.weights(whole.method))


def test_both_views_are_counted():
    method = built()
    one = counting.multiply_adds(lambda: method.projected(images()).sum().backward())
    assert counting.multiply_adds(lambda: method.dry_step(images())) == 2 * one


# Refusals


@pytest.mark.parametrize("override", ["train.batch_size=1", "train.micro_batch_size=4"])
def test_a_batch_that_is_not_compared_whole_is_refused(override):
    with pytest.raises(UserError) as caught:
        load("contrastive_debug", [override])
    assert "'contrastive' compares all images of a batch" in str(caught.value) and "\n" not in str(caught.value)
    assert load("contrastive_debug", ["train.micro_batch_size=8"]).train.batch_size == 8


def test_without_lightly_the_line_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setattr(contrastive, "find_spec", lambda name: None)
    with pytest.raises(UserError) as caught:
        api.run("contrastive_debug", out=tmp_path / "run")
    assert str(caught.value).endswith("lightly, which is absent: pip install 'diffrep[selfsup]'")
    assert not (tmp_path / "run").exists()


# Several processes

SCRIPT = '''
"""Argument: where to leave the weights and the network events while lightly was imported."""
import os
import sys
from pathlib import Path

from safetensors.torch import save_file

out, rank, events = Path(sys.argv[1]), os.environ["RANK"], []
from diffrep.methods.contrastive import need_lightly

need_lightly()
sys.addaudithook(lambda event, _: events.append(event))
import lightly.loss

(out / f"events-{rank}.txt").write_text(" ".join(e for e in events if e.startswith(("socket.", "urllib."))))

import case

save_file(case.trained(out / f"run-{rank}"), out / f"weights-{rank}.safetensors")
'''

CASE = """
import tiny
import torch

from diffrep.methods.contrastive import Contrastive, ContrastiveConfig
from diffrep.models.students import StudentConfig
from diffrep.randomness import seeded

torch.set_num_threads(1)
VIT = {"img_size": 4, "patch_size": 2, "embed_dim": 16, "depth": 1, "num_heads": 2}  # no batch statistics


def trained(run_dir):
    with seeded(0, "test"):
        config = ContrastiveConfig(student=StudentConfig(name="vit_tiny_patch16_224", options=VIT))
        made = Contrastive(config, 2, 4)
    plain = tiny.SGD.model_copy(update={"group_lr": {}})
    tiny.trainer(run_dir, made, plain, augment="none", steps=4).fit()
    return {name: value.contiguous() for name, value in tiny.weights(made).items()}
"""


def test_two_processes_compare_with_each_others_images_and_nobody_calls_home(tmp_path, monkeypatch):
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "case.py").write_text(CASE)
    training = Path(__file__).parents[1] / "training"
    environment = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": f"{tmp_path}:{training}"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "script.py"]
    done = subprocess.run(
        [*command, str(tmp_path)],
        cwd=tmp_path,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / f"events-{rank}.txt").read_text() for rank in (0, 1)] == ["", ""]
    monkeypatch.syspath_prepend(tmp_path)
    alone = importlib.import_module("case").trained(tmp_path / "alone")
    sys.modules.pop("case")
    first, second = (load_file(tmp_path / f"weights-{rank}.safetensors") for rank in (0, 1))
    for name, value in alone.items():
        torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
        assert torch.equal(first[name], second[name]), name
