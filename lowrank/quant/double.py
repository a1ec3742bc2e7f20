"""Double quantization (QLoRA §3): the scales of the blocks, 8 bits each, with one fp32 number per 256 blocks.

    m = mean A        a = max |A - m| over 256 blocks        ĉ = code of (A - m) / a        Â = c_ĉ · a + m

The code is bitsandbytes': not exactly the nearest of the 256 values but the nearest to one of 65,536 equal steps. Â has
two roundings, of the product and of the sum (a fused multiply-add gives other bits). Â can be negative where A is near
0; it is kept so, as the files have it.
"""

from functools import cache

import torch
from torch import Tensor

from lowrank.kernels.nf4_codec import blocks_of, decision_bounds
from lowrank.quant import compiled
from lowrank.quant.codebooks import codebook
from lowrank.quant.codec import look_up

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
