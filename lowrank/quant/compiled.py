"""Inner loops compiled ahead of time where there is a C++ compiler; here the codec's, 4 bits to bf16 and back.

`lowrank doctor --compile` builds them once for a machine, into the cache folder. A process loads what it finds there in
a few milliseconds and never compiles; without it, or with LOWRANK_COMPILED=off, eager torch runs. A loaded
loop is tried against its own source run eagerly, and left alone where it differs: the codec's give the same bits, the
others (`models/one_row.py`, `methods/lora_paths.py`) sums in another order.

Decoding. A block has only 16 values v_k = bf16(c_k A). A byte gives two of them, which are the halves of one int32.
Each bit of a code becomes a mask of its half, and halves the values to choose from. That is the shortest way in lanes
of 32 bits, which have no table. Its limit is the arithmetic: about 39 instructions of AVX-512 for 32 weights.
"""

import hashlib
import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.errors import unknown
from lowrank.files import cache_folder
from lowrank.kernels.nf4_codec import decision_bounds, encode_ref
from lowrank.quant.codebooks import codebook

PIECE = 64  # weights decoded together: two vectors of 16 bytes share the 16 values of their block
MODES = ("auto", "off")


def _values(scales: Tensor, table: Tensor) -> Tensor:
    """c_k A rounded to bf16 (nearest, ties to even), in the upper half.  (...), (16,) -> (..., 16) int32"""
    bits = (scales[..., None] * table).view(torch.int32)
    return bits + ((bits >> 16) & 1) + 0x7FFF


def _once(x: Tensor) -> list[Tensor]:
    """The last dimension apart, each part for all vectors that use it."""
    return [part[..., None] for part in held(x).unbind(-1)]


def _select(values: list[Tensor], codes: Tensor, bits: int, mask_of: Callable[[Tensor], Tensor]) -> Tensor:
    """The value that each code names; `bits` has a 1 at the first bit of each code, 4 places up.

    `mask_of` makes 0xFFFF of each 1: by a product in lanes of 32 bits; by a shift and a subtraction in lanes of 64,
    which multiply a third as fast.
    """
    for j in range(4):
        mask = mask_of(codes >> (4 + j) & bits)
        values = [(x & ~mask) | (y & mask) for x, y in zip(values[0::2], values[1::2])]
    return values[0]


def decode_pieces(
    first: Tensor, second: Tensor, low: Tensor, high: Tensor, scales: Tensor, table: Tensor, ones: Tensor
) -> None:
    """first, second (N, 16) int32, two bf16 each, from low, high (N, 16) uint8; scales (N,); table (16,); ones (1,)."""
    bits = _values(scales, table)
    values = _once((bits & -0x10000) | ((bits >> 16) & 0xFFFF))
    for out, codes in ((first, low), (second, high)):
        byte = codes.int()
        # as a tensor: of the number 0xFFFF the compiler would make a shift and a subtraction
        out.copy_(_select(values, byte | byte << 20, 0x10001, lambda bit: bit * ones))


