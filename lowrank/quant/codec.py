"""The formats' inner loops, fast on a CPU in eager torch and bit-equal to the plain reference in `nf4_codec`.

Decoding: a byte of two 4-bit codes indexes a table of 256 PAIRS of fp32 values, gathered as one 64-bit number each;
then one product with the scale of the block in fp32 and one rounding. Encoding to a table: [-1, 1] is cut into cells so
narrow that each holds at most one decision bound; a table gives for each cell its bound and the rank below it, gathered
together, and the comparison with that one bound is exact. Both run in pieces that stay in the cache, over a workspace
that is kept between calls: fresh memory costs more than the arithmetic. `compiled.py` has faster versions of both, used
where they were built.
"""

import threading
from functools import cache

import torch
from torch import Tensor

from lowrank.kernels.dispatch import FLOATS, use_triton
from lowrank.kernels.nf4_codec import decision_bounds, dequantize_into, encode_ref, nf4_quantize, pack
from lowrank.quant import compiled
from lowrank.quant.codebooks import codebook

PIECE = 2**20  # values decoded at a time: 4 MB of fp32
ENCODE_PIECE = 2**18
CELLS = 2048
COMPILED_PIECE = 2**22  # values a call: what is computed for their blocks stays in the cache; whole second levels
COMPILED = ("nf4", "fp4", "int4")  # c_k · A and no zero point
SAFE = 2.0**-100, 2.0**100  # where 1 / absmax is a normal number, far from both ends


class _Workspace(threading.local):
    """One growing buffer per use and thread. On a GPU the caching allocator does that, so there it is just `empty`."""

    def __init__(self) -> None:
        self.buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, use: str, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        if device.type != "cpu":
            return torch.empty(numel, dtype=dtype, device=device)
        buffer = self.buffers.get((use, dtype))
        if buffer is None or buffer.numel() < numel:
            with torch.inference_mode(False):
                buffer = self.buffers[use, dtype] = torch.empty(numel, dtype=dtype)
        return buffer[:numel]


workspace = _Workspace()


def look_up(table: Tensor, index: Tensor, out: Tensor) -> Tensor:
    """out[i] = table[index[i]], the index truncated to an integer.

    index_select is the faster one on one thread, and stays on one thread in one dimension; gather divides its rows
    among threads. 2^20 weights on 2 threads: 0.21 ms by gather, 0.73 by index_select, 0.43 by index_select of four
    values at once (AMD EPYC with AVX-512).
    """
    n, device = out.numel(), out.device
    if device.type == "cpu" and torch.get_num_threads() > 1 and n % 16 == 0:
        rows = workspace.take("rows", n, torch.int64, device).copy_(index).view(16, -1)
        torch.gather(table.expand(16, -1), 1, rows, out=out.view(16, -1))
        return out
    return torch.index_select(table, 0, workspace.take("index", n, torch.int32, device).copy_(index), out=out)


@cache
def _pairs(format: str, device: torch.device) -> Tensor:
    """The two fp32 values of each byte, as the bits of one int64.  -> (256,)"""
    values = codebook(format)
    first, second = values.repeat_interleave(16), values.repeat(16)  # byte = 16 · first + second
    return torch.stack((first, second), dim=1).view(torch.int64).view(-1).to(device)


