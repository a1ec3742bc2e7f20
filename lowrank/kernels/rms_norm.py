"""RMSNorm (Zhang and Sennrich, 2019), arXiv:1910.07467:  y = x r w,  r = 1 / sqrt(mean(x²) + eps).

dx = r (g - x r² mean(g x)),  g = dy w          dw = Σ dy x r

Backward needs x, which the layer before keeps anyway, and one r a row; an fp32 copy of x is never kept.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The definition: fp32 inside, one rounding at the end.  (..., D), (D,) -> (..., D)"""
    return F.rms_norm(x.float(), (x.shape[-1],), weight.float(), eps).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x32 = x.float()
        r = x32.pow(2).mean(-1, keepdim=True).add_(eps).rsqrt_()  # (..., 1)
        ctx.save_for_backward(x, weight, r)
        return (x32 * r).mul_(weight.float()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, r = ctx.saved_tensors
        normed = x.float() * r
        dy = grads[0].float()
        dw = (dy * normed).flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        g = dy * weight.float()
        g -= normed.mul_((g * normed).mean(-1, keepdim=True))
        return g.mul_(r).to(x.dtype), dw, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y = x / sqrt(mean(x²) + eps) · w, in x's dtype.  (..., D), (D,) -> (..., D)"""
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm needs weight ({x.shape[-1]},), got {tuple(weight.shape)}")
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call, no-any-return]
    return rms_norm_ref(x, weight, eps)
