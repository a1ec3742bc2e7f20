"""LoKr: low-rank Kronecker product, KronA (Edalati et al., 2022), arXiv:2212.10650; LyCORIS, arXiv:2309.14859.

    y = W x + b + (α / r) (w1 ⊗ w2) x        w1: (O₁, I₁) = 0,  w2: (O₂, I₂),  O = O₁ O₂,  I = I₁ I₂

w2 is a product w2ₐ w2_b of rank r where that is smaller; w1 too where `decompose_both`.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowrank.adapter import Adapter, features, linear, register
from lowrank.methods.loha import LoHaConfig


@dataclass(frozen=True)
class LoKrConfig(LoHaConfig):
    factor: int = -1
    """The first factor's size where it divides the layer's; -1 takes the most even split."""

    decompose_both: bool = False
    """Also write w1 as a product of rank r."""


def split(size: int, factor: int = -1) -> tuple[int, int]:
    """size = m · n with m <= n: m = factor where that divides, else the most even split with m <= factor."""
    if factor > 0 and size % factor == 0:
        return min(factor, size // factor), max(factor, size // factor)
    limit = size if factor == -1 else factor
    m = max(d for d in range(1, math.isqrt(size) + 1) if size % d == 0 and d <= limit)
    return m, size // m


@register("lokr")
class LoKr(Adapter):
    Config = LoKrConfig

    def __init__(self, config: LoKrConfig, base: nn.Module) -> None:
        super().__init__(config, base)
        in_features, out_features = features(base)
        (i1, i2), (o1, o2), rank = split(in_features, config.factor), split(out_features, config.factor), config.rank
        self.scaling = config.alpha / rank
        if config.decompose_both and rank < max(o1, i1) / 2:
            self.lokr_w1_a = nn.Parameter(torch.zeros(o1, rank))
            self.lokr_w1_b = nn.Parameter(torch.empty(rank, i1))
        else:
            self.lokr_w1 = nn.Parameter(torch.zeros(o1, i1))
        if rank < max(o2, i2) / 2:
            self.lokr_w2_a = nn.Parameter(torch.empty(o2, rank))
            self.lokr_w2_b = nn.Parameter(torch.empty(rank, i2))
        else:
            self.lokr_w2 = nn.Parameter(torch.empty(o2, i2))
        for name, parameter in self.named_parameters():
            if name not in ("lokr_w1", "lokr_w1_a"):
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))

    def delta(self) -> Tensor:
        w1 = self.lokr_w1 if hasattr(self, "lokr_w1") else self.lokr_w1_a @ self.lokr_w1_b
        w2 = self.lokr_w2 if hasattr(self, "lokr_w2") else self.lokr_w2_a @ self.lokr_w2_b
        return self.scaling * torch.kron(w1, w2)  # (O, I)

    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        return y + linear(x, self.delta()).to(y.dtype)

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.delta(), bias
