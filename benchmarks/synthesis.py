"""Drawing images: against diffusers' own loop at equal steps, and in network calls against the paper's setting.

Same U-Net (2.6 M parameters, 32 pixels, untrained), same DDIM steps, same batch. Ours includes what makes a set
trustworthy: a noise stream per image, epsilon derived again after clipping, PNG, tar, hash.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import line, rivals
from diffrep.frozen.diffusion import DiffusionTeacher
from diffrep.frozen.generator import LOW_FIDELITY, DiffusionGenerator, SamplingConfig
from diffrep.methods.denoiser import DenoiserConfig, unet
from diffrep.methods.synthesis import Synthesis, SynthesisConfig
from diffrep.randomness import seeded
from diffrep.recipes.denoiser import denoiser_cifar10_small

IMAGES, STEPS = 16, 5


def measure() -> list[dict[str, Any]]:
    """Sixteen images of five steps; then calls per image."""
    config = denoiser_cifar10_small().method
    assert isinstance(config, DenoiserConfig)
    with seeded(0, "bench"):
        network = unet(config, 32, 10).eval()
    generator = DiffusionGenerator(DiffusionTeacher(network, "bench", 32, call_options={"return_dict": False}))
    sampling = SamplingConfig(num_sampling_steps=str(STEPS))
    plan = SynthesisConfig(sampling=sampling, images=IMAGES, block_size=IMAGES)
    synthesis = Synthesis(generator, plan, 0, False)

    def ours() -> None:
        with tempfile.TemporaryDirectory() as folder:
            synthesis.make_shard(Path(folder), 0)

    mine, theirs = rivals(ours, _pipeline(network), repeats=3)
    unit = f"CPU s, {IMAGES} images of {STEPS} steps"
    found = [line("a shard of DDIM samples", "diffusers' DDIMPipeline", mine, theirs, unit=unit)]
    calls = [_calls(SamplingConfig()), _calls(LOW_FIDELITY.model_copy(update={"guided_channels": None}))]
    rival = "the paper's low fidelity: DDPM, T = 100, s = 2"
    return [*found, line("DDIM, T = 20, s = 1", rival, *map(float, calls), unit="network calls per image")]


def _pipeline(network: Any) -> Any:
    from diffusers import DDIMPipeline, DDIMScheduler

    pipeline = DDIMPipeline(network, DDIMScheduler(num_train_timesteps=1000, beta_schedule="linear"))
    pipeline.set_progress_bar_config(disable=True)
    return lambda: pipeline(batch_size=IMAGES, num_inference_steps=STEPS, output_type="np")


def _calls(sampling: SamplingConfig) -> int:
    """Of a class-conditional network; counted, not run."""
    tiny = DiffusionTeacher(torch.nn.Conv2d(3, 3, 1), "counted", 32, num_classes=10)
    return sum(DiffusionGenerator(tiny).calls(sampling))
