"""LoftQ: LoRA-Fine-Tuning-aware Quantization (Li et al., 2023), arXiv:2310.08659.

    repeat:  Q = quantize(W - s B A);   s B A = SVD_r(W - Q)          s = α / r;  B A = 0 at first
    y = Q x + b + s B A x

The quantized Q stands in for the dense base while the adapter acts, so step 0 is not the base model but the best that
4 bits and rank r make of it. It starts from the unquantized weight: attach it to a model loaded with quantize=None.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowrank.adapter import dense_weight, register
from lowrank.errors import at_least
from lowrank.methods.lora import LoRA, LoRAConfig
from lowrank.methods.parts import principal
from lowrank.quant.formats import parse_format
from lowrank.quant.linear import QuantizedLinear
from lowrank.quant.tensor import QuantizedTensor


@dataclass(frozen=True)
class LoftQConfig(LoRAConfig):
    format: str = "nf4"
    """What the base is quantized to."""

    block_size: int = 64
    """Values that share a scale."""

    iterations: int = 1
    """Rounds of quantization and SVD."""

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_format(self.format)
        at_least(self, 1, "iterations")


@register("loftq")
class LoftQ(LoRA):
    Config = LoftQConfig
    initial_A: Tensor
    initial_B: Tensor
    edits_base = True
    identity_at_init = False

    def __init__(self, config: LoftQConfig, base: nn.Module) -> None:
        super().__init__(config, base)
        if not isinstance(base, nn.Linear):
            raise ValueError(f"LoftQ starts from a dense nn.Linear, got {type(base).__name__}: load with quantize=None")
        self.config, weight = config, dense_weight(base).float()
        self.register_buffer("initial_A", torch.zeros_like(self.lora_A))  # of the round before: they define Q
        self.register_buffer("initial_B", torch.zeros_like(self.lora_B))
        with torch.no_grad():
            for round in range(config.iterations):
                if round:
                    self.initial_A.copy_(self.lora_A)
                    self.initial_B.copy_(self.lora_B)
                lost = (weight - self.quantized(weight).dequantize(torch.float32)) / self.scaling
                A, B = principal(lost, config.rank)
                self.lora_A[: len(A)], self.lora_B[:, : len(A)] = A, B  # the rest of too high a rank stays as it is

    def quantized(self, weight: Tensor) -> QuantizedTensor:
        format, double_quant = parse_format(self.config.format)
        rest = weight.float() - self.scaling * self.initial_B.float() @ self.initial_A.float()
        return QuantizedTensor.quantize(rest, format, self.config.block_size, double_quant=double_quant)

    def edit(self, base: nn.Module) -> nn.Module:
        return QuantizedLinear(self.quantized(dense_weight(base)), base.bias)  # type: ignore[arg-type]

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return super().merge(self.quantized(weight).dequantize(torch.float32).to(weight.dtype), bias)
