"""LoRA with another adapter for each row of the batch, as S-LoRA (Sheng et al., 2023), arXiv:2311.03285, serves it.

    d = s B A x        h = A x, (N, T, R)        for each row n with its own k = index[n], or k = n without an index
    g = Bᵀ dd          dx = s Aᵀ g               dA_k = Σ s gᵀ x,   dB_k = Σ s ddᵀ h, over the rows and tokens of k

N rows   T tokens   K adapters   x: (N, T, I),  A: (K, R, I),  B: (K, O, R),  s: (N,). Smaller ranks are filled up with
zero rows of A and zero columns of B. Three kernels do all six products: `_down` sums over a long side and leaves R
numbers, `_up` makes a long side of R numbers, `_outer` sums over tokens. An adapter's dA and dB are summed by one
program for all its rows, always in one order; nothing is gathered for each row.
"""

from typing import Any

import torch
from torch import Tensor

from lowrank.kernels.dispatch import cast, dot, launches, multiplies, store, tl, triton

TOKENS, WIDTH = 32, 128  # a tile of x; at most 64 of the R ranks at a time


def lora_grouped_ref(
    x: Tensor, A: Tensor, B: Tensor, scaling: Tensor | None = None, index: Tensor | None = None
) -> Tensor:
    """The definition, in A's dtype: two batched products.  -> (N, T, O)"""
    if index is not None:
        A, B = A[index], B[index]
    h = torch.bmm(x.to(A.dtype), A.mT)  # (N, T, R)
    return torch.bmm(h if scaling is None else h * scaling[:, None, None], B.mT)


