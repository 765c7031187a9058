"""DiT: a transformer that predicts the noise in latents or pixels (Peebles and Xie 2023, official `models.py`).

Patches become tokens; timestep and class become one vector c, and every block is told of c by nothing but a shift, a
scale and a gate of its two branches (adaLN-Zero). Parameters have the official names.
Letters: B images, C channels, H W cells, p patch size, N = h w tokens, D width, K classes.
Deviations: equal timesteps of a batch are embedded once; attention is torch's fused one. Classes are never dropped
here: who trains gives the null class itself.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from diffrep.config import Config
from diffrep.errors import UserError

WAVES = 256  # cosines and sines of a timestep
LONGEST = 10_000.0  # of their periods, and of those of the position table
EPS = 1e-6  # of every layer norm; none has parameters


class DiTConfig(Config):
    """Defaults: DiT-XL/2 for 256 pixels."""

    input_size: int = Field(32, ge=1)  # cells per side: pixels / 8 behind the VAE
    patch_size: int = Field(2, ge=1)  # p, cells per token and side
    in_channels: int = Field(4, ge=1)  # C
    hidden_size: int = Field(1152, ge=4)  # D
    depth: int = Field(28, ge=1)
    num_heads: int = Field(16, ge=1)
    mlp_ratio: float = Field(4.0, gt=0)
    num_classes: int = Field(1000, ge=1)  # K
    has_null_class: bool = True  # class_dropout_prob > 0: row K of the table stands for no class
    learn_sigma: bool = True  # a variance for each channel besides the noise
    # "diffusers": the periods (and an epsilon) with which diffusers runs, and may have trained, such a network.
    sinusoid: Literal["official", "diffusers"] = "official"

    @model_validator(mode="after")
    def _fits(self) -> DiTConfig:
        for whole, part in (("input_size", "patch_size"), ("hidden_size", "num_heads")):
            if getattr(self, whole) % getattr(self, part):
                raise ValueError(f"{whole} {getattr(self, whole)} is not divisible by {part} {getattr(self, part)}")
        if self.hidden_size % 4:
            raise ValueError(f"hidden_size {self.hidden_size} is not divisible by 4, which the position table needs")
        return self

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) of the tokens."""
        side = self.input_size // self.patch_size
        return side, side

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def mlp_width(self) -> int:
        return int(self.hidden_size * self.mlp_ratio + 1e-6)  # a ratio that was read off two widths may round down


