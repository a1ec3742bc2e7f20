"""The learning rate's course and the optimizer.

    warm-up:  lr(s) = lr · s / W                        s < W, so the first step has rate 0
    cosine:   lr(s) = lr · (m + (1 - m) (1 + cos(π p)) / 2),   p = (s - W) / (S - W),  m = min_lr_ratio

AdamW (Loshchilov and Hutter, 2019), arXiv:1711.05101, over the trainable parameters only.
"""

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

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


class AdamW:
    """torch's fused AdamW over groups {params, lr, peak}, with moments in each parameter's dtype.

    torch.optim.AdamW ends in the same operator with the same bits, but its class imports torch's compiler: 77 MB and
    two seconds at the start of every run.
    """

    def __init__(self, groups: list[dict[str, Any]], config: OptimConfig) -> None:
        self.param_groups, self.config = groups, config
        self.state: dict[Tensor, dict[str, Tensor]] = {}
        for p in (p for group in groups for p in group["params"]):
            step = torch.zeros((), dtype=torch.float32, device=p.device)  # the operator counts on the device
            self.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}

    @torch.no_grad()
    def step(self) -> None:
        """One update of every parameter that has a gradient."""
        c = self.config
        for group in self.param_groups:
            alike: dict[Any, list[Tensor]] = defaultdict(list)  # one call takes one device and dtype
            for p in group["params"]:
                if p.grad is not None:
                    alike[p.device, p.dtype].append(p)
            for params in alike.values():
                means, squares, steps = (
                    [self.state[p][key] for p in params] for key in ("exp_avg", "exp_avg_sq", "step")
                )
                grads: Any = [p.grad for p in params]
                torch._foreach_add_(steps, 1)
                torch._fused_adamw_(  # type: ignore[attr-defined]
                    params, grads, means, squares, [], steps, amsgrad=False, maximize=False,
                    lr=group["lr"], beta1=c.beta1, beta2=c.beta2, weight_decay=c.weight_decay, eps=c.eps,
                )  # fmt: skip

    def zero_grad(self) -> None:
        for p in self.state:
            p.grad = None


def make_optimizer(model: nn.Module, config: OptimConfig) -> AdamW:
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
    return AdamW(groups, config)


def set_rate(optimizer: AdamW, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor
