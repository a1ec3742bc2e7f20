"""y = x dequant(W)ᵀ + b on a weight that stays in NF4, on plain tensors.

    y = x Wᵀ + b        dx = dy W        db = Σ dy        x: (M, I), W: (O, I) stored as ⌈O I / 2⌉ bytes and N scales

Nothing dense is kept between forward and backward. A GPU takes one of three ways, by M (`limits`):

    gemv     one row of x: each weight looked up in fp32, multiplied and added; any dtype, no tensor cores (sm_75)
    tile     decoded codes go straight into the tensor cores, a block's scale multiplies its partial sum: each weight is
             read once, as 4 bits, for every 16 to 64 rows; split along I where O alone gives too few programs
    dense    W decoded once into a buffer (the caching allocator's, so the same one for each layer), then torch's
             product: what training takes, forward and backward, since from some hundreds of rows on arithmetic decides

The first two need I to be a multiple of a block's first 64 values, since there a row starts with a block; `dense` takes
any shape. Scales are absmax itself or doubly quantized (`nf4_codec.Scales`).
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank.files import cache_folder, read_json
from lowrank.kernels.dispatch import dot, launches, store, tl, triton
from lowrank.kernels.nf4_codec import (
    NF4,
    Scales,
    as_words,
    block_scale,
    check_packed,
    constants,
    decode_ref,
    dequantize_into,
    scale_arguments,
)

# The largest M that takes each way; what is larger is `dense`. Not measured: chosen from compiled code and rooflines
# (docs/kernels.md). `python -m bench.bench_kernels` writes what it measured to the cache folder, by the device's name.
LIMITS = {"default": {"gemv": 0, "tile": 64}, "sm_75": {"gemv": 8, "tile": 0}, "gfx": {"gemv": 1, "tile": 0}}
MEASURED = "nf4_linear.json"


def nf4_linear_ref(
    x: Tensor, packed: Tensor, scales: Scales, out_features: int, block_size: int = 64, bias: Tensor | None = None
) -> Tensor:
    """The definition: the product with the decoded weight, which is rounded once to x's dtype.  (..., I) -> (..., O)"""
    return F.linear(x, _weight(packed, scales, (out_features, x.shape[-1]), x.dtype, block_size, gpu=False), bias)


def absmax_of(scales: Scales) -> Tensor:
    """The scales in fp32, the second level decoded.  -> (N,)"""
    if len(scales) == 1:
        return scales[0]
    codes, nested, offset, levels = scales
    return levels[codes.int()] * nested.repeat_interleave(256)[: codes.numel()] + offset


