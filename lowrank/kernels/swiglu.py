"""SwiGLU gate (Shazeer, 2020), arXiv:2002.05202:  c = silu(a) ⊙ b,  silu(a) = a σ(a).

db = dc ⊙ silu(a)        da = dc ⊙ b ⊙ (σ(a) + silu(a) (1 - σ(a)))

silu(a) is computed again in backward: cheaper than a third (..., F) tensor kept alive until then. Gate and up may be
the two halves of one product: rows may lie apart, and nothing is copied.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank.kernels.dispatch import launches, rows, store, tl, triton, wide

BLOCK = 1024  # numbers of a row in one program: eight for each of 128 threads


def swiglu_ref(a: Tensor, b: Tensor) -> Tensor:
    """The definition: fp32 inside, one rounding at the end."""
    return (F.silu(wide(a)) * wide(b)).to(a.dtype)


@triton.jit
def _fwd(a_ptr, b_ptr, c_ptr, a_row, b_row, F, BLOCK: tl.constexpr):
    m = tl.program_id(0).to(tl.int64)  # M · F passes 2³¹ at long contexts
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(a_ptr + m * a_row + i, mask=i < F).to(tl.float32)
    b = tl.load(b_ptr + m * b_row + i, mask=i < F).to(tl.float32)
    store(c_ptr + m * F + i, a * tl.sigmoid(a) * b, i < F)


@triton.jit
def _bwd(a_ptr, b_ptr, dc_ptr, da_ptr, db_ptr, a_row, b_row, dc_row, F, BLOCK: tl.constexpr):
    m = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(a_ptr + m * a_row + i, mask=i < F).to(tl.float32)
    b = tl.load(b_ptr + m * b_row + i, mask=i < F).to(tl.float32)
    dc = tl.load(dc_ptr + m * dc_row + i, mask=i < F).to(tl.float32)
    s = tl.sigmoid(a)
    store(da_ptr + m * F + i, dc * b * (s + a * s * (1 - s)), i < F)
    store(db_ptr + m * F + i, dc * a * s, i < F)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, kernel: bool) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.kernel = kernel
        if not kernel:  # library calls that each round, and together are the fastest on a CPU
            return F.silu(a).mul_(b)
        c = torch.empty(a.shape, dtype=a.dtype, device=a.device)
        a, b = rows(a), rows(b)
        _fwd[_grid(a)](a, b, c, a.stride(0), b.stride(0), a.shape[1], BLOCK=BLOCK)
        return c

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        a, b = ctx.saved_tensors
        if not ctx.kernel:
            return torch.ops.aten.silu_backward(grads[0] * b, a), F.silu(a).mul_(grads[0]), None
        da, db = (torch.empty(a.shape, dtype=a.dtype, device=a.device) for _ in "ab")
        a, b, dc = rows(a), rows(b), rows(grads[0])
        _bwd[_grid(a)](a, b, dc, da, db, a.stride(0), b.stride(0), dc.stride(0), a.shape[1], BLOCK=BLOCK)
        return da, db, None


def _grid(a: Tensor) -> tuple[int, int]:
    return a.shape[0], triton.cdiv(a.shape[1], BLOCK)


def swiglu(a: Tensor, b: Tensor) -> Tensor:
    """c = silu(a) ⊙ b for a, b of one shape (..., F)."""
    if a.shape != b.shape or a.dtype != b.dtype:
        raise ValueError(
            f"swiglu needs gate and up of one shape and dtype, got {tuple(a.shape)} {a.dtype} and"
            f" {tuple(b.shape)} {b.dtype}"
        )
    kernel = launches("swiglu", a=a, b=b)
    if not kernel and not (torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)):
        return F.silu(a).mul_(b)
    with torch.cuda.device_of(a):
        return _SwiGLU.apply(a, b, kernel)  # type: ignore[no-untyped-call, no-any-return]