class DiT(nn.Module):
    """(x_t, timestep, class) -> predicted noise, and above it what becomes of the variance."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config, width = config, config.hidden_size
        self.x_embedder = PatchEmbed(config.in_channels, config.patch_size, width)
        self.pos_embed = nn.Parameter(torch.empty(1, config.grid[0] * config.grid[1], width), requires_grad=False)
        self.t_embedder = TimestepEmbedder(width, config.sinusoid)
        self.y_embedder = LabelEmbedder(config.num_classes + config.has_null_class, width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(width, config.patch_size**2 * config.out_channels)
        self.reset_parameters()

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) of the tokens."""
        return self.config.grid

    def forward(self, x: Tensor, timesteps: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """The network's raw prediction.

        Args:
            x: (B, C, H, W) at the noise level of ``timesteps``.
            timesteps: (B,), in [0, T), whole or not.
            class_labels: (B,) int64 in [0, K), K for the null class; None: all of them the null class.

        Returns:
            (B, C or 2C, H, W): noise, and with ``learn_sigma`` where the variance lies between its ends (-1 to 1).

        Raises:
            UserError: no labels for a network without a null class.
        """
        c = self.condition(timesteps, class_labels)
        tokens = self.x_embedder(x) + self.pos_embed  # (B, N, D)
        for block in self.blocks:
            tokens = block(tokens, c)
        return self.unpatchify(self.final_layer(tokens, c))

    def condition(self, timesteps: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """c (B, D): all that the blocks know of timestep and class; arguments as those of :meth:`forward`."""
        if class_labels is None:
            if not self.config.has_null_class:
                raise UserError("this DiT was trained without a null class: it reads labels, and cannot be guided")
            class_labels = torch.full((len(timesteps),), self.config.num_classes, device=timesteps.device)
        return self.t_embedder(timesteps) + self.y_embedder(class_labels)

    def modulation_after(self, index: int, c: Tensor) -> tuple[Tensor, Tensor]:
        """Shift and scale, each (B, D), with which the output of block ``index`` is read by what comes next."""
        linear, both = self.get_submodule(self.reader_of(index)).adaLN_modulation[1], 2 * self.config.hidden_size
        shift, scale = F.linear(F.silu(c), linear.weight[:both], linear.bias[:both]).chunk(2, 1)
        return shift, scale

    def reader_of(self, index: int) -> str:
        """The part that reads the output of block ``index``: the next block's attention, or the final layer."""
        return f"blocks.{index + 1}" if index + 1 < self.config.depth else "final_layer"

    def unpatchify(self, tokens: Tensor) -> Tensor:
        """(B, N, p p C), channels last in each patch -> (B, C, H, W)."""
        (h, w), p = self.grid, self.config.patch_size
        patches = tokens.reshape(len(tokens), h, w, p, p, -1)
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(len(tokens), -1, h * p, w * p)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The official initialisation: every block is the identity, and the whole network predicts zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.flatten(1))  # a view: a patch is one vector
                nn.init.zeros_(module.bias)
        for drawn in (self.t_embedder.mlp[0], self.t_embedder.mlp[2], self.y_embedder.embedding_table):
            nn.init.normal_(drawn.weight, std=0.02)
        silent = [*(part.adaLN_modulation[1] for part in (*self.blocks, self.final_layer)), self.final_layer.linear]
        for linear in silent:
            nn.init.zeros_(linear.weight)
        self.pos_embed.copy_(position_table(self.config.hidden_size, self.grid[0]))


# Into tokens and into c


class PatchEmbed(nn.Module):
    """(B, C, H, W) -> (B, N, D), row by row, one convolution."""

    def __init__(self, channels: int, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch_size, patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """timesteps (B,), whole or not -> (B, D)."""

    def __init__(self, width: int, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.mlp = nn.Sequential(nn.Linear(WAVES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, timesteps: Tensor) -> Tensor:
        if timesteps.is_meta or timesteps.requires_grad:  # no values that could be equal; ``unique`` has no gradient
            return self._embedded(timesteps)
        distinct, which = timesteps.unique(return_inverse=True)
        return self._embedded(distinct)[which]

    def _embedded(self, timesteps: Tensor) -> Tensor:
        return self.mlp(sinusoid(timesteps, self.kind).to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """labels (B,) int64 -> (B, D)."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(rows, width)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)


def sinusoid(timesteps: Tensor, kind: str = "official") -> Tensor:
    """(B,) -> (B, 256) float32: cos(t f_k) for k = 0..127, then sin(t f_k), with f_k = 10000^(-k / 128).

    ``kind`` "diffusers" divides k by 127, as diffusers' ``Timesteps(256, downscale_freq_shift=1)`` does.
    """
    half = WAVES // 2
    k = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    frequency = torch.exp(-math.log(LONGEST) * k / (half if kind == "official" else half - 1))
    angle = timesteps[:, None].float() * frequency  # (B, 128)
    return torch.cat([angle.cos(), angle.sin()], 1)


def position_table(width: int, side: int) -> Tensor:
    """(side^2, D) float64: the first half of D tells the column, the second the row, each as [sin | cos].

    Frequencies are 10000^(-j / (D / 4)), j < D / 4. Source: `get_2d_sincos_pos_embed` of the official code.
    """
    quarter = width // 4
    frequency = LONGEST ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    angle = torch.arange(side, dtype=torch.float64)[:, None] * frequency
    place = torch.cat([angle.sin(), angle.cos()], 1)  # (side, D / 2)
    column, row = place.repeat(side, 1), place.repeat_interleave(side, 0)
    return torch.cat([column, row], 1)


# Blocks


class Block(nn.Module):
    """x + gate attention(norm(x)), then x + gate MLP(norm(x)), both norms and gates by c (adaLN-Zero)."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width = config.hidden_size
        second = EPS if config.sinusoid == "official" else 1e-5  # what diffusers has in this place alone
        self.norm1 = nn.LayerNorm(width, eps=EPS, elementwise_affine=False)
        self.attn = Attention(width, config.num_heads)
        self.norm2 = nn.LayerNorm(width, eps=second, elementwise_affine=False)
        self.mlp = Mlp(width, config.mlp_width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x (B, N, D), c (B, D) -> (B, N, D)."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, 1)  # each (B, D)
        x = x + gate_a[:, None] * self.attn(modulated(self.norm1(x), shift_a, scale_a))
        return x + gate_m[:, None] * self.mlp(modulated(self.norm2(x), shift_m, scale_m))


class FinalLayer(nn.Module):
    """Tokens (B, N, D) -> their patches (B, N, p p C)."""

    def __init__(self, width: int, width_out: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=EPS, elementwise_affine=False)
        self.linear = nn.Linear(width, width_out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, 1)
        return self.linear(modulated(self.norm_final(x), shift, scale))


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift, for x (B, N, D) and one shift and scale (B, D) per image."""
    return x * (1 + scale[:, None]) + shift[:, None]


class Attention(nn.Module):
    """Multi-head self-attention over (B, N, D)."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.num_heads, width // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, N, D / heads)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two layers with a GELU (tanh approximation) between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
