"""NF4, the plain definition (QLoRA: Dettmers et al., 2023, arXiv:2305.14314).

    w = (w_1 ... w_n) in blocks of G over the flattened tensor        A = max |w_i| of the block
    code_i = argmin_k |w_i / A - c_k|                                 ŵ_i = round(c_code_i · A)

Two codes a byte, the first in the HIGH nibble. Everything is fp32 with one rounding to the output dtype at the end. The
same functions take any table of 16 values; each faster version in the project is compared with them, bit by bit.
"""

import torch
from torch import Tensor

# The 16 values as fp32 (`lowrank.quant.codebooks.normal_codebook(4)` derives them from the normal quantiles).
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def blocks_of(w: Tensor, block_size: int) -> Tensor:
    """The flattened tensor as fp32 rows of one block each, the last filled up with zeros.  (...) -> (N, G)"""
    flat = w.reshape(-1).float()  # reshape: strides of a transposed or sliced w are resolved here
    missing = -flat.numel() % block_size
    return torch.nn.functional.pad(flat, (0, missing)).view(-1, block_size) if missing else flat.view(-1, block_size)


def decision_bounds(code: Tensor) -> tuple[Tensor, Tensor]:
    """Where the nearest code changes: (bounds (15,), order (16,)) so that order[number of bounds < s] is nearest to s.

    Each bound is the midpoint of two neighbours rounded to fp32, as bitsandbytes has it, so a decision is off the
    nearest by at most half an ulp of the bound. A tie goes to the lower value. FP4's two zeros have the bound 0.
    """
    values, order = torch.sort(code.double(), stable=True)
    bounds = ((values[:-1] + values[1:]) / 2).float()
    return bounds, order.to(torch.uint8)


def scale_ref(blocks: Tensor, absmax: Tensor) -> Tensor:
    """w · (1 / A), with 0 for a block of zeros.  (N, G), (N,) -> (N, G) in [-1, 1]

    The reciprocal, not the quotient: so a tie between two codes falls as it does in bitsandbytes. Where 1 / A is no
    normal fp32 number, both are first scaled by a power of two, which changes nothing else.
    """
    factor = torch.where(absmax < 2.0**-100, 2.0**100, torch.where(absmax > 2.0**100, 2.0**-100, 1.0))
    reciprocal = 1 / torch.where(absmax == 0, 1.0, absmax * factor)
    return blocks * factor[:, None] * reciprocal[:, None]


def pack(codes: Tensor) -> Tensor:
    """Two codes a byte, the first in the high nibble; n is even.  (n,) -> (n/2,) uint8"""
    return codes[0::2] << 4 | codes[1::2]


def unpack(packed: Tensor, numel: int) -> Tensor:
    """The codes of `pack`.  (⌈n/2⌉,) -> (n,) uint8"""
    return torch.stack((packed >> 4, packed & 15), dim=1).view(-1)[:numel]


def encode_ref(w: Tensor, code: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Packed nearest codes and the absmax of each block, for any table of 16 values.  -> (⌈n/2⌉,) uint8, (N,) fp32"""
    blocks = blocks_of(w, block_size)
    absmax = blocks.abs().amax(dim=1)
    bounds, order = decision_bounds(code)
    ranks = torch.bucketize(scale_ref(blocks, absmax), bounds.to(w.device), out_int32=True)  # how many bounds lie below
    even = w.numel() + w.numel() % 2  # an odd count is followed by the code of the zero that fills up its block
    codes = order.to(w.device).index_select(0, ranks.view(-1)[:even])
    return pack(codes), absmax


def decode_ref(packed: Tensor, absmax: Tensor, code: Tensor, numel: int, dtype: torch.dtype, block_size: int) -> Tensor:
    """round(c_code · A): the product in fp32, one rounding to `dtype`.  -> (n,)"""
    values = code.to(packed.device).index_select(0, unpack(packed, numel).int())
    return (blocks_of(values, block_size) * absmax[:, None]).view(-1)[:numel].to(dtype)


def nf4_quantize_ref(w: Tensor, block_size: int = 64) -> tuple[Tensor, Tensor]:
    return encode_ref(w, torch.tensor(NF4), block_size)


def nf4_dequantize_ref(packed: Tensor, absmax: Tensor, numel: int, dtype: torch.dtype, block_size: int = 64) -> Tensor:
    return decode_ref(packed, absmax, torch.tensor(NF4), numel, dtype, block_size)
