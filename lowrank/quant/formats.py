"""The formats: names, sizes, and how a weight is rounded to each.

    nf4, fp4       ŵ = c_k · A                 A = max |w| of the block, c a table of 16 values
    int4, int8     ŵ = k · s                   s = max |w| / 7 or / 127, k = round(w / s)
    int4-affine    ŵ = k · s + z               z = min w, s = (max w - z) / 15, k = round((w - z) / s)

Blocks run over the flattened tensor. Arithmetic is fp32; scales are stored in fp32 or, for the int formats, in fp16.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank.errors import unknown
from lowrank.kernels.nf4_codec import blocks_of, pack
from lowrank.quant.codec import encode_table

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Format:
    """What decides how a format is stored and decoded."""

    bits: int
    limit: int = 0
    """The largest code of a symmetric integer format: s = max |w| / limit. 0 for a table of values."""

    affine: bool = False
    """Each block has a zero point z beside its scale."""

    @property
    def table(self) -> bool:
        """The scale is the block's largest magnitude itself, so that it can be quantized a second time."""
        return not self.limit and not self.affine


FORMATS = {
    "nf4": Format(bits=4),
    "fp4": Format(bits=4),
    "int4": Format(bits=4, limit=7),
    "int4-affine": Format(bits=4, affine=True),
    "int8": Format(bits=8, limit=127),
}
NAMES = ("nf4", "nf4-dq", "fp4", "fp4-dq", "int8", "int4", "int4-affine")  # what load, quantize_model and a config take


def parse_format(name: str) -> tuple[str, bool]:
    """ "nf4-dq" -> ("nf4", True): the format and whether its scales are quantized too."""
    if name not in NAMES:
        raise unknown("quantization format", name, NAMES)
    return name.removesuffix("-dq"), name.endswith("-dq")


def check_block_size(block_size: object, where: str = "") -> None:
    if type(block_size) is not int or block_size not in BLOCK_SIZES:
        raise ValueError(f"unknown block size {block_size!r}{where}; known: {', '.join(map(str, BLOCK_SIZES))}")


def check_finite(w: Tensor, scales: Tensor, zeros: Tensor | None, name: str) -> None:
    """Refuse a weight with NaN or infinity, or with a range that the scales cannot hold; both show in the scales."""
    if torch.isfinite(scales).all() and (zeros is None or torch.isfinite(zeros).all()):
        return
    bad = w.numel() - int(torch.isfinite(w).sum())
    if bad:
        raise ValueError(
            f"{name} has {bad} of {w.numel()} values that are NaN or infinite; quantization needs finite ones"
        )
    raise ValueError(f"{name}: the range of a block does not fit {scales.dtype}; try float32 scales or another format")


def round_to(w: Tensor, format: str, block_size: int, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    """(codes, scales, zeros) of a weight of any shape.  -> uint8, (N,) `scale_dtype`, (N,) or None"""
    spec = FORMATS[format]
    if spec.table:
        return *encode_table(w, format, block_size), None
    blocks = blocks_of(w, block_size)  # (N, G)
    if spec.affine:
        return _round_affine(w, blocks, scale_dtype)
    scales = (blocks.abs().amax(dim=1) / spec.limit).to(scale_dtype)
    # a scale that underflowed to 0 decodes to 0 whatever the code; an fp16 scale can be rounded down, hence the clamp
    k = torch.round(blocks / torch.where(scales == 0, 1.0, scales.float())[:, None]).clamp_(-spec.limit, spec.limit)
    k = k.view(-1)
    if spec.bits == 8:
        return k[: w.numel()].to(torch.int8).view(torch.uint8), scales, None
    return pack((k[: w.numel() + w.numel() % 2] + 8).to(torch.uint8)), scales, None


def _round_affine(w: Tensor, blocks: Tensor, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    short = blocks.numel() - w.numel()  # the last block is filled up with its first value, which moves neither end
    if short:
        blocks[-1, -short:] = blocks[-1, 0]
    zeros = blocks.amin(dim=1).to(scale_dtype)
    scales = ((blocks.amax(dim=1) - zeros.float()) / 15).clamp_(min=0).to(scale_dtype)
    offset = blocks - zeros.float()[:, None]
    k = torch.round(offset / torch.where(scales == 0, 1.0, scales.float())[:, None]).clamp_(0, 15)
    return pack(k.view(-1)[: w.numel() + w.numel() % 2].to(torch.uint8)), scales, zeros
