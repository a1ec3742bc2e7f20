"""Weights in the order in which torch's own products read them on a CPU, for a few rows of bf16.

int4 is multiplied as it is packed: a quarter of the bytes of a bf16 weight. A bf16 weight is put into oneDNN's order
once; the plain product does so in each call, which at one row takes as long as the product itself. The operators are
private, so each is tried once on a small case and left alone where it is missing or gives something else. The int4
product rounds its scales to bf16, an error of the size that a product in bf16 has anyway; the bf16 one gives the plain
product's bits.
"""

from collections.abc import Callable, Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank.kernels.nf4_codec import unpack
from lowrank.quant import compiled
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


def pack_product(parts: Sequence[QuantizedTensor], bias: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """x -> x [Q₁ᵀ Q₂ᵀ ...] + b for weights of one layout; torch's are (code - 8) s + z.  (..., I) -> (..., ΣO)"""
    I, G = parts[0].shape[1], parts[0].block_size
    codes = torch.cat([unpack(q.codes, q.numel).view(q.shape) for q in parts])  # (O, I)
    s = torch.cat([q.scales for q in parts]).float().view(-1, I // G)
    z = torch.zeros_like(s)
    if parts[0].zeros is not None:
        z = torch.cat([q.zeros for q in parts if q.zeros is not None]).float().view_as(s) + 8 * s
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    scale_zero = torch.stack((s, z), dim=-1).transpose(0, 1).to(torch.bfloat16).contiguous()  # (I/G, O, 2)

    def product(x: Tensor) -> Tensor:
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(x.reshape(-1, I), packed, G, scale_zero)
        y = y.view(*x.shape[:-1], -1)
        return y if bias is None else y + bias

    return product


def ordered_product(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """x -> x Wᵀ + b with a copy of the bf16 weight in oneDNN's order.  (..., I) -> (..., O)"""
    ordered = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
    product = torch.ops.mkldnn._linear_pointwise.default
    return lambda x: product(x, ordered, bias, "none", [], "")  # type: ignore[no-any-return]


@cache
def ordered_product_works() -> bool:
    w = torch.linspace(-1, 1, 48 * 64).view(48, 64).cos().to(torch.bfloat16)
    x = torch.linspace(-2, 1, 2 * 64).view(1, 2, 64).to(torch.bfloat16)
    try:
        return torch.equal(ordered_product(w, w[:, 0].contiguous())(x), F.linear(x, w, w[:, 0].contiguous()))
    except (AttributeError, RuntimeError):  # gone, or not for this CPU
        return False


@cache
def packed_product_works() -> bool:
    w = torch.linspace(-1, 1, 32 * 64).view(32, 64).cos()
    x = torch.linspace(-2, 1, 2 * 64).view(2, 64).to(torch.bfloat16)
    q = QuantizedTensor.quantize(w, "int4-affine", 32)
    try:
        got = pack_product([q])(x).float()
    except (AttributeError, RuntimeError):  # gone, or not for this CPU
        return False
    want = x.float() @ q.dequantize(torch.float32).T
    return bool((got - want).norm() < 0.02 * want.norm())


def describe() -> dict[str, str]:
    """What `lowrank doctor` prints about quantized weights on a CPU."""
    packed = "torch's packed product" if packed_product_works() else "decoded (torch has no packed product here)"
    return {
        "quantized weights": compiled.describe(),
        "int4 at fewer than 8 rows": packed,
        "bf16 in generation": "weights in oneDNN's order" if ordered_product_works() else "plain products",
    }
