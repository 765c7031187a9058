"""What the published runs cost, counted from our own code on the meta device: ``python -m benchmarks.scale``.

Writes the tables between the marks of docs/scale.md. Nothing is trained, and no weights are read. Multiply-adds are
torch's counter's; a step is what a run's result states: forward of what is frozen, forward and backward of the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.scale_addp import SIZES, made, official_step, parts, savings, walk
from diffrep.api import without_weights
from diffrep.assemble import multiply_adds_per_image
from diffrep.counting import multiply_adds, on_meta, peak_bytes
from diffrep.methods.addp import ADDP
from diffrep.methods.repfusion import RepFusion
from diffrep.models.dit import DiT, DiTConfig
from diffrep.models.masked_vit import TokenPredictor
from diffrep.models.students import Student, StudentConfig
from diffrep.recipes import RECIPES
from diffrep.recipes.dmkd_cifar100 import NETWORKS, PAIRS

PAGE, MARKS = Path("docs/scale.md"), ("<!-- counted: begin -->\n", "<!-- counted: end -->\n")
PEAK, USED = 989e12, 0.4  # one H100 SXM: dense bf16 operations per second, and the share of them that is assumed
GB, G = 1e9, 1e9
SHOWN = 50_000  # images of a published score
IMAGENET = "ImageNet train, 147.9 GB as its tar"


def hours(multiply_adds: float) -> float:
    """Of one H100: 2 operations each, at the assumed share of its peak."""
    return 2 * multiply_adds / (PEAK * USED) / 3600


# Runs


@dataclass(frozen=True)
class Run:
    """One published run.

    each: multiply-adds per image. weights: parameters trained, and frozen beside them. copies: of the trained ones in
    float32, with gradient and optimiser. activations: bytes per image in float32, blocks kept and checkpointed.
    """

    name: str
    images: int
    each: float
    weights: tuple[int, int] = (0, 0)
    copies: int = 4
    activations: tuple[int, ...] = ()
    data: str = ""

    def cells(self) -> list[str]:
        total = self.images * self.each
        state = (self.weights[0] * self.copies + self.weights[1]) * 4
        held = " / ".join(f"{a / 1e6:.0f}" for a in self.activations) or "-"
        parameters = " + ".join(f"{n / 1e6:.1f} M" for n in self.weights if n) or "-"
        return [
            self.name, f"{self.images:,}", amount(self.each), f"{total:.2e}", time_of(total), parameters,
            f"{state / GB:.2f}" if state else "-", held, self.data,
        ]  # fmt: skip


def amount(multiply_adds: float) -> str:
    return f"{multiply_adds / G:,.0f} G" if multiply_adds >= 1e12 else f"{multiply_adds / G:.4g} G"


def time_of(multiply_adds: float) -> str:
    found = hours(multiply_adds)
    return f"{found:,.0f}" if found >= 10 else f"{found:.2g}"


def parameters(*modules: nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def growth(step: Callable[[int], Any]) -> int:
    """Bytes of activations that one image more holds at the worst moment of a step, in float32."""
    step(1)  # gradients are made at the first one, and stay
    with mock.patch.object(F, "scaled_dot_product_attention", lambda q, k, v, *_, **__: _Attention.apply(q, k, v)):
        return (peak_bytes(lambda: step(3), False) - peak_bytes(lambda: step(1), False)) // 2


class _Attention(torch.autograd.Function):
    """What a fused kernel holds: inputs and output, and no table of all pairs."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, found)
        return found

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(given) for given in ctx.saved_tensors[:3])


def pretraining_run(name: str, size: str) -> Run:
    recipe, addp = RECIPES[name](), made(size)
    held = [growth(lambda n, a=a: a.dry_step(torch.zeros(n, 3, 256, 256, device="meta"))) for a in both(size)]
    frozen = parameters(addp.tokenizer.module, addp.predictor.module)
    images = recipe.train.steps * recipe.train.batch_size
    return Run(name, images, official_step(size), (parameters(addp.network), frozen), 4, tuple(held), IMAGENET)


