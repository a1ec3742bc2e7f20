"""SwiGLU gate (Shazeer, 2020), arXiv:2002.05202:  c = silu(a) ⊙ b,  silu(a) = a σ(a).

db = dc ⊙ silu(a)        da = dc ⊙ b ⊙ (σ(a) + silu(a) (1 - σ(a)))

silu(a) is computed again in backward: cheaper than a third (..., F) tensor kept alive until then.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu_ref(a: Tensor, b: Tensor) -> Tensor:
    """The definition, in the inputs' dtype: silu is rounded once, and the product once more."""
    return F.silu(a) * b


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return F.silu(a).mul_(b)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grads[0] * b, a), F.silu(a).mul_(grads[0])


def swiglu(a: Tensor, b: Tensor) -> Tensor:
    """c = silu(a) ⊙ b for a, b of one shape (..., F)."""
    if a.shape != b.shape:
        raise ValueError(f"swiglu needs gate and up of one shape, got {tuple(a.shape)} and {tuple(b.shape)}")
    return _SwiGLU.apply(a, b)  # type: ignore[no-untyped-call, no-any-return]
