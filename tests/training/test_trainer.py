"""The loop: it learns, resumes to the same bits, splits batches without a difference, and stops in order."""

import inspect
import json

import pytest
import tiny
import torch
from tiny import trainer

from diffrep.data.datasets import DataConfig
from diffrep.data.feed import Feed
from diffrep.errors import Interrupted, RunError, UserError
from diffrep.training import checkpoint, devices
from diffrep.training import trainer as trainer_module
from diffrep.training.optim import Ema


def metrics(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def stop_after(step, made):
    """A wish to stop that comes once ``made`` has seen ``step`` batches."""
    return lambda: len(made.seen) >= step


def interrupted_at(run_dir, step, **options):
    made = tiny.method()
    with pytest.raises(Interrupted, match=f"stopped at step {step} of"):
        trainer(run_dir, made, **options).fit(stop_after(step, made))


def test_it_learns(tmp_path):
    made = tiny.method()
    told = []
    budget = trainer(tmp_path, made, tiny.SGD, steps=60).fit(progress=lambda *at: told.append(at))
    loss = [line["loss"] for line in metrics(tmp_path)]
    assert loss[-1] < 0.3 * loss[0]
    pictures = tiny.image_set(100)
    right = made.logits(pictures.gather(torch.arange(100)) / 255).argmax(1) == pictures.labels
    assert right.float().mean() > 0.95
    assert budget["steps"] == 60 and budget["images_seen"] == 480
    assert told == [(k, 60) for k in range(1, 61)]


@pytest.mark.parametrize("optim", [tiny.SGD, tiny.ADAM], ids=["sgd", "adamw"])
@pytest.mark.parametrize("at", [1, 4, 7])
def test_resumed_is_unbroken_bit_for_bit(tmp_path, optim, at):
    whole = tiny.method()
    trainer(tmp_path / "whole", whole, optim, ema_decay=0.9, clip_norm=1.0).fit()
    interrupted_at(tmp_path / "broken", at, optim=optim, ema_decay=0.9, clip_norm=1.0)
    again = tiny.method()
    trainer(tmp_path / "broken", again, optim, ema_decay=0.9, clip_norm=1.0).fit()
    assert len(again.seen) == 12 - at
    assert tiny.same(tiny.weights(again), tiny.weights(whole))
    kept = [run / "checkpoints" / "step-00000012" / "state.safetensors" for run in sorted(tmp_path.iterdir())]
    assert kept[0].read_bytes() == kept[1].read_bytes()


def test_metrics_after_a_resume_are_those_of_an_unbroken_run(tmp_path):
    trainer(tmp_path / "whole").fit()
    interrupted_at(tmp_path / "broken", 7)
    # Killed after step 7's checkpoint: one whole line more, and one cut off.
    with open(tmp_path / "broken" / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 9, "loss": 0.0}) + '\n{"step": 10, "lo')
    trainer(tmp_path / "broken").fit()
    found, wanted = metrics(tmp_path / "broken"), metrics(tmp_path / "whole")
    steps = [line["step"] for line in found]
    assert steps == sorted(set(steps)) == [3, 4, 6, 7, 8, 9, 12]
    by_step = {line["step"]: line["lr"] for line in found}
    assert all(by_step[line["step"]] == line["lr"] for line in wanted)
    assert found[-1]["loss"] == pytest.approx(wanted[-1]["loss"], abs=0)  # both the mean of steps 10 to 12


def test_a_log_line_is_the_mean_since_the_last(tmp_path):
    trainer(tmp_path / "each", log_every=1).fit()
    trainer(tmp_path / "third", log_every=3, checkpoint_every=100).fit()
    each, third = metrics(tmp_path / "each"), metrics(tmp_path / "third")
    assert [line["step"] for line in third] == [3, 6, 9, 12]
    for k, line in enumerate(third):
        three = each[3 * k : 3 * k + 3]
        assert line["loss"] == pytest.approx(sum(x["loss"] for x in three) / 3)
        assert line["choices"] == pytest.approx([sum(x["choices"][c] for x in three) / 3 for c in (0, 1)])
        assert line["lr"] == three[-1]["lr"]


