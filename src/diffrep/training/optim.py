"""Optimisers and learning-rate schedules. A rate is a pure function of the step, so nothing of it needs saving."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from diffrep.config import Config
from diffrep.errors import UserError, nearest
from diffrep.training.lars import Lars
from diffrep.training.muon import Muon

MILESTONE_SLACK = 1e-6  # steps: a share such as 163,889 / 184,375 of the run may be rounded to just behind its step


class LrScheduleConfig(Config):
    """The factor on the rate: warm-up, an optional constant stretch, then the decay."""

    name: Literal["constant", "cosine", "step", "polynomial"] = "cosine"
    warmup_steps: int = Field(0, ge=0)  # linear; the first step has one part of it
    warmup_from_zero: bool = False  # the first step has rate 0, as MAE's and ADDP's schedule
    # share of the scheduled rate at step 0, rising to 1 while the decay counts from step 0 (mmcv, ViTDet)
    warmup_ratio: float | None = Field(None, gt=0, le=1)
    warmup_by_powers: bool = False  # from warmup_ratio by equal factors, and the decay begins behind it (zllrunning)
    hold: float = Field(0.0, ge=0, lt=1)  # share of the run before cosine or polynomial decay begins
    final: float = Field(0.0, ge=0, le=1)  # factor at the end of cosine or polynomial
    milestones: tuple[float, ...] = ()  # shares of the run at which `step` multiplies by gamma
    gamma: float = Field(0.1, gt=0, le=1)
    power: float = Field(0.9, gt=0)  # of polynomial

    @model_validator(mode="after")
    def _fits(self) -> LrScheduleConfig:
        if self.name == "step" and not self.milestones:
            raise ValueError("lr_schedule 'step' needs milestones, as shares of the run in (0, 1)")
        if any(not 0 < m < 1 for m in self.milestones):
            raise ValueError("milestones are shares of the run in (0, 1)")
        if self.warmup_ratio is not None and (self.warmup_from_zero or not self.warmup_steps):
            raise ValueError("warmup_ratio needs warmup_steps, and not warmup_from_zero")
        if self.warmup_by_powers and self.warmup_ratio is None:
            raise ValueError("warmup_by_powers starts from a warmup_ratio")
        return self


class OptimConfig(Config):
    """One optimiser for all parts of a method; parts may have rates of their own."""

    name: Literal["adamw", "adam", "sgd", "lars", "muon"] = "adamw"  # muon: for filters, the rest by nesterov's sgd
    lr: float | None = Field(None, gt=0)  # the rate used
    base_lr: float | None = Field(None, gt=0)  # rate per 256 images: lr = base_lr x batch_size / 256
    group_lr: dict[str, float] = {}  # factor on the rate by part, e.g. {"policy": 1.5}
    weight_decay: float = Field(0.0, ge=0)  # muon: divided by the group's rate, so a share per step; filters have none
    weight_decay_exclude_1d: bool = False  # no decay of biases, norms, tables of positions and class tokens
    weight_decay_exclude_norms: bool = False  # no decay of norms, tables and tokens, but of biases (detectron2)
    layer_decay: float = Field(1.0, gt=0, le=1)  # factor on the rate for each layer below the head
    betas: tuple[float, float] = (0.9, 0.999)  # adam, adamw
    momentum: float = Field(0.9, ge=0, lt=1)  # sgd, lars, and muon of what is no filter
    filter_momentum: float = Field(0.6, ge=0, lt=1)  # muon
    nesterov: bool = False  # sgd
    lr_schedule: LrScheduleConfig = LrScheduleConfig()

    @model_validator(mode="after")
    def _fits(self) -> OptimConfig:
        if (self.lr is None) == (self.base_lr is None):
            raise ValueError("give either lr or base_lr")
        if any(not 0 <= beta < 1 for beta in self.betas):
            raise ValueError("betas are in [0, 1)")
        if any(factor < 0 for factor in self.group_lr.values()):
            raise ValueError("group_lr holds factors of 0 or more")
        if self.nesterov and (self.name != "sgd" or not self.momentum):
            raise ValueError("nesterov belongs to sgd with a momentum above 0")
        if self.weight_decay_exclude_1d and self.weight_decay_exclude_norms:
            raise ValueError("weight_decay_exclude_1d spares norms already; give it or weight_decay_exclude_norms")
        return self

    def rate(self, batch_size: int) -> float:
        return self.lr if self.lr is not None else float(self.base_lr or 0) * batch_size / 256


Part = dict[str, Any]  # a group of parameters as torch's optimisers take it


def optimiser(
    config: OptimConfig,
    groups: dict[str, list[nn.Parameter]],
    batch_size: int,
    layers: Sequence[Sequence[nn.Parameter]] = (),
    undecayed: Sequence[nn.Parameter] = (),
    norms: Sequence[nn.Parameter] = (),
) -> torch.optim.Optimizer:
    """Each group keeps its peak rate under ``peak_lr``; the first one has the rate of the deepest layer.

    Args:
        layers: parameters by depth, for ``layer_decay``; the head last.
        undecayed: what weight decay may spare although it has more than one dimension. norms: those of norms.

    Raises:
        UserError: ``group_lr`` names a part the method does not have, or it does not know its layers.
    """
    unknown = [name for name in config.group_lr if name not in groups]
    if unknown:
        raise UserError(f"optim.group_lr: the method has no part '{unknown[0]}'; {nearest(unknown[0], groups)}")
    rate = config.rate(batch_size)
    parts = [
        {"params": params, "lr": 0.0, "peak_lr": rate * config.group_lr.get(name, 1.0), "name": name}
        for name, params in groups.items()
    ]
    if config.layer_decay < 1:
        parts = by_layer(parts, config.layer_decay, layers)
    if config.weight_decay_exclude_1d or config.weight_decay_exclude_norms:
        parts = sparing(parts, [*undecayed, *norms], config.weight_decay_exclude_1d)
    return _built(config, [part for part in parts if part["params"]])


def by_layer(parts: Sequence[Part], decay: float, layers: Sequence[Sequence[nn.Parameter]]) -> list[Part]:
    """Each part layer by layer from the head down, layer l of 0..L+1 at decay^(L + 1 - l) of the part's rate.

    Source: official `lr_decay`, after Bao et al. 2021 (BEiT); what lies in no layer has the whole rate.
    """
    if not layers:
        raise UserError("optim.layer_decay: this network does not say in which layer a parameter lies; timm's ViTs do")
    depth = {parameter: number for number, layer in enumerate(layers) for parameter in layer}
    last, found = len(layers) - 1, []
    for part in parts:
        for number in range(last, -1, -1):
            chosen = [p for p in part["params"] if depth.get(p, last) == number]
            rate = part["peak_lr"] * decay ** (last - number)
            found.append(part | {"params": chosen, "peak_lr": rate, "name": f"{part['name']}.{number}"})
    return found


def sparing(parts: Sequence[Part], undecayed: Sequence[nn.Parameter], and_1d: bool) -> list[Part]:
    """Each part in two: what weight decay takes from, and what it spares; ``and_1d``: whatever has one dimension."""
    named = set(undecayed)
    found = []
    for part in parts:
        spared = [p for p in part["params"] if p in named or (and_1d and p.dim() <= 1)]
        others = [p for p in part["params"] if p not in named and not (and_1d and p.dim() <= 1)]
        found += [part | {"params": others}, part | {"params": spared, "weight_decay": 0.0}]
    return found


def _built(config: OptimConfig, parts: list[Part]) -> torch.optim.Optimizer:
    if config.name == "sgd":
        return torch.optim.SGD(
            parts, momentum=config.momentum, nesterov=config.nesterov, weight_decay=config.weight_decay
        )
    if config.name == "lars":
        return Lars(parts, config.momentum, config.weight_decay)
    if config.name == "muon":
        for part in parts:
            part.setdefault("weight_decay", config.weight_decay / part["peak_lr"] if part["peak_lr"] else 0.0)
        return Muon(parts, config.momentum, config.filter_momentum)
    kind = torch.optim.AdamW if config.name == "adamw" else torch.optim.Adam
    return kind(parts, betas=config.betas, weight_decay=config.weight_decay)


def norm_parameters(network: nn.Module) -> list[nn.Parameter]:
    """Weights and biases of norms, told by the name of their class."""
    norms = [module for module in network.modules() if "Norm" in type(module).__name__]
    return [parameter for norm in norms for parameter in norm.parameters(recurse=False)]


def lr_factor(config: LrScheduleConfig, step: int, steps: int) -> float:
    """The factor on the peak rate at ``step`` of ``steps`` (both counted from 0), in [0, 1]."""
    begins = config.warmup_steps if config.warmup_ratio is None or config.warmup_by_powers else 0
    if step >= config.warmup_steps:
        return _scheduled(config, step, steps, begins)
    if config.warmup_ratio is None:
        return (step + (not config.warmup_from_zero)) / config.warmup_steps
    left = 1 - step / config.warmup_steps
    if config.warmup_by_powers:
        return config.warmup_ratio**left
    return _scheduled(config, step, steps, begins) * (1 - left * (1 - config.warmup_ratio))  # mmcv's LrUpdaterHook


def _scheduled(config: LrScheduleConfig, step: int, steps: int, begins: int) -> float:
    """Without warm-up; ``begins``: the step from which cosine and polynomial count."""
    progress = (step - begins) / max(1, steps - begins)
    if config.name == "constant":
        return 1.0
    if config.name == "step":
        return config.gamma ** sum(step >= m * steps - MILESTONE_SLACK for m in config.milestones)
    decayed = max(0.0, (progress - config.hold) / (1 - config.hold))
    curve = (1 + math.cos(math.pi * decayed)) / 2 if config.name == "cosine" else (1 - decayed) ** config.power
    return config.final + (1 - config.final) * curve


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


class Ema:
    """A running mean of what is trained, with a warm start: decay = min(decay, (1 + n) / (10 + n))."""

    def __init__(self, method: nn.Module, decay: float) -> None:
        self.decay = decay
        self.mean = {n: p.detach().clone() for n, p in method.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, method: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        parameters = dict(method.named_parameters())
        means = list(self.mean.values())
        torch._foreach_lerp_(means, [parameters[n].detach() for n in self.mean], 1 - decay)

    @torch.no_grad()
    def copy_to(self, method: nn.Module) -> None:
        for name, parameter in method.named_parameters():
            if name in self.mean:
                parameter.copy_(self.mean[name])