def both(size: str) -> tuple[ADDP, ADDP]:
    """Blocks kept, blocks checkpointed."""
    return made(size), made(size, True)


def predictor_run() -> Run:
    """MAGE's own training, of which no recipe is shipped: half of the tokens never enter its encoder."""
    addp = made("base")
    with torch.device("meta"):
        network = TokenPredictor(addp.predictor.module.config)
    order = torch.arange(256, device="meta")

    def step(images: int) -> None:
        ids = torch.zeros(images, 256, dtype=torch.int64, device="meta")
        network(ids, ids == 0, shown=order[:128].expand(images, -1)).sum().backward()

    each = parts("base").encode + multiply_adds(lambda: step(1))
    images = 1600 * (1_281_167 // 4096) * 4096
    weights = parameters(network), parameters(addp.tokenizer.module)
    return Run("MAGE base, 1600 epochs (ADDP's predictor)", images, each, weights, 4, (growth(step),), IMAGENET)


def copies(recipe: Any) -> int:
    """Of each trained parameter: weight, gradient, and two moments or one."""
    return 3 if recipe.optim.name in ("sgd", "lars", "muon") else 4


def student_run(name: str, classes: int, frozen: int = 0, kept: int = 0, data: str = "") -> Run:
    """A recipe whose trained part is one student with a classifier. frozen: multiply-adds of its teacher."""
    recipe = RECIPES[name]()
    pixels = recipe.data.image_size or 32
    with torch.device("meta"):
        student = Student(recipe.method.student, classes)

    def step(images: int) -> None:
        student(torch.zeros(images, 3, pixels, pixels, device="meta")).sum().backward()

    each = multiply_adds(lambda: step(2)) / 2 + frozen
    images = recipe.train.steps * recipe.train.batch_size
    return Run(name, images, each, (parameters(student), kept), copies(recipe), (growth(step),), data)


def taught_run(name: str, teacher: str, classes: int, data: str) -> Run:
    """A student of a classifier; teacher: its name in timm."""
    pixels = RECIPES[name]().data.image_size or 32
    with torch.device("meta"):
        network = Student(StudentConfig(name=teacher), classes).backbone.eval()
    once = multiply_adds(on_meta(network, torch.zeros(1, 3, pixels, pixels)))
    return student_run(name, classes, once, parameters(network), data)


def repfusion_run(name: str, classes: int, data: str) -> Run:
    """Student, policy and projectors, and the teacher up to its tap."""
    recipe = without_weights(RECIPES[name]())
    pixels = recipe.data.image_size or 32
    road = RepFusion(recipe.method, classes, pixels)
    images = recipe.train.steps * recipe.train.batch_size
    frozen = sum(p.numel() for p in road.teacher.network.module.parameters())
    return Run(
        name, images, multiply_adds_per_image(road, pixels), (parameters(road), frozen), copies(recipe), (), data
    )


def drawn_run(name: str) -> Run:
    """Images by DiT-XL/2, two passes a step under guidance; the VAE's decoder is not counted."""
    task = RECIPES[name]().stages["set"].synthesis
    with torch.device("meta"):
        network = DiT(DiTConfig())
    step = torch.zeros(1, dtype=torch.int64)
    once = multiply_adds(on_meta(network, torch.zeros(1, 4, 32, 32), step, step))
    passes = 2 * int(task.sampling.num_sampling_steps)
    return Run(name, task.images, once * passes, (0, parameters(network)), 4, (), f"{passes} passes per image")


def generation_runs() -> list[Run]:
    found = []
    for size in SIZES:
        for steps, schedule in ((20, "cosine"), (256, "linear")):
            addp = made(size)
            kept = parameters(addp.network, addp.tokenizer.module)
            each = walk(size, steps, schedule, skips=True)
            found.append(Run(f"ADDP {size}: {SHOWN:,} images, {steps} steps", SHOWN, each, (0, kept)))
    return found


def runs() -> list[Run]:
    """All rows, the third road first."""
    sets = {"140k": 140_000, "200k": 200_000, "1280k": 1_280_000}
    imagenet = {k: f"{n:,} images of 256 pixels, at most {n * 196_608 / GB:.0f} GB" for k, n in sets.items()}
    return [
        pretraining_run("addp_pretrain_base_1600ep", "base"),
        pretraining_run("addp_pretrain_large_800ep", "large"),
        predictor_run(),
        student_run("addp_finetune_base", 1000, data=IMAGENET),
        student_run("addp_finetune_large", 1000, data=IMAGENET),
        *generation_runs(),
        *(taught_run(f"dmkd_imagenet_{n}_{k}", "resnet18", 1000, imagenet[k]) for n in ("rn18", "rn50") for k in sets),
        *(taught_run(f"dmkd_cifar100_{t}_{s}", NETWORKS[t], 100, "50,000 drawn images, 0.15 GB") for t, s in PAIRS),
        *(drawn_run(f"dmkd_imagenet_set_low{k}") for k in ("_140k", "", "_1280k")),
        repfusion_run("repfusion_cifar10_resnet18", 10, "CIFAR-10, 0.17 GB"),
        repfusion_run("repfusion_celebahq_resnet18", 2, "CelebA-HQ at 256 pixels"),
    ]


# The page

HEAD = (
    "run", "images", "multiply-adds per image", "per run", "H100 hours", "parameters, trained + frozen",
    "weights, gradients, optimiser, GB", "activations per image, MB", "data",
)  # fmt: skip


def table(head: tuple[str, ...], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows)]


