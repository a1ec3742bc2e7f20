"""x Qᵀ and dy Q: Q is decoded into a workspace that all layers share, so a frozen weight costs its 4 bits.

A GPU has kernels for both. On a CPU there are three ways, all with sums in fp32 and one rounding to the dtype of x:

- a part of Q is decoded, then multiplied while it is in the cache;
- for dy Q, straight into the order in which oneDNN reads weights (`packed.turned_product`);
- bf16 values multiplied as fp32 ones, exact copies, where the processor is slower or lost in bf16.
"""

import math
import platform
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank.kernels.dispatch import use_triton
from lowrank.kernels.nf4_linear import nf4_linear_dx
from lowrank.quant.codec import decodes_compiled, workspace
from lowrank.quant.double import NESTED_BLOCK
from lowrank.quant.packed import second_level, turned_product
from lowrank.quant.tensor import QuantizedTensor

PART = 2**22  # weights that are decoded, then multiplied
PART_ROWS = 256  # of x; above, the product reads Q from more than one core anyway
FLOAT_ROWS = {"fast": None, "slow": 64, "none": 1}  # from which on fp32 is the faster one
CPUINFO = Path("/proc/cpuinfo")


def _arm_has_bf16() -> bool:
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):  # a torch without oneDNN
        return False


@cache
def bf16_products() -> str:
    """How a CPU multiplies bf16: "fast"; "slow", at half the rate of fp32; "none", by converting.

    AVX512-BF16 is twice as fast as fp32 on AMD, half as fast on Intel, whose own way is AMX (`bench.bench_quant` prints
    both rates). Without either, torch has no quick bf16 product for backward.
    """
    if platform.machine() not in ("x86_64", "AMD64"):
        return "fast" if _arm_has_bf16() else "none"
    if torch.cpu._is_amx_tile_supported():
        return "fast"
    if not torch.cpu._is_avx512_bf16_supported():
        return "none"
    maker = CPUINFO.read_text() if CPUINFO.exists() else platform.processor()
    return "fast" if "AuthenticAMD" in maker else "slow"


def in_float32(x: Tensor) -> bool:
    """Whether these rows are multiplied as fp32."""
    if x.dtype != torch.bfloat16 or x.device.type != "cpu":
        return False
    rows = FLOAT_ROWS[bf16_products()]
    return rows is not None and x.numel() >= rows * x.shape[-1]


def dense(q: QuantizedTensor, dtype: torch.dtype) -> Tensor:
    """The values in the shared workspace: good until the next call.  -> (O, I)"""
    out = workspace.take("dense", q.numel, dtype, q.codes.device)
    (filled,) = q.decode_each([out])
    return filled.view(q.shape)


def part_rows(q: QuantizedTensor) -> int:
    """How many rows of Q are a part: they end with a block, of the second level too. At least one, all at most."""
    O, I = q.shape
    each = q.block_size * (NESTED_BLOCK if q.double_quant else 1)
    step = each // math.gcd(each, I)
    return max(min(max(PART // max(I * step, 1), 1) * step, O), 1)


def parts(q: QuantizedTensor, like: Tensor) -> Iterator[Tensor]:
    """The parts of Q in turn, in the dtype of `like`, each good until the next.  -> (part_rows(q) or fewer, I)"""
    (O, I), rows = q.shape, part_rows(q)
    memory = workspace.take("part", rows * I, like.dtype, like.device)  # of its own: each core keeps its lines
    for part in q.decode_each([memory[: min(rows, O - start) * I] for start in range(0, O, rows)]):
        yield part.view(-1, I)


def parts_as_float32(q: QuantizedTensor, like: Tensor) -> Iterator[Tensor]:
    """`parts`, rounded to the dtype of `like` all the same."""
    for part in parts(q, like):
        yield workspace.take("float32", part.numel(), torch.float32, like.device).view_as(part).copy_(part)


def product(x: Tensor, q: QuantizedTensor, bias: Tensor | None) -> Tensor:
    """x Qᵀ + b, no gradient.  (..., I) -> (..., O)

    By parts where that pays: each core multiplies what it decoded itself, and a part that changes hands can cost more
    than its decoding.
    """
    (O, I), rows, wide = q.shape, part_rows(q), q.numel > 0 and in_float32(x)
    few = rows < O and x.numel() <= PART_ROWS * I and decodes_compiled(q.format, x)
    if not (wide or few):
        return F.linear(x, dense(q, x.dtype), bias)
    y = x.new_empty(*x.shape[:-1], O)
    weights, convert = (parts_as_float32(q, x), Tensor.float) if wide else (parts(q, x), Tensor.detach)
    biases: Sequence[Tensor | None] = [None] * O if bias is None else convert(bias).split(rows)
    converted = convert(x)
    for out, weight, b in zip(y.split(rows, -1), weights, biases):
        out.copy_(F.linear(converted, weight, b))
    return y


def product_back(dy: Tensor, q: QuantizedTensor) -> Tensor:
    """dy Q.  (..., O) -> (..., I)"""
    if q.format == "nf4" and use_triton(dy, q.codes):
        return nf4_linear_dx(dy, q.codes, q.scales, q.shape[1], q.block_size, second_level(q))
    if q.numel and in_float32(dy):
        O, I = q.shape
        rows = dy.reshape(dy.shape[:-1].numel(), O).float()
        total = rows.new_zeros(len(rows), I)
        for columns, weight in zip(rows.split(part_rows(q), -1), parts_as_float32(q, dy)):
            total.addmm_(columns, weight)
        return total.to(dy.dtype).view(*dy.shape[:-1], I)
    dx = turned_product(dy, q)
    return dy @ dense(q, dy.dtype) if dx is None else dx