@pytest.mark.parametrize("size", [1, 3, 8])
def test_micro_batches_equal_the_whole_batch_to_rounding(tmp_path, size):
    whole, parts = tiny.method(), tiny.method()
    trainer(tmp_path / "whole", whole, tiny.SGD).fit()
    trainer(tmp_path / "parts", parts, tiny.SGD, micro_batch_size=size).fit()
    assert len(parts.seen) == 12 * -(-8 // size)
    for name, value in tiny.weights(whole).items():
        torch.testing.assert_close(tiny.weights(parts)[name], value, rtol=1e-5, atol=1e-6)
    for one, other in zip(metrics(tmp_path / "whole"), metrics(tmp_path / "parts"), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)


@pytest.mark.parametrize("size", [1, 3, 5])
def test_augmented_rows_are_the_same_whatever_the_split(tmp_path, size):
    whole, parts = tiny.method(), tiny.method()
    for made, train in ((whole, {}), (parts, {"micro_batch_size": size})):
        trainer(tmp_path / str(id(made)), made, augment="crop_flip:1", steps=3, **train).fit()
    for field in ("images", "labels", "index", "view"):
        rows = [torch.cat([getattr(b, field) for b in made.seen]) for made in (whole, parts)]
        assert torch.equal(*rows), field
    assert len(torch.cat([b.view for b in whole.seen]).unique()) > 5


def test_clipping_bounds_the_norm_of_all_parts_together(tmp_path):
    # Plain SGD without momentum: a step is the rate times the gradient.
    options = {"name": "sgd", "lr": 1.0, "momentum": 0.0, "lr_schedule": {"name": "constant"}}
    optim = type(tiny.SGD)(**options)
    moved = {}
    for limit in (None, 0.01):
        made = tiny.method()
        before = tiny.weights(made)
        trainer(tmp_path / str(limit), made, optim, steps=1, clip_norm=limit).fit()
        after = tiny.weights(made)
        moved[limit] = torch.cat([(after[n] - before[n]).flatten() for n, _ in made.named_parameters()])
    assert moved[None].norm() > 0.1
    assert moved[0.01].norm() == pytest.approx(0.01, rel=1e-3)
    torch.testing.assert_close(moved[0.01] / 0.01, moved[None] / moved[None].norm(), rtol=1e-3, atol=1e-3)


def test_the_export_is_the_running_mean(tmp_path):
    plain, averaged = tiny.method(), tiny.method()
    by_hand = Ema(plain, 0.9)
    loop = trainer(tmp_path / "plain", plain)
    for step in range(12):
        loop.step(step)
        by_hand.update(plain, step)
    trainer(tmp_path / "averaged", averaged, ema_decay=0.9).fit()
    for name, value in by_hand.mean.items():
        assert torch.equal(averaged.get_parameter(name), value), name
    assert not torch.equal(averaged.net.weight, plain.net.weight)
    assert torch.equal(averaged.count, plain.count)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bad": 6 / 12}, "entropy is NaN at step 7"),
        ({"bad": 6 / 12, "value": float("inf")}, "entropy is infinite at step 7"),
        ({"bad": 6 / 12, "term": "choices"}, "choices is NaN at step 7"),
    ],
)
def test_a_part_that_is_not_finite_stops_the_run_before_the_next_checkpoint(tmp_path, options, words):
    loop = trainer(tmp_path, tiny.method(**options))
    with pytest.raises(RunError) as error:
        loop.fit()
    good = tmp_path / "checkpoints" / "step-00000004"
    assert words in str(error.value) and str(good) in str(error.value)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000004"]
    assert [line["step"] for line in metrics(tmp_path)] == [3, 4, 6]
    # What is left is whole: a healthy method goes on from it.
    whole, again = tiny.method(), tiny.method()
    trainer(tmp_path / "whole", whole).fit()
    trainer(tmp_path, again).fit()
    assert tiny.same(tiny.weights(again), tiny.weights(whole))


def test_the_loss_itself_and_no_checkpoint_yet(tmp_path):
    class Broken(tiny.Tiny):
        def forward(self, batch, rng, progress):
            return {"loss": super().forward(batch, rng, progress)["loss"] * float("nan")}

    with pytest.raises(RunError, match="loss is NaN at step 1; there was no checkpoint yet"):
        trainer(tmp_path, Broken()).fit()
    assert not (tmp_path / "checkpoints").exists() and not (tmp_path / "metrics.jsonl").exists()


