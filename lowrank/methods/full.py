"""Full fine-tuning as an adapter: a dense trainable update of each targeted weight and bias.

    y = (W + Δ) x + b + δ          Δ: (O, I) = 0,  δ: (O,) = 0

The base stays untouched, so the fine-tune detaches exactly and R(θ - θ₀) is its penalty:  strength / 2 · (|Δ|² + |δ|²).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowrank.adapter import Adapter, features, linear, register


@dataclass(frozen=True)
class FullConfig:
    strength: float = 0.0
    """Weight of the pull back to the base (L2-SP); 0 lets it move freely."""

    def __post_init__(self) -> None:
        if self.strength < 0:
            raise ValueError(f"strength must not be negative, got {self.strength}")


@register("full")
class Full(Adapter):
    Config = FullConfig

    def __init__(self, config: FullConfig, base: nn.Module) -> None:
        super().__init__(config, base)
        in_features, out_features = features(base)
        self.strength = config.strength
        self.delta_weight = nn.Parameter(torch.zeros(out_features, in_features))  # (O, I)
        has_bias = getattr(base, "bias", None) is not None
        self.delta_bias = nn.Parameter(torch.zeros(out_features)) if has_bias else None  # (O,)

    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        update = linear(x, self.delta_weight)  # (..., I) -> (..., O)
        return y + (update if self.delta_bias is None else update + self.delta_bias).to(y.dtype)

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.delta_weight, bias if bias is None or self.delta_bias is None else bias + self.delta_bias

    def penalty(self) -> Tensor | None:
        if self.strength == 0:
            return None
        squares = sum((p.square().sum() for p in self.parameters()), self.delta_weight.new_zeros(()))
        return self.strength / 2 * squares
