"""How wrong a quantized weight can be: proven from the stored parts alone, and expected for normal weights.

What is stored says in which interval [l, h] the original w lay, and ŵ = q.dequantize(dtype) is known, so

    |w - ŵ| <= max(h - ŵ, ŵ - l)

which is the half-gap of the code times the scale, plus the double-quantization term, plus the rounding of ŵ. Below, u
is 2^-24 (fp32); the intervals are real arithmetic, evaluated in fp64:

    nf4, fp4       w = t A with t ∈ [b_k - 3u, b_k+1 + 3u] ∩ [-1, 1]: the decision bounds around code k, widened by the
                   two roundings of t = w · (1 / A). A is stored exactly; with double quantization it lies in
                   [m + a x_l - 4ua, m + a x_h + 4ua] and is >= 0: the 8-bit code stands for a range of its 65,536
                   steps and so for a range [x_l, x_h] of (A - m) / a, and that quotient has two roundings.
    int4, int8     |w / s - k| <= 1/2 + u (|k| + 2) by rounding to nearest; and |w| <= L s, s widened by its rounding.
                   For k = ±L the second is the tighter, and it holds where s was rounded down and k was clamped.
    int4-affine    the same for (w - z) / s, k = 0 ... 15: min w >= z less its rounding, max w <= z + 15 s, widened.
"""

import math
from collections.abc import Iterator
from functools import cache

import numpy as np
import torch
from torch import Tensor

from lowrank.kernels.nf4_codec import blocks_of, decision_bounds, unpack
from lowrank.quant.codebooks import codebook
from lowrank.quant.double import NESTED_BLOCK, STEPS, step_codes
from lowrank.quant.formats import FORMATS
from lowrank.quant.tensor import QuantizedTensor

U = 2.0**-24
TINY = 2.0**-149  # the smallest fp32 number: twice the absolute rounding η of a subnormal result
ROUNDING = {torch.float32: (0.0, 0.0), torch.float16: (2.0**-11, 2.0**-25)}  # of a scale, beyond fp32 arithmetic
PIECE = 2**13  # blocks at a time


