"""LoRA: Low-Rank Adaptation of Large Language Models (Hu et al., 2021), arXiv:2106.09685.

    y = W x + (α / r) B A x        A: (R, I) ~ Kaiming uniform,  B: (O, R) = 0

rsLoRA (Kalajdzievski, 2023), arXiv:2312.03732, replaces α / r by α / √r.
"""

import math
from dataclasses import dataclass

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

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")
        if not self.alpha > 0:
            raise ValueError(f"alpha must be positive, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}")


@register("lora")
class LoRA(Adapter):
    Config = LoRAConfig

    def __init__(self, config: LoRAConfig, base: nn.Module) -> None:
        super().__init__(config, base)
        in_features, out_features = features(base)
        self.scaling = config.alpha / (math.sqrt(config.rank) if config.rank_stabilized else config.rank)
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
