"""Weights in the order in which torch's own products read them on a CPU: for generation, and for backward.

int4 is multiplied as it is packed: a quarter of the bytes of a bf16 weight. A bf16 weight is put into oneDNN's order
once; the plain product does so in each call, which at one row takes as long as the product itself. The operators are
private, so each is tried once on a small case and left alone where it is missing or gives something else. The int4
product rounds its scales to bf16, an error of the size that a product in bf16 has anyway; the bf16 one gives the plain
product's bits.
"""

import ctypes
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank.kernels.nf4_codec import unpack
from lowrank.quant import compiled
from lowrank.quant.codebooks import codebook
from lowrank.quant.codec import COMPILED, piece_scales
from lowrank.quant.tensor import QuantizedTensor

PACKED_ROWS = 8  # from here on it is no faster than decoding and a dense product
GROUPS = (32, 64, 128, 256)
TURNED_PART, TURNED_PIECE = 2**23, 2**22  # weights of a product, and of a call of the loop
TURNED_BYTES = 2**27  # of workspaces in a thread


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


class _Turned(threading.local):
    """Workspaces in oneDNN's order of Wᵀ, [I/64][O/2][64][2]: the pair of two rows in each of 64 columns.

    One for each shape of a part, at most TURNED_BYTES together, the oldest dropped first. The order is oneDNN's secret,
    so each is made from a weight that holds where its elements belong, and is used if they are there.
    """

    def __init__(self) -> None:
        self.kept: dict[tuple[int, int], tuple[Tensor, Tensor | None]] = {}

    def take(self, O: int, I: int) -> tuple[Tensor, Tensor | None]:
        """The weight as oneDNN takes it, and its memory (O/2, I/64, 32) int64: None if the order is another one."""
        if (O, I) not in self.kept:
            while self.kept and sum(o * i for o, i in self.kept) + O * I > TURNED_BYTES // 2:
                self.kept.pop(next(iter(self.kept)))
            with torch.inference_mode(False):
                row, column = (torch.arange(I) * 24593).short()[:, None], (torch.arange(O) * 769).short()
                at = (row + column) & 0x3FFF  # of which no one is NaN in bf16
                ordered = torch.ops.mkldnn._reorder_linear_weight(at.view(torch.bfloat16))
                place, size = torch.ops.mkldnn.data_ptr(ordered), torch.ops.mkldnn._nbytes(ordered)
                memory = torch.frombuffer((ctypes.c_char * size).from_address(place), dtype=torch.int16)
                known = torch.equal(memory, at.view(I // 64, 64, O // 2, 2).transpose(1, 2).reshape(-1))
                words = memory.view(torch.int64).view(I // 64, O // 2, 32).transpose(0, 1) if known else None
            self.kept[O, I] = ordered, words
        return self.kept[O, I]


_turned = _Turned()


def second_level(q: QuantizedTensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """What kernels and loops decode doubly quantized scales with."""
    if q.nested_absmax is None or q.nested_offset is None:
        return None
    return q.nested_absmax.contiguous(), q.nested_offset, codebook("dynamic8", q.codes.device)


def _cuts(start: int, end: int, most: int) -> Iterator[tuple[int, int]]:
    """[start, end) in almost equal parts of at most `most`, but of two at least."""
    parts = max(min(-(-(end - start) // max(most, 1)), (end - start) // 2), 1)
    return pairwise(start + (end - start) * i // parts for i in range(parts + 1))


def turned_product(dy: Tensor, q: QuantizedTensor) -> Tensor | None:
    """dy Q by a loop that decodes Q straight into oneDNN's order of Qᵀ; None where that cannot be.

    Q is multiplied some columns at a time, and these are decoded some at a time: both stay in the cache for the while.
    """
    O, I = q.shape
    width, weights = I // compiled.PIECE, compiled.PIECE * max(O, 1)  # of pieces of 64 columns
    parts = list(_cuts(0, width, TURNED_PART // weights))
    small = 2 * weights * max(end - start for start, end in parts) <= TURNED_BYTES
    fits = small and O % 2 == 0 and O > 2 and I % max(q.block_size, compiled.PIECE) == 0 and width > 1
    if not fits or dy.dtype != torch.bfloat16 or q.format not in COMPILED or q.block_size < compiled.PIECE:
        return None
    double = (second_level(q) or ()) if q.block_size == compiled.PIECE else ()
    run = compiled.loop("turned_double" if double else "turned") if compiled.usable(dy) else None
    if run is None or not (compiled.usable(q.codes) and ordered_product_works()):
        return None
    codes = q.codes.contiguous()
    scales = q.scales.contiguous() if double else piece_scales(q.block_scales(), q.block_size)
    calls = []  # made first, as in `decode_double`
    for start, end in parts:
        weight, words = _turned.take(O, (end - start) * compiled.PIECE)
        if words is None:
            return None
        arguments = []
        for i, j in _cuts(start, end, TURNED_PIECE // weights):
            first = (torch.tensor(i, dtype=torch.int32, device="cpu"), *double) if double else ()
            inputs = codes[32 * i :], scales[i:], scales[:width], *first, codebook(q.format)
            arguments.append([words[:, i - start : j - start], *inputs])
        calls.append((arguments, weight))
    found = []
    for arguments, weight in calls:
        for one in arguments:
            run(one)
        found.append(torch.ops.mkldnn._linear_pointwise.default(dy, weight, None, "none", [], ""))
    return found[0] if len(found) == 1 else torch.cat(found, dim=-1)


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
