"""DoRA: Weight-Decomposed Low-Rank Adaptation (Liu et al., 2024), arXiv:2402.09353.

    V = W + (α / r) B A,    y = (m / |V|) ⊙ V x + b        m: (O,) = |W|, norms of rows; A, B as in LoRA

The norm needs no dense V:  |V|² = |W|² + 2 s (W Aᵀ) · B + s² (B (A Aᵀ)) · B  by rows, with s = α / r. It is held
constant in backward (§4.3). On a base of 16 bits W Aᵀ is rounded to them, a small share of the norm.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowrank.adapter import dense_weight, register
from lowrank.kernels.row_norm import row_norm
from lowrank.methods.lora import LoRA, LoRAConfig


@dataclass(frozen=True)
class DoRAConfig(LoRAConfig):
    pass


@register("dora")
class DoRA(LoRA):
    Config = DoRAConfig
    squares: Tensor
    exact_gradient = False

    def __init__(self, config: DoRAConfig, base: nn.Module) -> None:
        super().__init__(config, base)
        if isinstance(base, nn.Embedding):
            raise ValueError("DoRA on an embedding is not offered: its rows are looked up, not multiplied")
        squares = dense_weight(base).double().square().sum(dim=1)  # (O,)
        self.register_buffer("squares", squares, persistent=False)  # fp64: B = 0 gives m / |V| = 1 exactly
        self.lora_magnitude_vector = nn.Parameter(squares.sqrt().float())

    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        bias = getattr(base, "bias", None)
        wx = (y if bias is None else y - bias).to(self.lora_A.dtype)
        v = super().forward(x, wx, base) * (self.lora_magnitude_vector / self.norm(base))  # (..., O) * (O,)
        return (v if bias is None else v + bias).to(y.dtype)

    @torch.no_grad()
    def norm(self, base: nn.Module) -> Tensor:
        """|V| of each row, without V.  -> (O,)"""
        if type(base) is nn.Linear:
            return row_norm(base.weight, self.lora_A, self.lora_B, self.scaling, self.squares)
        A, B, bias = self.lora_A, self.lora_B, getattr(base, "bias", None)
        weight = getattr(base, "weight", None)
        wa = base(A if weight is None else A.to(weight.dtype)).T  # (O, R): the base is a function that multiplies by Wᵀ
        wa = (wa if bias is None else wa - bias[:, None]).to(A.dtype)
        squares = self.squares + 2 * self.scaling * (wa * B).sum(1) + self.scaling**2 * (B @ (A @ A.T) * B).sum(1)
        return squares.clamp(min=0).sqrt().to(A.dtype)

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        v = super().merge(weight, bias)[0]  # (O, I)
        return v * (self.lora_magnitude_vector / v.norm(dim=1))[:, None], bias
