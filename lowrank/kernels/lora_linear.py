"""Frozen layers on one input with LoRA on each, as one function: y_i = W_i x + b_i + s_i B_i A_i x.

    h = x [A_1; A_2; ...]ᵀ                 one product for all of them, (M, ΣR)
    y_i = x W_iᵀ + b_i + s_i h_i B_iᵀ      the second sum goes into the memory of the first
    g = [s_1 dy_1 B_1, s_2 dy_2 B_2, ...]  (M, ΣR)
    dx = Σ dy_i W_i + g [A_1; A_2; ...]    dA_i = g_iᵀ x        dB_i = s_i dy_iᵀ h_i

Saved for backward are x, once, and h; no copy of A, B or x in another dtype, no sum. W_i is a tensor, or two functions
that multiply by it and decode it anew each time (NF4). The large products are not done here. What is left for a kernel
is adding a product of rank R to a result in place (`add_low_rank`): it reads and writes y once, takes fp32 factors as
they are stored and rounds once. It is bound by bandwidth, and a library's product is not made for a depth of 8.
Forward adds s h Bᵀ with it, backward g A.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank.kernels.dispatch import cast, dot, launches, multiplies, store, tl, triton

# a tensor (O, I), or (x, bias=) -> x Wᵀ + b in memory of its own, and dy -> dy W
Weight = Tensor | tuple[Callable[..., Tensor], Callable[[Tensor], Tensor]]


def lora_linear_ref(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """The definition, for one layer.  (..., I), (O, I), (O,), (R, I), (O, R) -> (..., O)"""
    update = scaling * F.linear(F.linear(x.to(A.dtype), A), B)
    return F.linear(x, weight, bias) + update.to(x.dtype)


@triton.jit
def _add(
    y_ptr, h_ptr, w_ptr, scaling, y_m, h_m, w_o, w_r, M, O, R,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """y[m, o] += scaling Σᵣ h[m, r] w[o, r]"""
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = (m < M)[:, None] & (o < O)[None, :]
    acc = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(0, R, RANKS):
        r = start + tl.arange(0, RANKS)
        h = tl.load(h_ptr + m[:, None] * h_m + r[None, :], mask=(m < M)[:, None] & (r < R)[None, :], other=0.0)
        at = o[None, :].to(tl.int64) * w_o + r[:, None].to(tl.int64) * w_r
        w = tl.load(w_ptr + at, mask=(o < O)[None, :] & (r < R)[:, None], other=0.0)
        acc = dot(h, cast(w, h.dtype), acc)
    y_ptr += m[:, None] * y_m + o[None, :]
    store(y_ptr, tl.load(y_ptr, mask=inside, other=0.0).to(tl.float32) + scaling * acc, inside)


def add_low_rank(y: Tensor, h: Tensor, w: Tensor, scaling: float = 1.0) -> Tensor:
    """y += scaling · h wᵀ, in y's own memory, which is returned.  (M, O), (M, R), (O, R) -> (M, O)"""
    (M, O), R = y.shape, h.shape[1]
    if h.shape != (M, R) or w.shape != (O, R) or h.dtype != y.dtype:
        raise ValueError(
            f"add_low_rank needs y (M, O), h (M, R) of y's dtype, w (O, R), got {[tuple(t.shape) for t in (y, h, w)]},"
            f" {y.dtype}, {h.dtype}"
        )
    if y.stride(1) != 1 or not launches("add_low_rank", y=y, h=h, w=w) or not multiplies(y):
        return y.addmm_(h, w.to(y.dtype).T, alpha=scaling)
    h = h if h.stride(1) == 1 else h.contiguous()
    tile = {"ROWS": 64, "WIDTH": 128, "RANKS": min(max(triton.next_power_of_2(R), 16), 64)}
    grid = triton.cdiv(M, 64), triton.cdiv(O, 128)
    with torch.cuda.device_of(y):
        _add[grid](y, h, w, scaling, y.stride(0), h.stride(0), *w.stride(), M, O, R, **tile)
    return y


