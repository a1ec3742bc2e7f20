"""Codes and scales -> values, fast on a CPU in eager torch, bit-equal to `nf4_codec.decode_ref`.

A byte of two 4-bit codes indexes a table of 256 PAIRS of fp32 values, gathered as one 64-bit number each; then one
multiplication by the scale of the block in fp32 and one rounding. It runs in pieces that stay in the cache, over a
workspace that is kept between calls: fresh memory costs more than the arithmetic.
"""

import threading
from functools import cache

import torch
from torch import Tensor

from lowrank.quant.codebooks import codebook

PIECE = 2**20  # values decoded at a time: 4 MB of fp32


@cache
def _pairs(format: str, device: torch.device) -> Tensor:
    """The two fp32 values of each byte, as the bits of one int64.  -> (256,)"""
    values = codebook(format)
    first, second = values.repeat_interleave(16), values.repeat(16)  # byte = 16 · first + second
    return torch.stack((first, second), dim=1).view(torch.int64).view(-1).to(device)


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


def decode_into(out: Tensor, format: str, codes: Tensor, scales: Tensor, zeros: Tensor | None, block_size: int) -> None:
    """Fill the flat contiguous `out` (n,) of any float dtype; scales (N,) are fp32 or fp16, no longer quantized."""
    numel, device = out.numel(), out.device
    whole = numel - numel % block_size
    for start in range(0, whole, PIECE):
        end = min(start + PIECE, whole)
        first, last = start // block_size, end // block_size
        piece = out[start:end]
        values = piece if out.dtype == torch.float32 else workspace.take("values", end - start, torch.float32, device)
        if format == "int8":
            values.copy_(codes[start:end].view(torch.int8))
        else:
            index = workspace.take("index", (end - start) // 2, torch.int64, device)
            index.copy_(codes[start // 2 : end // 2])
            torch.index_select(_pairs(format, device), 0, index, out=values.view(torch.int64))
        rows = values.view(-1, block_size)
        rows.mul_(scales[first:last, None])
        if zeros is not None:
            rows.add_(zeros[first:last, None])
        if values is not piece:
            piece.copy_(values)
    if whole < numel:
        _decode_rest(
            out[whole:],
            format,
            codes[whole // (1 if format == "int8" else 2) :],
            scales[-1],
            None if zeros is None else zeros[-1],
        )


def _decode_rest(out: Tensor, format: str, codes: Tensor, scale: Tensor, zero: Tensor | None) -> None:
    """The last, partial block, whose count may be odd."""
    if format == "int8":
        values = codes.view(torch.int8).float()
    else:
        values = _pairs(format, out.device)[codes.int()].view(torch.float32)[: out.numel()]
    values = values * scale.float()
    out.copy_(values if zero is None else values + zero.float())
