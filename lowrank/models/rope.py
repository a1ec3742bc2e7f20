"""Rotary positions (Su et al., 2021), arXiv:2104.09864: the frequencies of each family, and the tables of cos and sin.

    φ = position · theta^(-2i / dim);   `lowrank/kernels/rope.py` turns a head's numbers by it

Angles and tables are fp32 whatever the model's dtype: bf16 cannot count positions beyond 256.
"""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lowrank.models.families import Rope

Rotation = tuple[Tensor, Tensor]  # cos, ±sin: (B or 1, T, 1, dim), fp32


def frequencies(rope: Rope, length: int, device: torch.device) -> tuple[Tensor, float]:
    """(dim / 2,) fp32 frequencies and the factor on cos and sin, for a sequence of `length` positions."""
    options: dict[str, Any] = dict(rope.options)
    theta, scale = rope.theta, 1.0
    half = torch.arange(0, rope.dim, 2, dtype=torch.int64, device=device).float()
    if rope.kind == "dynamic" and length > rope.max_positions:  # the base grows with the length (NTK-aware)
        stretch = options.get("factor", 1.0) * length / rope.max_positions - (options.get("factor", 1.0) - 1)
        theta = theta * stretch ** (rope.dim / (rope.dim - 2))
    inverse = 1.0 / theta ** (half / rope.dim)
    if rope.kind == "linear":
        inverse = inverse / options.get("factor", 1.0)
    elif rope.kind == "factors":
        inverse = inverse / torch.tensor(options["factors"], device=device)
    elif rope.kind == "llama3":
        inverse = _llama3(inverse, options)
    elif rope.kind == "yarn":
        inverse, scale = _yarn(rope, inverse, options)
    elif rope.kind == "longrope":
        inverse, scale = _longrope(rope, inverse, options, length)
    return inverse, scale


def divisors(rope: Rope) -> Tensor:
    """What its stretching divides each plain frequency by.  (dim / 2,)"""
    plain = replace(rope, kind="default", options=())
    stretched, unstretched = (frequencies(r, 1, torch.device("cpu"))[0] for r in (rope, plain))
    return unstretched / stretched


def _llama3(inverse: Tensor, options: dict[str, Any]) -> Tensor:
    """Long wavelengths are divided by `factor`, short ones kept, those between blended."""
    factor, low, high = options["factor"], options["low_freq_factor"], options["high_freq_factor"]
    original = options["original_max_position_embeddings"]
    wavelength = 2 * math.pi / inverse
    smooth = ((original / wavelength - low) / (high - low)).clamp(0, 1)
    return (1 - smooth) * inverse / factor + smooth * inverse


def _yarn(rope: Rope, inverse: Tensor, options: dict[str, Any]) -> tuple[Tensor, float]:
    """YaRN (Peng et al., 2023), arXiv:2309.00071: a ramp over the dimensions instead of one over the wavelengths."""
    factor = options.get("factor", 1.0)
    original = options.get("original_max_position_embeddings") or rope.max_positions

    def dimension(turns: float) -> float:
        return rope.dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(options.get("beta_fast") or 32), dimension(options.get("beta_slow") or 1)
    if options.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    ramp = torch.arange(rope.dim // 2, dtype=torch.float32, device=inverse.device) - low
    ramp = (ramp / (high - low if high != low else 0.001)).clamp(0, 1)
    scale = options.get("attention_factor")
    if scale is None:
        mscale, all_dim = options.get("mscale"), options.get("mscale_all_dim")
        scale = _mscale(factor, mscale) / _mscale(factor, all_dim) if mscale and all_dim else _mscale(factor, 1.0)
    return inverse / factor * ramp + inverse * (1 - ramp), float(scale)


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _longrope(rope: Rope, inverse: Tensor, options: dict[str, Any], length: int) -> tuple[Tensor, float]:
    """LongRoPE (Ding et al., 2024), arXiv:2402.13753: one list of divisors for short inputs, one for long ones."""
    original = options.get("original_max_position_embeddings") or rope.max_positions
    factors = options["long_factor"] if length > original else options["short_factor"]
    factor = options.get("factor") or rope.max_positions / original
    scale = options.get("attention_factor")
    if scale is None:
        scale = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return inverse / torch.tensor(factors, dtype=torch.float32, device=inverse.device), float(scale)


def rotation(rope: Rope, positions: Tensor, length: int) -> Rotation:
    """cos and ±sin for (B, T) positions. `length` decides between the short and the long form of a stretched rope."""
    inverse, scale = frequencies(rope, length, positions.device)
    angle = (positions.float()[:, :, None] * inverse)[:, :, None]  # (B, T, 1, dim / 2)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    if rope.interleaved:
        return torch.stack([cos, cos], dim=-1).flatten(-2), torch.stack([-sin, sin], dim=-1).flatten(-2)
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)
