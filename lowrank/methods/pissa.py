"""PiSSA: Principal Singular Values and Singular Vectors Adaptation (Meng et al., 2024), arXiv:2404.02948.

    W = U S Vᵀ,  A₀ = √(S_r / s) V_rᵀ,  B₀ = U_r √(S_r / s)        s = α / r;  r: the r largest singular values
    y = (W - s B₀ A₀) x + b + s B A x                               A, B start at A₀, B₀

The residual W - s B₀ A₀ stands in for a dense base while the adapter acts. On a quantized base, where storing it would
round again, it is computed as W x - s B₀ (A₀ x).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank.adapter import dense_weight, register, with_weight
from lowrank.methods.lora import LoRA, LoRAConfig
from lowrank.methods.parts import Less, principal
from lowrank.quant.linear import QuantizedLinear


@dataclass(frozen=True)
class PiSSAConfig(LoRAConfig):
    iterations: int = 0
    """Power iterations of a randomised SVD; 0 computes the exact one."""


@register("pissa")
class PiSSA(LoRA):
    Config = PiSSAConfig
    initial_A: Tensor
    initial_B: Tensor
    edits_base = True

    def __init__(self, config: PiSSAConfig, base: nn.Module) -> None:
        super().__init__(config, base)
        if isinstance(base, nn.Embedding):
            raise ValueError("PiSSA on an embedding is not offered: the residual of a lookup table is the whole table")
        A, B = self.initial(dense_weight(base).float(), config)
        with torch.no_grad():  # a rank above min(I, O) is filled up with zeros
            self.lora_A.copy_(F.pad(A, (0, 0, 0, config.rank - len(A))))
            self.lora_B.copy_(F.pad(B, (0, config.rank - B.shape[1])))
        self.register_buffer("initial_A", self.lora_A.detach().clone())  # saved: another SVD may give other signs
        self.register_buffer("initial_B", self.lora_B.detach().clone())

    def initial(self, weight: Tensor, config: PiSSAConfig) -> tuple[Tensor, Tensor]:
        """A₀ and B₀ of W in fp32."""
        return principal(weight / self.scaling, config.rank, config.iterations)

    def edit(self, base: nn.Module) -> nn.Module:
        if isinstance(base, QuantizedLinear):
            return Less(base, self.scaling * self.initial_B, self.initial_A)
        weight = dense_weight(base)
        return with_weight(base, (weight - self.scaling * self.initial_B @ self.initial_A).to(weight.dtype))

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return super().merge(weight - self.scaling * self.initial_B @ self.initial_A, bias)
