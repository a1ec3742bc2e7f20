"""RMSNorm (Zhang and Sennrich, 2019), arXiv:1910.07467:  y = x r w,  r = 1 / sqrt(mean(x²) + eps).

dx = r (g - x r² mean(g x)),  g = dy w          dw = Σ dy x r

Backward needs x, which the layer before keeps anyway, and one r a row; an fp32 copy of x is never kept. Gemma stores
w - 1: `offset` is added to the weight, in fp32. A program takes whole rows, several where they are short (the heads of
q and k); for dw it walks down TILES of them, and the programs' sums are added up at the end, always in one order.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank.kernels.dispatch import launches, rows, store, tl, triton, wide

TILES = 8  # a program's share of dw is one row of fp32 for this many tiles of x


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """The definition: fp32 inside, one rounding at the end.  (..., D), (D,) -> (..., D)"""
    return F.rms_norm(wide(x), (x.shape[-1],), wide(weight) + offset, eps).to(x.dtype)


@triton.jit
def _fwd(x_ptr, w_ptr, y_ptr, r_ptr, x_row, M, D, eps, offset, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    i = tl.arange(0, BLOCK)
    inside = (m < M)[:, None] & (i < D)[None, :]
    x = tl.load(x_ptr + m[:, None] * x_row + i[None, :], mask=inside, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + i, mask=i < D, other=0.0).to(tl.float32) + offset
    r = 1 / tl.sqrt(tl.sum(x * x, axis=1) / D + eps)
    store(y_ptr + m[:, None] * D + i[None, :], x * r[:, None] * w[None, :], inside)
    store(r_ptr + m, r, m < M)


@triton.jit
def _bwd(
    x_ptr, w_ptr, r_ptr, dy_ptr, dx_ptr, dw_ptr, x_row, dy_row, M, D, offset,
    TILES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, DW: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, BLOCK)
    w = tl.load(w_ptr + i, mask=i < D, other=0.0).to(tl.float32) + offset
    dw = tl.zeros((BLOCK,), tl.float32)
    for tile in range(TILES):
        m = (tl.program_id(0).to(tl.int64) * TILES + tile) * ROWS + tl.arange(0, ROWS)
        inside = (m < M)[:, None] & (i < D)[None, :]
        x = tl.load(x_ptr + m[:, None] * x_row + i[None, :], mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + m[:, None] * dy_row + i[None, :], mask=inside, other=0.0).to(tl.float32)
        r = tl.load(r_ptr + m, mask=m < M, other=0.0)[:, None]
        normed, g = x * r, dy * w[None, :]
        mean = tl.sum(g * normed, axis=1)[:, None] / D
        store(dx_ptr + m[:, None] * D + i[None, :], r * (g - normed * mean), inside)
        if DW:
            dw += tl.sum(dy * normed, axis=0)
    if DW:
        tl.store(dw_ptr + tl.program_id(0).to(tl.int64) * D + i, dw, mask=i < D)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float, kernel: bool) -> Tensor:
        ctx.offset, ctx.kernel = offset, kernel
        if not kernel:
            x32 = wide(x)
            r = x32.pow(2).mean(-1, keepdim=True).add_(eps).rsqrt_()  # (..., 1)
            ctx.save_for_backward(x, weight, r)
            return (x32 * r).mul_(wide(weight) + offset if offset else wide(weight)).to(x.dtype)
        flat, weight = rows(x), weight.contiguous()
        M, D = flat.shape
        y, r = torch.empty(x.shape, dtype=x.dtype, device=x.device), x.new_empty(M, dtype=torch.float32)
        tile = _tile(D)
        _fwd[(triton.cdiv(M, tile["ROWS"]),)](flat, weight, y, r, flat.stride(0), M, D, eps, offset, **tile)
        ctx.save_for_backward(x, weight, r)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        x, weight, r = ctx.saved_tensors
        if ctx.kernel:
            return *_launched_bwd(ctx, x, weight, r, grads[0]), None, None, None
        normed = wide(x) * r
        dy = wide(grads[0])
        dw = (dy * normed).flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        g = dy * (wide(weight) + ctx.offset if ctx.offset else wide(weight))
        g -= normed.mul_((g * normed).mean(-1, keepdim=True))
        return g.mul_(r).to(x.dtype), dw, None, None, None


def _launched_bwd(ctx: Any, x: Tensor, weight: Tensor, r: Tensor, dy: Tensor) -> tuple[Tensor, Tensor | None]:
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x, dy = rows(x), rows(dy)
    (M, D), tile, with_dw = x.shape, _tile(x.shape[1]), ctx.needs_input_grad[1]
    tiles = TILES if with_dw else 1
    programs = triton.cdiv(M, tile["ROWS"] * tiles)
    sums = r.new_empty((programs, D) if with_dw else 1)
    strides = x.stride(0), dy.stride(0)
    _bwd[(programs,)](x, weight, r, dy, dx, sums, *strides, M, D, ctx.offset, TILES=tiles, DW=with_dw, **tile)
    return dx, sums.sum(0).to(weight.dtype) if with_dw else None


def _tile(D: int) -> dict[str, int]:
    """Whole rows, about 2,048 numbers in all; 16 warps hold 8,192 with room for what backward needs."""
    block = triton.next_power_of_2(D)
    ROWS = max(1, 2048 // block)
    return {"ROWS": ROWS, "BLOCK": block, "num_warps": min(max(ROWS * block // 512, 1), 16)}


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """y = x / sqrt(mean(x²) + eps) · (weight + offset), in x's dtype.  (..., D), (D,) -> (..., D)"""
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm needs weight ({x.shape[-1]},), got {tuple(weight.shape)}")
    kernel = launches("rms_norm", x=x, weight=weight)
    if kernel or (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)):
        with torch.cuda.device_of(x):
            return _RMSNorm.apply(x, weight, eps, offset, kernel)  # type: ignore[no-untyped-call, no-any-return]
    return rms_norm_ref(x, weight, eps, offset)
