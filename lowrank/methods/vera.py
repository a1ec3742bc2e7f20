"""VeRA: Vector-based Random Matrix Adaptation (Kopiczko et al., 2023), arXiv:2310.11454.

    y = W x + b + λ_b ⊙ B (λ_d ⊙ (A x))        λ_d: (R,) = 0.1,  λ_b: (O,) = 0;  A: (R, I), B: (O, R) random, frozen

One A and one B serve all layers: they have the largest layer's size, and each layer takes the corner it needs. They are
drawn from `seed` (A first, both U(-a, a), a = √6 / √columns, on the CPU), so an adapter file need not hold them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank.adapter import Adapter, features, linear, register
from lowrank.methods.parts import Checked, shared_uniform


@dataclass(frozen=True)
class VeRAConfig(Checked):
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
        super().__post_init__()
        object.__setattr__(self, "largest", tuple(self.largest))


@register("vera")
class VeRA(Adapter):
    Config = VeRAConfig
    vera_A: Tensor
    vera_B: Tensor

    @classmethod
    def complete(cls, config: VeRAConfig, layers: Mapping[str, nn.Module]) -> VeRAConfig:
        inputs, outputs = zip(*(features(layer) for layer in layers.values()))
        return config if any(config.largest) else replace(config, largest=(max(inputs), max(outputs)))

    def __init__(self, config: VeRAConfig, base: nn.Module) -> None:
        super().__init__(config, base)
        in_features, out_features = features(base)
        largest = config.largest if any(config.largest) else (in_features, out_features)
        if in_features > largest[0] or out_features > largest[1]:
            raise ValueError(f"a layer {in_features} -> {out_features} is larger than the shared matrices {largest}")
        A, B = shared_uniform(config.seed, (config.rank, largest[0]), (largest[1], config.rank))
        if config.save_projection:  # a file may bring other values, and each layer must have its own to hold them
            A, B = A.clone(), B.clone()
        self.register_buffer("vera_A", A[:, :in_features], persistent=config.save_projection)  # (R, I)
        self.register_buffer("vera_B", B[:out_features], persistent=config.save_projection)  # (O, R)
        self.dropout = config.dropout
        self.vera_lambda_d = nn.Parameter(torch.full((config.rank,), config.d_initial))
        self.vera_lambda_b = nn.Parameter(torch.zeros(out_features))

    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        h = self.vera_lambda_d * linear(self.dropped(x), self.vera_A)  # (..., I) -> (..., R)
        return y + (self.vera_lambda_b * F.linear(h, self.vera_B)).to(y.dtype)

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.vera_lambda_b[:, None] * (self.vera_B * self.vera_lambda_d) @ self.vera_A, bias
