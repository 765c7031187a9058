"""What all tests share: one thread, the folders with real data and with golden numbers, and tiny teachers.

DIFFREP_DATA (default ../shared) holds data/ and weights/; DIFFREP_GOLDEN (default ../shared/golden) holds numbers made
by the official code. Both are optional: without them their tests are skipped with a line that says so.

A golden test asks for the fixture ``golden_case`` and says with ``@pytest.mark.golden(of=...)`` which cases it reads;
it then runs once for every such case of every file in the folder. It looks at a case's metadata and keys, never at its
name: a file of the same layout with other names and sizes is read all the same.
"""

import json
import os
import sys
import types
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import hypothesis
import pytest
import torch
from safetensors import safe_open
from torch import nn

ROOT = Path(__file__).parents[1]

# The same examples at every run; `--hypothesis-profile default` looks for new ones.
hypothesis.settings.register_profile("steady", derandomize=True)
hypothesis.settings.load_profile("steady")

torch.set_num_threads(1)  # two processes with many threads each starve each other, and rounding then varies


@pytest.fixture
def shared() -> Path:
    """$DIFFREP_DATA, or a skip that says what is missing."""
    folder = (ROOT / os.environ.get("DIFFREP_DATA", "../shared")).resolve()
    if not folder.is_dir():
        pytest.skip("no real data: set DIFFREP_DATA to the folder that holds data/ and weights/")
    return folder


# Golden numbers


@dataclass(frozen=True)
class GoldenCase:
    """One case of one golden file. meta: its entry in the metadata; keys: its tensors, e.g. ``outputs/exact_loss``."""

    file: Path
    name: str
    meta: dict
    keys: frozenset[str]

    def get(self, key: str) -> torch.Tensor:
        with safe_open(self.file, "pt") as tensors:
            return tensors.get_tensor(f"case/{self.name}/{key}")

    def under(self, prefix: str) -> dict[str, torch.Tensor]:
        """{"w": ...} of ``inputs/w``, ... for the prefix ``inputs/``."""
        return {key.removeprefix(prefix): self.get(key) for key in sorted(self.keys) if key.startswith(prefix)}

    def outputs_named(self, name: str) -> list[str]:
        """The keys of outputs whose last part is ``name``."""
        return sorted(k for k in self.keys if k.startswith("outputs/") and k.rsplit("/", 1)[1] == name)


@cache
def golden_cases() -> tuple[GoldenCase, ...]:
    folder = (ROOT / os.environ.get("DIFFREP_GOLDEN", "../shared/golden")).resolve()
    return tuple(case for file in sorted(folder.glob("*.safetensors")) for case in _cases(file))


def _cases(file: Path) -> list[GoldenCase]:
    with safe_open(file, "pt") as tensors:
        described, keys = json.loads((tensors.metadata() or {}).get("cases", "{}")), list(tensors.keys())
    found: dict[str, set[str]] = {name: set() for name in described}
    for key in keys:
        for name in found:
            if key.startswith(f"case/{name}/"):
                found[name].add(key.removeprefix(f"case/{name}/"))
    return [GoldenCase(file, name, described[name], frozenset(found[name])) for name in described]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "golden_case" in metafunc.fixturenames:
        mark = metafunc.definition.get_closest_marker("golden")
        reads = mark.kwargs.get("of", lambda case: True) if mark else lambda case: True
        cases = [case for case in golden_cases() if reads(case)]
        reason = "no golden case of this kind: set DIFFREP_GOLDEN to the folder with the official numbers"
        empty = pytest.param(None, marks=pytest.mark.skip(reason=reason), id="none")
        shown = [pytest.param(case, id=f"{case.file.stem}-{case.name}") for case in cases]
        metafunc.parametrize("golden_case", shown or [empty])


# Tiny teachers


class TinyDenoiser(nn.Module):
    """(x, timestep[, class_labels]) -> predicted noise, in five layers; ``mid`` is reached twice in a pass."""

    def __init__(self, channels: int = 3, width: int = 8, num_classes: int | None = None, image_size: int = 8) -> None:
        super().__init__()
        self.image_size, self.in_channels = image_size, channels
        self.stem = nn.Conv2d(channels, width, 3, padding=1)
        self.time = nn.Linear(4, width)
        self.classes = nn.Embedding(num_classes + 1, width) if num_classes else None
        self.down = nn.Sequential(nn.Conv2d(width, width, 3, 2, 1), nn.GroupNorm(2, width), nn.Dropout(0.5))
        self.mid = nn.Conv2d(width, width, 3, padding=1)
        self.up = nn.ConvTranspose2d(width, width, 2, 2)
        self.out = nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, x: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor | None = None):
        angle = timestep.float()[:, None] * torch.tensor([1.0, 0.1, 0.01, 0.001], device=x.device)
        condition = self.time(angle.sin())
        if self.classes is not None:
            condition = condition + self.classes(class_labels)
        h = self.stem(x) + condition[:, :, None, None]
        h = self.down(h)
        h = self.mid(torch.relu(self.mid(h)))
        return self.out(torch.relu(self.up(h)))


@pytest.fixture
def tiny_denoiser():
    """tiny_denoiser(...) makes a TinyDenoiser with always the same weights."""

    def make(**options) -> TinyDenoiser:
        with torch.random.fork_rng():
            torch.manual_seed(7)
            return TinyDenoiser(**options)

    return make


@pytest.fixture
def factory(monkeypatch):
    """factory(make) gives the teacher reference ``python:...`` under which ``make()`` is found."""
    module = types.ModuleType("diffrep_test_factories")
    monkeypatch.setitem(sys.modules, module.__name__, module)

    def register(make, name: str = "make") -> str:
        setattr(module, name, make)
        return f"python:{module.__name__}:{name}"

    return register


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory):
    """pipeline(conditional=..., ...) is a diffusers folder that methods/denoiser.py wrote, untrained."""
    from diffrep.methods.denoiser import Denoiser, DenoiserConfig

    @cache
    def make(num_classes: int = 4, image_size: int = 8, **settings) -> Path:
        folder = tmp_path_factory.mktemp("run")
        config = DenoiserConfig(block_out_channels=(8, 16), norm_num_groups=4, **settings)
        with torch.random.fork_rng():
            torch.manual_seed(5)
            Denoiser(config, num_classes, image_size).export(folder)
        return folder / "pipeline"

    return make


# Tiny token networks


@pytest.fixture(scope="session")
def token_networks(tmp_path_factory) -> str:
    """A folder with an untrained tokenizer (16 tokens of 2x2 pixels, 11 codes) and token predictor."""
    from diffrep.frozen.tokens import write_network
    from diffrep.models.masked_vit import TokenPredictor, TokenPredictorConfig
    from diffrep.models.vqgan import VQGAN, VQGANConfig

    folder = tmp_path_factory.mktemp("tokens")
    with torch.random.fork_rng():
        torch.manual_seed(5)
        tokenizer = VQGAN(VQGANConfig(ch=32, ch_mult=(1, 1), num_res_blocks=1, z_channels=4, num_codes=11))
        tokenizer.codebook.data.normal_()
        small = {"embed_dim": 16, "depth": 1, "num_heads": 2, "decoder_depth": 1, "decoder_num_heads": 2}
        predictor = TokenPredictor(TokenPredictorConfig(**small, num_codes=11, num_tokens=16, init_std=0.5))
    write_network(folder, "tokenizer", tokenizer, "tiny", "MIT")
    write_network(folder, "token_predictor", predictor, "tiny", "MIT")
    return str(folder)
