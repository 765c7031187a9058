"""What a machine is told to set follows from what was measured on it: pytest tests/test_doctor.py"""

import re

import pytest
import yaml

from diffrep import doctor
from diffrep.frozen.diffusion import DiffusionTeacher
from diffrep.frozen.passes import PassConfig

GAINS = {"bf16": 1.0, "channels_last": 1.0, "fused_attention": 1.0}


@pytest.fixture(scope="module")
def found():
    return doctor.examine()


def told(found, option, **changed):
    """The line of one option."""
    passes = found["passes"] | {name: value for name, value in changed.items() if name in GAINS}
    rest = {name: value for name, value in changed.items() if name not in GAINS}
    lines = [line for line in doctor.lines(found | rest | {"passes": passes}) if f"method.passes.{option}=" in line]
    assert len(lines) == 1
    return lines[0]


def test_what_is_measured(found):
    assert found["passes"].keys() == GAINS.keys()  # compiling takes minutes: it is not tried
    assert all(0 < gain < 100 for gain in found["passes"].values()) and found["gmacs_per_second"] > 0
    assert found["free_memory_bytes"] > 0 and {"compiler", "triton"} <= found.keys()


def test_every_option_has_one_line_whose_advice_can_be_set(found):
    advice = [line.partition("-> ")[2] for line in doctor.lines(found) if "method.passes." in line]
    settings = dict(re.search(r"method\.passes\.(\w+)=(\w+)", line).groups() for line in advice)
    assert len(advice) == len(settings) and settings.keys() == PassConfig.model_fields.keys()
    PassConfig(**{name: yaml.safe_load(value.replace("N", "100")) for name, value in settings.items()})


@pytest.mark.parametrize(("option", "key"), [("precision", "bf16"), ("channels_last", "channels_last")])
def test_an_option_is_advised_where_it_saves_time(found, option, key):
    default = {"precision": "fp32", "channels_last": "false"}[option]
    assert f"--set method.passes.{option}=" in told(found, option, **{key: 1.6})
    assert f"no faster here: keep method.passes.{option}={default}" in told(found, option, **{key: 1.02})
    assert f"slower here: keep method.passes.{option}={default}" in told(found, option, **{key: 0.4})


def test_attention_stays_fused_unless_it_is_slower(found):
    assert "keep method.passes.attention=fused" in told(found, "attention", fused_attention=1.0)
    assert "--set method.passes.attention=plain" in told(found, "attention", fused_attention=0.5)


@pytest.mark.parametrize(
    ("cuda", "compiler", "triton", "advised"),
    [(False, "g++", False, True), (False, None, False, False), (True, "g++", True, True), (True, "g++", False, False)],
)
def test_compiling_needs_its_tools(found, cuda, compiler, triton, advised):
    line = told(found, "compile", cuda=cuda, compiler=compiler, triton=triton)
    assert ("--set method.passes.compile=true" in line) == advised
    assert ("keep method.passes.compile=false" in line) == (not advised)


def test_ratios_are_of_the_plain_pass_and_of_each_option_in_force(monkeypatch):
    seconds = {"plain": 2.0, "bf16": 1.0, "channels_last": 4.0, "attention_written_out": 3.0}
    ran = []
    monkeypatch.setattr(DiffusionTeacher, "features", lambda teacher, *_: ran.append(teacher.passes))

    def timed(run, device):
        run()
        return next(seconds[name] for name, config in doctor.WAYS.items() if config == ran[-1])

    monkeypatch.setattr(doctor, "_seconds", timed)
    rate, gains = doctor._trial("cpu")
    assert gains == {"bf16": 2.0, "channels_last": 0.5, "fused_attention": 1.5}
    assert ran == [*doctor.WAYS.values()] * (1 + doctor.REPEATS)  # in turn
    monkeypatch.setattr(doctor, "BATCH", 2 * doctor.BATCH)
    assert doctor._trial("cpu")[0] == pytest.approx(2 * rate, abs=0.11)