def addp_parts() -> list[str]:
    rows = []
    for size in SIZES:
        part, step = parts(size), official_step(size)
        counts = [part.encode, part.decode, part.predictor, part.encoder, step]
        images = RECIPES[f"addp_pretrain_{size}_{'1600' if size == 'base' else '800'}ep"]().train
        total = step * images.steps * images.batch_size
        cells = [*(f"{n / G:.2f} G" for n in counts[:4]), f"{step / G:.1f} G", f"{total:.2e}"]
        rows.append([f"ADDP {size}", *cells, f"{growth(lambda n, s=size: _decoded(s, n)) / 1e6:.0f} MB"])
    head = ("", "encode", "decode", "predictor pass", "ADDP encoder", "step", "run", "held by a decode")
    return table(head, rows)


@torch.no_grad()
def _decoded(size: str, images: int) -> None:
    vq, shape = made(size).tokenizer.module, made(size).network.config
    vq.decode(torch.zeros(images, shape.num_tokens, vq.config.z_channels, device="meta"), shape.grid)


def savings_table() -> list[str]:
    found = {size: savings(size) for size in SIZES}
    rows = []
    for words in found["base"]:
        cells = []
        for by_step in found.values():
            share = 1 - by_step[words] / by_step["as published"]
            cells.append(f"{by_step[words] / G:.1f} G" + (f" (-{100 * share:.1f} %)" if share else ""))
        rows.append([words, *cells])
    return table(("multiply-adds of a step, one image", *(f"ADDP {size}" for size in found)), rows)


def walks_table() -> list[str]:
    rows = []
    for size in SIZES:
        for steps, schedule in ((20, "cosine"), (256, "linear")):
            plain, ours = (walk(size, steps, schedule, skips) for skips in (False, True))
            share = 100 * (1 - ours / plain)
            rows.append([f"ADDP {size}, {steps} steps", f"{plain / G:,.0f} G", f"{ours / G:,.0f} G (-{share:.1f} %)"])
    return table(("one generated image", "as published", "here"), rows)


def counted() -> str:
    """What stands between the marks."""
    blocks = [
        ["### Every run", "", *table(HEAD, [run.cells() for run in runs()])],
        ["### ADDP's parts, one image at 256 pixels", "", *addp_parts()],
        ["### What the redundancies save", "", *savings_table(), "", *walks_table()],
    ]
    return "\n" + "\n\n".join("\n".join(block) for block in blocks) + "\n\n"


def main() -> None:
    before, _, rest = PAGE.read_text().partition(MARKS[0])
    PAGE.write_text(before + MARKS[0] + counted() + MARKS[1] + rest.partition(MARKS[1])[2])
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