@triton.jit
def _each(x, N: tl.constexpr, W: tl.constexpr):
    """(N, W, 8) -> 8 times (N, W), so that a sum over them stays within a thread."""
    even, odd = tl.split(x.reshape(N, W, 4, 2))
    e, f = tl.split(even.reshape(N, W, 2, 2))
    g, h = tl.split(odd.reshape(N, W, 2, 2))
    x0, x4 = tl.split(e)
    x2, x6 = tl.split(f)
    x1, x5 = tl.split(g)
    x3, x7 = tl.split(h)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def _gemv(
    x_ptr, words_ptr, scale_ptr, nested_ptr, offset_ptr, levels_ptr, code_ptr, bias_ptr, y_ptr, O, N,
    G: tl.constexpr, C: tl.constexpr, NESTED: tl.constexpr, BIAS: tl.constexpr,
    ROWS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """A program: ROWS outputs of one row of x. I = N C, C = min(G, 64) weights of one scale: (ROWS, CHUNKS, C/8, 8)."""
    I = N * C  # so that Triton knows what divides it, and loads 128 bits at a time
    o = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    x_ptr += tl.program_id(1).to(tl.int64) * I
    chunk = tl.arange(0, CHUNKS)
    word = (chunk * (C // 8))[:, None] + tl.arange(0, C // 8)[None, :]
    e = tl.arange(0, 8)
    acc = tl.zeros((ROWS, CHUNKS, C // 8), tl.float32)
    for k in range(0, I, CHUNKS * C):
        inside = k // 8 + word < N * (C // 8)
        at = (o * (N * (C // 8)) + k // 8)[:, None, None] + word[None]
        words = tl.load(words_ptr + at, mask=(o < O)[:, None, None] & inside[None], other=0)
        x = tl.load(x_ptr + k + word[:, :, None] * 8 + e[None, None, :], mask=inside[:, :, None], other=0.0)
        first = k + chunk * C
        block = ((o * I)[:, None] + first[None, :]) // G
        mask = (o < O)[:, None] & (first < I)[None, :]
        scale = block_scale(scale_ptr, nested_ptr, offset_ptr, levels_ptr, block, mask, NESTED)
        x = _each(x.to(tl.float32), CHUNKS, C // 8)
        part = tl.zeros((ROWS, CHUNKS, C // 8), tl.float32)
        for j in tl.static_range(8):
            part += tl.load(code_ptr + ((words >> ((j * 4) ^ 4)) & 15)) * x[j][None]
        acc += part * scale[:, :, None]
    y = tl.sum(tl.sum(acc, 2), 1)
    if BIAS:
        y += tl.load(bias_ptr + o, mask=o < O, other=0.0).to(tl.float32)
    store(y_ptr + tl.program_id(1).to(tl.int64) * O + o, y, o < O)


def _permutes(dtype: torch.dtype) -> str:
    """PTX: a word of 8 codes -> 4 registers of 2 values each, in order. 2.6 instructions a weight, no memory.

    prmt picks 4 bytes out of 8 by the low 3 bits of 4 codes; so a table of 16 takes two, and bit 3 of each code selects
    one. Both bytes of a 16-bit value are looked up like that and interleaved.
    """
    bits = [value & 0xFFFF for value in torch.tensor(NF4).to(dtype).view(torch.int16).tolist()]
    # One of prmt's tables has to be in a register. ptxas would keep constants in uniform ones and move one for each
    # prmt; z is 0, which it cannot know, so z | constant is computed once and stays.
    lines = ["mov.u32 z, %laneid;", "mul.hi.u32 z, z, z;", "and.b32 s, $4, 0x77777777;", "shl.b32 u, $4, 4;"]
    tables = {}
    for name, shift in (("l", 0), ("h", 8)):
        t = [sum((v >> shift & 255) << 8 * j for j, v in enumerate(bits[i : i + 4])) for i in (0, 4, 8, 12)]
        lines += [f"or.b32 {name}0, z, 0x{t[0]:08x};", f"or.b32 {name}8, z, 0x{t[2]:08x};"]
        tables[name] = f"0x{t[1]:08x}", f"0x{t[3]:08x}"
    for half, (signs, outputs) in enumerate((("0x9D8C", "01"), ("0xBFAE", "23"))):
        if half:
            lines.append("shr.u32 s, s, 16;")
        lines.append(f"prmt.b32 m, $4, u, {signs};")  # bit 3 of four codes, each spread over a byte
        for name, (fours, twelves) in tables.items():
            lines += [f"prmt.b32 a, {name}0, {fours}, s;", f"prmt.b32 b, {name}8, {twelves}, s;"]
            lines.append(f"lop3.b32 {name}, a, b, m, 0xD8;")  # m ? b : a
        lines += [f"prmt.b32 ${outputs[0]}, l, h, 0x4051;", f"prmt.b32 ${outputs[1]}, l, h, 0x6273;"]
    return "{ .reg .b32 s, u, m, a, b, l, h, z, l0, l8, h0, h8; " + " ".join(lines) + " }"


FP16, BF16 = tl.constexpr(_permutes(torch.float16)), tl.constexpr(_permutes(torch.bfloat16))


@triton.jit
def _decode(words, pairs_ptr, dtype: tl.constexpr, PRMT: tl.constexpr):
    """Words of 8 codes -> 4 times 2 values side by side in 32 bits: by byte permutes, or from a table of all bytes."""
    if PRMT:
        p = tl.inline_asm_elementwise(
            BF16 if dtype == tl.bfloat16 else FP16, "=r,=r,=r,=r,r", [words], (tl.int32,) * 4, is_pure=True, pack=1
        )
    else:
        p = (
            tl.load(pairs_ptr + (words & 255)),
            tl.load(pairs_ptr + ((words >> 8) & 255)),
            tl.load(pairs_ptr + ((words >> 16) & 255)),
            tl.load(pairs_ptr + ((words >> 24) & 255)),
        )
    return p


@triton.jit
def _part(acc, p, x_ptr, mask, dtype: tl.constexpr):
    """acc + the product of one pair of each word, (BO, 8) x 2 values, with its 16 rows of xᵀ."""
    low = (p & 0xFFFF).to(tl.int16).to(dtype, bitcast=True)
    high = (p >> 16).to(tl.int16).to(dtype, bitcast=True)
    return dot(tl.join(low, high).reshape(p.shape[0], 16), tl.load(x_ptr, mask=mask, other=0.0), acc)


@triton.jit
def _tile(
    x_ptr, words_ptr, scale_ptr, nested_ptr, offset_ptr, levels_ptr, pairs_ptr, bias_ptr, y_ptr, M, O, N, steps,
    G: tl.constexpr, NESTED: tl.constexpr, BIAS: tl.constexpr, PRMT: tl.constexpr,
    BO: tl.constexpr, BM: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A program: yᵀ (BO, BM) over `steps` times 64 inputs, I = 64 N. W is on the left: no decoding is done twice."""
    I = N * 64
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    o = tl.program_id(0).to(tl.int64) * BO + tl.arange(0, BO)
    m = tl.program_id(2).to(tl.int64) * BM + tl.arange(0, BM)
    i = tl.arange(0, 16)
    words_ptr += (o * (N * 8))[:, None] + tl.arange(0, 8)[None, :]
    x_ptr += (m * I)[None, :] + (8 * (i // 2) + i % 2)[:, None]  # a sum has no order: x is read in the codes' order
    start = tl.program_id(1) * steps
    acc = tl.zeros((BO, BM), tl.float32)
    for step in tl.range(start, tl.minimum(start + steps, N), num_stages=STAGES):
        k = step * 64
        words = tl.load(words_ptr + k // 8, mask=(o < O)[:, None], other=0)
        block = (o * I + k) // G
        scale = block_scale(scale_ptr, nested_ptr, offset_ptr, levels_ptr, block, o < O, NESTED)
        p = _decode(words, pairs_ptr, dtype, PRMT)
        part = tl.zeros((BO, BM), tl.float32)
        for j in tl.static_range(4):
            part = _part(part, p[j], x_ptr + k + 2 * j, (m < M)[None, :], dtype)
        acc += part * scale[:, None]
    if BIAS:
        acc += tl.load(bias_ptr + o, mask=o < O, other=0.0).to(tl.float32)[:, None]
    y_ptr += (tl.program_id(1) * M).to(tl.int64) * O
    store(y_ptr + (m * O)[None, :] + o[:, None], acc, (o < O)[:, None] & (m < M)[None, :])


@triton.jit
def _add_splits(parts_ptr, bias_ptr, y_ptr, n, O, SPLITS: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """y = Σ parts + b, always in the same order: a run gives the same bits again, which atomic adds would not."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    y = tl.zeros((BLOCK,), tl.float32)
    for s in tl.static_range(SPLITS):
        y += tl.load(parts_ptr + s * n + i, mask=i < n, other=0.0)
    if BIAS:
        y += tl.load(bias_ptr + i % O, mask=i < n, other=0.0).to(tl.float32)
    store(y_ptr + i, y, i < n)


def gemv(
    x: Tensor, packed: Tensor, scales: Scales, out_features: int, block_size: int, bias: Tensor | None = None
) -> Tensor:
    """(M, I) contiguous -> (M, O), each row by itself."""
    (M, I), C = x.shape, min(block_size, 64)
    y = torch.empty(M, out_features, dtype=x.dtype, device=x.device)
    _gemv[(triton.cdiv(out_features, 4), M)](
        x, as_words(packed), *scale_arguments(scales), constants(x.device)[0], y if bias is None else bias, y,
        out_features, I // C, block_size, C, len(scales) == 4, bias is not None, 4, 1024 // C,
    )  # fmt: skip
    return y


def tile(
    x: Tensor,
    packed: Tensor,
    scales: Scales,
    out_features: int,
    block_size: int,
    bias: Tensor | None = None,
    splits: int = 0,
) -> Tensor:
    """(M, I) contiguous, fp16 or bf16 -> (M, O). `splits` of I: 0 means as many as fill the device."""
    M, I = x.shape
    BM = 16 if M <= 16 else 32 if M <= 32 else 64
    BO, warps, stages, registers = TILES[BM]
    grid = triton.cdiv(out_features, BO), triton.cdiv(M, BM)
    steps, ptx = I // 64, x.is_cuda and torch.version.hip is None
    if not splits:  # 4 programs a processor, of 4 steps at least; the parts to add up stay below half of W's bytes
        fill = 4 * processors(x.device) // (grid[0] * grid[1])
        splits = max(1, min(fill, steps // 4, I // (32 * M), 16))
    y = torch.empty(M, out_features, dtype=x.dtype, device=x.device)
    parts = y if splits == 1 else torch.empty(splits, M, out_features, device=x.device)
    limit = {"maxnreg": registers} if ptx else {}  # else ptxas stops at 128 of its own accord, and may spill
    _tile[(grid[0], splits, grid[1])](
        x, as_words(packed), *scale_arguments(scales), pairs(x.dtype, x.device), y if bias is None else bias, parts,
        M, out_features, steps, triton.cdiv(steps, splits), block_size, len(scales) == 4,
        bias is not None and splits == 1, ptx, BO, BM, stages, num_warps=warps, **limit,
    )  # fmt: skip
    if splits > 1:
        _add_splits[(triton.cdiv(y.numel(), 1024),)](
            parts, y if bias is None else bias, y, y.numel(), out_features, splits, bias is not None, 1024
        )
    return y


# Rows of x: (outputs, warps, stages, most registers). From compiled code: no spills, fewest instructions a weight.
TILES = {16: (128, 2, 4, 192), 32: (64, 2, 3, 192), 64: (128, 8, 3, 128)}


@cache
def pairs(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The two values of each byte in the low and the high half of an int32.  -> (256,)"""
    values = torch.tensor(NF4).to(dtype)
    first, second = values.repeat_interleave(16), values.repeat(16)  # byte = 16 · first + second
    return torch.stack((first, second), dim=1).view(torch.int32).view(-1).to(device)


@cache
def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@cache
def limits(device: torch.device) -> dict[str, int]:
    """The largest M of `gemv` and of `tile` on a device: measured there, else a default. M above both is `dense`."""
    if device.type != "cuda":
        return LIMITS["default"]
    measured = _measured(torch.cuda.get_device_name(device))
    old = torch.cuda.get_device_capability(device) < (8, 0)
    return measured or LIMITS["gfx" if torch.version.hip else "sm_75" if old else "default"]


def _measured(name: str) -> dict[str, int] | None:
    """What `bench.bench_kernels` found on a device of this name; None where it has not run."""
    file = cache_folder() / MEASURED
    found = read_json(file).get(name) if file.is_file() else None
    if found is None:
        return None
    if not all(type(found.get(way)) is int for way in ("gemv", "tile")):
        raise ValueError(
            f"{file}: {name!r} must give the numbers gemv and tile, got {found}; remove it or measure again"
        )
    return {way: found[way] for way in ("gemv", "tile")}


def describe(in_features: int, dtype: torch.dtype, device: torch.device) -> str:
    """For `lowrank doctor`: the way for each M, and where that comes from."""
    if device.type != "cuda":
        return "decoded a few megabytes at a time, then torch's product (no GPU)"
    changes = sorted({1, 9} | {largest + 1 for largest in limits(device).values()})
    ways = [(M, way(M, in_features, 64, dtype, device)) for M in changes]
    parts = [f"M >= {M} {taken}" for i, (M, taken) in enumerate(ways) if i == 0 or taken != ways[i - 1][1]]
    if in_features % 64:
        return f"{parts[0]}: rows of {in_features} do not start with a block"
    known = _measured(torch.cuda.get_device_name(device))
    return ", ".join(parts) + (" (measured here)" if known else " (not measured here: python -m bench.bench_kernels)")


def way(M: int, in_features: int, block_size: int, dtype: torch.dtype, device: torch.device) -> str:
    """ "gemv", "tile" or "dense": what a product with M rows of x takes."""
    largest, wide = limits(device), dtype == torch.float32
    if in_features % min(block_size, 64):
        return "dense"
    if (8 if wide else largest["gemv"]) >= M:  # fp32 has no tensor cores, and a dense copy of 4 bytes a weight
        return "gemv"
    return "tile" if largest["tile"] >= M and not wide and block_size >= 64 else "dense"


class _NF4Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, out_features: int, block_size: int, gpu: bool, *stored: Tensor
    ) -> Tensor:
        ctx.save_for_backward(*stored)
        ctx.layout = (out_features, x.shape[-1]), block_size, gpu
        return _product(x, bias, out_features, block_size, gpu, *stored)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (dy,), (packed, *scales), (shape, block_size, gpu) = grads, ctx.saved_tensors, ctx.layout
        dx = db = None
        if ctx.needs_input_grad[0]:
            dx = dy @ _weight(packed, tuple(scales), shape, dy.dtype, block_size, gpu)
        if ctx.needs_input_grad[1]:
            db = dy.flatten(0, -2).sum(0)
        return dx, db, *(None,) * (4 + len(scales))


def _weight(
    packed: Tensor, scales: Scales, shape: tuple[int, int], dtype: torch.dtype, block_size: int, gpu: bool
) -> Tensor:
    """The decoded weight, in a buffer from the caching allocator: the one that the layer before gave back."""
    if gpu:
        return dequantize_into(torch.empty(shape, dtype=dtype, device=packed.device), packed, scales, block_size)
    return decode_ref(packed, absmax_of(scales), torch.tensor(NF4), shape[0] * shape[1], dtype, block_size).view(shape)


def _product(
    x: Tensor, bias: Tensor | None, out_features: int, block_size: int, gpu: bool, packed: Tensor, *scales: Tensor
) -> Tensor:
    I = x.shape[-1]
    chosen = way(x.numel() // I, I, block_size, x.dtype, x.device) if gpu else "dense"
    if chosen == "dense":
        return F.linear(x, _weight(packed, scales, (out_features, I), x.dtype, block_size, gpu), bias)
    with torch.cuda.device_of(x):
        run = gemv if chosen == "gemv" else tile
        y = run(x.reshape(-1, I).contiguous(), packed, scales, out_features, block_size, bias)
    return y.view(*x.shape[:-1], out_features)


def nf4_linear(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    out_features: int,
    block_size: int = 64,
    bias: Tensor | None = None,
    nested: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """y in x's dtype, differentiable in x and bias. x (..., I), packed uint8, absmax (N,) fp32, bias (O,).

    `nested`: (nested absmax (⌈N/256⌉,), offset (), levels (256,)) of doubly quantized scales; absmax holds their codes.
    """
    scales = (absmax,) if nested is None else (absmax, *nested)
    if not x.is_floating_point() or not x.dim():
        raise ValueError(f"x must be (..., I) of a float dtype, got {tuple(x.shape)} of {x.dtype}")
    gpu = launches("nf4_linear", x=x, packed=packed, absmax=absmax, bias=bias)
    check_packed(packed, scales, out_features * x.shape[-1], block_size, x.device)
    if bias is not None and (bias.shape != (out_features,) or bias.dtype != x.dtype):
        raise ValueError(f"bias must be ({out_features},) of {x.dtype}, got {tuple(bias.shape)} of {bias.dtype}")
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return _NF4Linear.apply(x, bias, out_features, block_size, gpu, packed, *scales)  # type: ignore[no-untyped-call, no-any-return]
    return _product(x, bias, out_features, block_size, gpu, packed, *scales)


def nf4_linear_dx(
    dy: Tensor,
    packed: Tensor,
    absmax: Tensor,
    in_features: int,
    block_size: int = 64,
    nested: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """dx = dy W, for a function that has a backward of its own.  (..., O) -> (..., I)"""
    scales, shape = (absmax,) if nested is None else (absmax, *nested), (dy.shape[-1], in_features)
    gpu = launches("nf4_linear_dx", dy=dy, packed=packed, absmax=absmax)
    check_packed(packed, scales, shape[0] * shape[1], block_size, dy.device)
    return dy @ _weight(packed, scales, shape, dy.dtype, block_size, gpu)
