"""Rotary positions (Su et al., 2021), arXiv:2104.09864: each pair (a, b) of a head is turned by its position's angle φ.

    a' = a cos φ - b sin φ        b' = b cos φ + a sin φ        backward: the same by -φ

A pair is (i, i + dim/2), or (2i, 2i + 1) where `interleaved`; numbers from dim on pass through. The tables hold cos φ
and ±sin φ (minus for a, plus for b) for both numbers of each pair, so that plain code is two products and a sum. A
program turns HEADS heads of one token: the angles are read once for all of them. B, T and H may have any strides.
"""

from typing import Any

import torch
from torch import Tensor

from lowrank.kernels.dispatch import launches, store, tl, triton


def rope_ref(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """The definition: x cos + swap(x) (±sin), where swap exchanges the two numbers of each pair."""
    width = cos.shape[-1]
    v = x[..., :width].to(cos.dtype)
    swapped = v.unflatten(-1, (-1, 2)).flip(-1).flatten(-2) if interleaved else v.roll(width // 2, dims=-1)
    y = (v * cos).addcmul_(swapped, sin).to(x.dtype)
    return y if width == x.shape[-1] else torch.cat([y, x[..., width:]], dim=-1)


@triton.jit
def _turn(
    x_ptr, cos_ptr, sin_ptr, y_ptr, x_b, x_t, x_h, table_b, sign, T, H, K, PAIRS,
    STEP: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)  # b T + t
    h = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    i = tl.arange(0, BLOCK)
    first = i * STEP
    second = first + (PAIRS if STEP == 1 else 1)
    table = n // T * table_b + n % T * (2 * PAIRS)
    cos = tl.load(cos_ptr + table + first, mask=i < PAIRS)[None, :]
    sin = sign * tl.load(sin_ptr + table + second, mask=i < PAIRS)[None, :]
    x_ptr += n // T * x_b + n % T * x_t + h * x_h
    y_ptr += (n * H + h) * K
    inside = (h < H) & (i < PAIRS)[None, :]
    a = tl.load(x_ptr + first[None, :], mask=inside).to(tl.float32)
    b = tl.load(x_ptr + second[None, :], mask=inside).to(tl.float32)
    store(y_ptr + first[None, :], a * cos - b * sin, inside)
    store(y_ptr + second[None, :], b * cos + a * sin, inside)
    if REST > 0:
        j = 2 * PAIRS + tl.arange(0, REST)[None, :]
        tl.store(y_ptr + j, tl.load(x_ptr + j, mask=(h < H) & (j < K)), mask=(h < H) & (j < K))


class _Rope(torch.autograd.Function):
    """Keeps the tables alone for backward, which is the same rotation backwards."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, kernel: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved, ctx.kernel = interleaved, kernel
        return _turned(x, cos, sin, interleaved, kernel)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(grads[0], cos, sin, ctx.interleaved, ctx.kernel, sign=-1.0), None, None, None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, kernel: bool, sign: float = 1.0) -> Tensor:
    if not kernel:
        return rope_ref(x, cos, sin if sign > 0 else -sin, interleaved)
    x = x if x.stride(3) == 1 else x.contiguous()
    B, T, H, K = x.shape
    pairs, rest = cos.shape[3] // 2, K - cos.shape[3]
    y = torch.empty((B, T, H, K), dtype=x.dtype, device=x.device)
    heads = min(triton.next_power_of_2(H), 16)
    table_b = 0 if cos.shape[0] == 1 else T * 2 * pairs
    strides = x.stride(0), x.stride(1), x.stride(2), table_b
    tile = {"STEP": 2 if interleaved else 1, "HEADS": heads, "BLOCK": triton.next_power_of_2(pairs)}
    tile["REST"] = triton.next_power_of_2(rest) if rest else 0
    _turn[(B * T, triton.cdiv(H, heads))](x, cos, sin, y, *strides, sign, T, H, K, pairs, **tile)
    return y


def rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Turn each head's numbers by its position.  x (B, T, H, K), tables (B or 1, T, 1, dim) -> (B, T, H, K)"""
    dim = cos.shape[-1]
    if x.dim() != 4 or cos.shape[1:] != (x.shape[1], 1, dim) or cos.shape[0] not in (1, x.shape[0]):
        raise ValueError(f"rope needs x (B, T, H, K), cos (B or 1, T, 1, dim), got {(*x.shape,)}, {(*cos.shape,)}")
    if sin.shape != cos.shape or dim % 2 or dim > x.shape[3]:
        raise ValueError(f"rope needs cos and sin alike, dim even and <= K, got {(*cos.shape,)}, {(*sin.shape,)}")
    kernel = launches("rope", x=x, cos=cos, sin=sin)
    if kernel:
        if cos.dtype != torch.float32 or sin.dtype != torch.float32:
            raise ValueError(f"rope needs cos and sin in float32, got {cos.dtype} and {sin.dtype}")
        cos, sin = cos.contiguous(), sin.contiguous()
    with torch.cuda.device_of(x):
        if torch.is_grad_enabled() and x.requires_grad:
            return _Rope.apply(x, cos, sin, interleaved, kernel)  # type: ignore[no-untyped-call, no-any-return]
        return _turned(x, cos, sin, interleaved, kernel)
