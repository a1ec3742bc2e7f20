"""What methods are put together from: bounds of settings, factors of a weight, random matrices that layers share."""

import math
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

V = TypeVar("V", int, float)
BOUNDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "rank": (lambda value: value >= 1, "be at least 1"),
    "tokens": (lambda value: value >= 1, "be at least 1"),
    "block_size": (lambda value: value >= 2, "be at least 2"),
    "alpha": (lambda value: value > 0, "be positive"),
    "lr_ratio": (lambda value: value > 0, "be positive"),
    "dropout": (lambda value: 0 <= value < 1, "lie in [0, 1)"),
    "neumann_terms": (lambda value: value == 0 or value >= 3, "be 0 or at least 3"),
}


class Checked:
    """A configuration whose settings of these names keep within their bounds; what else it checks is its own."""

    def __post_init__(self) -> None:
        for name, (fits, wanted) in BOUNDS.items():
            if hasattr(self, name) and not fits(getattr(self, name)):
                raise ValueError(f"{name} must {wanted}, got {getattr(self, name)}")


def by_pattern(patterns: Mapping[str, V], path: str, default: V) -> V:
    """The value of the first pattern that matches the end of `path`, from a dot on."""
    return next((v for pattern, v in patterns.items() if re.match(rf"(.*\.)?({pattern})$", path)), default)


def principal(weight: Tensor, rank: int, iterations: int = 0) -> tuple[Tensor, Tensor]:
    """A (R, I) and B (O, R), equally large, whose product is the best approximation by rank R = min(rank, I, O)."""
    if iterations:
        U, S, V = torch.svd_lowrank(weight, q=min(rank, *weight.shape), niter=iterations)
        Vt = V.T
    else:
        U, S, Vt = torch.linalg.svd(weight, full_matrices=False)
    root = S[:rank].clamp(min=0).sqrt()
    return root[:, None] * Vt[:rank], U[:, :rank] * root


class Less(nn.Module):
    """base(x) - B A x"""

    A: Tensor
    B: Tensor

    def __init__(self, base: nn.Module, B: Tensor, A: Tensor) -> None:
        super().__init__()
        self.base, self.bias = base, base.bias
        self.register_buffer("A", A)
        self.register_buffer("B", B)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        return y - F.linear(F.linear(x.to(self.A.dtype), self.A), self.B).to(y.dtype)  # type: ignore[no-any-return]


@lru_cache(maxsize=4)
def shared_uniform(seed: int, *shapes: tuple[int, int]) -> list[Tensor]:
    """U(-a, a), a = √6 / √columns, drawn in turn on the CPU: the same tensors for all layers that ask for the same."""
    generator = torch.Generator().manual_seed(seed)
    bounds = [math.sqrt(6 / columns) for _, columns in shapes]
    return [torch.empty(s).uniform_(-a, a, generator=generator) for s, a in zip(shapes, bounds)]
