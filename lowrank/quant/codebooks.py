"""The tables of values: NF-k from normal quantiles, bitsandbytes' FP4, uniform int4, the 8-bit map for scales."""

from functools import cache

import torch
from torch import Tensor

from lowrank.kernels.nf4_codec import NF4

CPU = torch.device("cpu")


def normal_codebook(bits: int = 4) -> Tensor:
    """The NF-k values in rising order, fp32: NF4 for bits = 4, exactly.  -> (2^k,)

    QLoRA (arXiv:2305.14314, appendix E): 2^(k-1) positive values and 2^(k-1) - 1 negative ones at evenly spaced
    probabilities between 1/2 and 1 - (1/2^k + 1/(2^k - 1)) / 4, an exact zero, all divided by the largest. The
    probabilities are fp32 and the quantiles fp64, and the last probability has seven digits: with more, or with
    quantiles in fp32, some of the 16 stored values of NF4 come out one bit off.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"a normal codebook needs 2 to 8 bits, got {bits}")
    half = 2 ** (bits - 1)
    offset = round(1 - (1 / 2**bits + 1 / (2**bits - 1)) / 4, 7)
    positive = torch.special.ndtri(torch.linspace(offset, 0.5, half + 1)[:-1].double()).float()
    negative = -torch.special.ndtri(torch.linspace(offset, 0.5, half)[:-1].double()).float()
    values = torch.cat((positive, torch.zeros(1), negative)).sort().values
    return values / values.abs().max()


def _fp4() -> Tensor:
    """bitsandbytes' FP4 by bit pattern: sign, two bits of exponent, one of mantissa; divided by 12."""
    magnitudes = torch.tensor([0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0], dtype=torch.float32) / 12
    return torch.cat((magnitudes, -magnitudes)) + 0.0  # code 8 is a second zero, stored as +0


def _dynamic_map() -> Tensor:
    """The 256 values of the signed dynamic 8-bit map (Dettmers, 2015, arXiv:1511.04561), for the scales of the scales.

    Seven decades 10^-6 ... 1; decade i has 2^i values, the midpoints of 2^i equal cells of [0.1, 1]; each with both
    signs; and 0 and 1.
    """
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32)
        middle = (10 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        values += middle + [-v for v in middle]
    return torch.tensor(sorted(values), dtype=torch.float32)


def _make(name: str) -> Tensor:
    if name == "nf4":
        return torch.tensor(NF4, dtype=torch.float32)
    if name == "fp4":
        return _fp4()
    if name == "int4":
        return torch.arange(-8.0, 8.0, dtype=torch.float32)  # code 0 (-8) is never written by us; GGUF's Q4_0 uses it
    if name == "int4-affine":
        return torch.arange(0.0, 16.0, dtype=torch.float32)
    if name == "dynamic8":
        return _dynamic_map()
    raise KeyError(name)


@cache
def codebook(name: str, device: torch.device = CPU) -> Tensor:
    """The values of "nf4", "fp4", "int4", "int4-affine" by code, or "dynamic8", in fp32, made once per device."""
    with CPU:  # whatever the default device and dtype are when they are first asked for
        return _make(name).to(device)
