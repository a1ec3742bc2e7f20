"""LoRA: Low-Rank Adaptation of Large Language Models (Hu et al., 2021), arXiv:2106.09685.

    y = W x + (α / r) B A x        A: (R, I) ~ Kaiming uniform,  B: (O, R) = 0

rsLoRA (Kalajdzievski, 2023), arXiv:2312.03732, replaces α / r by α / √r. LoRA+ (Hayou et al., 2024), arXiv:2402.12354,
trains B at a higher rate than A.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank.adapter import Adapter, features, linear, register
from lowrank.by_row import Sum
from lowrank.kernels.dispatch import mode
from lowrank.kernels.lora_grouped import lora_grouped, lora_grouped_ref
from lowrank.kernels.lora_linear import Weight, lora_linear
from lowrank.quant.linear import QuantizedLinear, product_back
from lowrank.quant.linear import linear as quantized_linear


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


def is_short(x: Tensor) -> bool:
    """Whether fp32 is quicker than 16 bits: on a CPU, where any product in 16 bits takes 30 µs, up to 32 tokens."""
    return x.device.type == "cpu" and x.numel() <= 32 * x.shape[-1]


def frozen_weight(base: nn.Module, dtype: torch.dtype) -> Weight | None:
    """The (O, I) weight as `lora_linear` takes it; None where calling the base does more than multiply by it."""
    if base._forward_hooks or base._forward_pre_hooks or any(p.requires_grad for p in base.parameters()):
        return None
    if type(base) is QuantizedLinear and dtype.is_floating_point:
        return partial(quantized_linear, q=base.quantized), partial(product_back, q=base.quantized)
    return base.weight if type(base) is nn.Linear and base.weight.dtype == dtype else None


@register("lora")
class LoRA(Adapter):
    Config = LoRAConfig

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
        x = F.dropout(x, self.dropout, self.training) if self.dropout and x.is_floating_point() else x
        h = linear(x, self.lora_A)  # (..., I) -> (..., R), in A's dtype
        return y + (self.scaling * F.linear(h, self.lora_B)).to(y.dtype)  # (..., R) -> (..., O)

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.scaling * self.lora_B @ self.lora_A, bias  # (O, R) @ (R, I) -> (O, I)

    def param_groups(self, lr: float) -> list[dict[str, Any]]:
        if self.lr_ratio == 1 or not self.lora_B.requires_grad:
            return super().param_groups(lr)
        others = [p for p in self.parameters() if p.requires_grad and p is not self.lora_B]
        return [{"params": others, "lr": lr}, {"params": [self.lora_B], "lr": lr * self.lr_ratio}]

    def fused(self, x: Tensor, base: nn.Module) -> Tensor | None:
        """The same sum without a tensor of its own for the update: it is added inside the second small product.

        With 16-bit activations both products run in 16 bits; rounding A, B and x Aᵀ changes the update by a few units
        of its last place.
        """
        if torch.is_autocast_enabled(x.device.type):  # the dtypes of x and y then say nothing of each other
            return None
        if (y := self.projected([self], x, [base])) is not None:
            return y[0]
        A, B, half = self.lora_A, self.lora_B, x.dtype in (torch.bfloat16, torch.float16)
        if not (half or x.dtype == A.dtype) or (self.training and self.dropout > 0):
            return None
        y = base(x)
        if half and is_short(x):
            return y.add(F.linear(F.linear(x.to(A.dtype), A), B).to(y.dtype), alpha=self.scaling)
        h = self.scaling * F.linear(x, A.to(x.dtype)).reshape(-1, len(A))  # (..., I) -> (N, R)
        y_rows, up = y.reshape(-1, y.shape[-1]), B.to(x.dtype).T.contiguous()
        if torch.is_grad_enabled() or base._forward_hooks:  # a hook may have kept y
            return torch.addmm(y_rows, h, up).view_as(y)
        return y_rows.addmm_(h, up).view_as(y)

    @classmethod
    def projected(cls, adapters: list[Any], x: Tensor, bases: list[nn.Module]) -> tuple[Tensor, ...] | None:
        """One function with its own backward: x is kept once, the A's are one product, no sum has memory of its own."""
        dropping = any(a.training and a.dropout > 0 for a in adapters)
        if dropping or not torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type):
            return None
        weights = [frozen_weight(base, x.dtype) for base in bases]
        if None in weights:
            return None
        factors = [a.lora_A for a in adapters], [a.lora_B for a in adapters]
        return lora_linear(x, weights, [base.bias for base in bases], *factors, [a.scaling for a in adapters])  # type: ignore[arg-type, misc]

    @classmethod
    def grouped(cls, rows: list[tuple[Any, float]], dtype: torch.dtype) -> Sum | None:
        """Two batched products for all rows; smaller ranks are filled up with zeros."""
        adapters = list(dict.fromkeys(a for a, _ in rows if a is not None))
        if not dtype.is_floating_point or any(a.training and a.dropout > 0 for a in adapters):
            return None
        rank = max(len(a.lora_A) for a in adapters)
        A = torch.stack([F.pad(a.lora_A, (0, 0, 0, rank - len(a.lora_A))) for a in adapters])  # (K, R, I)
        up = torch.stack([F.pad(a.lora_B.T, (0, 0, 0, rank - len(a.lora_A))) for a in adapters])  # (K, R, O)
        index = torch.tensor([0 if a is None else adapters.index(a) for a, _ in rows], device=A.device)  # (N,)
        scaling = A.new_tensor([0.0 if a is None else w * a.scaling for a, w in rows])  # (N,)
        product = lora_grouped if A.is_cuda or mode() == "triton" else lora_grouped_ref

        @cache
        def factors(short: bool) -> tuple[Any, ...]:
            kind = A.dtype if short or dtype.itemsize != 2 else dtype
            if A.is_cuda:
                return A.to(kind), up.mT.to(kind), scaling, index
            return A[index].to(kind), (up[index] * scaling[:, None, None]).to(kind).mT, None, None

        def act(x: Tensor, y: Tensor) -> Tensor:
            x = x if x.dim() == 3 else x.reshape(len(x), -1, x.shape[-1])
            return y + product(x, *factors(is_short(x))).view_as(y).to(y.dtype)

        return act
