"""NF4 as two functions on plain tensors. `lowrank.quant.tensor.QuantizedTensor` is the same as one value."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lowrank.quant.tensor import QuantizedTensor


def quantize(w: Tensor, block_size: int = 64) -> tuple[Tensor, Tensor]:
    """Packed codes, the first of a byte in its high nibble, and each block's absmax.  -> (⌈n/2⌉,) uint8, (N,) fp32"""
    q = QuantizedTensor.quantize(w, "nf4", block_size)
    return q.codes, q.scales


def dequantize(
    packed: Tensor, absmax: Tensor, shape: Sequence[int], dtype: torch.dtype, block_size: int = 64
) -> Tensor:
    """c_code · absmax in fp32, rounded once to `dtype`.  (⌈n/2⌉,), (N,) -> shape"""
    return QuantizedTensor("nf4", tuple(shape), dtype, block_size, packed.reshape(-1), absmax.reshape(-1)).dequantize()
