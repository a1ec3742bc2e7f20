"""The learning rate's course and the optimizer.

    warm-up:  lr(s) = lr · s / W                        s < W, so the first step has rate 0
    cosine:   lr(s) = lr · (m + (1 - m) (1 + cos(π p)) / 2),   p = (s - W) / (S - W),  m = min_lr_ratio

AdamW is torch's own (Loshchilov and Hutter, 2019), arXiv:1711.05101, over the trainable parameters only.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from lowrank.adapter import adapted_layers


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    lr: float = 2e-4
    """Peak learning rate, reached at the end of warm-up."""

    min_lr_ratio: float = 0.0
    """The cosine ends at min_lr_ratio * lr."""

    warmup_ratio: float = 0.05
    """Share of the steps over which the rate rises from 0."""

    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.99
    eps: float = 1e-8

    clip: float = 1.0
    """The gradient's global norm is cut to this; 0 leaves it as it is."""

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ValueError(f"lr must be positive, got {self.lr}")
        for name in ("min_lr_ratio", "warmup_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        if self.clip < 0:
            raise ValueError(f"clip must not be negative, got {self.clip}")


def rate(step: int, steps: int, config: OptimConfig) -> float:
    """The factor on lr in optimizer step `step` (from 0) of `steps`."""
    warmup = math.ceil(config.warmup_ratio * steps - 1e-9)  # 1e-9: 0.05 * 1000 must be 50 and not 51
    if step < warmup:
        return step / warmup
    progress = (step - warmup) / max(steps - warmup, 1)
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * (1 + math.cos(math.pi * progress)) / 2


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over what trains: each adapter's own groups first, then any other parameter with a gradient."""
    by_rate: dict[float, list[nn.Parameter]] = {}
    seen: set[int] = set()
    for _, layer in adapted_layers(model):
        for adapter in layer.adapters.values():
            for group in adapter.param_groups(config.lr):  # type: ignore[operator]
                own = [p for p in group["params"] if p.requires_grad and id(p) not in seen]
                seen.update(map(id, own))
                by_rate.setdefault(group["lr"], []).extend(own)
    by_rate.setdefault(config.lr, []).extend(p for p in model.parameters() if p.requires_grad and id(p) not in seen)
    groups = [{"params": params, "lr": lr, "peak": lr} for lr, params in by_rate.items() if params]
    if not groups:
        raise ValueError("nothing to train: no parameter has requires_grad; attach an adapter first")
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, betas=betas, eps=config.eps, weight_decay=config.weight_decay, fused=True)


def set_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor
