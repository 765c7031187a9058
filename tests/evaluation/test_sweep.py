"""The probe over taps and noise levels: pytest tests/evaluation/test_sweep.py"""

import json
import weakref

import pytest
import torch
import torch.nn.functional as F
import yaml
from planted import CLASSES, images, teacher

from diffrep import api
from diffrep.config import validate
from diffrep.data.datasets import label_subset
from diffrep.errors import Interrupted, UserError
from diffrep.evaluation.kept import Kept
from diffrep.evaluation.probe import accuracy, primal_probe, probe_scores, standardise
from diffrep.evaluation.probing import Probe, label_free
from diffrep.evaluation.streaming import Chosen, pixel_reader, pooled, streamed, teacher_reader
from diffrep.evaluation.sweep import SweepConfig, gathered, labelled
from diffrep.randomness import derived_seed
from diffrep.recipes.loading import load

CPU = torch.device("cpu")
TRAIN, TEST = images(600, 1), images(400, 2, "test")
TAPS = ("poor", "good")


def config(**settings) -> SweepConfig:
    return SweepConfig(**{"taps": TAPS, "timesteps": (0, 40, 900), "pool": 2, **settings})


def run(settings: SweepConfig, seed=0, kept=None, stop=lambda: False, model=None, progress=lambda *_: None):
    probe = Probe(model or teacher(), TRAIN, TEST, settings, seed, CPU)
    return probe.run(kept or Kept(), progress, stop)


def features(model, chosen, timestep, tap):
    x = chosen.gather(torch.arange(len(chosen))).float() / 255
    return F.adaptive_avg_pool2d(model.features(x, timestep, [tap])[tap], 2).flatten(1)


def test_few_labels_are_the_kernel_probe_over_the_label_draws():
    model, settings = teacher(), config(labels=20, draws=3)
    found = run(settings, seed=4)["rows"]
    seeds = [4, *(derived_seed(4, "label draw", d) for d in (1, 2))]
    draws = [label_subset(TRAIN.labels, 20, s) for s in seeds]
    assert [(row["tap"], row["timestep"]) for row in found[1:]] == [(p, t) for t in settings.timesteps for p in TAPS]
    for row in found[1:]:
        seen, unseen = (features(model, of, row["timestep"], row["tap"]) for of in (TRAIN, TEST))
        scores = torch.tensor(probe_scores(seen, TRAIN.labels, unseen, TEST.labels, draws, CLASSES))
        assert row["mean"] == pytest.approx(float(scores.mean()), abs=1e-3)
        assert row["sd"] == pytest.approx(float(scores.std()), abs=1e-3)


def test_all_labels_in_one_pass_score_as_the_probe_that_holds_all_features():
    model = teacher()
    found = run(config(), model=model)
    assert model.module.passes == found["images_seen"] == 3 * (len(TRAIN) + len(TEST))
    for row in found["rows"][1:]:
        x, y = (features(model, of, row["timestep"], row["tap"]) for of in (TRAIN, TEST))
        seen, unseen = standardise(x, y)
        held = accuracy(primal_probe(seen, TRAIN.labels, unseen, CLASSES), TEST.labels)
        assert row["mean"] == pytest.approx(held, abs=0.8) and row["sd"] == 0  # the penalty is chosen by another rule


def test_the_planted_best_is_found_and_every_row_has_all_units():
    found = run(config(sigmas=(0.02, 0.15, 1.0), timesteps=()))
    assert (found["best"]["tap"], round(found["best"]["sigma"], 2)) == ("good", 0.15)
    for row in found["rows"][1:]:
        assert row["snr"] == pytest.approx(row["sigma"] ** -2, rel=1e-4)
        assert row["alpha_bar"] == pytest.approx(1 / (1 + row["sigma"] ** 2), rel=1e-4)
    assert found["rows"][0]["tap"] == "pixels" and found["rows"][0]["sigma"] is None


def test_memory_stays_the_same_however_many_images():
    """How many blocks of features are alive at once."""

    def most_alive(count: int) -> int:
        train, alive, most = images(count, 3), weakref.WeakSet(), 0

        def read(of, positions):
            nonlocal most
            block = torch.zeros(len(positions), 3) + positions[:, None]
            alive.add(block)
            most = max(most, len(alive))
            return {"tap": block}

        streamed(read, [Chosen(train, torch.arange(count))], Chosen(train, torch.arange(count)), CLASSES, 0)
        return most

    assert most_alive(5000) == most_alive(600) <= 2


