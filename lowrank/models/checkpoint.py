"""Where weights come from: a Hugging Face folder (safetensors, sharded or not) or a GGUF file, one tensor at a time."""

import hashlib
import json
import mmap
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lowrank.errors import FileFormatError
from lowrank.files import read_json
from lowrank.kernels.nf4_codec import pack
from lowrank.models.families import config_from_gguf, config_from_json, family_of, gguf_name
from lowrank.models.gguf import GGUF, sample
from lowrank.quant.state import STATE
from lowrank.quant.tensor import QuantizedTensor

PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def open_checkpoint(path: str | Path) -> "FolderCheckpoint | GGUFCheckpoint":
    """A .gguf file, or a folder with config.json and safetensors (or one .gguf file)."""
    path = Path(path)
    if path.is_file():
        if path.suffix == ".gguf":
            return GGUFCheckpoint(path)
        if path.suffix in PICKLES:
            raise _pickle(path)
        raise ValueError(f"{path} is no model this reader knows: wanted a .gguf file or a folder with config.json")
    if not path.is_dir():
        raise FileNotFoundError(f"no model at {path}: wanted a folder with config.json, a .gguf file, or 'quickstart'")
    if (path / "config.json").is_file():
        return FolderCheckpoint(path)
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        return GGUFCheckpoint(files[0])
    if files:
        raise ValueError(f"{path} holds {len(files)} GGUF files; name one of them: {', '.join(f.name for f in files)}")
    raise FileNotFoundError(f"{path} holds neither config.json nor a .gguf file: it is no model folder")


def _pickle(path: Path) -> ValueError:
    return ValueError(
        f"{path} is a pickle, which can run any code when it is read, so it is refused. Convert it once where you "
        "trust it: load it with torch.load(path, weights_only=True) and write it with safetensors.torch.save_file"
    )