def decode_into(out: Tensor, format: str, codes: Tensor, scales: Tensor, zeros: Tensor | None, block_size: int) -> None:
    """Fill the flat contiguous `out` (n,) of any float dtype; scales (N,) are fp32 or fp16, no longer quantized."""
    numel, device = out.numel(), out.device
    if format in ("nf4", "fp4") and numel and out.dtype in FLOATS and use_triton(out, codes, scales):
        dequantize_into(out, codes, (scales,), block_size, codebook(format, device))
        return
    for start in range(_decode_compiled(out, format, codes, scales, block_size), numel, PIECE):
        end = min(start + PIECE, numel)
        piece, whole = out[start:end], end - end % block_size
        in_place = out.dtype == torch.float32 and numel % 2 == 0
        values = piece if in_place else workspace.take("values", (end - start + 1) // 2 * 2, torch.float32, device)
        if format == "int8":
            values[: end - start].copy_(codes[start:end].view(torch.int8))
        else:
            look_up(_pairs(format, device), codes[start // 2 : (end + 1) // 2], values.view(torch.int64))
        rows, last = values[: whole - start].view(-1, block_size), values[whole - start : end - start]
        span = slice(start // block_size, whole // block_size)
        rows.mul_(scales[span, None])
        last.mul_(scales[-1])  # of a partial block; empty otherwise
        if zeros is not None:
            rows.add_(zeros[span, None])
            last.add_(zeros[-1])
        if not in_place:
            piece.copy_(values[: end - start])


def decodes_compiled(format: str, out: Tensor) -> bool:
    """Whether the compiled loop decodes into such a tensor."""
    fits = out.dtype == torch.bfloat16 and format in COMPILED and compiled.usable(out)
    return fits and compiled.loop("decode") is not None


def _decode_compiled(out: Tensor, format: str, codes: Tensor, scales: Tensor, block_size: int) -> int:
    """Fill the front of a bf16 `out` by the compiled loop where there is one; how many values that were."""
    run = compiled.loop("decode") if decodes_compiled(format, out) else None
    each = max(block_size, 2 * compiled.PIECE)  # torch.export makes a size of 1 special
    n = out.numel() // each * each
    if run is None or not n or out.storage_offset() % 2:
        return 0
    words, bytes = out[:n].view(torch.int32).view(-1, 2, 16), codes[: n // 2].contiguous().view(-1, 2, 16)
    scales = piece_scales(scales, block_size)[: n // min(block_size, compiled.PIECE)]
    # A piece of two blocks of 32 is two pieces, each of the same half twice.
    halves = [(0, 1, scales)] if block_size >= compiled.PIECE else [(i, i, scales[i::2].contiguous()) for i in (0, 1)]
    for i, j, each_scale in halves:
        tensors = words[:, i], words[:, j], bytes[:, i], bytes[:, j], each_scale
        for start in range(0, len(each_scale), step := COMPILED_PIECE // compiled.PIECE):
            start = min(start, len(each_scale) - 2)
            run([x[start : start + step] for x in tensors] + [codebook(format), compiled.ones()])
    return n


def piece_scales(scales: Tensor, block_size: int) -> Tensor:
    """The scale of each piece of a compiled loop in fp32 (of each block where that is smaller)."""
    scales = scales.float().contiguous()
    return scales if block_size <= compiled.PIECE else scales.repeat_interleave(block_size // compiled.PIECE)


@cache
def _cells(format: str, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """For each cell of [-1, 1] its bound and the rank below it as one int64 (CELLS + 1,); and the byte of two ranks ->
    the byte of two codes (256,), None where they are the same.

    Cell i is what fl(s + 1) · CELLS / 2 truncates to i. Rounding moves s + 1 by at most 2^-24, so a bound within 1e-6
    of an edge is listed in both cells; a cell without a bound has infinity, which no s passes.
    """
    bounds, order = decision_bounds(codebook(format))
    low = torch.arange(CELLS + 1, dtype=torch.float64) * 2 / CELLS - 1
    rank = torch.searchsorted(bounds.double(), low - 1e-6)
    count = torch.searchsorted(bounds.double(), low + 2 / CELLS + 1e-6) - rank
    assert int(count.max()) == 1
    bound = torch.where(count == 1, bounds[rank.clamp(max=14)], torch.inf)
    table = torch.stack((bound.view(torch.int32), rank.int()), dim=1).view(torch.int64).view(-1)
    codes = (order[:, None] << 4 | order[None, :]).view(-1)
    same = torch.equal(order, torch.arange(16, dtype=torch.uint8))
    return table.to(device), None if same else codes.to(device)


def encode_table(w: Tensor, format: str, block_size: int) -> tuple[Tensor, Tensor]:
    """`encode_ref` for nf4 and fp4: packed codes (⌈n/2⌉,) uint8 and block maxima (N,) fp32 of the flattened tensor."""
    if format == "nf4" and w.numel() and use_triton(w):
        return nf4_quantize(w, block_size)
    flat, numel, device = w.reshape(-1), w.numel(), w.device
    packed = torch.empty(-(-numel // 2), dtype=torch.uint8, device=device)
    absmax = torch.empty(-(-numel // block_size), dtype=torch.float32, device=device)
    whole = numel - numel % block_size
    run, bounds = compiled.loop("encode") if compiled.usable(w) else None, decision_bounds(codebook(format))[0]
    for start in range(0, whole, ENCODE_PIECE):
        end = min(start + ENCODE_PIECE, whole)
        maxima = absmax[start // block_size : end // block_size]
        part = packed[start // 2 : end // 2]
        if run is None or end - start < 2 * block_size:
            _encode_piece(flat[start:end], format, block_size, part, maxima)
            continue
        pairs = workspace.take("scaled", end - start, torch.float32, device).copy_(flat[start:end]).view(torch.int64)
        run([part.view(-1, block_size // 2), maxima, pairs.view(-1, block_size // 2), bounds])
        if (codes := _cells(format, device)[1]) is not None:
            part.copy_(codes.index_select(0, part.int()))
    if whole < numel:
        packed[whole // 2 :], absmax[whole // block_size :] = encode_ref(flat[whole:], codebook(format), block_size)
    return packed, absmax


def _encode_piece(piece: Tensor, format: str, block_size: int, packed: Tensor, maxima: Tensor) -> None:
    n, device = piece.numel(), piece.device
    scaled = workspace.take("scaled", n, torch.float32, device)
    cell = workspace.take("cell", n, torch.float32, device)
    scaled.copy_(piece)
    torch.abs(scaled, out=cell)
    torch.amax(cell.view(-1, block_size), dim=1, out=maxima)
    if not ((maxima <= SAFE[1]) & ((maxima >= SAFE[0]) | (maxima == 0))).all():  # NaN too
        packed[:], _ = encode_ref(piece, codebook(format), block_size)
        return
    table, codes = _cells(format, device)
    scaled.view(-1, block_size).mul_(maxima.clamp(min=SAFE[0]).reciprocal_()[:, None])
    torch.add(scaled, 1.0, out=cell).mul_(CELLS / 2)
    found = look_up(table, cell, workspace.take("found", n, torch.int64, device))
    above = torch.gt(scaled, found.view(torch.float32).view(-1, 2)[:, 0])
    ranks = torch.add(found.view(torch.uint8).view(-1, 8)[:, 4], above.view(torch.uint8))  # little-endian
    torch.index_select(codes, 0, pack(ranks).int(), out=packed) if codes is not None else packed.copy_(pack(ranks))