def test_parts_are_probes_on_more_and_more_images():
    model = teacher()
    order = label_subset(TRAIN.labels, 500, 0)
    read = teacher_reader(model, 40, TAPS, 2, None, 0, CPU)
    held_out = Chosen(TEST, torch.arange(len(TEST)))
    both = streamed(read, [Chosen(TRAIN, order[:100]), Chosen(TRAIN, order[100:])], held_out, CLASSES, 0)
    for number, count in enumerate((100, 500)):
        alone = streamed(read, [Chosen(TRAIN, labelled(TRAIN, count, 0))], held_out, CLASSES, 0)
        for tap in TAPS:  # another order of summing: at most an image on the border
            assert both.accuracies[tap][number] == pytest.approx(alone.accuracies[tap][0], abs=0.3)


def test_fewer_images_are_class_balanced_and_nested():
    few, more = (set(labelled(TRAIN, n, 7).tolist()) for n in (50, 100))
    assert few < more and TRAIN.labels[list(few)].bincount().tolist() == [10] * CLASSES
    found = run(config(train_images=50, held_out_images=100))
    assert found["images"] == {"train": 50, "held_out": 100} and found["labels_seen"] == {"probe": 50}


def test_an_image_has_the_same_noise_at_every_level_and_in_every_company():
    model = teacher(lambda log_sigma: 0.0)  # green alone: the image as it was noised
    read = teacher_reader(model, 300, ("good",), 4, "forward", 0, CPU)
    alone, among = read(TRAIN, torch.tensor([7]))["good"], read(TRAIN, torch.arange(20))["good"]
    torch.testing.assert_close(alone[0], among[7])
    without = teacher_reader(model, 300, ("good",), 4, None, 0, CPU)(TRAIN, torch.arange(20))["good"]
    assert not torch.allclose(among, without)
    alpha_bar = [model.schedule.alpha_bar_at(t) for t in (300, 600)]
    clean = TRAIN.gather(torch.arange(20))[:, 1].flatten(1).float() / 255 * 2 - 1
    later = teacher_reader(model, 600, ("good",), 4, "forward", 0, CPU)(TRAIN, torch.arange(20))["good"]
    noise = [(x - a**0.5 * clean) / (1 - a) ** 0.5 for x, a in zip((among, later), alpha_bar, strict=True)]
    torch.testing.assert_close(noise[0], noise[1], atol=1e-4, rtol=0)


def test_maps_are_pooled_to_cells_and_tokens_to_their_mean():
    grid = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert pooled(grid, 2).tolist() == [[2.5, 4.5, 10.5, 12.5]]
    tokens = torch.arange(6.0).reshape(1, 3, 2)
    assert pooled(tokens, 1).tolist() == [[2.0, 3.0]] and pooled(tokens, 2).tolist() == [[0, 1, 2, 3, 4, 5]]
    assert pooled(torch.ones(2, 5), 1).shape == (2, 5)


def test_pixels_are_pooled_only_where_all_labels_are_used():
    large = images(30, 4)
    wide = pixel_reader(2)(large, torch.arange(30))["pixels"]
    assert wide.shape == (30, 3 * 4) and pixel_reader()(large, torch.arange(30))["pixels"].shape == (30, 48)
    assert gathered(pixel_reader(), Chosen(large, torch.arange(30)))["pixels"].shape == (30, 48)


