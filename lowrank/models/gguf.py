"""Reading GGUF files: the header, checked before anything is allocated, and the tensors, decoded from a memory map.

    "GGUF" | version u32 | tensors u64 | keys u64 | keys (name, type, value) | tensors (name, dims, type, offset) | data

Every count and offset of the header is compared with the size of the file, so that a damaged file costs an error and
never memory. Values are decoded in numpy, block by block as the formats define them (N blocks, a few bytes each).
"""

import math
import mmap
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from lowrank.errors import FileFormatError

Array = np.ndarray[Any, np.dtype[Any]]
MAX_DIMS = 4
MAX_DEPTH = 4  # arrays of arrays; real files have one level


def _half(blocks: Array, start: int) -> Array:
    """The fp16 number at byte `start` of each block, as (N, 1) fp32."""
    return np.ascontiguousarray(blocks[:, start : start + 2]).view(np.float16).astype(np.float32)


def _nibbles(bytes_: Array) -> Array:
    """(N, 16) bytes -> (N, 32): the low halves first, then the high ones."""
    return np.concatenate([bytes_ & 15, bytes_ >> 4], axis=1)


def _four_bit(bytes_: Array) -> Array:
    """(N, 16) bytes -> (N, 32) fp32"""
    return _nibbles(bytes_).astype(np.float32)


def _five_bit(bytes_: Array) -> Array:
    """(N, 20) bytes -> (N, 32) fp32: nibbles behind 4 bytes, whose bit j is the fifth of value j."""
    fifth = np.unpackbits(bytes_[:, :4], axis=1, bitorder="little")
    return (_nibbles(bytes_[:, 4:]) | fifth << 4).astype(np.float32)


def _six_bit(b: Array) -> tuple[Array, Array]:
    """The eight 6-bit scales and minima that Q4_K and Q5_K pack into 12 bytes.  (N, 12) -> 2 x (N, 8)"""
    low, middle, high = b[:, 0:4], b[:, 4:8], b[:, 8:12]
    scales = np.concatenate([low & 63, (high & 15) | (low >> 6 << 4)], axis=1)
    minima = np.concatenate([middle & 63, (high >> 4) | (middle >> 6 << 4)], axis=1)
    return scales.astype(np.float32), minima.astype(np.float32)


def _k_values(b: Array, codes: Array) -> Array:
    """d · scale · code - dmin · minimum for 8 groups of 32 codes.  codes: (N, 8, 32)"""
    scales, minima = _six_bit(b[:, 4:16])
    d, dmin = _half(b, 0) * scales, _half(b, 2) * minima  # (N, 8)
    return (d[:, :, None] * codes.astype(np.float32) - dmin[:, :, None]).reshape(len(b), 256)


def _q4_k(b: Array) -> Array:
    q = b[:, 16:].reshape(-1, 4, 1, 32)
    return _k_values(b, np.concatenate([q & 15, q >> 4], axis=2).reshape(-1, 8, 32))


def _q5_k(b: Array) -> Array:
    q = b[:, 48:].reshape(-1, 4, 1, 32)
    codes = np.concatenate([q & 15, q >> 4], axis=2).reshape(-1, 8, 32)
    fifth = b[:, 16:48].reshape(-1, 1, 32) >> np.arange(8, dtype=np.uint8)[:, None] & 1  # bit g belongs to group g
    return _k_values(b, codes | fifth << 4)


def _q6_k(b: Array) -> Array:
    ql = b[:, :128].reshape(-1, 2, 1, 64)  # two halves of 128 values
    low = np.concatenate([ql & 15, ql >> 4], axis=2).reshape(-1, 2, 4, 32)
    high = b[:, 128:192].reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], dtype=np.uint8)[:, None] & 3
    codes = (low | high << 4).astype(np.float32) - 32  # (N, 2, 4, 32)
    scales = _half(b, 208) * b[:, 192:208].view(np.int8).astype(np.float32)  # (N, 16), one for 16 values
    return (scales[:, :, None] * codes.reshape(-1, 16, 16)).reshape(-1, 256)


