"""What ``diffrep probe`` makes of its options: pytest tests/launch/test_probe_verb.py"""

import typer
from typer.testing import CliRunner

from diffrep.config import validate
from diffrep.evaluation.sweep import SweepConfig
from diffrep.launch.probe_verb import add_probe_verb, probe_rows


def asked(*options: str) -> tuple[dict, bool, bool]:
    """The arguments of api.probe, --dry-run and --json."""
    app, found = typer.Typer(), []
    add_probe_verb(app, lambda *given: found.append(given))
    done = CliRunner().invoke(app, ["TEACHER", "--data", "digits", *options])
    assert done.exit_code == 0, done.output
    return found[0]


def config(*options: str) -> SweepConfig:
    return validate(SweepConfig, asked(*options)[0]["settings"], "probe")


def test_without_options_it_is_the_mid_block_at_eight_sigmas():
    assert config() == SweepConfig(taps=("mid_block",))
    assert config("--search") == SweepConfig(taps=("all",), search=True)
    assert config("--search", "--taps", "a,b").taps == ("a", "b")


def test_levels_come_in_one_of_four_units():
    assert config("--timesteps", "0,50").timesteps == (0, 50)
    assert config("--sigmas", "0.05,0.3").sigmas == (0.05, 0.3)
    assert config("--snrs", "400,8.5").snrs == (400, 8.5)
    assert config("--alpha-bars", "0.99,0.5").alpha_bars == (0.99, 0.5)


def test_every_option_reaches_its_field():
    found = config(
        "--pool", "2", "--noise", "forward", "--images", "500", "--test-images", "100", "--split", "validation",
        "--control", "--draws", "3",
    )  # fmt: skip
    expected = {"pool": 2, "noise": "forward", "train_images": 500, "held_out_images": 100, "split": "validation"}
    assert found == SweepConfig(taps=("mid_block",), control=True, draws=3, **expected)
    assert config("--labels", "50").labels == 50 and config("--search", "--budget", "0.05").budget == 0.05
    given, dry_run, as_json = asked("--seed", "3", "--out", "here", "--dry-run", "--json", "--image-size", "64")
    assert (given["seed"], str(given["out"]), given["data"]["image_size"]) == (3, "here", 64)
    assert dry_run and as_json and not given["allow_code"]


def test_programs_get_rows_or_what_a_search_found():
    rows = [{"tap": "pixels", "mean": 1.0}]
    assert probe_rows({"rows": rows, "control": [{"tap": "a", "mean": 2.0}]}) == [
        *rows, {"tap": "a", "mean": 2.0, "untrained": True},
    ]  # fmt: skip
    found = probe_rows({"rows": [], "search": {"passes": 3}, "best": rows[0], "overrides": ["method.tap=a"]})
    assert found == {"passes": 3, "best": rows[0], "overrides": ["method.tap=a"]}