def test_a_stopped_probe_keeps_its_levels(tmp_path):
    model, asked = teacher(), []
    of = {"teacher": "a", "training set": "b"}

    def stop():
        asked.append(1)
        return model.module.passes > 1.5 * (len(TRAIN) + len(TEST))

    with pytest.raises(Interrupted, match="the same command goes on"):
        run(config(), kept=Kept(tmp_path / "levels.json", of), stop=stop, model=model)
    model.module.passes = 0
    said = []
    found = run(config(), kept=Kept(tmp_path / "levels.json", of), model=model, progress=lambda *a: said.append(a))
    assert model.module.passes == 2 * (len(TRAIN) + len(TEST)) and asked
    assert said[0][0] == len(TRAIN) + len(TEST) and said[-1] == (3000, 3000)
    assert found["rows"] == run(config())["rows"]
    with pytest.raises(UserError, match="measured on another teacher; choose another --out"):
        Kept(tmp_path / "levels.json", of | {"teacher": "other"})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sigmas": (0.1,), "snrs": (3.0,)}, "noise levels are given once: sigmas or snrs"),
        ({"alpha_bars": (1.0,)}, "alpha_bars.0"),
        ({"sigmas": (0.0,)}, "sigmas.0"),
        ({"labels": 20, "search": True}, "leave labels out"),
        ({"labels": 20, "train_images": 100}, "with few, labels says how many"),
    ],
)
def test_what_contradicts_itself_is_refused(settings, words):
    with pytest.raises(UserError, match=words):
        validate(SweepConfig, {"taps": TAPS, **settings}, "probe")


def test_timesteps_and_images_without_labels_are_refused():
    with pytest.raises(UserError, match=r"1000 is outside 0\.\.999"):
        run(config(timesteps=(5, 1000)))
    unlabelled = images(20, 1)
    unlabelled.labels = None
    with pytest.raises(UserError, match="no labels to score against"):
        Probe(teacher(), unlabelled, TEST, config(), 0, CPU)


def test_the_label_free_score_is_compared_honestly():
    rows = [{"tap": "a", "timestep": t, "mean": float(m), "label_free": r} for t, m, r in [(0, 1, 9.0), (1, 2, 5.0)]]
    rows += [{"tap": "b", "timestep": t, "mean": 7.0 + t, "label_free": 1.0 + t} for t in (0, 1)]
    found = label_free(rows)
    assert found["within_tap"] == {"a": -1.0, "b": 1.0} and found["rank_correlation"] == pytest.approx(-0.8)
    assert found["chosen"]["mean"] == 1.0


@pytest.fixture(scope="module")
def probed(pipeline, tmp_path_factory):
    """A grid on digits with its control, as the verb leaves it."""
    out = tmp_path_factory.mktemp("probe") / "out"
    settings = {"taps": ["all"], "sigmas": [0.05, 0.5], "pool": 2, "noise": "forward", "control": True}
    settings |= {"train_images": 200, "held_out_images": 100}
    arguments = (str(pipeline()), {"source": "digits"}, settings, out)
    return arguments, api.probe(*arguments)


def test_the_best_pair_is_a_part_of_a_recipe(probed, tmp_path):
    (_, _, _, out), found = probed
    best = found["best"]
    mine = tmp_path / "mine.yaml"
    mine.write_text(f"base: repfusion_debug\n{(out / 'best.yaml').read_text()}")
    by_words = load("repfusion_debug", found["overrides"]).method
    for method in (load(str(mine)).method, by_words):
        assert (method.tap, method.timestep.choices(), method.hint_grid) == (best["tap"], (best["timestep"],), 2)
        assert method.timestep.select == "fixed" and method.noise == "forward"
    assert yaml.safe_load((out / "best.yaml").read_text()).keys() == {"method"}


def test_a_finished_probe_answers_at_once_and_the_folder_has_everything(probed):
    arguments, found = probed
    assert api.probe(*arguments) == found
    out = arguments[3]
    assert json.loads((out / "sweep.json").read_text()) == found["rows"]
    assert {row["tap"] for row in found["control"]} == {row["tap"] for row in found["rows"][1:]}
    assert len({row["timestep"] for row in found["control"]}) == 1
    assert found["images_seen"] == 300 * 3 and found["multiply_adds"] > 0


def test_a_dry_run_counts_what_the_run_takes(probed, tmp_path):
    (model, data, settings, _), found = probed
    cost = api.probe(model, data, settings, tmp_path / "none", dry_run=True)
    assert (cost["passes"], cost["multiply_adds"]) == (found["images_seen"], found["multiply_adds"])
    assert cost["seconds"] > 0 and not (tmp_path / "none").exists()


def test_an_untrained_teacher_has_no_control(pipeline, tmp_path):
    settings = {"taps": ["mid_block"], "control": True}
    with pytest.raises(UserError, match="is untrained itself"):
        api.probe(f"random:{pipeline()}", {"source": "digits"}, settings, tmp_path / "none")
