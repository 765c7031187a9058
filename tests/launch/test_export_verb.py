"""``diffrep export`` on a run: pytest tests/launch/test_export_verb.py"""

import json
import sys

import pytest
import torch

from diffrep import cli
from diffrep.methods.finetune import Finetune, FinetuneConfig
from diffrep.models.stored import load_student
from diffrep.models.students import StudentConfig


@pytest.fixture
def said(tmp_path, monkeypatch, capsys):
    """said(arguments) -> exit code, stdout, stderr of ``diffrep export`` beside a finished run ``run``."""
    config = FinetuneConfig(student=StudentConfig(name="conv_small"))
    Finetune(config, 3, 8).export(tmp_path / "run")
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["diffrep", "export", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, *capsys.readouterr()

    return call


def test_it_writes_a_folder_and_says_how_to_load_it(said, tmp_path):
    code, out, err = said("run", "--out", "mine")
    assert (code, err) == (0, "")
    assert 'load_student(Path("mine/model.safetensors")); timm has no conv_small' in out
    x = torch.rand(2, 3, 8, 8)
    here, there = load_student(tmp_path / "run/weights.safetensors"), load_student(tmp_path / "mine/model.safetensors")
    assert torch.equal(here.eval()(x), there.eval()(x))


def test_json_is_all_that_is_printed(said):
    code, out, err = said("run", "--out", "mine", "--onnx", "--image-size", "8", "--json")
    found = json.loads(out)
    assert (code, err, found["image_size"], found["in_timm"]) == (0, "", 8, False)
    assert found["files"] == ["model.safetensors", "config.json", "model.onnx"]


def test_wrong_input_is_one_line(said):
    code, out, err = said("nowhere", "--out", "mine")
    assert (code, out) == (2, "") and err.startswith("diffrep: nowhere holds no student") and err.count("\n") == 1
    assert said("run", "--out", "run")[0] == 2
