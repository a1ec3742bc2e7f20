"""NF4, the plain definition (QLoRA: Dettmers et al., 2023, arXiv:2305.14314).

    w = (w_1 ... w_n) in blocks of G over the flattened tensor        A = max |w_i| of the block
    code_i = argmin_k |w_i / A - c_k|                                 ŵ_i = round(c_code_i · A)

Two codes a byte, the first in the HIGH nibble. Everything is fp32 with one rounding to the output dtype at the end. The
same functions take any table of 16 values; each faster version in the project is compared with them, bit by bit.
"""

from functools import cache

import torch
from torch import Tensor

from lowrank.kernels.dispatch import FLOATS, store, tl, triton, use_triton

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)

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


# What follows runs on a GPU. A scale is absmax itself, (absmax,), or doubly quantized (lowrank.quant.double), the four
# tensors (codes (N,) uint8, nested absmax (⌈N/256⌉,), offset (), levels (256,)), decoded where it is used.
Scales = tuple[Tensor, ...]


@triton.jit
def block_scale(scale_ptr, nested_ptr, offset_ptr, levels_ptr, block, mask, NESTED: tl.constexpr):
    """The scale of each block in fp32: A, or level · a + m."""
    scale = tl.load(scale_ptr + block, mask=mask, other=0)
    if NESTED:
        level = tl.load(levels_ptr + scale.to(tl.int32))
        scale = level * tl.load(nested_ptr + block // 256, mask=mask, other=0.0) + tl.load(offset_ptr)
    return scale


@triton.jit
def _dequantize(
    words_ptr, scale_ptr, nested_ptr, offset_ptr, levels_ptr, code_ptr, w_ptr, n,
    G: tl.constexpr, BLOCKS: tl.constexpr, NESTED: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    i = (block * (G // 8))[:, None] + tl.arange(0, G // 8)[None, :]  # a word of 8 codes: (BLOCKS, G/8)
    e = tl.arange(0, 8)
    j = i[:, :, None] * 8 + e[None, None, :]
    words = tl.load(words_ptr + i, mask=i * 8 < n, other=0)
    codes = (words[:, :, None] >> ((e * 4) ^ 4)[None, None, :]) & 15  # bytes from the low end, high nibble first
    table = tl.load(code_ptr + tl.arange(0, 16))
    w = tl.gather(table, codes.reshape(BLOCKS * G), 0).reshape(BLOCKS, G // 8, 8)
    scale = block_scale(scale_ptr, nested_ptr, offset_ptr, levels_ptr, block, block * G < n, NESTED)
    store(w_ptr + j, w * scale[:, None, None], j < n)


@triton.jit
def _quantize(w_ptr, bounds_ptr, packed_ptr, absmax_ptr, n, G: tl.constexpr, BLOCKS: tl.constexpr):
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    i = (block * G)[:, None] + tl.arange(0, G)[None, :]
    w = tl.load(w_ptr + i, mask=i < n, other=0.0).to(tl.float32)
    absmax = tl.max(tl.abs(w), 1)
    absmax = tl.where(tl.max((w != w).to(tl.int32), 1) > 0, float("nan"), absmax)  # tl.max passes over NaN
    tl.store(absmax_ptr + block, absmax, mask=block * G < n)
    factor = tl.where(absmax < 2.0**-100, 2.0**100, tl.where(absmax > 2.0**100, 2.0**-100, 1.0))  # as scale_ref has it
    reciprocal = tl.math.div_rn(1.0, tl.where(absmax == 0, 1.0, absmax * factor))  # `/` is off by an ulp on a GPU
    scaled = w * factor[:, None] * reciprocal[:, None]
    codes = tl.zeros((BLOCKS, G), tl.int32)
    for k in tl.static_range(15):
        codes += (scaled > tl.load(bounds_ptr + k)).to(tl.int32)
    high, low = tl.split(codes.reshape(BLOCKS, G // 2, 2))
    at = (block * (G // 2))[:, None] + tl.arange(0, G // 2)[None, :]
    tl.store(packed_ptr + at, (high * 16 + low).to(tl.uint8), mask=at * 2 < n)


@cache
def constants(device: torch.device) -> tuple[Tensor, Tensor]:
    """The codebook (16,) and its decision bounds (15,) on a device."""
    code = torch.tensor(NF4)
    return code.to(device), decision_bounds(code)[0].to(device)


def check_block_size(block_size: int) -> None:
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size must be one of {', '.join(map(str, BLOCK_SIZES))}, got {block_size!r}")


def as_words(packed: Tensor) -> Tensor:
    """The bytes as int32, eight codes each; copied where their number or address is no multiple of 4."""
    packed = packed.reshape(-1)
    if packed.numel() % 4 or packed.storage_offset() % 4 or packed.data_ptr() % 4:
        packed = torch.nn.functional.pad(packed, (0, -packed.numel() % 4))
    return packed.view(torch.int32)


def scale_arguments(scales: Scales) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four tensors for a kernel's four pointers; without a second level the last three are not read."""
    return scales if len(scales) == 4 else (scales[0],) * 4  # type: ignore[return-value]


def dequantize_into(w: Tensor, packed: Tensor, scales: Scales, block_size: int, code: Tensor | None = None) -> Tensor:
    """Fill the contiguous `w` on a GPU with round(c_code · A); `code`: another table of 16 values.  -> w"""
    numel = w.numel()
    if not w.is_contiguous() or w.dtype not in FLOATS:
        raise ValueError(f"w must be contiguous and one of {FLOATS}, got strides {w.stride()} of {w.dtype}")
    check_packed(packed, scales, numel, block_size, w.device)
    table = constants(w.device)[0] if code is None else code
    blocks = max(1, 4096 // block_size)
    with torch.cuda.device_of(w):
        # no fused multiply-add: level · a + m has two roundings
        _dequantize[(triton.cdiv(numel, blocks * block_size),)](
            as_words(packed), *scale_arguments(scales), table, w, numel, block_size, blocks, len(scales) == 4,
            enable_fp_fusion=False,
        )  # fmt: skip
    return w


def check_packed(packed: Tensor, scales: Scales, numel: int, block_size: int, device: torch.device) -> None:
    """ValueError, by name, unless codes and scales are those of `numel` weights on `device`."""
    check_block_size(block_size)
    blocks = -(-numel // block_size)
    parts = {"packed": (packed, torch.uint8, -(-numel // 2)), "absmax": (scales[0], torch.float32, blocks)}
    if len(scales) == 4:
        parts["absmax"] = (scales[0], torch.uint8, blocks)
        parts["nested_absmax"] = (scales[1], torch.float32, -(-blocks // 256))
        parts["offset"], parts["levels"] = (scales[2], torch.float32, 1), (scales[3], torch.float32, 256)
    for name, (part, dtype, size) in parts.items():
        if part.device != device:
            raise ValueError(f"{name} is on {part.device}, the rest on {device}: move it with .to()")
        if part.dtype != dtype or part.numel() != size:
            wanted = f"{size} {str(dtype).removeprefix('torch.')} for {numel} weights at block size {block_size}"
            raise ValueError(f"{name} must be {wanted}, got {part.numel()} {part.dtype}")


def nf4_quantize(w: Tensor, block_size: int = 64) -> tuple[Tensor, Tensor]:
    """Packed codes and absmax of any fp32, fp16 or bf16 tensor.  (...) -> (⌈n/2⌉,) uint8, (N,) fp32"""
    check_block_size(block_size)
    if w.dtype not in FLOATS:
        raise ValueError(f"w must be one of {FLOATS}, got {w.dtype}")
    if not use_triton(w):
        return nf4_quantize_ref(w, block_size)
    w = w.contiguous()
    packed = torch.empty(-(-w.numel() // 2), dtype=torch.uint8, device=w.device)
    absmax = torch.empty(-(-w.numel() // block_size), device=w.device)
    blocks = max(1, 2048 // block_size)
    with torch.cuda.device_of(w):
        _quantize[(triton.cdiv(absmax.numel(), blocks),)](
            w, constants(w.device)[1], packed, absmax, w.numel(), block_size, blocks, enable_fp_fusion=False
        )
    return packed, absmax
