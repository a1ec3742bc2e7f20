"""The codec's two inner loops, compiled ahead of time where there is a C++ compiler: 4 bits to bf16, and back.

`lowrank doctor --compile` builds them once for a machine, into the cache folder. A process loads what it finds there in
a few milliseconds and never compiles; without it, or with LOWRANK_COMPILED=off, the eager loops of `codec.py` run. Both
give the same bits: a loaded loop is tried against its own source run eagerly, and left alone where it differs.

Decoding. A block has only 16 values v_k = bf16(c_k A). A byte gives two of them, which are the halves of one int32.
Each bit of a code becomes a mask of its half, and ands and xors select, by the form that every function of four bits
has: ⊕_S a_S ∏_{j in S} bit_j with a_S = ⊕_{k in S} v_k. That is the shortest way in 32-bit lanes, which have no table.
"""

import hashlib
import os
import platform
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from lowrank.errors import unknown
from lowrank.files import cache_folder
from lowrank.kernels.nf4_codec import decision_bounds, encode_ref
from lowrank.quant.codebooks import codebook

TILE = 16  # blocks that are decoded together, one in each lane
MODES = ("auto", "off")


def decode_tiles(out: Tensor, codes: Tensor, scales: Tensor, table: Tensor) -> None:
    """out (B, 16, G/2) int32, two bf16 each; codes (B, 16, G/2) uint8; scales (B, 16) fp32; table (16,) fp32."""
    a = []
    for k in range(16):
        bits = (scales * table[k]).view(torch.int32)
        bits = bits + ((bits >> 16) & 1) + 0x7FFF  # to bf16: nearest, ties to even
        a.append((bits & -0x10000) | ((bits >> 16) & 0xFFFF))
    for j in range(4):
        a = [a[k] ^ a[k - (1 << j)] if k >> j & 1 else a[k] for k in range(16)]
    coefficients = torch.stack(a, dim=1)[..., None]  # (B, 16 subsets, 16 blocks, 1)
    byte = codes.int()
    halves = byte | byte << 20  # >> 4: the first code at bit 0, the second at bit 16
    terms = list(coefficients.unbind(1))
    for j in range(4):
        bit = halves >> (4 + j) & 0x10001
        mask = (bit << 16) - bit
        terms = [x ^ (y & mask) for x, y in zip(terms[0::2], terms[1::2])]
    out.copy_(terms[0])


def encode_blocks(packed: Tensor, absmax: Tensor, pairs: Tensor, bounds: Tensor) -> None:
    """packed (N, G/2) uint8, two ranks a byte; absmax (N,) fp32; pairs (N, G/2) int64, two fp32 each; bounds (15,)."""
    first, second = ((pairs >> shift).int().view(torch.float32) for shift in (0, 32))
    largest = torch.maximum(first.abs(), second.abs()).amax(dim=1)
    factor = torch.where(largest < 2.0**-100, 2.0**100, torch.where(largest > 2.0**100, 2.0**-100, 1.0))
    reciprocal = 1 / torch.where(largest == 0, 1.0, largest * factor)  # as in `scale_ref`
    ranks = []
    for half in (first, second):
        scaled, rank = half * factor[:, None] * reciprocal[:, None], torch.zeros_like(half, dtype=torch.int32)
        for i in range(15):
            rank = rank + (scaled > bounds[i])
        ranks.append(rank)
    absmax.copy_(largest)
    packed.copy_((ranks[0] * 16 + ranks[1]).to(torch.uint8))


class _Loop(nn.Module):
    """What torch.export takes."""

    def __init__(self, function: Callable[..., None]) -> None:
        super().__init__()
        self.function = function

    def forward(self, tensors: list[Tensor]) -> tuple[()]:
        self.function(*tensors)
        return ()


def _samples() -> dict[str, tuple[Callable[..., None], list[Tensor]]]:
    """For each loop a small case: 64 blocks of 64 in NF4."""
    w = torch.linspace(-8, 8, 4096).sin().view(64, 64)
    codes, absmax = encode_ref(w, codebook("nf4"), 64)
    out = torch.empty(4, TILE, 32, dtype=torch.int32)
    bounds, _ = decision_bounds(codebook("nf4"))
    return {
        "decode": (decode_tiles, [out, codes.view(4, TILE, 32), absmax.view(4, TILE), codebook("nf4")]),
        "encode": (encode_blocks, [torch.empty_like(codes).view(64, 32), absmax * 0, w.view(torch.int64), bounds]),
    }


def folder() -> Path:
    """Where this machine's loops lie: another torch, source or processor has another folder."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    flags = [line for line in lines if line.startswith(("flags", "Features"))][:1]
    key = f"{Path(__file__).read_text(encoding='utf-8')} {torch.__version__} {platform.machine()} {flags}"
    return cache_folder() / f"compiled-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


def build() -> float:
    """Compile both loops into `folder()`; the seconds it took."""
    start = time.perf_counter()
    folder().mkdir(parents=True, exist_ok=True)
    blocks, width = torch.export.Dim("blocks", min=2), torch.export.Dim("bytes", min=16)
    free = {
        "decode": [{0: blocks, 2: width}, {0: blocks, 2: width}, {0: blocks}, None],
        "encode": [{0: blocks, 1: width}, {0: blocks}, {0: blocks, 1: width}, None],
    }
    for name, (function, example) in _samples().items():
        program = torch.export.export(_Loop(function), (example,), dynamic_shapes=(free[name],))
        with tempfile.TemporaryDirectory(dir=folder()) as temporary:
            settings: dict[str, object] = {"cpp.dynamic_threads": True}  # as many as torch has when it runs
            if name == "decode":  # all coefficients in one loop
                large = ("realize_opcount_threshold", "realize_reads_threshold", "max_fusion_size")
                settings |= dict.fromkeys(large, 10**5)
            to = f"{temporary}/{name}.pt2"
            torch._inductor.aoti_compile_and_package(program, package_path=to, inductor_configs=settings)
            os.replace(to, folder() / f"{name}.pt2")
    loop.cache_clear()
    return time.perf_counter() - start


@cache
def loop(name: str) -> Callable[[list[Tensor]], object] | None:
    """The compiled "decode" or "encode" if it is there and right, chosen once in a process."""
    mode = os.environ.get("LOWRANK_COMPILED", "auto")
    if mode not in MODES:
        raise unknown("value of LOWRANK_COMPILED", mode, MODES)
    path = folder() / f"{name}.pt2"
    if mode == "off" or not path.is_file():
        return None
    (function, want), (_, got) = _samples()[name], _samples()[name]
    function(*want)
    try:
        run = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, -1).run
        run(got)
    except (AttributeError, RuntimeError, TypeError):  # the loader is private: it may change
        return None
    return run if all(map(torch.equal, want, got)) else None


def usable(tensor: Tensor) -> bool:
    """Whether a loop may take this tensor's memory: a plain one on a CPU, not while somebody else compiles."""
    return tensor.device.type == "cpu" and type(tensor) is Tensor and not torch.compiler.is_compiling()


def describe() -> str:
    """Which of the two ways this process goes."""
    if loop("decode") and loop("encode"):
        return f"decoded by loops compiled for this machine ({folder()})"
    return "decoded by eager torch; `lowrank doctor --compile` compiles the loops (once, about a minute)"
