"""y = x dequant(W)ᵀ + b on a weight that stays in NF4, on plain tensors.

    y = x Wᵀ + b        dx = dy W        db = Σ dy        x: (..., I), W: (O, I) stored as ⌈O I / 2⌉ bytes and N absmax

W is decoded in forward and again in backward; nothing dense is kept between the two. This is the definition, in plain
PyTorch on any device: faster versions are compared with it. The layers of `quant/linear.py` decode into reused memory.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank.kernels.nf4_codec import nf4_dequantize_ref


class _NF4Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        packed: Tensor,
        absmax: Tensor,
        shape: tuple[int, int],
        block_size: int,
        bias: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(packed, absmax)
        ctx.shape, ctx.block_size = shape, block_size
        return F.linear(x, _decoded(packed, absmax, shape, block_size, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None, None, Tensor | None]:
        (dy,) = grads
        packed, absmax = ctx.saved_tensors
        dx = dy @ _decoded(packed, absmax, ctx.shape, ctx.block_size, dy.dtype) if ctx.needs_input_grad[0] else None
        db = dy.flatten(0, -2).sum(0) if ctx.needs_input_grad[5] else None
        return dx, None, None, None, None, db


def _decoded(packed: Tensor, absmax: Tensor, shape: tuple[int, int], block_size: int, dtype: torch.dtype) -> Tensor:
    return nf4_dequantize_ref(packed, absmax, shape[0] * shape[1], dtype, block_size).view(shape)


def nf4_linear(
    x: Tensor, packed: Tensor, absmax: Tensor, out_features: int, block_size: int = 64, bias: Tensor | None = None
) -> Tensor:
    """y in x's dtype, differentiable in x and bias. x (..., I), packed uint8, absmax (N,) fp32, bias (O,)."""
    numel = out_features * x.shape[-1]
    blocks = -(-numel // block_size)
    if packed.dtype != torch.uint8 or packed.numel() != -(-numel // 2):
        raise ValueError(
            f"packed must be {-(-numel // 2)} uint8 for a ({out_features}, {x.shape[-1]}) weight,"
            f" got {packed.numel()} {packed.dtype}"
        )
    if absmax.dtype != torch.float32 or absmax.numel() != blocks:
        raise ValueError(
            f"absmax must be {blocks} float32 at block size {block_size}, got {absmax.numel()} {absmax.dtype}"
        )
    if bias is not None and bias.shape != (out_features,):
        raise ValueError(f"bias must be ({out_features},), got {tuple(bias.shape)}")
    shape = (out_features, x.shape[-1])
    return _NF4Linear.apply(x, packed.reshape(-1), absmax.reshape(-1), shape, block_size, bias)  # type: ignore[no-untyped-call, no-any-return]
