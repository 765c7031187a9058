"""One step of ADDP's pretraining at its base size and 256 pixels, random weights, against a plain write-up of it.

The rival follows the specification line by line in float32: two predictor passes, attention by its formula, every row
and all 2,025 columns of every head, the loss of every position times the mask. Both find ids in float32, teach without
dropout and learn with it. Timed are forward and backward pass, without the optimiser; memory is the most that a process
of its own holds during one, weights and gradients in it. Three quarters of the tokens are masked, the law's mean.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.published_teachers import GB, SELF, peak_so_far
from benchmarks.timing import line, rivals
from diffrep.counting import multiply_adds
from diffrep.diffusion.masking import lowest
from diffrep.frozen.tokens import FrozenPredictor, Tokenizer
from diffrep.methods.addp import ADDP, ADDPConfig
from diffrep.models.addp_vit import ADDPVit, ADDPVitConfig
from diffrep.models.masked_vit import TokenPredictor, TokenPredictorConfig, TransformerConfig
from diffrep.models.vqgan import VQGAN, VQGANConfig
from diffrep.randomness import seeded

NOISIER = 205 / 256  # share masked one step later, at the law's mean
RIVAL, GOAL = "plain eager float32", 1.3
FROZEN = {"float32": None, "frozen parts bfloat16, ids float32": "bf16"}
SMOOTHING = 0.1


@dataclass(frozen=True)
class Size:
    """Which networks, and how many images a step has: of a time, of a peak."""

    name: str
    image_size: int
    network: TransformerConfig
    tokenizer: VQGANConfig
    timed: int = 1
    held: int = 4


BASE = Size("ADDP-base at 256 pixels", 256, TransformerConfig(), VQGANConfig())
TINY = Size(  # for whoever changes this page
    "a tiny ADDP",
    8,
    TransformerConfig(embed_dim=16, depth=2, num_heads=2, decoder_depth=2, decoder_num_heads=2),
    VQGANConfig(ch=32, ch_mult=(1, 1), num_res_blocks=1, z_channels=4, num_codes=11),
)


def measure(size: Size = BASE) -> list[dict[str, Any]]:
    """That both compute one thing; CPU seconds in both precisions; multiply-adds; peaks, blocks checkpointed or not."""
    return [_agreement(size), *_steps(size), _counts(size), *_memory(size)]


def method(size: Size, device: str = "cpu", **options: Any) -> ADDP:
    """Without files: random weights."""
    made, shape = ADDP.__new__(ADDP), size.network.model_dump()
    nn.Module.__init__(made)
    made.config = ADDPConfig(tokenizer="random", token_predictor="random", network=size.network, **options)
    shape |= {"num_codes": size.tokenizer.num_codes}
    look = ADDPVitConfig(**shape, image_size=size.image_size, patch_size=size.tokenizer.stride)
    with seeded(0, "bench"), torch.device(device):
        made.network, tokenizer = ADDPVit(look), VQGAN(size.tokenizer)
        predictor = TokenPredictor(TokenPredictorConfig(**shape, num_tokens=look.num_tokens))
    made.tokenizer, made.predictor = Tokenizer(tokenizer, "random"), FrozenPredictor(predictor, "random")
    made.network.checkpoint_blocks = made.config.checkpoint_blocks
    return made.train()


def given(size: Size, images: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images and the two masks."""
    side = size.image_size // size.tokenizer.stride
    order = torch.rand(images, side * side, generator=torch.Generator().manual_seed(0))
    shown = torch.rand(images, 3, size.image_size, size.image_size, generator=torch.Generator().manual_seed(1))
    return shown, lowest(order, order.shape[1] * 3 // 4), lowest(order, int(order.shape[1] * NOISIER))


def ours(made: ADDP, images: Tensor, m_t: Tensor, m_next: Tensor) -> Tensor:
    """The loss after its backward pass."""
    made.zero_grad()
    loss = made.losses(made.tokenizer.encode(images), m_t, m_next).mean()
    loss.backward()
    return loss.detach()


def plain(made: ADDP, images: Tensor, m_t: Tensor, m_next: Tensor) -> Tensor:
    """The same, written out."""
    made.zero_grad()
    loss = plain_loss(made, images, m_t, m_next)
    loss.backward()
    return loss.detach()


# The rival


def plain_loss(made: ADDP, images: Tensor, m_t: Tensor, m_next: Tensor) -> Tensor:
    network, vq, predictor = made.network, made.tokenizer.module, made.predictor.module
    codes = vq.config.num_codes
    with torch.no_grad():
        ids = vq.encode(images)
        guess = _predicted(predictor, ids, m_next)[:, 1:, :codes].softmax(2)
        target = _predicted(predictor, ids, m_t)[:, 1:, :codes].softmax(2)
        z_t = torch.where(m_t[..., None], guess @ vq.codebook, vq.lookup(ids))
        x_t = vq.decode(z_t, network.config.grid)
    logits = _answered(network, x_t, ids, m_t)[:, 1 : 1 + m_t.shape[1]]
    wanted = F.pad(target, (0, logits.shape[2] - codes))
    each = F.cross_entropy(
        logits.flatten(0, 1), wanted.flatten(0, 1), reduction="none", label_smoothing=SMOOTHING
    )  # fmt: skip
    return (each * m_t.flatten()).sum() / m_t.sum()


def _predicted(predictor: Any, ids: Tensor, mask: Tensor) -> Tensor:
    x = predictor.token_emb(predictor.sequence(ids, mask))
    for block in predictor.blocks:
        x = _block(block, x)
    y = predictor.decoder_embed(predictor.norm(x))
    y = torch.where(F.pad(mask, (1, 0))[..., None], y[:, :1], y) + predictor.decoder_pos_embed_learned
    for block in predictor.decoder_blocks:
        y = _block(block, y)
    return _head(predictor.mlm_layer, predictor.decoder_norm(y), predictor.token_emb.word_embeddings.weight)


def _answered(network: ADDPVit, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    x = network.embed(pixels)
    for block in network.blocks:
        x = _block(block, x)
    y = network.decoder_embed(network.norm(x))
    hidden, dropped = F.pad(mask, (1, 0))[..., None], F.pad(mask, (1, 0), value=True)[..., None]
    places = torch.where(hidden, network.decoder_pos_mask_embed, network.decoder_pos_embed_learned)
    where = mask.byte().argsort(dim=1, stable=True)[:, : mask.shape[1] - mask.shape[1] * 3 // 4]
    visible = network.token_emb(ids.gather(1, where)) + network.decoder_pos_token_embed[0, 1 + where]
    y = torch.cat([torch.where(dropped, network.mask_token, y) + places, visible], 1)
    for block in network.decoder_blocks:
        y = _block(block, y)
    return _head(network.mlm_layer, network.decoder_norm(y), network.token_emb.weight)


def _head(head: Any, x: Tensor, embeddings: Tensor) -> Tensor:
    return head.ln(F.gelu(head.fc(x))) @ embeddings.detach().T + head.bias


def _block(block: Any, x: Tensor) -> Tensor:
    attention, width = block.attn, x.shape[2]
    heads = attention.num_heads
    q, k, v = attention.qkv(block.norm1(x)).view(*x.shape[:2], 3, heads, width // heads).permute(2, 0, 3, 1, 4)
    weights = attention.attn_drop((q @ k.transpose(2, 3) * (width // heads) ** -0.5).softmax(3))
    x = x + attention.proj_drop(attention.proj((weights @ v).transpose(1, 2).flatten(2)))
    return x + block.mlp(block.norm2(x))


# What is measured


def _agreement(size: Size) -> dict[str, Any]:
    """Dropout off: the loss of both, and the largest difference of a gradient over the largest gradient."""
    made, inputs = method(size).eval(), given(size, size.timed)
    theirs = float(plain(made, *inputs))
    wanted = {name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None}
    mine = float(ours(made, *inputs))
    found = {name: p.grad for name, p in made.named_parameters() if p.grad is not None}
    largest = max(float(g.abs().max()) for g in wanted.values())
    gap = max(float((found[name] - g).abs().max()) for name, g in wanted.items()) / largest
    return line(f"loss of {size.name}, dropout off", RIVAL, mine, theirs, unit="nats", gradient_gap=gap)


def _steps(size: Size) -> list[dict[str, Any]]:
    inputs, rival, found = given(size, size.timed), method(size), []
    for words, precision in FROZEN.items():
        made = method(size, frozen_precision=precision)
        mine, theirs = rivals(_calls(ours, made, inputs), _calls(plain, rival, inputs), repeats=3)
        name, holds = f"a pretraining step of {size.name}, {words}", theirs / mine >= (GOAL if precision else 1)
        found.append(line(name, RIVAL, mine, theirs, unit=f"CPU s, batch {size.timed}", holds=holds))
    return found


def _calls(run: Callable[..., Tensor], made: ADDP, inputs: tuple[Tensor, ...]) -> Callable[[], Tensor]:
    return lambda: run(made, *inputs)


def _counts(size: Size) -> dict[str, Any]:
    """Of one image, by torch's counter; ours as a run's result states it, on shapes alone."""
    made, inputs = method(size, "meta"), given(size, 1)
    mine = made.frozen_multiply_adds() + multiply_adds(lambda: made.dry_step(inputs[0].to("meta")))
    rival = method(size)
    theirs = multiply_adds(lambda: plain(rival, *inputs))
    return line(f"multiply-adds of a step of {size.name}", RIVAL, mine / 1e9, theirs / 1e9, unit="G")


def _memory(size: Size) -> list[dict[str, Any]]:
    theirs = _alone(size, None)
    kinds: dict[str, dict[str, Any]] = {"blocks kept": {}, "blocks checkpointed": {"checkpoint_blocks": True}}
    rows = {words: _alone(size, options) for words, options in kinds.items()}
    name = f"peak memory of a pretraining step of {size.name}"
    return [line(f"{name}, {w}", RIVAL, mine, theirs, unit=f"GB, batch {size.held}") for w, mine in rows.items()]


def _alone(size: Size, options: dict[str, Any] | None) -> float:
    """Peak resident GB of a process that takes one step; None: the rival's."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (size, options))


def _peak(size: Size, options: dict[str, Any] | None) -> float:
    torch.set_num_threads(1)
    made, inputs = method(size, **(options or {})), given(size, size.held)
    (SELF / "clear_refs").write_text("5")  # forgets the peak so far
    (plain if options is None else ours)(made, *inputs)
    return peak_so_far() / GB
