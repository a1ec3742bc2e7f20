"""LoRA: Low-Rank Adaptation of Large Language Models (Hu et al., 2021), arXiv:2106.09685.

    y = W x + (α / r) B A x        A: (R, I) ~ Kaiming uniform,  B: (O, R) = 0

rsLoRA (Kalajdzievski, 2023), arXiv:2312.03732, replaces α / r by α / √r. LoRA+ (Hayou et al., 2024), arXiv:2402.12354,
trains B at a higher rate than A.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank.adapter import Adapter, features, linear, register
from lowrank.methods.lora_paths import fused, grouped, projected
from lowrank.methods.parts import Checked, by_pattern


@dataclass(frozen=True)
class LoRAConfig(Checked):
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


@register("lora")
class LoRA(Adapter):
    Config = LoRAConfig
    fused = fused
    projected = classmethod(projected)  # type: ignore[assignment]
    grouped = classmethod(grouped)  # type: ignore[assignment]

    def __init__(self, config: LoRAConfig, base: nn.Module) -> None:
        super().__init__(config, base)
        in_features, out_features = features(base)
        self.scaling = config.alpha / (math.sqrt(config.rank) if config.rank_stabilized else config.rank)
        self.lr_ratio = config.lr_ratio
        self.dropout = config.dropout
        self.lora_A = nn.Parameter(torch.empty(config.rank, in_features))  # (R, I)
        self.lora_B = nn.Parameter(torch.zeros(out_features, config.rank))  # (O, R)
        # a = √5 is U(-1/√I, 1/√I), as in the authors' code; the paper says Gaussian. B = 0 makes step 0 exact.
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        h = linear(self.dropped(x), self.lora_A)  # (..., I) -> (..., R), in A's dtype
        return y + (self.scaling * F.linear(h, self.lora_B)).to(y.dtype)  # (..., R) -> (..., O)

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.scaling * self.lora_B @ self.lora_A, bias  # (O, R) @ (R, I) -> (O, I)

    def param_groups(self, lr: float) -> list[dict[str, Any]]:
        if self.lr_ratio == 1 or not self.lora_B.requires_grad:
            return super().param_groups(lr)
        others = [p for p in self.parameters() if p.requires_grad and p is not self.lora_B]
        return [{"params": others, "lr": lr}, {"params": [self.lora_B], "lr": lr * self.lr_ratio}]
