"""VeRA: Vector-based Random Matrix Adaptation (Kopiczko et al., 2023), arXiv:2310.11454.

    y = W x + b + λ_b ⊙ B (λ_d ⊙ (A x))        λ_d: (R,) = 0.1,  λ_b: (O,) = 0;  A: (R, I), B: (O, R) random, frozen

One A and one B serve all layers: they have the largest layer's size, and each layer takes the corner it needs. They are
drawn from `seed` (A first, both U(-a, a), a = √6 / √columns, on the CPU), so an adapter file need not hold them.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank.adapter import Adapter, features, linear, register


@dataclass(frozen=True)
class VeRAConfig:
    rank: int = 256
    """R, the inner dimension; the parameters are only O + R a layer."""

    d_initial: float = 0.1
    """Start of λ_d."""

    dropout: float = 0.0
    """Share of the adapter's inputs set to zero in training."""

    seed: int = 0
    """Of the shared random matrices."""

    largest: tuple[int, int] = (0, 0)
    """(I, O) of the shared matrices; (0, 0) takes the largest among the layers."""

    save_projection: bool = False
    """Keep A and B in the adapter file too."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "largest", tuple(self.largest))
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}")


@lru_cache(maxsize=4)
def projections(seed: int, rank: int, in_features: int, out_features: int) -> tuple[Tensor, Tensor]:
    """A (R, I) and B (O, R): one tensor for all layers that ask for the same."""
    generator = torch.Generator().manual_seed(seed)
    A, B = torch.empty(rank, in_features), torch.empty(out_features, rank)
    for matrix in (A, B):
        bound = math.sqrt(6 / matrix.shape[1])
        matrix.uniform_(-bound, bound, generator=generator)
    return A, B


@register("vera")
class VeRA(Adapter):
    Config = VeRAConfig
    vera_A: Tensor
    vera_B: Tensor

    @classmethod
    def complete(cls, config: VeRAConfig, layers: Mapping[str, nn.Module]) -> VeRAConfig:
        if any(config.largest):
            return config
        sizes = [features(layer) for layer in layers.values()]
        return replace(config, largest=(max(i for i, _ in sizes), max(o for _, o in sizes)))

    def __init__(self, config: VeRAConfig, base: nn.Module) -> None:
        super().__init__(config, base)
        in_features, out_features = features(base)
        largest = config.largest if any(config.largest) else (in_features, out_features)
        if in_features > largest[0] or out_features > largest[1]:
            raise ValueError(f"a layer {in_features} -> {out_features} is larger than the shared matrices {largest}")
        A, B = projections(config.seed, config.rank, *largest)
        if config.save_projection:  # a file may bring other values, and each layer must have its own to hold them
            A, B = A.clone(), B.clone()
        self.register_buffer("vera_A", A[:, :in_features], persistent=config.save_projection)  # (R, I)
        self.register_buffer("vera_B", B[:out_features], persistent=config.save_projection)  # (O, R)
        self.dropout = config.dropout
        self.vera_lambda_d = nn.Parameter(torch.full((config.rank,), config.d_initial))
        self.vera_lambda_b = nn.Parameter(torch.zeros(out_features))

    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        x = F.dropout(x, self.dropout, self.training) if x.is_floating_point() else x
        h = self.vera_lambda_d * linear(x, self.vera_A)  # (..., I) -> (..., R)
        return y + (self.vera_lambda_b * F.linear(h, self.vera_B)).to(y.dtype)

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.vera_lambda_b[:, None] * (self.vera_B * self.vera_lambda_d) @ self.vera_A, bias
