"""Double quantization (QLoRA §3): the scales of the blocks, 8 bits each, with one fp32 number per 256 blocks.

    m = mean A        a = max |A - m| over 256 blocks        ĉ = code of (A - m) / a        Â = c_ĉ · a + m

The code is bitsandbytes': not exactly the nearest of the 256 values but the nearest to one of 65,536 equal steps. Â has
two roundings, of the product and of the sum (a fused multiply-add gives other bits). Â can be negative where A is near
0; it is kept so, as the files have it.
"""

from collections.abc import Iterator, Sequence
from functools import cache

import torch
from torch import Tensor

from lowrank.kernels.nf4_codec import blocks_of, decision_bounds
from lowrank.quant import compiled
from lowrank.quant.codebooks import codebook
from lowrank.quant.codec import COMPILED_PIECE, decodes_compiled, look_up

NESTED_BLOCK = 256
STEPS = 65535


@cache
def step_codes(device: torch.device) -> Tensor:
    """The code for each of the 65,536 steps from -1 to 1.  -> (65536,) uint8"""
    bounds, order = decision_bounds(codebook("dynamic8"))
    steps = torch.arange(STEPS + 1, dtype=torch.float64) * 2 / STEPS - 1
    return order[torch.bucketize(steps, bounds.double())].to(device)


def quantize_scales(absmax: Tensor, name: str = "weight") -> tuple[Tensor, Tensor, Tensor]:
    """(N,) fp32 -> codes (N,) uint8, absmax of each 256 (⌈N/256⌉,) fp32, offset () fp32"""
    offset = absmax.mean() if absmax.numel() else absmax.new_zeros(())
    blocks = blocks_of(absmax - offset, NESTED_BLOCK)
    nested = blocks.abs().amax(dim=1)
    if not torch.isfinite(nested + offset).all():  # the largest Â, which a rounding may lift beyond the largest A
        what = "mean of its block maxima" if not torch.isfinite(offset) else "decoded scale of its largest block"
        raise ValueError(f"{name}: the {what} overflows fp32; quantize it without double quantization")
    scaled = (blocks / torch.where(nested == 0, 1.0, nested)[:, None]).view(-1)[: absmax.numel()]
    step = ((scaled + 1) * (STEPS / 2) + 0.5).int()
    return step_codes(absmax.device).index_select(0, step), nested, offset


def dequantize_scales(codes: Tensor, nested: Tensor, offset: Tensor) -> Tensor:
    """Â = c · a + m, two roundings.  -> (N,) fp32"""
    n, levels = codes.numel(), codebook("dynamic8", codes.device)
    values = torch.empty_like(codes, dtype=torch.float32)
    run = compiled.loop("scales") if compiled.usable(codes) else None
    if run is not None and n >= 2 * NESTED_BLOCK and n % NESTED_BLOCK == 0:
        run([values.view(-1, NESTED_BLOCK), codes.view(-1, NESTED_BLOCK), nested, offset, levels])
        return values
    look_up(levels, codes, values)
    return blocks_of(values, NESTED_BLOCK).mul_(nested[:, None]).view(-1)[:n].add_(offset)


def decode_double(
    parts: Sequence[Tensor], format: str, codes: Tensor, scales: Tensor, nested: Tensor, offset: Tensor, block_size: int
) -> Iterator[Tensor] | None:
    """`QuantizedTensor.decode_each` by a loop that decodes the scales on the way; None where there is no such loop.

    All views are made before the first call: Python takes several times as long between two calls, which leave nothing
    of it in the cache.
    """
    sizes = [part.numel() // compiled.PIECE for part in parts]
    whole = all(part.numel() == n * compiled.PIECE and n % 2 == 0 < n for part, n in zip(parts, sizes))
    usable = all(decodes_compiled(format, part) and part.storage_offset() % 2 == 0 for part in parts)
    run = compiled.loop("decode_double") if whole and usable and block_size == compiled.PIECE else None
    if run is None:
        return None
    most = COMPILED_PIECE // compiled.PIECE
    cuts = [[min(most, n - i) for i in range(0, n, most)] for n in sizes]
    outs = [part.view(torch.int32).view(-1, 2, 16).split(cut) for part, cut in zip(parts, cuts)]
    every = [n for cut in cuts for n in cut]
    bytes = codes.contiguous().view(-1, 2, 16)  # loops ask no strides
    tensors = bytes[:, 0], bytes[:, 1], scales.contiguous()
    pieces = zip(*(t.split(every) for t in tensors), nested.contiguous().split([-(-n // NESTED_BLOCK) for n in every]))
    constants = offset, codebook("dynamic8"), codebook(format), compiled.ones()
    calls = [[[out[:, 0], out[:, 1], *next(pieces), *constants] for out in words] for words in outs]

    def fill() -> Iterator[Tensor]:
        for part, arguments in zip(parts, calls):
            for one in arguments:
                run(one)
            yield part

    return fill()
