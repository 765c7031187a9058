"""docs/scale.md: its numbers are those of specification and code, counted again: pytest tests/test_scale.py"""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def scale():
    """Both pages."""
    sys.path.insert(0, str(ROOT))
    try:
        from benchmarks import scale, scale_addp

        yield SimpleNamespace(**vars(scale_addp) | vars(scale))
    finally:
        sys.path.remove(str(ROOT))


# Official modules, counted by torch's counter (specification, section 5): G multiply-adds of an image at 256 pixels.
OFFICIAL = {
    "base": {"predictor": 39.11, "encoder": 23.20, "step": 366.5, "run": 7.5e20},
    "large": {"predictor": 108.88, "encoder": 81.06, "step": 724.7, "run": 7.4e20},
}
DECODER = {"base": {64: 20.28, 128: 24.60, 255: 33.46}, "large": {64: 35.27, 128: 42.66, 255: 57.70}}
WALKS = {("base", 20): 2830, ("large", 20): 4309, ("base", 256): 36_186, ("large", 256): 55_621}
SHORTER = {("base", 20): 2594, ("large", 20): 3933, ("base", 256): 36_083, ("large", 256): 55_448}
EPOCHS = {"base": "1600", "large": "800"}


@pytest.mark.parametrize("size", OFFICIAL)
def test_parts_steps_and_runs_are_the_official_ones(scale, size):
    part, official = scale.parts(size), OFFICIAL[size]
    assert part.encode / 1e9 == pytest.approx(64.38, abs=0.01)
    assert part.decode / 1e9 == pytest.approx(93.27, abs=0.01)
    assert part.predictor / 1e9 == pytest.approx(official["predictor"], abs=0.01)
    assert part.encoder / 1e9 == pytest.approx(official["encoder"], abs=0.01)
    for visible, wanted in DECODER[size].items():
        assert scale.answer(size, visible) / 1e9 == pytest.approx(wanted, abs=0.01)
    assert scale.official_step(size) / 1e9 == pytest.approx(official["step"], abs=0.1)
    course = scale.RECIPES[f"addp_pretrain_{size}_{EPOCHS[size]}ep"]().train
    assert scale.official_step(size) * course.steps * course.batch_size == pytest.approx(official["run"], rel=0.01)


def test_the_law_of_masks_is_the_official_one(scale):
    pairs = list(scale.law())
    assert sum(p for p, *_ in pairs) == pytest.approx(1)
    assert sum(p * n for p, n, _ in pairs) == pytest.approx(191.3, abs=0.05)
    assert sum(p for p, n, _ in pairs if n == 256) == pytest.approx(0.0284, abs=1e-4)
    assert sum(p for p, n, noisier in pairs if n == noisier) == pytest.approx(0.0321, abs=1e-4)


@pytest.mark.parametrize("size", OFFICIAL)
def test_each_redundancy_saves_and_the_counts_between_are_exact(scale, size):
    steps = list(scale.savings(size).values())
    assert steps == sorted(steps, reverse=True) and len(set(steps)) == 4
    assert scale.quadratic(lambda n: scale.trained(size, n), 164, scale.KNOWN) == pytest.approx(
        scale.trained(size, 164), rel=1e-9
    )
    assert scale.quadratic(lambda n: scale.asked(size, n), 214, scale.KNOWN) == pytest.approx(
        scale.asked(size, 214), rel=1e-9
    )


@pytest.mark.parametrize(("size", "steps"), WALKS)
def test_a_generated_image_costs_what_it_is_said_to(scale, size, steps):
    schedule = "cosine" if steps == 20 else "linear"
    assert scale.walk(size, steps, schedule, skips=False) / 1e9 == pytest.approx(WALKS[size, steps], abs=1)
    once = scale.parts(size).decoder(0)  # the table of a blank image, which the specification does not count
    shorter = scale.walk(size, steps, schedule, skips=True) - once
    assert shorter / 1e9 == pytest.approx(SHORTER[size, steps], abs=1)


def test_hours_follow_the_formula_on_the_page(scale):
    assert scale.hours(7.5e20) == pytest.approx(2 * 7.5e20 / (0.40 * 989e12) / 3600)
    assert "2 x multiply-adds / (0.40 x 989e12 per second) / 3600" in scale_page()


def scale_page() -> str:
    return (ROOT / "docs" / "scale.md").read_text()


def test_the_page_holds_what_is_counted_of_addp(scale):
    found = scale_page()
    for line in (*scale.addp_parts(), *scale.savings_table(), *scale.walks_table()):
        assert line in found
    row = scale.Run("ADDP base: 50,000 images, 20 steps", 50_000, scale.walk("base", 20, "cosine", skips=True)).cells()
    assert f"| {' | '.join(row[:5])} |" in found


@pytest.mark.slow
def test_the_page_is_what_the_command_writes(scale):
    assert scale.MARKS[0] + scale.counted() + scale.MARKS[1] in scale_page()
