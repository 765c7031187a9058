"""Pictures of chosen timesteps, from logs written by hand: pytest tests/report/test_choices.py"""

import json

import pytest
import torch
from folders import CHROMIUM, on_a_phone, page, words, write_folder

from diffrep.api import run
from diffrep.diffusion.selection import binned

BINS = 32


def share(low: int, high: int) -> list[float]:
    """All choices spread evenly over these parts."""
    return [1 / (high - low) if low <= i < high else 0.0 for i in range(BINS)]


def recipe(select="policy", values=tuple(range(1000)), seed=0, **timestep) -> dict:
    chosen = {"select": select, "values": list(values), **timestep}
    method = {"kind": "repfusion", "teacher": "random:x", "tap": "mid", "timestep": chosen}
    return {"name": "looked", "kind": "recipe", "seed": seed, "data": {"source": "digits"}, "method": method} | {
        "train": {"steps": 100}
    }


# Evenly, then the first half, then the first two of 32 parts.
LOG = [
    {"step": step, "kd_loss": 1.0, "chosen_timesteps": parts}
    for step, parts in ((10, share(0, 32)), (50, share(0, 16)), (100, share(0, 2)))
]


def test_a_wide_policy_is_drawn_and_said(tmp_path):
    _, reader = page([write_folder(tmp_path / "run", recipe(), None, LOG)], tmp_path)
    (alt,) = [a for a in reader.alternatives if "at the start" in a]
    # Of 1,000 timesteps part i holds 31.25 i to 31.25 (i + 1).
    assert (
        "at the start 50 % on t = 0 to 499, in the middle 50 % on t = 0 to 249, at the end 50 % on t = 0 to 31." in alt
    )
    text = words(reader)
    assert "Which timesteps were chosen" in text and "A policy is a small network" in text
    assert "Where the policy looks" not in text and "that a rule drew" not in text


def test_a_rule_is_folded_away(tmp_path):
    folder = write_folder(tmp_path / "run", recipe("range", (0, 800), decay_to=50), None, LOG)
    text, reader = page([folder], tmp_path)
    assert "Timesteps that a rule drew (1)" in text and "A policy is" not in text
    assert any("at the end 50 % on t = 0 to 24." in a for a in reader.alternatives)  # 800 / 32 = 25 a part


def test_a_policy_whose_probabilities_are_drawn_is_not_drawn_twice(tmp_path):
    both = [line | {"policy_probs": [0.5, 0.3, 0.2]} for line in LOG]
    folder = write_folder(tmp_path / "run", recipe(values=(0, 100, 900)), None, both)
    text = words(page([folder], tmp_path)[1])
    assert "Where the policy looks" in text and "Which timesteps were chosen" not in text


def test_seeds_are_averaged_where_all_logged(tmp_path):
    late = [{"step": 100, "chosen_timesteps": share(30, 32)}]
    folders = [write_folder(tmp_path / f"run{s}", recipe(seed=s), None, log) for s, log in enumerate([LOG, late])]
    (alt,) = [a for a in page(folders, tmp_path)[1].alternatives if "at the start" in a]
    assert "at the start 50 % on t = 0 to 62, in the middle 50 % on t = 0 to 62, at the end 50 % on t = 0 to 62." in alt


@pytest.mark.parametrize("log", [[], [{"step": 10, "kd_loss": 1.0}]])
def test_a_log_without_choices_draws_nothing(log, tmp_path):
    folder = write_folder(tmp_path / "run", recipe("fixed", (100,)), None, log)
    assert "Which timesteps were chosen" not in words(page([folder], tmp_path)[1])


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_a_phone_shows_it_without_sideways_scrolling(tmp_path):
    width, console = on_a_phone(page([write_folder(tmp_path / "run", recipe(), None, LOG)], tmp_path)[0], tmp_path)
    assert width <= 390 and "CONSOLE" not in console


def test_the_logs_histogram_is_a_share_that_micro_batches_add_up_to():
    chosen = torch.tensor([0, 31, 32, 500, 968, 969, 999, 999])
    parts = binned(chosen, 1000, BINS)
    # Part i is the timesteps from 31.25 i up to 31.25 (i + 1): 968 lies in part 30, 969 in part 31.
    assert {i: float(v) for i, v in enumerate(parts) if v} == {0: 0.25, 1: 0.125, 16: 0.125, 30: 0.125, 31: 0.375}
    halves = (binned(chosen[:2], 1000, BINS) * 2 + binned(chosen[2:], 1000, BINS) * 6) / 8
    torch.testing.assert_close(parts, halves)
    each = binned(torch.arange(1000), 1000, BINS)
    assert each.shape == (BINS,) and each.max() - each.min() < 0.0011 and float(each.sum()) == pytest.approx(1)


@pytest.mark.parametrize("select", ["policy", "range", "list"])
def test_a_real_run_logs_its_choices_and_its_page_draws_them(select, tmp_path):
    values = "[0,900]" if select == "range" else str(list(range(0, 900, 10)))  # 90 of a list: more than MAX_SEPARATE
    run("denoiser_debug", out=tmp_path / "denoiser")
    changes = [f"method.teacher=random:{tmp_path / 'denoiser'}", f"method.timestep.select={select}"]
    changes += [f"method.timestep.values={values}", "method.standardise=none", "optim.group_lr={}"]
    folder = tmp_path / select
    run("repfusion_debug", changes, out=folder)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and all(sum(line["chosen_timesteps"]) == pytest.approx(1) for line in lines)
    assert any("at the start" in a for a in page([folder], tmp_path)[1].alternatives)