class _LoRALinear(torch.autograd.Function):
    """factors: A_1, A_2, ..., B_1, B_2, ..."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Sequence[Weight],
        biases: Sequence[Tensor | None],
        scalings: Sequence[float],
        *factors: Tensor,
    ) -> tuple[Tensor, ...]:
        n, rows = len(weights), x.reshape(-1, x.shape[-1])
        h = F.linear(rows, _stacked(factors[:n], x.dtype))  # (M, ΣR)
        ys = []
        for W, bias, s, B, part in zip(weights, biases, scalings, factors[n:], _parts(h, factors[:n])):
            y = F.linear(rows, W, bias) if isinstance(W, Tensor) else W[0](rows, bias=bias)
            ys.append(add_low_rank(y, part, B, s).view(*x.shape[:-1], len(B)))
        ctx.save_for_backward(x, h, *factors, *(W for W in weights if isinstance(W, Tensor)))
        ctx.layers = [None if isinstance(W, Tensor) else W for W in weights], scalings
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, h, *saved = ctx.saved_tensors
        coded, scalings = ctx.layers
        n = len(coded)
        As, Bs, plain = saved[:n], saved[n : 2 * n], iter(saved[2 * n :])
        weights = [W or next(plain) for W in coded]
        rows, dys = x.reshape(-1, x.shape[-1]), [dy.reshape(-1, dy.shape[-1]) for dy in grads]
        needs, first = ctx.needs_input_grad, 4
        g = torch.cat([s * (dy @ B.to(dy.dtype)) for s, dy, B in zip(scalings, dys, Bs)], dim=1)  # (M, ΣR)
        dx, dAs, dBs = None, [None] * n, [None] * n
        if needs[0]:
            dx = _back(dys[0], weights[0])
            for dy, W in zip(dys[1:], weights[1:]):
                dx = dx.addmm_(dy, W) if isinstance(W, Tensor) else dx.add_(_back(dy, W))
            dx = add_low_rank(dx, g, _stacked(As, x.dtype).T).view(x.shape)
        if any(needs[first : first + n]):
            dAs = [dA.to(A.dtype) for dA, A in zip((g.T @ rows).split([len(A) for A in As]), As)]
        if any(needs[first + n :]):
            # (R, O), not (O, R): the faster one on a CPU
            sums = [s * (part.T @ dy) for s, dy, part in zip(scalings, dys, _parts(h, As))]
            dBs = [dB.T.to(B.dtype, memory_format=torch.contiguous_format) for dB, B in zip(sums, Bs)]
        return dx, None, None, None, *dAs, *dBs


def _back(dy: Tensor, weight: Weight) -> Tensor:
    """dy W"""
    return dy @ weight if isinstance(weight, Tensor) else weight[1](dy)


def _stacked(As: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return (As[0] if len(As) == 1 else torch.cat(list(As))).to(dtype)


def _parts(h: Tensor, As: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return h.split([len(A) for A in As], dim=1)


def lora_linear(
    x: Tensor,
    weights: Sequence[Weight],
    biases: Sequence[Tensor | None],
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    scalings: Sequence[float],
) -> tuple[Tensor, ...]:
    """Every layer's y, differentiable in x, A and B.  (..., I), n x (O, I), (O,), (R, I), (O, R) -> n x (..., O)"""
    given = {"x": x}
    for i, (a, b, weight, bias) in enumerate(zip(A, B, weights, biases, strict=True)):
        if a.dim() != 2 or b.dim() != 2 or a.shape[1] != x.shape[-1] or b.shape[1] != len(a):
            raise ValueError(f"lora_linear needs A (R, {x.shape[-1]}) and B (O, R), got {(*a.shape,)}, {(*b.shape,)}")
        wanted = len(b), x.shape[-1]
        if isinstance(weight, Tensor) and (weight.shape != wanted or weight.dtype != x.dtype):
            raise ValueError(f"lora_linear needs weight {wanted} {x.dtype}, got {(*weight.shape,)} {weight.dtype}")
        named = {"weight": weight, "bias": bias}
        frozen = {f"{name} {i}": t for name, t in named.items() if isinstance(t, Tensor)}
        if trained := [name for name, t in frozen.items() if t.requires_grad]:
            raise ValueError(f"lora_linear gives no gradient to {trained[0]}, which requires one: freeze it")
        given |= frozen | {f"A {i}": a, f"B {i}": b}
    launches("lora_linear", **given)
    return _LoRALinear.apply(x, weights, biases, scalings, *A, *B)  # type: ignore[no-untyped-call, no-any-return]