def elementwise(q: QuantizedTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """A proven upper bound of |w - q.dequantize(dtype)| for every w that quantizes to q.  -> (shape of w) fp32

    Rounded up, with room for comparing in fp32. Infinite where the value overflows `dtype`.
    """
    out = torch.empty(q.numel, dtype=torch.float32, device=q.codes.device)
    for start, end, scales, zeros in _pieces(q):
        first, last = start * q.block_size, min(end * q.block_size, q.numel)
        if q.format == "int8":
            codes = blocks_of(q.codes[first:last].view(torch.int8), q.block_size)  # (N, G), every block with its own
            bound = _farthest(q, codes, scales, zeros, dtype)
        else:
            every = _farthest(q, codebook(q.format, q.codes.device)[None, :], scales, zeros, dtype)  # (N, 16)
            codes = blocks_of(unpack(q.codes[first // 2 : -(-last // 2)], last - first), q.block_size)
            bound = every.gather(1, codes.long())
        out[first:last] = bound.view(-1)[: last - first]
    return out.view(q.shape)


def block_worst_case(q: QuantizedTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The largest value of `elementwise` that any codes could give a block with these scales.  -> (N,) fp32"""
    device = q.codes.device
    codes = torch.arange(-127.0, 128, device=device) if q.format == "int8" else codebook(q.format, device)
    written = codes[1:] if q.format == "int4" else codes  # -8 is read, never written
    worst = [_farthest(q, written[None, :], s, z, dtype).amax(dim=1) for _, _, s, z in _pieces(q)]
    return torch.cat(worst) if worst else torch.empty(0, device=device)


def matmul(q: QuantizedTensor, x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """A bound of |x Wᵀ - x Qᵀ| for exact products with Q = q.dequantize(dtype).  (..., I) -> (..., O) fp64

    Σ_i |x_i| |W_oi - Q_oi| by the triangle inequality. Rounding inside a product comes on top, for W as for Q.
    """
    if len(q.shape) != 2 or x.shape[-1] != q.shape[1]:
        raise ValueError(f"x must end in {q.shape[-1:]} for a weight of shape {q.shape}, got {tuple(x.shape)}")
    return x.detach().abs().double() @ elementwise(q, dtype).double().T


def scale_term(q: QuantizedTensor) -> Tensor:
    """Double quantization's own term: a bound of |A - Â| for each block, 0 without it.  -> (N,) fp64

    It moves a value by at most |c_k| times this, plus rounding.
    """
    a_hat = q.block_scales().double()
    low, high = _absmax_interval(q)
    return torch.maximum(high - a_hat, a_hat - low)


def _pieces(q: QuantizedTensor) -> Iterator[tuple[int, int, tuple[Tensor, Tensor, Tensor], Tensor | None]]:
    """(first block, last block, (scales, lowest and highest original absmax) as fp64 columns, zeros)"""
    scales = q.block_scales()
    low, high = _absmax_interval(q) if FORMATS[q.format].table else (scales.double(), scales.double())
    for start in range(0, scales.numel(), PIECE):
        end = min(start + PIECE, scales.numel())
        columns = tuple(part[start:end, None] for part in (scales, low, high))
        yield start, end, columns, None if q.zeros is None else q.zeros[start:end, None]  # type: ignore[misc]


def _absmax_interval(q: QuantizedTensor) -> tuple[Tensor, Tensor]:
    """Where the absmax of each block lay before double quantization.  -> (N,), (N,) fp64"""
    if q.nested_absmax is None or q.nested_offset is None:
        return q.scales.double(), q.scales.double()
    x_low, x_high = (edge.to(q.codes.device)[q.scales.int()] for edge in _steps_of_code())
    a = q.nested_absmax.double().repeat_interleave(NESTED_BLOCK)[: q.scales.numel()]
    m = q.nested_offset.double()
    slack = 4 * U * a + TINY * (a > 0)
    return (m + a * x_low - slack).clamp(min=0), (m + a * x_high + slack).clamp(min=0)


@cache
def _steps_of_code() -> tuple[Tensor, Tensor]:
    """The interval of (A - m) / a that each 8-bit code stands for, from the table itself.  -> (256,), (256,) fp64

    Step i is taken for positions within 1/2 of i; its fp32 arithmetic (x + 1, the product, + 1/2) adds less than 1/100.
    """
    codes = step_codes(torch.device("cpu")).long()
    index = torch.arange(STEPS + 1)
    first = torch.full((256,), STEPS).scatter_reduce(0, codes, index, "amin")
    last = torch.zeros(256, dtype=torch.long).scatter_reduce(0, codes, index, "amax")
    low, high = (first - 0.51) * 2 / STEPS - 1, (last + 0.51) * 2 / STEPS - 1
    return low.clamp(min=-1 - U), high.clamp(max=1 + U)


def _farthest(
    q: QuantizedTensor, codes: Tensor, columns: tuple[Tensor, Tensor, Tensor], zeros: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """max(h - ŵ, ŵ - l) for values of codes (1 or N, any) and scales (N, 1), rounded up to fp32."""
    scales, *absmax = columns
    if FORMATS[q.format].table:
        low, high = _cell_of_table(q.format, absmax)
    elif zeros is None:
        low, high = _cell_of_symmetric(codes.double(), scales.double(), FORMATS[q.format].limit, q.scales.dtype)
    else:
        low, high = _cell_of_affine(codes.double(), scales.double(), zeros.double(), q.scales.dtype)
    value = codes * scales  # as it is decoded: fp32, one rounding to dtype
    value = (value if zeros is None else value + zeros.float()).to(dtype).double()
    bound = torch.maximum(high - value, value - low)
    # 2^-20: the rounding to fp32, and that of whoever computes w - ŵ in fp32
    return (bound * (1 + 2.0**-20) + TINY).nan_to_num(nan=math.inf).float()


def _cell_of_table(format: str, absmax: list[Tensor]) -> tuple[Tensor, Tensor]:
    """[l, h] by code: the cell [t_l, t_h] times the interval of A.  (N, 1) x 2 -> (N, 16) x 2"""
    bounds, order = decision_bounds(codebook(format))
    edges = torch.cat((torch.tensor([-1.0]), bounds, torch.tensor([1.0]))).double()
    t_low, t_high = torch.empty(16, dtype=torch.float64), torch.empty(16, dtype=torch.float64)
    t_low[order.long()] = (edges[:-1] - 3 * U).clamp(min=-1)
    t_high[order.long()] = (edges[1:] + 3 * U).clamp(max=1)
    t_low, t_high = t_low.to(absmax[0].device), t_high.to(absmax[0].device)
    a_low, a_high = absmax
    low = torch.minimum(t_low * a_low, t_low * a_high) - TINY
    return low, torch.maximum(t_high * a_low, t_high * a_high) + TINY


def _widened(s: Tensor, scale_dtype: torch.dtype) -> Tensor:
    """The largest number that two fp32 roundings and one to the dtype of the scales can have brought to s."""
    relative, absolute = ROUNDING[scale_dtype]
    return s * (1 + 2 * relative) * (1 + 4 * U) + 2 * absolute + TINY


def _cell_of_symmetric(k: Tensor, s: Tensor, limit: int, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    largest = limit * _widened(s, scale_dtype)
    half = 0.5 + U * (k.abs() + 2)
    low, high = s * (k - half), s * (k + half)
    outer = (k.abs() >= limit) | (s == 0)  # clamped, or the scale underflowed: only |w| <= max |w| is known
    return (
        torch.maximum(torch.where(outer & (k <= 0), -torch.inf, low), -largest),
        torch.minimum(torch.where(outer & (k >= 0), torch.inf, high), largest),
    )


def _cell_of_affine(k: Tensor, s: Tensor, z: Tensor, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    relative, absolute = ROUNDING[scale_dtype]
    least = z - (relative * z.abs() + absolute)
    largest = z + 15 * _widened(s, scale_dtype)
    half = 0.5 + 2 * U * (k + 2)
    low, high = z + s * (k - half), z + s * (k + half)
    low = torch.maximum(torch.where((k <= 0) | (s == 0), -torch.inf, low), least)
    return low, torch.minimum(torch.where((k >= 15) | (s == 0), torch.inf, high), largest)


def expected_mse(format: str | Tensor, block_size: int = 64) -> float:
    """The mean squared error of w ~ N(0, 1) in a format, or in any table of values from -1 to 1 with absmax scaling.

    The largest of G normal magnitudes has density f(a) = 2G φ(a) (2Φ(a) - 1)^(G-1); given it, it is coded exactly and
    the others are independent normals cut off at ±a, whose error is a sum over cells in closed form:

        E = (G-1)/G ∫ f(a) Σ_k ∫_cell (x - a c_k)² φ(x) dx / (2Φ(a) - 1) da

    int4-affine integrates over smallest and largest value together. Scales are exact: no double quantization, no fp16.
    """
    if isinstance(format, Tensor):
        return _expected_table(format.double().sort().values, block_size)
    return _expected(format, block_size)


@cache
def _expected(format: str, G: int) -> float:
    spec = FORMATS[format]
    if spec.affine:
        return _expected_affine(G)
    levels = (
        codebook(format).double().sort().values if spec.table else torch.arange(-spec.limit, spec.limit + 1).double()
    )
    return _expected_table(levels / levels[-1], G)


def _expected_table(values: Tensor, G: int) -> float:
    a, weight = _nodes(G, tails=2)  # (400,)
    inside = torch.erf(a / math.sqrt(2))  # 2Φ(a) - 1
    density = 2 * G * _phi(a) * inside ** (G - 1)
    edges = torch.cat((values.new_tensor([-1.0]), (values[:-1] + values[1:]) / 2, values.new_tensor([1.0])))
    error = _cell_error(a[:, None] * edges[:-1], a[:, None] * edges[1:], a[:, None] * values).sum(dim=1)
    return ((weight * density * error / inside).sum() * (G - 1) / G / (weight * density).sum()).item()


def codebook_mse(values: Tensor) -> float:
    """The mean squared error of N(0, 1) rounded to the nearest of fixed values, with no scaling and no blocks."""
    values = values.double().sort().values
    inner = (values[:-1] + values[1:]) / 2
    far = values.new_tensor([40.0])
    return _cell_error(torch.cat((-far, inner)), torch.cat((inner, far)), values).sum().item()


def unlikely_absmax(block_size: int, chance: float) -> float:
    """The absmax that a block of standard normal values exceeds with this chance."""
    tail = torch.tensor(-math.expm1(math.log1p(-chance) / block_size) / 2, dtype=torch.float64)
    return -torch.special.ndtri(tail).item()


def _expected_affine(G: int) -> float:
    high, weight = _nodes(G, tails=1)
    low, high = -high[:, None], high[None, :]  # smallest and largest value: mirror images
    inside = (_Phi(high) - _Phi(low)).clamp(min=0)
    density = weight[:, None] * weight[None, :] * _phi(low) * _phi(high) * inside ** (G - 2) * (high > low)
    k = torch.arange(16, dtype=torch.float64)[:, None, None]
    step = (high - low) / 15
    left, right = low + step * (k - 0.5).clamp(min=0), low + step * (k + 0.5).clamp(max=15)
    error = _cell_error(left, right, low + step * k).sum(dim=0) / inside.clamp(min=1e-300)
    return ((density * error).sum() / density.sum() * (G - 2) / G).item()


def _cell_error(low: Tensor, high: Tensor, c: Tensor) -> Tensor:
    """∫ (x - c)² φ(x) dx from low to high = (1 + c²) ΔΦ - Δ(xφ) + 2c Δφ"""
    p_low, p_high = _phi(low), _phi(high)
    return (1 + c * c) * (_Phi(high) - _Phi(low)) - (high * p_high - low * p_low) + 2 * c * (p_high - p_low)


def _phi(x: Tensor) -> Tensor:
    return torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def _Phi(x: Tensor) -> Tensor:
    return torch.special.ndtr(x)


def _nodes(G: int, tails: int) -> tuple[Tensor, Tensor]:
    """Gauss-Legendre nodes and weights over where the largest of G normal values (magnitudes: tails = 2) can be."""
    log_p = torch.tensor([math.log(1e-14), math.log1p(-1e-14)], dtype=torch.float64)
    low, high = (-torch.special.ndtri(-torch.expm1(log_p / G) / tails)).tolist()
    x, weight = np.polynomial.legendre.leggauss(400)
    return torch.from_numpy((high - low) / 2 * x + (high + low) / 2), torch.from_numpy((high - low) / 2 * weight)
