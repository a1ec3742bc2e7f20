"""int4 times a few bf16 rows by torch's own packed product on a CPU: it reads a quarter of the bytes of a bf16 weight.

A private operator, so it is tried once on a small case and left alone where it is missing or gives something else. Its
scales are rounded to bf16, an error of the size that a product in bf16 has anyway.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from lowrank.kernels.nf4_codec import unpack
from lowrank.quant.tensor import QuantizedTensor

PACKED_ROWS = 8  # from here on it is no faster than decoding and a dense product
GROUPS = (32, 64, 128, 256)


def packable(q: QuantizedTensor, x: Tensor) -> bool:
    """Whether the packed product takes this weight: int4 in whole groups along each row, bf16, on a CPU."""
    return (
        q.format in ("int4", "int4-affine")
        and x.dtype == torch.bfloat16
        and x.device.type == "cpu"
        and q.block_size in GROUPS
        and q.shape[1] % q.block_size == 0
        and q.shape[0] % 16 == 0
        and packed_product_works()
    )


def pack_product(q: QuantizedTensor) -> Callable[[Tensor], Tensor]:
    """x -> x Qᵀ; the operator's weights are (code - 8) s + z.  (..., I) -> (..., O)"""
    O, I = q.shape
    s = q.scales.float().view(O, I // q.block_size)
    z = torch.zeros_like(s) if q.zeros is None else q.zeros.float().view_as(s) + 8 * s
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unpack(q.codes, q.numel).view(O, I).int(), 1)
    scale_zero = torch.stack((s, z), dim=-1).transpose(0, 1).to(torch.bfloat16).contiguous()  # (I/G, O, 2)

    def product(x: Tensor) -> Tensor:
        rows = x.reshape(-1, I).contiguous()
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, packed, q.block_size, scale_zero)
        return y.view(*x.shape[:-1], O)

    return product


@cache
def packed_product_works() -> bool:
    w = torch.linspace(-1, 1, 32 * 64).view(32, 64).cos()
    x = torch.linspace(-2, 1, 2 * 64).view(2, 64).to(torch.bfloat16)
    q = QuantizedTensor.quantize(w, "int4-affine", 32)
    try:
        got = pack_product(q)(x).float()
    except (AttributeError, RuntimeError):  # gone, or not for this CPU
        return False
    want = x.float() @ q.dequantize(torch.float32).T
    return bool((got - want).norm() < 0.02 * want.norm())


def describe() -> dict[str, str]:
    """What `lowrank doctor` prints about quantized weights on a CPU."""
    packed = "torch's packed product" if packed_product_works() else "decoded (torch has no packed product here)"
    return {
        "quantized weights": "decoded by table gathers in eager torch, nothing is compiled",
        "int4 at fewer than 8 rows": packed,
    }
