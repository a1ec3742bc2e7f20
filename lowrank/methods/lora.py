"""LoRA: Low-Rank Adaptation of Large Language Models (Hu et al., 2021), arXiv:2106.09685.

    y = W x + (α / r) B A x        A: (R, I) ~ Kaiming uniform,  B: (O, R) = 0

rsLoRA (Kalajdzievski, 2023), arXiv:2312.03732, replaces α / r by α / √r. LoRA+ (Hayou et al., 2024), arXiv:2402.12354,
trains B at a higher rate than A.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank.adapter import Adapter, features, linear, register


@dataclass(frozen=True)
class LoRAConfig:
    rank: int = 8
    """R, the inner dimension of the update."""

    alpha: float = 16.0
    """The update is scaled by alpha / rank, or alpha / sqrt(rank) when rank-stabilized."""

    dropout: float = 0.0
    """Share of the adapter's inputs set to zero in training."""

    rank_stabilized: bool = False
    """rsLoRA: the scaling that keeps the update's size whatever the rank."""

    lr_ratio: float = 1.0
    """LoRA+: the rate of B over the rate of A; the paper uses about 16."""

    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Other ranks for single layers: a regular expression for the end of the layer's name -> rank."""

    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Other alphas, in the same way."""

    def at(self, path: str) -> Self:
        """The settings of one layer."""
        rank, alpha = by_pattern(self.rank_pattern, path, self.rank), by_pattern(self.alpha_pattern, path, self.alpha)
        return replace(self, rank=rank, alpha=alpha, rank_pattern={}, alpha_pattern={})

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")
        if not self.alpha > 0:
            raise ValueError(f"alpha must be positive, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}")
        if not self.lr_ratio > 0:
            raise ValueError(f"lr_ratio must be positive, got {self.lr_ratio}")


V = TypeVar("V", int, float)


def by_pattern(patterns: Mapping[str, V], path: str, default: V) -> V:
    """The value of the first pattern that matches the end of `path`, from a dot on."""
    return next((v for pattern, v in patterns.items() if re.match(rf"(.*\.)?({pattern})$", path)), default)


@register("lora")
class LoRA(Adapter):
    Config = LoRAConfig

    def __init__(self, config: LoRAConfig, base: nn.Module) -> None:
        super().__init__(config, base)
        in_features, out_features = features(base)
        self.scaling = config.alpha / (math.sqrt(config.rank) if config.rank_stabilized else config.rank)
        self.lr_ratio, self.rank_stabilized = config.lr_ratio, config.rank_stabilized
        self.dropout = nn.Dropout(config.dropout)
        self.lora_A = nn.Parameter(torch.empty(config.rank, in_features))  # (R, I)
        self.lora_B = nn.Parameter(torch.zeros(out_features, config.rank))  # (O, R)
        # a = √5 is U(-1/√I, 1/√I), as in the authors' code; the paper says Gaussian. B = 0 makes step 0 exact.
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        h = linear(self.dropout(x) if self.dropout.p else x, self.lora_A)  # (..., I) -> (..., R), in A's dtype
        return y + (self.scaling * F.linear(h, self.lora_B)).to(y.dtype)  # (..., R) -> (..., O)

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.scaling * self.lora_B @ self.lora_A, bias  # (O, R) @ (R, I) -> (O, I)

    def param_groups(self, lr: float) -> list[dict[str, Any]]:
        if self.lr_ratio == 1 or not self.lora_B.requires_grad:
            return super().param_groups(lr)
        others = [p for p in self.parameters() if p.requires_grad and p is not self.lora_B]
        return [{"params": others, "lr": lr}, {"params": [self.lora_B], "lr": lr * self.lr_ratio}]

    def fused(self, x: Tensor, base: nn.Module) -> Tensor | None:
        """The same sum in the base's 16-bit dtype: both small products on its fast path, added inside the second one.

        It saves x and x Aᵀ and no fp32 copy of either. Rounding A, B and x Aᵀ to 16 bits changes the update by a few
        units of its last place. With fp32 activations there is nothing to gain, and dropout needs `forward`.
        """
        if x.dtype not in (torch.bfloat16, torch.float16) or (self.training and self.dropout.p > 0):
            return None
        y = base(x)
        h = F.linear(x, self.lora_A.to(x.dtype))  # (..., I) -> (..., R)
        update = h.flatten(0, -2), self.lora_B.to(x.dtype).T
        return torch.addmm(y.flatten(0, -2), *update, alpha=self.scaling).view_as(y)

    @classmethod
    def grouped(cls, adapters: list[Any], weights: list[float], x: Tensor, y: Tensor) -> Tensor | None:
        """Row i of the batch through adapters[i], all in two batched products; smaller ranks are padded with zeros."""
        first = next(adapter for adapter in adapters if adapter is not None)
        if x.dim() < 2 or not x.is_floating_point() or any(a and a.training and a.dropout.p > 0 for a in adapters):
            return None
        rank = max(len(a.lora_A) for a in adapters if a is not None)
        none = first.lora_A.new_zeros(rank, x.shape[-1]), first.lora_B.new_zeros(y.shape[-1], rank)
        pads = {id(a): rank - len(a.lora_A) for a in adapters if a is not None}
        A = [none[0] if a is None else F.pad(a.lora_A, (0, 0, 0, pads[id(a)])) for a in adapters]
        B = [none[1] if a is None else F.pad(a.lora_B, (0, pads[id(a)])) for a in adapters]
        scale = [w * (0.0 if a is None else a.scaling) for a, w in zip(adapters, weights)]
        h = x.flatten(1, -2).to(first.lora_A.dtype) @ torch.stack(A).mT  # (N, T, I) @ (N, I, R)
        update = h * h.new_tensor(scale)[:, None, None] @ torch.stack(B).mT  # (N, T, R) @ (N, R, O)
        return y + update.view_as(y).to(y.dtype)
