"""LoHa: low-rank Hadamard product, FedPara (Hyeon-Woo et al., 2021), arXiv:2108.06098; LyCORIS, arXiv:2309.14859.

    y = W x + b + (α / r) ((w1ₐ w1_b) ⊙ (w2ₐ w2_b)) x        wₐ: (O, R), w_b: (R, I);  w2_b = 0

Two factors of rank r give an update of rank up to r².
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowrank.adapter import Adapter, features, linear, register
from lowrank.methods.parts import Checked


@dataclass(frozen=True)
class LoHaConfig(Checked):
    rank: int = 8
    """R of each factor."""

    alpha: float = 8.0
    """The update is scaled by alpha / rank."""


@register("loha")
class LoHa(Adapter):
    Config = LoHaConfig

    def __init__(self, config: LoHaConfig, base: nn.Module) -> None:
        super().__init__(config, base)
        in_features, out_features = features(base)
        self.scaling = config.alpha / config.rank
        self.hada_w1_a = nn.Parameter(torch.empty(out_features, config.rank))
        self.hada_w1_b = nn.Parameter(torch.empty(config.rank, in_features))
        self.hada_w2_a = nn.Parameter(torch.empty(out_features, config.rank))
        self.hada_w2_b = nn.Parameter(torch.zeros(config.rank, in_features))
        for parameter in (self.hada_w1_a, self.hada_w1_b, self.hada_w2_a):
            nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))

    def delta(self) -> Tensor:
        return self.scaling * (self.hada_w1_a @ self.hada_w1_b) * (self.hada_w2_a @ self.hada_w2_b)  # (O, I)

    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        return y + linear(x, self.delta()).to(y.dtype)

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.delta(), bias
