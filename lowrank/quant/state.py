"""Quantized weights as named tensors: bitsandbytes' 4-bit keys, byte for byte, and our own for the int formats.

nf4, fp4    W (⌈n/2⌉, 1) uint8 · W.absmax · W.quant_map · W.quant_state.bitsandbytes__nf4 (JSON)
            double quantization: W.absmax is uint8, and W.nested_absmax, W.nested_quant_map
int4, int4-affine, int8    W.codes · W.scales · W.zeros · W.meta (JSON: format, shape, block_size, dtype)
"""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lowrank.errors import unknown
from lowrank.quant.codebooks import codebook
from lowrank.quant.double import NESTED_BLOCK
from lowrank.quant.formats import DTYPES, FORMATS

if TYPE_CHECKING:
    from lowrank.quant.tensor import QuantizedTensor

STATE = "quant_state.bitsandbytes__"


def write_state(q: "QuantizedTensor", prefix: str) -> dict[str, Tensor]:
    dtype = str(q.dtype).removeprefix("torch.")
    if not FORMATS[q.format].table:
        meta = {"format": q.format, "shape": list(q.shape), "block_size": q.block_size, "dtype": dtype}
        parts = {"codes": q.codes, "scales": q.scales} | ({} if q.zeros is None else {"zeros": q.zeros})
        return {f"{prefix}.{name}": part for name, part in parts.items()} | {f"{prefix}.meta": _to_json(meta)}
    state = {
        prefix: q.codes.view(-1, 1),
        f"{prefix}.absmax": q.scales,
        f"{prefix}.quant_map": codebook(q.format).clone(),
    }
    meta = {"quant_type": q.format, "blocksize": q.block_size, "dtype": dtype, "shape": list(q.shape)}
    if q.nested_absmax is not None and q.nested_offset is not None:
        state[f"{prefix}.nested_absmax"] = q.nested_absmax
        state[f"{prefix}.nested_quant_map"] = codebook("dynamic8").clone()
        meta |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": q.nested_offset.item()}
    return state | {f"{prefix}.{STATE}{q.format}": _to_json(meta)}


def read_state(state: Mapping[str, Tensor], prefix: str) -> dict[str, Any]:
    """The fields of the QuantizedTensor under this prefix; that its parts fit each other is for the tensor to check."""
    return _read_ours(state, prefix) if f"{prefix}.meta" in state else _read_bitsandbytes(state, prefix)


def _read_ours(state: Mapping[str, Tensor], prefix: str) -> dict[str, Any]:
    key = f"{prefix}.meta"
    meta = _from_json(state, key)
    format = _one_of(meta, key, "format", [name for name, spec in FORMATS.items() if not spec.table])
    dtype = DTYPES[_one_of(meta, key, "dtype", DTYPES)]
    zeros = _scales(state, f"{prefix}.zeros") if FORMATS[format].affine else None
    codes, scales = _part(state, f"{prefix}.codes"), _scales(state, f"{prefix}.scales")
    return {
        "format": format,
        "shape": _shape(meta, key),
        "dtype": dtype,
        "block_size": _get(meta, key, "block_size"),
        "codes": codes,
        "scales": scales,
        "zeros": zeros,
    }


def _read_bitsandbytes(state: Mapping[str, Tensor], prefix: str) -> dict[str, Any]:
    keys = [f"{prefix}.{STATE}{name}" for name, spec in FORMATS.items() if spec.table]
    key = next((k for k in keys if k in state), None)
    if key is None:
        raise ValueError(f"no quantized weight here: none of {', '.join(keys)} and {prefix}.meta is among the keys")
    format = key.rpartition("__")[2]
    meta = _from_json(state, key)
    if _get(meta, key, "quant_type") != format:
        raise ValueError(f"{key} says quant_type {meta['quant_type']!r}")
    shape = _shape(meta, key)
    dtype = DTYPES[_one_of(meta, key, "dtype", DTYPES)]
    codes = _part(state, prefix)
    if codes.dtype != torch.uint8:  # quant_storage: the same bytes under another dtype
        codes = codes.contiguous().view(torch.uint8)
    _same_table(state, f"{prefix}.quant_map", format)
    nested = offset = None
    if f"{prefix}.nested_absmax" in state or "nested_offset" in meta:
        _same_table(state, f"{prefix}.nested_quant_map", "dynamic8")
        if _get(meta, key, "nested_blocksize") != NESTED_BLOCK:
            raise ValueError(f"{key} says nested_blocksize {meta['nested_blocksize']!r}; known: {NESTED_BLOCK}")
        value = _get(meta, key, "nested_offset")
        if type(value) not in (int, float) or not abs(value) <= torch.finfo(torch.float32).max:  # NaN too
            raise ValueError(f"{key} says nested_offset {value!r}, which is no finite fp32 number")
        nested, offset = (
            _scales(state, f"{prefix}.nested_absmax"),
            torch.tensor(value, dtype=torch.float32, device=codes.device),
        )
    return {
        "format": format,
        "shape": shape,
        "dtype": dtype,
        "block_size": _get(meta, key, "blocksize"),
        "codes": codes.reshape(-1),
        "scales": _scales(state, f"{prefix}.absmax"),
        "nested_absmax": nested,
        "nested_offset": offset,
    }


def _part(state: Mapping[str, Tensor], key: str) -> Tensor:
    tensor = state.get(key)
    if not isinstance(tensor, Tensor):
        raise ValueError(
            f"{key} is missing" if tensor is None else f"{key} must be a tensor, got {type(tensor).__name__}"
        )
    return tensor


def _scales(state: Mapping[str, Tensor], key: str) -> Tensor:
    scales = _part(state, key)
    if scales.is_floating_point() and not torch.isfinite(scales).all():
        raise ValueError(f"{key} holds NaN or infinity")
    return scales


def _same_table(state: Mapping[str, Tensor], key: str, name: str) -> None:
    """Refuse a table that is not the format's own: kernels have it built in, so decoding would be silently wrong."""
    table = _part(state, key)
    if table.dtype != torch.float32 or not torch.equal(table.cpu().reshape(-1), codebook(name)):
        raise ValueError(f"{key} is not the table of {name}")


def _to_json(meta: dict[str, Any]) -> Tensor:
    return torch.tensor(list(json.dumps(meta).encode("utf-8")), dtype=torch.uint8)


def _from_json(state: Mapping[str, Tensor], key: str) -> dict[str, Any]:
    tensor = _part(state, key)
    if tensor.dtype != torch.uint8 or tensor.dim() != 1:
        raise ValueError(f"{key} must be JSON as a row of uint8 bytes, got {tuple(tensor.shape)} of {tensor.dtype}")
    try:
        meta = json.loads(bytes(tensor.tolist()).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{key} is not valid JSON: {error}") from error
    if not isinstance(meta, dict):
        raise ValueError(f"{key} must be a JSON object, got {type(meta).__name__}")
    return meta


def _get(meta: dict[str, Any], key: str, field: str) -> Any:
    if field not in meta:
        raise ValueError(f"{key} has no {field!r}")
    return meta[field]


def _one_of(meta: dict[str, Any], key: str, field: str, known: Any) -> str:
    value = _get(meta, key, field)
    if not isinstance(value, str) or value not in known:
        raise unknown(f"{field} in {key}", value, known)
    return value


def _shape(meta: dict[str, Any], key: str) -> tuple[int, ...]:
    shape = _get(meta, key, "shape")
    if not isinstance(shape, list) or len(shape) > 8 or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"{key} says shape {shape!r}: wanted a list of at most 8 sizes")
    return tuple(shape)