class FolderCheckpoint:
    """config.json and model.safetensors, or the shards that model.safetensors.index.json names.

    Like GGUFCheckpoint it gives weights under our model's parameter paths.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = config_from_json(read_json(path / "config.json"), str(path / "config.json"))
        self._files: dict[str, Path] = {}  # stored name -> its file
        self._stored: dict[str, Any] = {}  # the same, opened
        for file in self._weight_files():
            try:
                opened = safe_open(str(file), framework="pt")
            except (SafetensorError, OSError) as error:
                raise FileFormatError(f"{file} is truncated, damaged or not a safetensors file: {error}") from error
            for name in opened.keys():  # noqa: SIM118 (safe_open is no dict)
                if name in self._stored:
                    raise FileFormatError(f"tensor {name!r} is in {self._files[name].name} and in {file.name}")
                self._files[name], self._stored[name] = file, opened
        self._prefix = self._find_prefix()
        four_bit = any(STATE in name for name in self._stored)
        self.quantized = "bitsandbytes 4 bit" if four_bit else None  # None: its linear layers are numbers

    def shape(self, path: str) -> tuple[int, ...] | None:
        """The stored shape of a parameter, None where the checkpoint does not have it."""
        name = self._name(path)
        if self._is_quantized(name):
            return self._quantized(name).shape
        return tuple(self._stored[name].get_slice(name).get_shape()) if name in self._stored else None

    def tensor(self, path: str, dtype: torch.dtype) -> Tensor:
        """One parameter in `dtype`, on the CPU."""
        name = self._name(path)
        value: Tensor = self._stored[name].get_tensor(name)
        if not value.is_floating_point():
            raise FileFormatError(f"{self._files[name]}: tensor {name!r} has type {value.dtype}, wanted floats")
        return value.to(dtype)

    def kept(self, path: str, dtype: torch.dtype) -> QuantizedTensor | None:
        """One weight as it is stored, where that is a quantized form that the engine works with."""
        name = self._name(path)
        return replace(self._quantized(name), dtype=dtype) if self._is_quantized(name) else None

    def _is_quantized(self, name: str) -> bool:
        return name in self._stored and f"{name}.absmax" in self._stored

    def _quantized(self, name: str) -> QuantizedTensor:
        parts = [stored for stored in self._stored if stored == name or stored.startswith(f"{name}.")]
        state = {stored: self._stored[stored].get_tensor(stored) for stored in parts}
        try:
            return QuantizedTensor.from_state_dict(state, name)
        except ValueError as error:
            raise FileFormatError(f"{self._files[name]}: {error}") from error

    def unused(self, paths: set[str]) -> list[str]:
        """What the checkpoint holds beyond `paths`."""
        wanted = {self._name(path) for path in paths}
        left = (name for name in self._stored if name not in wanted)
        return sorted(name for name in left if not any(name.startswith(f"{path}.") for path in _parents(name, wanted)))

    def samples(self) -> Iterator[tuple[str, tuple[int, ...], bytes]]:
        """(stored name, shape, sample of the stored bytes) of every tensor, by name."""
        raw = {file: _mapped(file) for file in set(self._files.values())}
        for name in sorted(self._files):
            data, base, header = raw[self._files[name]]
            start, end = header[name]["data_offsets"]
            yield name, tuple(header[name]["shape"]), sample(data, base + start, end - start)

    def _weight_files(self) -> list[Path]:
        index = self.path / "model.safetensors.index.json"
        if index.is_file():
            raw = read_json(index)
            names = raw.get("weight_map") if isinstance(raw, dict) else None
            if not isinstance(names, dict) or not all(isinstance(v, str) for v in names.values()):
                raise FileFormatError(f"{index} must hold an object weight_map of tensor name -> file name")
            files = sorted(set(names.values()))
            for file in files:
                if Path(file).name != file:  # a shard lies in the folder, nowhere else
                    raise FileFormatError(f"{index} names the file {file!r}, wanted a plain name in the same folder")
                if not (self.path / file).is_file():
                    raise FileNotFoundError(
                        f"{index} names {file}, which is not in the folder: the download is incomplete"
                    )
            return [self.path / file for file in files]
        found = sorted(self.path.glob("*.safetensors"))
        if len(found) == 1:
            return found
        if (self.path / "model.safetensors").is_file():
            return [self.path / "model.safetensors"]
        if found:
            raise FileNotFoundError(f"{self.path} has {len(found)} safetensors files and no {index.name} to join them")
        pickles = sorted(f for f in self.path.iterdir() if f.suffix in PICKLES)
        if pickles:
            raise _pickle(pickles[0])
        raise FileNotFoundError(f"{self.path} has a config.json but no weights: wanted model.safetensors")

    def _find_prefix(self) -> str:
        """Files of a bare body lack the first part of our paths ("model.", "transformer.", "bert.")."""
        first = family_of(self.config).names.embed
        head = first.split(".")[0] + "."
        return head if f"{first}.weight" not in self._stored and f"{first[len(head) :]}.weight" in self._stored else ""

    def _name(self, path: str) -> str:
        name = path.removeprefix(self._prefix)
        module, _, leaf = name.rpartition(".")
        older = f"{module}.{'gamma' if leaf == 'weight' else 'beta'}"  # as TensorFlow had it
        return older if name not in self._stored and module.endswith("LayerNorm") and older in self._stored else name


def _parents(name: str, wanted: set[str]) -> list[str]:
    """The weight that a stored name like W.absmax or W.quant_state.bitsandbytes__nf4 belongs to."""
    parts = name.split(".")
    return [path for i in range(len(parts) - 1, 0, -1) if (path := ".".join(parts[:i])) in wanted]


def _mapped(file: Path) -> tuple[mmap.mmap, int, dict[str, Any]]:
    """A safetensors file (length u64, a JSON header, data): its bytes, where data begin, the header."""
    with open(file, "rb") as stream:
        data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    base = 8 + int.from_bytes(data[:8], "little")
    return data, base, json.loads(data[8:base])


class GGUFCheckpoint:
    """A GGUF file under our parameter paths, with what llama.cpp's converter does to some tensors undone."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.gguf = GGUF(path)
        self.quantized: str | None = None
        shapes = {name: info.shape for name, info in self.gguf.tensors.items()}
        ropes = "rope_freqs.weight"
        factors = tuple(self.gguf.tensor(ropes).tolist()) if ropes in shapes else None
        self.config = config_from_gguf(self.gguf.metadata, shapes, str(path), factors)

    def shape(self, path: str) -> tuple[int, ...] | None:
        info = self.gguf.tensors.get(gguf_name(self.config, path))
        return None if info is None else info.shape

    def tensor(self, path: str, dtype: torch.dtype) -> Tensor:
        family = family_of(self.config)
        value = self.gguf.tensor(gguf_name(self.config, path), dtype)
        leaf = path.split(".")[-2]
        if (order := self._rows(path)) is not None:
            value = value[order]
        if family.norm == "rms+1" and value.dim() == 1 and leaf.endswith("norm"):
            value = (self.gguf.tensor(gguf_name(self.config, path)) - 1).to(dtype)  # the file holds 1 + w
        return value

    def kept(self, path: str, dtype: torch.dtype) -> QuantizedTensor | None:
        """The stored blocks of Q4_0, Q4_1 and Q8_0: codes and fp16 scales move, no value is rounded again."""
        name = gguf_name(self.config, path)
        info = self.gguf.tensors[name]
        if info.format.name not in KEPT:
            return None
        blocks = torch.from_numpy(self.gguf.blocks(name).copy())  # (N, bytes of a block)
        if (order := self._rows(path)) is not None:
            blocks = blocks.view(info.shape[0], -1, blocks.shape[1])[order].flatten(0, 1)
        format, half = KEPT[info.format.name]
        scales = [blocks[:, i : i + 2].contiguous().view(torch.float16).view(-1) for i in range(0, half, 2)]
        codes = blocks[:, half:]  # byte j holds value j in its low half and value j + 16 in its high half
        if format != "int8":
            codes = pack(torch.cat([codes & 15, codes >> 4], dim=1).view(-1))
        zeros = scales[1] if len(scales) == 2 else None
        return QuantizedTensor(format, info.shape, dtype, 32, codes.reshape(-1), scales[0], zeros)

    def _rows(self, path: str) -> Tensor | None:
        """The order that undoes the converter's permutation of q and k, None where there is none."""
        family, (*_, module, leaf) = family_of(self.config), path.split(".")
        if family.gguf != "llama" or module not in (family.names.q, family.names.k) or leaf not in ("weight", "bias"):
            return None
        heads = self.config.n_heads if module == family.names.q else self.config.n_kv_heads
        return unpermuted(heads * self.config.head_dim, heads)

    def unused(self, paths: set[str]) -> list[str]:
        wanted = {gguf_name(self.config, path) for path in paths} | {"rope_freqs.weight"}
        return sorted(name for name in self.gguf.tensors if name not in wanted)

    def samples(self) -> Iterator[tuple[str, tuple[int, ...], bytes]]:
        for name in sorted(self.gguf.tensors):
            yield name, self.gguf.tensors[name].shape, self.gguf.sample(name)


KEPT = {"Q4_0": ("int4", 2), "Q4_1": ("int4-affine", 4), "Q8_0": ("int8", 2)}  # our format, bytes before the codes


def unpermuted(rows: int, heads: int) -> Tensor:
    """The row order that undoes the file's: each head's pairs of neighbours become two halves again.  (rows,)"""
    return torch.arange(rows).view(heads, rows // heads // 2, 2).transpose(1, 2).reshape(-1)


Checkpoint = FolderCheckpoint | GGUFCheckpoint


def base_hash(checkpoint: Checkpoint) -> str:
    """SHA-256 of the configuration and of each tensor's name, shape and sample: seconds even for 70B parameters."""
    digest = hashlib.sha256(json.dumps(asdict(checkpoint.config), sort_keys=True).encode())
    for name, shape, piece in checkpoint.samples():
        digest.update(f"{name} {list(shape)} ".encode())
        digest.update(piece)
    return digest.hexdigest()
