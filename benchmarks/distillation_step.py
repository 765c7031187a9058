"""One RepFusion step, ours, against the same step put together as the official code does it.

Rival: a full U-Net pass with a hook, images augmented one by one through PIL, float32. Same teacher (published
CIFAR-10 architecture, untrained), same student, same policy network, same batch. First the truncated pass alone, with
everything else as the rival does it; then all of ours; then hints from a store, where the timestep is fixed.
"""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

from benchmarks.published_teachers import GB, SELF, peak_so_far
from benchmarks.timing import line, rivals
from diffrep import _torchvision_compat, losses
from diffrep.data.batch import Batch
from diffrep.data.transforms import augmentation
from diffrep.frozen.features import FeatureConfig, write_features
from diffrep.frozen.passes import PassConfig
from diffrep.frozen.teachers import load_teacher
from diffrep.methods.repfusion import RepFusion, RepFusionConfig, TimestepConfig
from diffrep.models.students import StudentConfig
from diffrep.randomness import Rows, seeded, stream

BATCH = 16
TEACHER, TAP = "random:ddpm-cifar10-32", "mid_block.resnets.1.conv2"
VIEWS = augmentation("crop_flip:4")
WHOLE = "the official composition: full U-Net pass, per-sample augmentation, float32"
UNIT = f"CPU s, batch {BATCH}"
OFFICIAL = TimestepConfig(select="policy", values=tuple(range(1000)), policy="conv")
FIXED = TimestepConfig(select="fixed", values=(50,))


def measure() -> list[dict[str, Any]]:
    """CPU time by student, with and without a store; what a step adds to its two networks; memory; checkpoints."""
    found = []
    for student in ("resnet18_cifar", "mobilenetv2_cifar"):
        method = _method(student)
        official = _official(method, cut=False)
        mine, theirs = rivals(_official(method, cut=True), official, repeats=3)
        found.append(
            line(f"distillation step, {student}: the pass truncated, nothing else", WHOLE, mine, theirs, unit=UNIT)
        )
        mine, theirs = rivals(
            _ours(_method(student, PassConfig(precision="bf16")), torch.bfloat16), official, repeats=3
        )
        found.append(line(f"distillation step, {student}: truncated, batched, bf16", WHOLE, mine, theirs, unit=UNIT))
    return [*found, *_stored(), _overhead(), *_size(_method("resnet18_cifar"))]


def _method(student: str, passes: PassConfig | None = None, **settings: Any) -> RepFusion:
    config = RepFusionConfig(
        **{"teacher": TEACHER, "tap": TAP, "timestep": OFFICIAL, "passes": passes or PassConfig()} | settings,
        student=StudentConfig(name=student),
    )
    with seeded(0, "bench"):
        return RepFusion(config, num_classes=10, image_size=32).train()


def _pixels() -> Tensor:
    return torch.randint(0, 256, (BATCH, 3, 32, 32), dtype=torch.uint8, generator=stream(0, "bench"))


LABELS = torch.arange(BATCH) % 10


def _ours(method: RepFusion, precision: torch.dtype, view: int | None = None) -> Callable[[], None]:
    pixels, index = _pixels(), torch.arange(BATCH)

    def step() -> None:
        views = torch.randint(0, VIEWS.num_views, (BATCH,)) if view is None else torch.full((BATCH,), view)
        batch = Batch(VIEWS.apply(pixels, views).float() / 255, LABELS, index, views)
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            loss = method(batch, Rows(stream(0, "step"), BATCH), 0.0)["loss"]
        loss.backward()
        method.zero_grad()

    return step