@triton.jit
def _down(
    x_ptr, w_ptr, index_ptr, h_ptr, x_n, x_t, w_k, w_r, w_i, T, I, R,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """h[n, t, r] = Σᵢ x[n, t, i] w[index[n], r, i]"""
    n = tl.program_id(0).to(tl.int64)
    t = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    r = tl.program_id(2) * RANKS + tl.arange(0, RANKS)
    x_ptr += n * x_n + t.to(tl.int64)[:, None] * x_t
    w_ptr += tl.load(index_ptr + n) * w_k + r[None, :] * w_r
    acc = tl.zeros((TOKENS, RANKS), tl.float32)
    for start in range(0, I, WIDTH):
        i = start + tl.arange(0, WIDTH)
        x = tl.load(x_ptr + i[None, :], mask=(t < T)[:, None] & (i < I)[None, :], other=0.0)
        w = tl.load(w_ptr + i[:, None] * w_i, mask=(r < R)[None, :] & (i < I)[:, None], other=0.0)
        acc = dot(cast(x, w.dtype), w, acc)
    store(h_ptr + (n * T + t[:, None]) * R + r[None, :], acc, (t < T)[:, None] & (r < R)[None, :])


@triton.jit
def _up(
    h_ptr, w_ptr, index_ptr, s_ptr, y_ptr, w_k, w_o, w_r, T, O, R,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """y[n, t, o] = s[n] Σᵣ h[n, t, r] w[index[n], o, r]"""
    n = tl.program_id(0).to(tl.int64)
    t = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    o = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)
    w_ptr += tl.load(index_ptr + n) * w_k + o[None, :].to(tl.int64) * w_o
    acc = tl.zeros((TOKENS, WIDTH), tl.float32)
    for start in range(0, R, RANKS):
        r = start + tl.arange(0, RANKS)
        h = tl.load(h_ptr + (n * T + t[:, None]) * R + r[None, :], mask=(t < T)[:, None] & (r < R)[None, :], other=0.0)
        w = tl.load(w_ptr + r[:, None] * w_r, mask=(o < O)[None, :] & (r < R)[:, None], other=0.0)
        acc = dot(h, w, acc)
    y_ptr += (n * T + t[:, None]) * O + o[None, :]
    store(y_ptr, acc * tl.load(s_ptr + n), (t < T)[:, None] & (o < O)[None, :])


@triton.jit
def _outer(
    h_ptr, x_ptr, index_ptr, s_ptr, dw_ptr, x_n, x_t, dw_k, dw_r, dw_i, N, T, I, R,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """dw[k, r, i] = Σₙ s[n] Σₜ h[n, t, r] x[n, t, i], over the rows n with index[n] = k"""
    k = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    r = tl.program_id(2) * RANKS + tl.arange(0, RANKS)
    total = tl.zeros((RANKS, WIDTH), tl.float32)
    for row in range(N):
        if tl.load(index_ptr + row) == k:
            n = tl.cast(row, tl.int64)
            acc = tl.zeros((RANKS, WIDTH), tl.float32)
            for start in range(0, T, TOKENS):
                t = start + tl.arange(0, TOKENS)
                h = tl.load(
                    h_ptr + (n * T + t[None, :]) * R + r[:, None], mask=(t < T)[None, :] & (r < R)[:, None], other=0.0
                )
                at = n * x_n + t.to(tl.int64)[:, None] * x_t + i[None, :]
                x = tl.load(x_ptr + at, mask=(t < T)[:, None] & (i < I)[None, :], other=0.0)
                acc = dot(h, cast(x, h.dtype), acc)
            total += acc * tl.load(s_ptr + n)
    dw_ptr += k * dw_k + r[:, None].to(tl.int64) * dw_r + i[None, :] * dw_i
    store(dw_ptr, total, (r < R)[:, None] & (i < I)[None, :])


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, B: Tensor, scaling: Tensor, index: Tensor) -> Tensor:
        x = _lined_up(x)
        h = _downed(x, A, index)
        ctx.save_for_backward(x, A, B, scaling, index, h)
        return _upped(h, B, index, scaling)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        x, A, B, scaling, index, h = ctx.saved_tensors
        dy = _lined_up(grads[0])
        g = _downed(dy, B.mT, index)
        dx = _upped(g, A.mT, index, scaling).to(x.dtype) if ctx.needs_input_grad[0] else None
        dA = _outered(g, x, A, index, scaling) if ctx.needs_input_grad[1] else None
        dB = _outered(h, dy, B.mT, index, scaling).mT if ctx.needs_input_grad[2] else None
        return dx, dA, dB, None, None


def _lined_up(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 else x.contiguous()


def _tile(R: int) -> dict[str, int]:
    return {"TOKENS": TOKENS, "WIDTH": WIDTH, "RANKS": min(max(triton.next_power_of_2(R), 16), 64)}


def _downed(x: Tensor, w: Tensor, index: Tensor) -> Tensor:
    """(N, T, I), (K, R, I) -> (N, T, R)"""
    (N, T, I), R, tile = x.shape, w.shape[1], _tile(w.shape[1])
    h = torch.empty(N, T, R, dtype=w.dtype, device=x.device)
    grid = N, triton.cdiv(T, TOKENS), triton.cdiv(R, tile["RANKS"])
    _down[grid](x, w, index, h, x.stride(0), x.stride(1), *w.stride(), T, I, R, **tile)
    return h


def _upped(h: Tensor, w: Tensor, index: Tensor, scaling: Tensor) -> Tensor:
    """(N, T, R), (K, O, R) -> (N, T, O)"""
    (N, T, R), O = h.shape, w.shape[1]
    y = torch.empty(N, T, O, dtype=w.dtype, device=h.device)
    grid = N, triton.cdiv(T, TOKENS), triton.cdiv(O, WIDTH)
    _up[grid](h, w, index, scaling, y, *w.stride(), T, O, R, **_tile(R))
    return y


def _outered(h: Tensor, x: Tensor, w: Tensor, index: Tensor, scaling: Tensor) -> Tensor:
    """(N, T, R), (N, T, I) -> the gradient of w (K, R, I)"""
    (N, T, R), (K, _, I), tile = h.shape, w.shape, _tile(h.shape[2])
    dw = torch.empty_like(w)
    grid = K, triton.cdiv(I, WIDTH), triton.cdiv(R, tile["RANKS"])
    warps = 8 if dw.dtype == torch.float32 else 4  # 4 spill in fp32
    _outer[grid](h, x, index, scaling, dw, x.stride(0), x.stride(1), *dw.stride(), N, T, I, R, **tile, num_warps=warps)
    return dw


def lora_grouped(x: Tensor, A: Tensor, B: Tensor, scaling: Tensor | None = None, index: Tensor | None = None) -> Tensor:
    """What each row's adapter adds to y; `scaling` is 1 unless given. With `index` (N,) int64, A and B hold K adapters.

    (N, T, I), (N or K, R, I), (N or K, O, R), (N,) -> (N, T, O) in A's dtype
    """
    (K, R, I), N = A.shape, len(x) if index is None else index.numel()
    wanted = x.dim() == 3 and x.shape[::2] == (N, I) and B.shape[::2] == (K, R) and (index is not None or K == N)
    if not wanted or (scaling is not None and scaling.shape != (N,)) or (index is not None and index.shape != (N,)):
        raise ValueError(
            "lora_grouped needs x (N, T, I), A (N, R, I), B (N, O, R), scaling (N,), index (N,) if A and B are shared,"
            f" got {[tuple(t.shape) for t in (x, A, B, scaling, index) if t is not None]}"
        )
    if A.dtype != B.dtype or (index is not None and index.dtype != torch.int64):
        raise ValueError(f"lora_grouped needs A and B of one dtype, index int64, got {A.dtype}, {B.dtype}, {index}")
    if index is not None and N and not 0 <= int(index.min()) <= int(index.max()) < K:
        raise ValueError(f"lora_grouped needs index in 0..{K - 1}, got {int(index.min())}..{int(index.max())}")
    if not launches("lora_grouped", x=x, A=A, B=B, scaling=scaling, index=index) or not multiplies(x):
        return lora_grouped_ref(x, A, B, scaling, index)
    scaling = torch.ones(N, device=x.device) if scaling is None else scaling.float().contiguous()
    index = torch.arange(N, device=x.device) if index is None else index.contiguous()
    with torch.cuda.device_of(x):
        return _Grouped.apply(x, A, B, scaling, index)  # type: ignore[no-untyped-call, no-any-return]
