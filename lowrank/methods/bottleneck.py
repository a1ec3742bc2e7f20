"""Bottleneck adapters: a small MLP at the output of a sub-layer, x its input and y its output before the residual sum.

    Houlsby et al. (2019), arXiv:1902.00751    y + U f(V y)        after attention and after the MLP
    Pfeiffer et al. (2020), arXiv:2005.00247   y + U f(V y)        after the MLP only
    He et al. (2021), arXiv:2110.04366         y + s U f(V x)      parallel to the MLP

V: (R, D) ~ N(0, 0.02²), U: (D, R) = 0, both with a bias of 0; f: the activation.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank.adapter import Adapter, Slot, register
from lowrank.methods.parts import Checked

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


@dataclass(frozen=True)
class HoulsbyConfig(Checked):
    rank: int = 16
    """R, the width of the bottleneck."""

    activation: str = "relu"
    """relu, gelu, silu or tanh."""

    scale: float = 1.0
    """Factor of the update (He et al. use 4 for the parallel one)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}")


@register("houlsby")
class Houlsby(Adapter):
    Config = HoulsbyConfig
    place = "sublayer"
    default_targets: ClassVar[tuple[str, ...]] = ("attn_slot", "mlp_slot")
    mergeable = False  # the activation is no linear map

    def __init__(self, config: HoulsbyConfig, base: nn.Module) -> None:
        super().__init__(config, base)
        assert isinstance(base, Slot)
        (dim,) = base.shape
        self.activation, self.scale = config.activation, config.scale
        self.down = nn.Parameter(0.02 * torch.randn(config.rank, dim))  # (R, D)
        self.down_bias = nn.Parameter(torch.zeros(config.rank))
        self.up = nn.Parameter(torch.zeros(dim, config.rank))  # (D, R)
        self.up_bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        return y + self.update(y).to(y.dtype)

    def update(self, h: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, R) -> (B, T, D)"""
        inner = ACTIVATIONS[self.activation](F.linear(h.to(self.down.dtype), self.down, self.down_bias))
        return self.scale * F.linear(inner, self.up, self.up_bias)


@dataclass(frozen=True)
class PfeifferConfig(HoulsbyConfig):
    pass


@register("pfeiffer")
class Pfeiffer(Houlsby):
    Config = PfeifferConfig
    default_targets = ("mlp_slot",)


@dataclass(frozen=True)
class ParallelConfig(HoulsbyConfig):
    scale: float = 4.0


@register("parallel")
class Parallel(Houlsby):
    Config = ParallelConfig
    default_targets = ("mlp_slot",)

    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        return y + self.update(x).to(y.dtype)