@dataclass(frozen=True)
class Format:
    name: str
    block: int
    """Values in one block."""
    size: int
    """Bytes of one block."""
    decode: Callable[[Array], Array]
    """(N, size) uint8 -> (N, block) fp32"""


FORMATS: dict[int, Format] = {
    0: Format("F32", 1, 4, lambda b: b.copy().view(np.float32)),
    1: Format("F16", 1, 2, lambda b: np.ascontiguousarray(b).view(np.float16).astype(np.float32)),
    2: Format("Q4_0", 32, 18, lambda b: _half(b, 0) * (_four_bit(b[:, 2:]) - 8)),
    3: Format("Q4_1", 32, 20, lambda b: _half(b, 0) * _four_bit(b[:, 4:]) + _half(b, 2)),
    6: Format("Q5_0", 32, 22, lambda b: _half(b, 0) * (_five_bit(b[:, 2:]) - 16)),
    7: Format("Q5_1", 32, 24, lambda b: _half(b, 0) * _five_bit(b[:, 4:]) + _half(b, 2)),
    8: Format("Q8_0", 32, 34, lambda b: _half(b, 0) * b[:, 2:].view(np.int8)),
    12: Format("Q4_K", 256, 144, _q4_k),
    13: Format("Q5_K", 256, 176, _q5_k),
    14: Format("Q6_K", 256, 210, _q6_k),
    30: Format("BF16", 1, 2, lambda b: (np.ascontiguousarray(b).view("<u2").astype("<u4") << 16).view("<f4")),
}  # fmt: skip
_NUMBERS = {0: "B", 1: "b", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class TensorInfo:
    name: str
    shape: tuple[int, ...]
    """In torch's order: the file writes the fastest dimension first."""
    format: Format
    start: int
    """First byte in the file."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) // self.format.block * self.format.size


class GGUF:
    """A memory-mapped GGUF file: `.metadata` (plain Python values) and `.tensors` (name -> TensorInfo)."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"no model file {self.path}")
        with open(self.path, "rb") as file:
            if self.path.stat().st_size < 24:
                raise FileFormatError(f"{self.path} is no GGUF file: only {self.path.stat().st_size} bytes")
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._at = 0
        if self._take(4) != b"GGUF":
            self._fail(f"it begins with {self._data[:4]!r}, wanted b'GGUF'")
        (version,) = struct.unpack("<I", self._take(4))
        if version not in (2, 3):
            self._fail(f"GGUF version {version}, supported: 2 and 3 (little-endian)")
        n_tensors, n_keys = self._count(24, "tensors"), self._count(12, "keys")
        self.metadata: dict[str, Any] = {}
        for _ in range(n_keys):
            key = self._string()
            self.metadata[key] = self._value(self._u32(), 0)
        self.tensors = {info.name: info for info in self._tensor_infos(n_tensors)}

    def tensor(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """One tensor, decoded slab by slab into its final dtype: no second copy of it in fp32."""
        info = self.tensors[name]
        out = torch.empty(info.shape, dtype=dtype)
        flat, raw, block = out.view(-1), self.blocks(name), info.format.block
        step = max(1, (1 << 20) // block)
        for i in range(0, len(raw), step):
            with np.errstate(invalid="ignore", over="ignore"):  # damaged scales give nan, not a warning
                values = info.format.decode(raw[i : i + step]).reshape(-1)
            flat[i * block : i * block + values.size] = torch.from_numpy(values)
        return out

    def blocks(self, name: str) -> Array:
        """The stored blocks of a tensor, (N, bytes of a block) uint8, a read-only view of the file."""
        info = self.tensors[name]
        raw = np.frombuffer(self._data, np.uint8, count=info.nbytes, offset=info.start)
        return raw.reshape(-1, info.format.size)

    def sample(self, name: str) -> bytes:
        """A fixed sample of a tensor's stored bytes."""
        info = self.tensors[name]
        return sample(self._data, info.start, info.nbytes)

    def _tensor_infos(self, count: int) -> Iterator[TensorInfo]:
        rows = []
        for _ in range(count):
            name, n_dims = self._string(), self._u32()
            if n_dims > MAX_DIMS:
                self._fail(f"tensor {name!r} has {n_dims} dimensions, at most {MAX_DIMS} are allowed")
            dims = struct.unpack(f"<{n_dims}Q", self._take(8 * n_dims))
            rows.append((name, dims, *struct.unpack("<IQ", self._take(12))))
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20 or alignment % 8:
            self._fail(f"general.alignment is {alignment!r}, wanted a multiple of 8 up to 1048576")
        base = -(-self._at // alignment) * alignment
        seen: set[str] = set()
        spans = []
        for name, dims, kind, offset in rows:
            if name in seen:
                self._fail(f"tensor {name!r} appears twice")
            seen.add(name)
            if 0 in dims:
                self._fail(f"tensor {name!r} has an empty dimension: {list(dims)}")
            if kind not in FORMATS:
                known = ", ".join(f.name for f in FORMATS.values())
                self._fail(f"tensor {name!r} has type {kind}, which is not supported; supported: {known}")
            info = TensorInfo(name, tuple(reversed(dims)), FORMATS[kind], base + offset)
            if dims and dims[0] % info.format.block:
                self._fail(f"tensor {name!r}: rows of {dims[0]} values are no whole {info.format.name} blocks")
            if offset % alignment or info.start + info.nbytes > len(self._data):
                self._fail(
                    f"tensor {name!r} ends at byte {info.start + info.nbytes}, the file has {len(self._data)}: "
                    "truncated or damaged; fetch it again"
                )
            spans.append((info.start, info.start + info.nbytes, name))
            yield info
        spans.sort()
        for (_, end, first), (start, _, second) in pairwise(spans):
            if start < end:
                self._fail(f"tensors {first!r} and {second!r} overlap")

    def _take(self, size: int) -> bytes:
        if self._at + size > len(self._data):
            self._fail(f"its header ends early (wanted {size} bytes at {self._at} of {len(self._data)}): truncated")
        self._at += size
        return self._data[self._at - size : self._at]

    def _u32(self) -> int:
        return int.from_bytes(self._take(4), "little")

    def _count(self, least: int, what: str) -> int:
        """A 64-bit count of items that take at least `least` bytes each."""
        count = int.from_bytes(self._take(8), "little")
        if count * least > len(self._data) - self._at:
            self._fail(f"it claims {count} {what}, more than its {len(self._data)} bytes can hold")
        return count

    def _string(self) -> str:
        return self._take(self._count(1, "characters")).decode("utf-8", errors="replace")  # some hold raw bytes

    def _value(self, kind: int, depth: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind in _NUMBERS:
            dtype = np.dtype(_NUMBERS[kind])
            return np.frombuffer(self._take(dtype.itemsize), dtype)[0].item()
        if kind != _ARRAY or depth >= MAX_DEPTH:
            self._fail(f"metadata value of type {kind} at depth {depth}, which GGUF does not have")
        inner = self._u32()
        if inner in _NUMBERS:
            dtype = np.dtype(_NUMBERS[inner])
            return np.frombuffer(self._take(self._count(dtype.itemsize, "values") * dtype.itemsize), dtype).tolist()
        return [self._value(inner, depth + 1) for _ in range(self._count(8, "values"))]

    def _fail(self, reason: str) -> NoReturn:
        raise FileFormatError(f"{self.path} is damaged or no GGUF file this reader knows: {reason}")


SAMPLE = 1024


def sample(data: mmap.mmap, start: int, nbytes: int) -> bytes:
    """Of the `nbytes` bytes of a tensor those at its beginning, in the middle and at its end."""
    offsets = sorted({0, max(0, nbytes // 2 - SAMPLE // 2), max(0, nbytes - SAMPLE)})
    return b"".join(data[start + at : start + min(at + SAMPLE, nbytes)] for at in offsets)