def test_weights_broken_by_a_finite_loss_are_never_called_good(tmp_path):
    class Steep(tiny.Tiny):
        """The loss stays finite, its gradient does not: sqrt at 0."""

        def forward(self, batch, rng, progress):
            parts = super().forward(batch, rng, progress)
            if progress >= 7 / 12:
                parts["loss"] = parts["loss"] + (self.net.weight * 0).sum().sqrt()
            return parts

    with pytest.raises(RunError, match=r"weight net.weight is not finite at step 8; .*step-00000004"):
        trainer(tmp_path, Steep()).fit()
    assert checkpoint.latest(tmp_path / "checkpoints").name == "step-00000004"


def test_a_wish_to_stop_at_the_last_step_is_the_end(tmp_path):
    made = tiny.method()
    assert trainer(tmp_path, made).fit(stop_after(12, made))["steps"] == 12


def test_no_steps_keep_the_initialisation(tmp_path):
    made = tiny.method()
    assert trainer(tmp_path, made, steps=0, ema_decay=0.9).fit()["images_seen"] == 0
    assert tiny.same(tiny.weights(made), tiny.weights(tiny.method()))


def test_tensorboard_gets_the_curves(tmp_path):
    pytest.importorskip("tensorboard")
    trainer(tmp_path, track=("tensorboard",)).fit()
    (events,) = tmp_path.rglob("events.out.tfevents.*")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(events.parent)).Reload()
    written = {line["step"]: line["loss"] for line in metrics(tmp_path)}
    assert {s.step: s.value for s in read.Scalars("loss")} == pytest.approx(written, rel=1e-6)
    assert "lr" in read.Tags()["scalars"]


def test_a_tracker_that_is_not_installed_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"'tensorboard' is not installed; install it with: pip install"):
        trainer(tmp_path, track=("tensorboard",))


def test_a_tracker_appears_only_once_training_begins(tmp_path):
    trainer(tmp_path, track=("tensorboard",))
    assert not list(tmp_path.rglob("*"))


def test_bf16_trains_in_float32_weights_and_its_runs_do_not_leak(tmp_path):
    half = tiny.method()
    trainer(tmp_path / "half", half, precision="bf16").fit()
    assert half.net.weight.dtype == torch.float32
    whole = tiny.method()
    trainer(tmp_path / "whole", whole).fit()
    assert not torch.equal(half.net.weight, whole.net.weight)
    torch.testing.assert_close(half.net.weight, whole.net.weight, atol=0.05, rtol=0.1)


def test_fp16_without_a_gpu_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"train.precision 'fp16' needs a GPU"):
        trainer(tmp_path, precision="fp16")


def test_an_unknown_part_in_group_lr_is_refused(tmp_path):
    with pytest.raises(UserError, match="no part 'policy'"):
        trainer(tmp_path, optim=type(tiny.SGD)(lr=1, group_lr={"policy": 1.0}))


def test_half_of_each_batch_from_the_labelled_images():
    chosen = torch.tensor([3, 8, 21])
    config = DataConfig(source="digits", labels=3, labelled_share=0.5)
    feed = Feed(tiny.image_set(), config, 8, 0, chosen)
    index = torch.stack([feed.index(step) for step in range(15)])
    assert index[:, :4].flatten().bincount(minlength=40).nonzero().flatten().tolist() == chosen.tolist()
    assert index[:, :4].flatten().bincount()[chosen].tolist() == [20, 20, 20]  # 60 draws, three whole rounds of 20
    rest = index[:10, 4:].flatten()  # 40 draws: one epoch
    assert sorted(rest.tolist()) == list(range(40))


def test_first_non_finite_names_the_earliest_and_a_part_before_the_sum():
    good = torch.zeros(4)
    bad = torch.tensor([0.0, 0.0, float("nan"), float("nan")])
    assert devices.first_non_finite({"loss": good, "kd": good}) is None
    assert devices.first_non_finite({"loss": bad, "kd": bad}) == ("kd", 2, "NaN")
    vector = torch.stack([good, good, good]).index_fill(0, torch.tensor([1]), float("inf"))
    assert devices.first_non_finite({"loss": bad, "probs": vector}) == ("probs", 1, "infinite")


def test_the_loop_stays_one_page():
    assert len(inspect.getsource(trainer_module).splitlines()) <= 150