def _official(method: RepFusion, cut: bool) -> Callable[[], None]:
    """The step in the official order; ``cut``: with our truncated pass in the place of the full one."""
    pixels, teacher = _pixels(), load_teacher(TEACHER)  # whole: ours lets go of what it does not need

    def hooked(images: Tensor, timestep: Tensor) -> Tensor:
        kept: dict[str, Tensor] = {}
        handle = teacher.module.get_submodule(TAP).register_forward_hook(lambda m, i, o: kept.update(feature=o))
        teacher.predict(teacher.normalise(images), timestep)
        handle.remove()
        return kept["feature"]

    def step() -> None:
        images = _augmented_one_by_one(pixels)
        learns = method.config.timestep.select == "policy"
        logits = method.policy(images) if learns else torch.zeros(BATCH, 1)
        choice = torch.multinomial(logits.softmax(1), 1).squeeze(1)
        timestep = method.timesteps[choice]
        feature = teacher.features(images, timestep, [TAP])[TAP] if cut else hooked(images, timestep)
        code = losses.pooled(feature, 1)
        loss = losses.feature_mse(method.imitations(images, [code.shape[-2:]], [0])[0], code).mean()
        if learns:
            task_loss = F.cross_entropy(method.task_head(code.flatten(1)), LABELS, reduction="none")
            policy_loss = losses.reinforce(logits, choice, -task_loss).mean()
            loss = loss + task_loss.mean() + policy_loss - 0.1 * losses.entropy(logits).mean()
        loss.backward()
        method.zero_grad()

    return step


def _augmented_one_by_one(pixels: Tensor) -> Tensor:
    from torchvision.transforms import v2

    pipeline = v2.Compose([v2.ToPILImage(), v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip(), v2.PILToTensor()])
    return torch.stack([pipeline(image) for image in pixels]).float() / 255


def _stored() -> list[dict[str, Any]]:
    """A fixed timestep, whose hints were written once for every image and view (here: one view)."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        teacher, pixels = load_teacher(TEACHER), _pixels()
        source = {"name": "bench", "split": "train", "fingerprint": "bench", "augment": "crop_flip:4"}
        config = FeatureConfig(taps=(TAP,), timesteps=FIXED.values, pool=1, dtype="float16")
        write_features(Path(folder), teacher, config, lambda v, k: pixels[k].float() / 255, BATCH, 1, source)
        for student, precision in (("wrn_16_2_cifar", torch.float32), ("wrn_16_2_cifar", torch.bfloat16)):
            official = _official(_method(student, timestep=FIXED), cut=False)
            replayed = _method(student, timestep=FIXED, features=folder)
            mine, theirs = rivals(_ours(replayed, precision, view=0), official, repeats=3)
            name = f"distillation step, {student}: hints stored, {str(precision).removeprefix('torch.')}"
            found.append(line(name, WHOLE, mine, theirs, unit=UNIT))
    return found


def _overhead() -> dict[str, Any]:
    """The whole step beside its two networks alone: truncated teacher, forward and backward of the student."""
    method, images = _method("resnet18_cifar"), _pixels().float() / 255
    timestep = torch.full((BATCH,), 50)

    def alone() -> None:
        method.teacher.network.features(images, timestep, [TAP])
        method.student.feature_map(images).sum().backward()
        method.zero_grad()

    mine, theirs = rivals(_ours(method, torch.float32), alone, repeats=5)
    return line("distillation step, resnet18_cifar: whole", "its truncated teacher and its student alone", mine, theirs,
                unit=UNIT)  # fmt: skip


def _size(method: RepFusion) -> list[dict[str, Any]]:
    """What is held at once; and a checkpoint of ours beside one that carries the teacher."""
    kept, all_of_it = (_bytes(network.module) for network in (method.teacher.network, load_teacher(TEACHER)))
    mine = len(save(method.state_dict()))
    ours, theirs = (_peak_alone(official) for official in (False, True))
    return [
        line("teacher in memory: weights up to the tap", "all weights", kept / 1e6, all_of_it / 1e6, unit="MB"),
        line("distillation step, resnet18_cifar: peak of a process", WHOLE, ours, theirs, unit=f"GB, batch {BATCH}"),
        line("checkpoint: what is trained", "with the teacher inside (official)", mine / 1e6, (mine + all_of_it) / 1e6,
             unit="MB"),
    ]  # fmt: skip


def _bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def _peak_alone(official: bool) -> float:
    """Most resident GB of a process of its own during two steps."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (official,))


def _peak(official: bool) -> float:
    _torchvision_compat.install()
    torch.set_num_threads(1)
    method = _method("resnet18_cifar")
    step = _official(method, cut=False) if official else _ours(method, torch.float32)
    (SELF / "clear_refs").write_text("5")  # forgets the peak so far: building random weights
    step(), step()
    return peak_so_far() / GB
