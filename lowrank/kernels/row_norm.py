"""The norm of each row of W + s B A, as DoRA needs it (Liu et al., 2024), arXiv:2402.09353, §4. No sum is stored.

    n_o² = |W_o|² + Σᵢ u (2 W_oi + u),   u = s Σᵣ B_or A_ri        W: (O, I), A: (R, I), B: (O, R), n: (O,)
    dB = s c V Aᵀ,   dA = s (c B)ᵀ V,   c = dn / n                 V = W + s B A;  V Aᵀ = W Aᵀ + s B (A Aᵀ)

|W|² is constant and given, so that B = 0 leaves the norm as it is, to the last bit. The kernel reads W once and makes u
tile by tile. Plain code takes the same sum as products, 2 s (W Aᵀ) · B + s² (B (A Aᵀ)) · B, and so does backward, which
DoRA leaves out (§4.3). u is rounded to W's dtype's products: on 16 bits a small share of a small term.
"""

from typing import Any

import torch
from torch import Tensor

from lowrank.kernels.dispatch import cast, dot, launches, multiplies, store, tl, triton, wide


def row_norm_ref(weight: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """The definition.  (O, I), (R, I), (O, R) -> (O,)"""
    return (wide(weight) + scaling * wide(B) @ wide(A)).norm(dim=1)


@triton.jit
def _change(
    w_ptr, a_ptr, b_ptr, change_ptr, scaling, w_o, w_i, O, I, R,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """Σᵢ u (2 w + u) of ROWS rows.  A, B: contiguous"""
    o = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    change = tl.zeros((ROWS,), tl.float32)
    for start in range(0, I, WIDTH):
        i = start + tl.arange(0, WIDTH)
        w = tl.load(
            w_ptr + o[:, None] * w_o + i[None, :].to(tl.int64) * w_i,
            mask=(o < O)[:, None] & (i < I)[None, :],
            other=0.0,
        )
        u = tl.zeros((ROWS, WIDTH), tl.float32)
        for first in range(0, R, RANKS):
            r = first + tl.arange(0, RANKS)
            b = tl.load(b_ptr + o[:, None] * R + r[None, :], mask=(o < O)[:, None] & (r < R)[None, :], other=0.0)
            a = tl.load(a_ptr + r[:, None] * I + i[None, :], mask=(r < R)[:, None] & (i < I)[None, :], other=0.0)
            u = dot(cast(b, w.dtype), cast(a, w.dtype), u)
        u *= scaling
        change += tl.sum(u * (2 * w.to(tl.float32) + u), axis=1)
    store(change_ptr + o, change, o < O)


class _RowNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, A: Tensor, B: Tensor, scaling: float, squares: Tensor, kernel: bool
    ) -> Tensor:
        if kernel:
            (O, I), R = weight.shape, len(A)
            change = torch.empty(O, device=weight.device)
            tile = {"ROWS": 32, "WIDTH": 128, "RANKS": min(max(triton.next_power_of_2(R), 16), 64)}
            sizes = *weight.stride(), O, I, R
            _change[(triton.cdiv(O, 32),)](weight, A.contiguous(), B.contiguous(), change, scaling, *sizes, **tile)
        else:
            wa = (weight @ A.to(weight.dtype).T).to(A.dtype)  # (O, R)
            change = 2 * scaling * (wa * B).sum(1) + scaling**2 * (B @ (A @ A.T) * B).sum(1)
        norm = (squares + change).clamp(min=0).sqrt().to(A.dtype)
        ctx.save_for_backward(weight, A, B, norm)
        ctx.scaling = scaling
        return norm

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        weight, A, B, norm = ctx.saved_tensors
        c = (ctx.scaling * grads[0] / norm.clamp(min=torch.finfo(norm.dtype).tiny))[:, None]  # (O, 1)
        wa = (weight @ A.to(weight.dtype).T).to(A.dtype)  # (O, R)
        cb = c * B
        dA = (cb.to(weight.dtype).T @ weight).to(A.dtype) + ctx.scaling * (cb.T @ B) @ A
        return None, dA, c * (wa + ctx.scaling * B @ (A @ A.T)), None, None, None


def row_norm(weight: Tensor, A: Tensor, B: Tensor, scaling: float, squares: Tensor | None = None) -> Tensor:
    """|W + s B A| of each row, differentiable in A and B; `squares` are |W|², (O,), taken from W if not given.

    (O, I), (R, I), (O, R) -> (O,) in A's dtype
    """
    if weight.dim() != 2 or A.shape[1:] != weight.shape[1:] or B.shape != (len(weight), len(A)):
        got = [tuple(t.shape) for t in (weight, A, B)]
        raise ValueError(f"row_norm needs weight (O, I), A (R, I), B (O, R), got {got}")
    if A.dtype != B.dtype or (squares is not None and squares.shape != weight.shape[:1]):
        raise ValueError(f"row_norm needs A and B of one dtype, squares ({len(weight)},), got {A.dtype}, {B.dtype}")
    kernel = launches("row_norm", weight=weight, A=A, B=B) and multiplies(weight)
    if squares is None:
        squares = weight.double().square().sum(dim=1)
    with torch.cuda.device_of(weight):
        return _RowNorm.apply(weight, A, B, scaling, squares, kernel)  # type: ignore[no-untyped-call, no-any-return]
