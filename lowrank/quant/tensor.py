"""QuantizedTensor: codes, scales and, where there is one, the second level, as one value that knows its layout."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lowrank.errors import unknown
from lowrank.quant.codec import decode_into
from lowrank.quant.double import NESTED_BLOCK, decode_double, dequantize_scales, quantize_scales
from lowrank.quant.formats import DTYPES, FORMATS, check_block_size, check_finite, parse_format, round_to
from lowrank.quant.pool import pool
from lowrank.quant.state import read_state, write_state

MAX_NUMEL = 2**48  # far above any tensor, far below where an int64 byte count overflows


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A weight of any shape in one of the formats of `lowrank.quant.formats`, in blocks over the flattened tensor.

    `format`, `shape`, `block_size` say how `codes` is to be read; a part that does not fit them is a ValueError here,
    so that decoding is right or never starts.
    """

    format: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    """Of the weight that was quantized, and of `dequantize()`."""

    block_size: int
    codes: Tensor
    """(⌈n/2⌉,) uint8, two 4-bit codes a byte, the first in the high nibble; int8: (n,) uint8, two's complement."""

    scales: Tensor
    """(N,) fp32, or fp16 for the int formats; with double quantization (N,) uint8, the codes of the scales."""

    zeros: Tensor | None = None
    """int4-affine: (N,), in the dtype of the scales."""

    nested_absmax: Tensor | None = None
    """Double quantization: (⌈N/256⌉,) fp32."""

    nested_offset: Tensor | None = None
    """Double quantization: () fp32, the mean of the scales before they were quantized."""

    def __post_init__(self) -> None:
        spec = (self.format, self.shape, self.dtype, self.block_size)
        check_parts("weight", *spec, self.codes, self.scales, self.zeros, self.nested_absmax, self.nested_offset)

    @classmethod
    def quantize(
        cls,
        w: Tensor,
        format: str,
        block_size: int = 64,
        double_quant: bool = False,
        scale_dtype: torch.dtype = torch.float32,
        name: str = "weight",
    ) -> "QuantizedTensor":
        """Round a finite fp32, fp16 or bf16 tensor of any shape and stride ("nf4-dq" is nf4 with double_quant=True).

        `name` is for the error messages.
        """
        if format.endswith("-dq"):
            format, double_quant = parse_format(format)
        if format not in FORMATS:
            raise unknown("quantization format", format, FORMATS)
        check_block_size(block_size)
        if double_quant and not FORMATS[format].table:
            raise ValueError(f"double quantization is for nf4 and fp4, not for {format}")
        if scale_dtype != torch.float32 and (FORMATS[format].table or scale_dtype != torch.float16):
            raise ValueError(
                f"{format} cannot hold its scales in {scale_dtype}: float32, and float16 for the int formats"
            )
        w = w.detach()
        if w.dtype not in DTYPES.values():
            raise ValueError(f"{name} has dtype {w.dtype}; quantization takes {', '.join(DTYPES)}: convert it first")
        codes, scales, zeros = round_to(w, format, block_size, scale_dtype)
        check_finite(w, scales, zeros, name)
        nested = offset = None
        if double_quant:
            scales, nested, offset = quantize_scales(scales, name)
        return cls(format, tuple(w.shape), w.dtype, block_size, codes, scales, zeros, nested, offset)

    @property
    def double_quant(self) -> bool:
        return self.nested_absmax is not None

    @cached_property
    def numel(self) -> int:
        return math.prod(self.shape)

    def parts(self) -> dict[str, Tensor]:
        """The tensors it is made of, by field name."""
        names = ("codes", "scales", "zeros", "nested_absmax", "nested_offset")
        return {name: part for name in names if (part := getattr(self, name)) is not None}

    def block_scales(self) -> Tensor:
        """The scale that each block is decoded with.  -> (N,) fp32"""
        if self.nested_absmax is None or self.nested_offset is None:
            return self.scales.float()
        return dequantize_scales(self.scales, self.nested_absmax, self.nested_offset)

    def dequantize(self, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
        """The product in fp32, rounded once to `dtype`. `out`: a contiguous tensor of this shape to fill."""
        if out is None:
            out = pool.empty(self.shape, dtype or self.dtype, self.codes.device)
        elif out.shape != self.shape or not out.is_contiguous() or (dtype or out.dtype) != out.dtype:
            raise ValueError(
                f"out must be a contiguous {self.shape} of {dtype or out.dtype}, got {tuple(out.shape)} of {out.dtype}"
            )
        for _ in self.decode_each([out.view(-1)]):
            pass
        return out

    def decode_each(self, parts: Sequence[Tensor]) -> Iterator[Tensor]:
        """Fill these flat contiguous tensors with all the weights in turn, one at each step, which returns it.

        All but the last hold whole blocks, of both levels. The same memory may stand there several times.
        """
        G, per_byte = self.block_size, 1 if FORMATS[self.format].bits == 8 else 2
        assert all(part.numel() % (G * (NESTED_BLOCK if self.double_quant else 1)) == 0 for part in parts[:-1])
        assert sum(part.numel() for part in parts) == self.numel
        if self.nested_absmax is not None and self.nested_offset is not None:
            second = self.nested_absmax, self.nested_offset
            if (filled := decode_double(parts, self.format, self.codes, self.scales, *second, G)) is not None:
                yield from filled
                return
        start, scales = 0, self.block_scales() if self.double_quant else self.scales
        for part in parts:
            end = start + part.numel()
            codes, blocks = self.codes[start // per_byte : -(-end // per_byte)], slice(start // G, -(-end // G))
            zeros = None if self.zeros is None else self.zeros[blocks]
            decode_into(part, self.format, codes, scales[blocks], zeros, G)
            yield part
            start = end

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and second level, without codebooks."""
        return sum(part.numel() * part.element_size() for part in self.parts().values())

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.numel if self.numel else 0.0

    def to(self, device: torch.device | str) -> "QuantizedTensor":
        parts = {name: part.to(device) for name, part in self.parts().items()}
        return QuantizedTensor(self.format, self.shape, self.dtype, self.block_size, **parts)

    def state_dict(self, prefix: str) -> dict[str, Tensor]:
        """Keys and bytes of bitsandbytes for nf4 and fp4; W.codes, W.scales, W.zeros, W.meta for the others."""
        return write_state(self, prefix)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor], prefix: str) -> "QuantizedTensor":
        """The tensor under the weight's full name. What is missing or does not fit is a ValueError naming the key."""
        fields = read_state(state, prefix)
        check_parts(prefix, **fields)
        return cls(**fields)


def check_parts(
    name: str,
    format: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    block_size: int,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    nested_absmax: Tensor | None = None,
    nested_offset: Tensor | None = None,
) -> None:
    """Raise ValueError, with the key, unless each part has the dtype and length that the layout asks for."""
    if format not in FORMATS:
        raise unknown("quantization format", format, FORMATS)
    spec = FORMATS[format]
    check_block_size(block_size, f" for {name}")
    if not all(type(n) is int and 0 <= n <= MAX_NUMEL for n in shape) or math.prod(shape) > MAX_NUMEL:
        raise ValueError(f"{name}: shape {shape} is not a list of sizes whose product is at most 2^48")
    if dtype not in DTYPES.values():
        raise ValueError(f"{name}: unknown dtype {dtype}; known: {', '.join(DTYPES)}")
    if (nested_absmax is None) != (nested_offset is None):
        raise ValueError(f"{name}: double quantization needs both nested_absmax and nested_offset")
    if nested_absmax is not None and not spec.table:
        raise ValueError(f"{name}: double quantization is for nf4 and fp4, not for {format}")
    if spec.affine != (zeros is not None):
        raise ValueError(f"{name}: {format} {'needs' if spec.affine else 'has no'} zeros")
    numel = math.prod(shape)
    blocks = -(-numel // block_size)
    scale_dtypes = (torch.float32,) if spec.table else (torch.float32, torch.float16)
    _check(name if spec.table else f"{name}.codes", codes, numel if spec.bits == 8 else -(-numel // 2), torch.uint8)
    scales_key = f"{name}.absmax" if spec.table else f"{name}.scales"
    if nested_absmax is not None and nested_offset is not None:
        _check(scales_key, scales, blocks, torch.uint8)
        _check(f"{name}.nested_absmax", nested_absmax, -(-blocks // NESTED_BLOCK), torch.float32)
        if nested_offset.dtype != torch.float32 or nested_offset.dim():
            raise ValueError(f"{name}: nested_offset must be one float32 number, got {nested_offset}")
        return
    _check(scales_key, scales, blocks, *scale_dtypes)
    if zeros is not None:
        _check(f"{name}.zeros", zeros, blocks, scales.dtype)


def _check(key: str, part: Tensor, numel: int, *dtypes: torch.dtype) -> None:
    if part.dtype not in dtypes or tuple(part.shape) != (numel,):
        wanted = " or ".join(str(d) for d in dtypes)
        raise ValueError(f"{key} must be ({numel},) of {wanted}, got {tuple(part.shape)} of {part.dtype}")
