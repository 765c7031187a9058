"""timm and diffusers beside a torch for which torchvision's compiled operators were not built."""

import subprocess
import sys

import pytest
import torch

from diffrep import _torchvision_compat as compat

SCRIPT = """
from diffrep import _torchvision_compat as compat

first, second = compat.install(), compat.install()
assert first == second, (first, second)
import timm
import torchvision
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from timm.data import create_transform

assert timm.create_model("resnet18", num_classes=2).fc.out_features == 2
from PIL import Image

assert tuple(create_transform((3, 8, 8))(Image.new("RGB", (20, 10))).shape) == (3, 8, 8)
assert torchvision.transforms.functional.hflip is not None
network = UNet2DModel(sample_size=8, block_out_channels=(8, 16), norm_num_groups=8,
                      down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
pipe = DDPMPipeline(network, DDPMScheduler())
pipe.set_progress_bar_config(disable=True)
assert pipe(num_inference_steps=1, output_type="np").images.shape == (1, 8, 8, 3)
print("needed" if first else "compiled")
"""


def test_timm_and_pipelines_import_and_work():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] in ("needed", "compiled")


@pytest.fixture
def declared(monkeypatch):
    """What install() would declare, with nothing declared yet; the real registry is left alone."""
    made = []

    class Library:
        def __init__(self, namespace, kind):
            made.append(namespace)

        def define(self, signature):
            made.append(signature.partition("(")[0])

    monkeypatch.setattr(torch.library, "Library", Library)
    monkeypatch.setattr(compat, "_libraries", [])
    return made


def test_nothing_is_declared_where_the_operators_are_compiled(declared, monkeypatch):
    monkeypatch.setattr(compat, "compiled_operators_load", lambda: True)
    assert compat.install() is False
    assert declared == []


def test_nothing_is_declared_without_torchvision(declared, monkeypatch):
    monkeypatch.setattr(compat.importlib.util, "find_spec", lambda name: None)
    assert compat.install() is False
    assert declared == []


def test_the_missing_operators_are_declared_once(declared, monkeypatch):
    monkeypatch.setattr(compat, "compiled_operators_load", lambda: False)
    assert compat.install() is True
    assert compat.install() is True
    assert declared == ["torchvision", "nms", "qnms"]


def test_a_library_that_does_not_load_is_said_so(monkeypatch):
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel", lambda name: False)

    def refuse(path):
        raise OSError("undefined symbol")

    monkeypatch.setattr(torch.ops, "load_library", refuse)
    assert compat.compiled_operators_load() is False
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel", lambda name: True)
    assert compat.compiled_operators_load() is True


@pytest.mark.parametrize("name", ["_C.so", "_C_stable.so", "_C.pyd"])
def test_the_compiled_library_is_found_under_each_of_its_names(name, tmp_path, monkeypatch):
    (tmp_path / name).touch()
    (tmp_path / "image.so").touch()
    spec = type("Spec", (), {"submodule_search_locations": [str(tmp_path)]})
    tried = []
    monkeypatch.setattr(compat.importlib.util, "find_spec", lambda _: spec)
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel", lambda _: False)
    monkeypatch.setattr(torch.ops, "load_library", tried.append)
    assert compat.compiled_operators_load() and tried == [str(tmp_path / name)]