def _columns(out: Tensor, codes: Tensor, scales: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
    """The codes (O/2, 2, C, 32) and scales (O/2, 2, C) of C pieces of each row.

    Both come flat, from the first of these pieces on; a row has W, the length of `width`, of which nothing is read. So
    the strides are worked out here: those of an example would be compiled in.
    """
    (O2, C), W = out.shape[:2], width.shape[0]
    return codes.as_strided((O2, 2, C, 32), (64 * W, 32 * W, 32, 1)), scales.as_strided((O2, 2, C), (2 * W, W, 1))


def _turn(out: Tensor, codes: Tensor, scales: Tensor, table: Tensor) -> None:
    """An int64 is two columns of two rows: a byte of the one row and the byte below it."""
    upper, lower = (_values(row, table) for row in scales.unbind(1))
    both = (((upper >> 16) & 0xFFFF) | (lower & -0x10000)).long()
    values = _once((both & 0xFFFFFFFF) | both << 32)
    byte, below = (row.int() for row in codes.unbind(1))
    bytes = (byte | below << 16).long()
    out.copy_(_select(values, bytes | bytes << 36, 0x1000100010001, lambda bit: (bit << 16) - bit))


def decode_turned(out: Tensor, codes: Tensor, scales: Tensor, width: Tensor, table: Tensor) -> None:
    """Into the order of `packed._Turned`: out (O/2, C, 32) int64, the rest as in `_columns`."""
    _turn(out, *_columns(out, codes, scales, width), table)


def _second(codes: Tensor, block: Tensor, nested: Tensor, offset: Tensor, levels: Tensor) -> Tensor:
    """`double.dequantize_scales` as part of a loop.

    codes (...) uint8 of the blocks (...) int32; nested (⌈N/256⌉,), offset (), levels (256,)
    """
    pairs = (levels, codes.int()), (nested, block >> 8)
    code, largest = (torch.embedding(t[:, None], i)[..., 0] for t, i in pairs)
    return code * largest + offset


def _count(n: int, like: Tensor) -> Tensor:
    return torch.arange(n, dtype=torch.int32, device=like.device)


def decode_pieces_double(
    first: Tensor, second: Tensor, low: Tensor, high: Tensor, scales: Tensor, nested: Tensor, offset: Tensor,
    levels: Tensor, table: Tensor, ones: Tensor,
) -> None:  # fmt: skip
    """`decode_pieces` of doubly quantized scales (N,) uint8."""
    scales = _second(scales, _count(scales.shape[0], scales), nested, offset, levels)
    decode_pieces(first, second, low, high, scales, table, ones)


def decode_turned_double(
    out: Tensor, codes: Tensor, scales: Tensor, width: Tensor, start: Tensor, nested: Tensor, offset: Tensor,
    levels: Tensor, table: Tensor,
) -> None:  # fmt: skip
    """`decode_turned` of doubly quantized scales, uint8, whose first is that of the block `start` () int32."""
    codes, scales = _columns(out, codes, scales, width)
    O2, C = out.shape[:2]
    block = _count(2 * O2, out)[:, None] * width.shape[0] + _count(C, out) + start
    _turn(out, codes, _second(scales, block.view(scales.shape), nested, offset, levels), table)


def decode_scales(out: Tensor, codes: Tensor, nested: Tensor, offset: Tensor, levels: Tensor) -> None:
    """`double.dequantize_scales`: out (B, 256) fp32; codes (B, 256) uint8; nested (B,); offset (); levels (256,)."""
    out.copy_(torch.embedding(levels[:, None], codes.int())[..., 0] * nested[:, None] + offset)


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


def held(x: Tensor) -> Tensor:
    """x, computed once: what is inlined into a product would be worked out anew for each of its outputs."""
    return x.as_strided(x.shape, x.stride())


class _Loop(nn.Module):
    """What torch.export takes."""

    def __init__(self, function: Callable[..., None]) -> None:
        super().__init__()
        self.function = function

    def forward(self, tensors: list[Tensor]) -> tuple[()]:
        self.function(*tensors)
        return ()


@dataclass(frozen=True)
class Source:
    """What is compiled: a function that writes its results into some of the tensors that it is given."""

    function: Callable[..., None]
    example: Callable[[], list[Tensor]]
    """A small case, which it is compiled with and tried on."""
    dynamic: list[dict[int, str] | None] | None
    """For each tensor the names of its free sizes, "name:min" (one name, one size). None: every size is free."""
    settings: dict[str, object] = field(default_factory=dict)
    """Inductor's."""
    alike: Callable[[Tensor, Tensor], bool] = torch.equal
    """Whether a result is right, given the eager one."""


def waves(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Numbers for an example."""
    return (torch.arange(torch.Size(shape).numel()).float() * 1.7).sin().view(shape).to(dtype)


def close(want: Tensor, got: Tensor) -> bool:
    """`Source.alike` for sums of another order: now and then the other neighbour in bf16, which is 2⁻⁸ away."""
    return bool((want.float() - got.float()).norm() <= 2**-8 * want.float().norm())


@cache
def number(value: float) -> Tensor:
    """A constant that a loop is given."""
    return torch.tensor(value, dtype=torch.float32, device="cpu")


@cache
def ones() -> Tensor:
    return torch.tensor([0xFFFF], dtype=torch.int32, device="cpu")


def _decode_example() -> list[Tensor]:
    """64 blocks of 64 in NF4."""
    codes, absmax = encode_ref(_encode_example()[2].view(torch.float32), codebook("nf4"), 64)
    parts = [codes.view(64, 2, 16)[:, i] for i in (0, 1)]
    low, high = (torch.empty_strided((64, 16), (32, 1), dtype=torch.uint8).copy_(part) for part in parts)
    outs = [torch.empty_strided((64, 16), (32, 1), dtype=torch.int32) for _ in parts]
    return [*outs, low, high, absmax, codebook("nf4"), ones()]


def _turned_example() -> list[Tensor]:
    """Rows of 5 pieces, of which 4 are decoded."""
    codes, absmax = encode_ref(_encode_example()[2].view(torch.float32).view(-1)[: 12 * 5 * 64], codebook("nf4"), 64)
    out = torch.empty(4, 6, 32, dtype=torch.int64).transpose(0, 1)
    return [out, codes[32:], absmax[1:], torch.ones(5), codebook("nf4")]


def _second_example(scales: Tensor) -> list[Tensor]:
    """Made-up scales of 8 bits in place of these."""
    codes = torch.arange(scales.numel()).to(torch.uint8).view(scales.shape)
    return [codes, torch.tensor([0.3, 0.7]), torch.tensor(0.1), codebook("dynamic8")]


def _decode_double_example() -> list[Tensor]:
    *before, scales, table, one = _decode_example()
    return [*before, *_second_example(scales), table, one]


def _turned_double_example() -> list[Tensor]:
    """All blocks but the first lie in the second of the second level."""
    out, codes, scales, width, table = _turned_example()
    scales, *second = _second_example(scales)
    return [out, codes, scales, width, torch.tensor(255, dtype=torch.int32), *second, table]


def _scales_example() -> list[Tensor]:
    codes = torch.arange(512, dtype=torch.int32).to(torch.uint8).view(2, 256)
    return [torch.empty(2, 256), codes, torch.tensor([0.3, 0.7]), torch.tensor(0.1), codebook("dynamic8")]


def _encode_example() -> list[Tensor]:
    """64 blocks of 64 in NF4."""
    w = torch.linspace(-8, 8, 4096).sin().view(64, 64)
    packed, bounds = torch.zeros(64, 32, dtype=torch.uint8), decision_bounds(codebook("nf4"))[0]
    return [packed, torch.zeros(64), w.view(torch.int64), bounds]


_B, _C, _D, _W = "blocks:2", "columns:2", "nested:1", "bytes:16"
_PIECES: list[dict[int, str] | None] = [{0: _B}] * 5
_TURNED: list[dict[int, str] | None] = [{0: _B, 1: _C}, {0: "codes:2"}, {0: "scales:2"}, {0: "width:2"}]
_TWO_LEVELS: list[dict[int, str] | None] = [{0: _D}, None, None]
_ONE_LOOP = ("realize_opcount_threshold", "realize_reads_threshold", "max_fusion_size")
_LARGE: dict[str, object] = dict.fromkeys(_ONE_LOOP, 10**5)
_UNCHECKED: dict[str, object] = {"assert_indirect_indexing": False}  # a byte is below 256
SOURCES = {
    "decode": Source(decode_pieces, _decode_example, [*_PIECES, None, None], _LARGE),
    "decode_double": Source(
        decode_pieces_double, _decode_double_example, [*_PIECES, *_TWO_LEVELS, None, None], _LARGE | _UNCHECKED
    ),
    "turned": Source(decode_turned, _turned_example, [*_TURNED, None], _LARGE),
    "turned_double": Source(
        decode_turned_double, _turned_double_example, [*_TURNED, None, *_TWO_LEVELS, None], _LARGE | _UNCHECKED
    ),
    "scales": Source(decode_scales, _scales_example, [{0: _B}, {0: _B}, {0: _B}, None, None], _UNCHECKED),
    "encode": Source(encode_blocks, _encode_example, [{0: _B, 1: _W}, {0: _B}, {0: _B, 1: _W}, None]),
}


def folder() -> Path:
    """Where this machine's loops lie: another torch or processor has another folder."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    flags = [line for line in lines if line.startswith(("flags", "Features"))][:1]
    key = f"{torch.__version__} {platform.machine()} {flags}"
    return cache_folder() / f"compiled-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


def package(name: str) -> Path:
    """Where a loop's package lies: another source has another name."""
    files = {__file__, SOURCES[name].function.__code__.co_filename}
    text = "".join(Path(file).read_text(encoding="utf-8") for file in sorted(files))
    return folder() / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.pt2"


def build() -> float:
    """Compile every loop of the modules that are imported into `folder()`; the seconds it took.

    RuntimeError where that fails, for want of a C++ compiler above all.
    """
    start = time.perf_counter()
    folder().mkdir(parents=True, exist_ok=True)
    for name, source in SOURCES.items():
        example = source.example()
        given = {at for sizes in source.dynamic or () if sizes for at in sizes.values()}
        dims: dict[str, Any] = {at: torch.export.Dim(at.split(":")[0], min=int(at.split(":")[1])) for at in given}
        dims[""] = torch.export.Dim.AUTO
        named = source.dynamic or [dict.fromkeys(range(t.dim()), "") for t in example]
        free = [sizes and {i: dims[at] for i, at in sizes.items()} for sizes in named]
        program = torch.export.export(_Loop(source.function), (example,), dynamic_shapes=(free,))
        with tempfile.TemporaryDirectory(dir=folder()) as temporary:
            settings = {"cpp.dynamic_threads": True, **source.settings}  # as many threads as torch has when it runs
            to = f"{temporary}/{name}.pt2"
            try:
                torch._inductor.aoti_compile_and_package(program, package_path=to, inductor_configs=settings)
            except torch._inductor.exc.InductorError as error:
                way_out = "install g++, or name another compiler in CXX; without, eager torch runs"
                raise RuntimeError(f"{name} could not be compiled, {error}: {way_out}") from error
            os.replace(to, package(name))
        for old in set(folder().glob(f"{name}-*.pt2")) - {package(name)}:
            old.unlink()
    loop.cache_clear()
    return time.perf_counter() - start


@cache
def loop(name: str) -> Callable[[list[Tensor]], object] | None:
    """The compiled version of a source if it is there and right, chosen once in a process."""
    mode = os.environ.get("LOWRANK_COMPILED", "auto")
    if mode not in MODES:
        raise unknown("value of LOWRANK_COMPILED", mode, MODES)
    if mode == "off" or not package(name).is_file():
        return None
    source, before = SOURCES[name], torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            want, got = source.example(), source.example()
            source.function(*want)
        run = torch._C._aoti.AOTIModelPackageLoader(str(package(name)), "model", False, 1, -1).run
        run(got)
    except (AttributeError, RuntimeError, TypeError):  # the loader is private: it may change
        return None
    finally:
        torch.set_default_dtype(before)
    return run if all(map(source.alike, want, got)) else None


def usable(tensor: Tensor) -> bool:
    """Whether a loop may take this tensor's memory: a plain one on a CPU, not while somebody else compiles."""
    plain = tensor.device.type == "cpu" and type(tensor) is Tensor and not torch.compiler.is_compiling()
    return plain and torch.get_default_dtype() == torch.float32  # the constants of a loop have that


def describe() -> str:
    """Which of the two ways this process goes."""
    if all(map(loop, ("decode", "decode_double", "turned", "turned_double", "scales", "encode"))):
        return f"decoded by loops compiled for this machine ({folder()})"
    return "decoded by eager torch; `lowrank doctor --compile` compiles the loops (once, in a minute or two)"
