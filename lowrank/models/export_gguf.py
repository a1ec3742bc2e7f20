"""A model as a GGUF file, which llama.cpp and Ollama load: F16 or Q8_0, with tokenizer and chat template.

What the file's metadata cannot say of a model is refused, by reading them back. Llama's q and k are permuted and
Gemma's norms are written as 1 + w, as llama.cpp's own converter does.
"""

import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from lowrank.errors import unknown
from lowrank.files import staged
from lowrank.models.checkpoint import GGUFCheckpoint, open_checkpoint, unpermuted
from lowrank.models.export import Weight, dense, weights
from lowrank.models.families import ModelConfig, config_from_gguf, family_of, gguf_metadata, gguf_name
from lowrank.models.gguf_vocabulary import CONTROL, NORMAL, RULES, USER_DEFINED, build
from lowrank.models.rope import divisors
from lowrank.models.tokenizer import FastVocabulary, PieceVocabulary, Tokenizer

F32, F16, Q8_0 = 0, 1, 8
TYPES = {"F16": (F16, 1), "Q8_0": (Q8_0, 7)}  # stored type, general.file_type
ALIGNMENT = 32


def export_gguf(model: Any, tokenizer: Tokenizer | None, file: str | Path, kind: str = "F16") -> list[str]:
    """One .gguf file, its matrices in `kind` (F16 or Q8_0), vectors in F32. What llama.cpp does otherwise is returned.

    ValueError where the metadata of a GGUF file cannot say what this model is.
    """
    if kind not in TYPES:
        raise unknown("GGUF type", kind, TYPES)
    found = weights(model)
    untied = model.family.names.lm_head + ".weight" in found
    config: ModelConfig = replace(model.config, tied=model.config.tied and not untied)
    metadata = {**gguf_metadata(config), "general.name": Path(model.origin.path).stem}
    metadata |= {"general.file_type": TYPES[kind][1], "general.quantization_version": 2}
    if tokenizer is not None:
        metadata |= tokenizer_metadata(model, tokenizer)
    stored: list[tuple[str, tuple[int, ...], int, Callable[[], Tensor]]] = []
    for path, weight in found.items():
        shape = tuple(weight.shape)
        type_ = F32 if len(shape) == 1 else F16 if shape[-1] % 32 else TYPES[kind][0]
        stored.append((gguf_name(config, path), shape, type_, lambda p=path, w=weight: _converted(config, p, w)))  # type: ignore[misc]
    factors = None
    if config.rope is not None and config.rope.kind in ("llama3", "factors"):
        by = divisors(config.rope)
        factors = tuple(by.tolist())
        stored.append(("rope_freqs.weight", (len(factors),), F32, lambda: by))
    notes = _read_back(config, metadata, {name: shape for name, shape, *_ in stored}, factors)
    with staged(file) as target, open(target, "wb") as out:
        out.write(_header(metadata, stored))
        for _, _, type_, value in stored:
            out.write(bytes(-out.tell() % ALIGNMENT))
            _write_tensor(out, value().float(), type_)
        out.write(bytes(-out.tell() % ALIGNMENT))
    return notes


def _converted(config: ModelConfig, path: str, weight: Weight) -> Tensor:
    """As llama.cpp's converter writes it: rows of q and k in pairs of neighbours (llama), norms as 1 + w (gemma)."""
    family, value, (*_, module, leaf) = family_of(config), dense(weight).cpu(), path.split(".")
    if family.gguf == "llama" and module in (family.names.q, family.names.k):
        heads = config.n_heads if module == family.names.q else config.n_kv_heads
        return value[unpermuted(len(value), heads).argsort()]
    if family.norm == "rms+1" and value.dim() == 1 and leaf == "weight":
        return value.float() + 1
    return value


def _read_back(
    config: ModelConfig, metadata: dict[str, Any], shapes: dict[str, tuple[int, ...]], factors: tuple[float, ...] | None
) -> list[str]:
    """What a reader of the file would take the model for, against what it is."""
    read = config_from_gguf(metadata, shapes, "the GGUF file", factors)
    if factors is not None:
        read = replace(read, rope=config.rope)
    notes = []
    if config.family == "mistral" and read.windows != config.windows:
        notes.append(
            f"llama.cpp attends to all tokens, this model to the last {config.windows[0]}: longer texts differ"
        )
        read = replace(read, windows=config.windows)
    free = ("family", "bos_id", "eos_ids", "pad_id")  # of these the tokenizer's metadata speak
    wrong = [f.name for f in fields(config) if f.name not in free and getattr(read, f.name) != getattr(config, f.name)]
    if wrong:
        says = "; ".join(
            f"{name} would be read as {getattr(read, name)}, it is {getattr(config, name)}" for name in wrong
        )
        raise ValueError(f"a GGUF file cannot say what this model is: {says}. Export a Hugging Face folder")
    return notes


def _header(metadata: dict[str, Any], stored: list[tuple[str, tuple[int, ...], int, Any]]) -> bytes:
    out = b"GGUF" + struct.pack("<IQQ", 3, len(stored), len(metadata))
    out += b"".join(_string(key) + _typed(value) for key, value in metadata.items())
    offset = 0
    for name, shape, type_, _ in stored:
        out += _string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), type_, offset)
        size = {F32: 4, F16: 2}.get(type_, 34 / 32) * torch.Size(shape).numel()
        offset += -(-int(size) // ALIGNMENT) * ALIGNMENT
    return out


def _string(text: str) -> bytes:
    raw = text.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw


def _typed(value: Any) -> bytes:
    """A metadata value behind its type."""
    kinds = {bool: (7, "?"), int: (4 if not isinstance(value, int) or value >= 0 else 5, "i"), float: (6, "f")}
    if isinstance(value, str):
        return struct.pack("<I", 8) + _string(value)
    if isinstance(value, list):
        inner = type(value[0]) if value else int
        if inner is str:
            return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(_string, value))
        number, letter = {**kinds, int: (5, "i")}[inner]
        return struct.pack("<IIQ", 9, number, len(value)) + struct.pack(f"<{len(value)}{letter}", *value)
    number, letter = kinds[type(value)]
    return struct.pack(f"<I{letter if number != 4 else 'I'}", number, value)


def _write_tensor(out: BinaryIO, value: Tensor, type_: int) -> None:
    """fp32 values in their stored form, a slab at a time."""
    flat = value.contiguous().view(-1)
    for part in flat.split(1 << 20):
        if type_ == Q8_0:  # blocks of 32: fp16 d = max|w| / 127, then round(w / d), halves away from zero
            blocks = part.view(-1, 32)
            d = blocks.abs().amax(dim=1, keepdim=True) / 127
            scaled = blocks * torch.where(d == 0, 0, 1 / d)
            codes = (scaled.sign() * (scaled.abs() + 0.5).floor()).to(torch.int8)
            part = torch.cat([d.to(torch.float16).view(torch.int8), codes], dim=1)
        out.write((part.half() if type_ == F16 else part).numpy().tobytes())


# ---- a tokenizer as GGUF metadata

PROBES = (
    "Hello, World's 1234567 3.14",
    " two  three   spaces\n\n\n\tand tabs \r\n end ",
    "naïve café, Größe, 你好世界, 123年, 😀👍🏽",
    "I'll WE'VE don't; x_1=f(y)+2**3 // a-b",
    "ABC١٢٣ ²³ e\u0301 \u00a0\u3000",
)


def tokenizer_metadata(model: Any, tokenizer: Tokenizer) -> dict[str, Any]:
    """`tokenizer.*` keys that give the same ids on the probes. ValueError where no rule of the format does."""
    checkpoint, found = open_checkpoint(model.origin.path), None
    if isinstance(checkpoint, GGUFCheckpoint):
        own = checkpoint.gguf.metadata
        if own.get("tokenizer.ggml.model") is not None:
            found = {k: v for k, v in own.items() if k.startswith("tokenizer.ggml.")}
    if found is None:
        found = next((m for m in _candidates(tokenizer, model.config.vocab_size) if _same_ids(m, tokenizer)), None)
    if found is None:
        raise ValueError(
            "no rule that GGUF metadata can name cuts text as this tokenizer does (tried: "
            f"{', '.join(RULES)}, sentencepiece): export a Hugging Face folder and convert it with llama.cpp's script"
        )
    others = sorted(tokenizer.eos_ids - {tokenizer.eos_id})
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "padding": tokenizer.pad_id, "eot": [*others, None][0]}
    found |= {f"tokenizer.ggml.{name}_token_id": id for name, id in ids.items() if id is not None}
    found["tokenizer.ggml.add_bos_token"] = tokenizer.policy["adds_bos"]
    if tokenizer.chat_template is not None:
        found["tokenizer.chat_template"] = tokenizer.chat_template
    return found


def _same_ids(metadata: dict[str, Any], tokenizer: Tokenizer) -> bool:
    built = FastVocabulary(build(metadata, "the tokenizer"))
    return all(built.encode(text, False, True) == tokenizer.encode(text, parse_special=True) for text in PROBES)


def _candidates(tokenizer: Tokenizer, size: int) -> Iterator[dict[str, Any]]:
    vocabulary: Any = tokenizer.vocabulary
    tokens = [f"[PAD{i}]" for i in range(size)]  # places of the embedding without a token
    types, scores = [5] * size, [0.0] * size
    found: dict[str, Any] = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    rules: list[dict[str, Any]] = [{}]
    if isinstance(vocabulary, PieceVocabulary):
        inner = vocabulary.inner
        for i in range(vocabulary.size):
            tokens[i], scores[i] = inner.id_to_piece(i), inner.get_score(i)
            kinds = (inner.is_unknown, inner.is_control, inner.is_unused, inner.is_byte)
            types[i] = next((kind for is_, kind in zip(kinds, (2, CONTROL, 5, 6)) if is_(i)), NORMAL)
        unknown_id = inner.unk_id()
    else:
        raw = json.loads(vocabulary.inner.to_str())
        if raw["model"]["type"] != "BPE":
            return
        special = {token["id"]: token["special"] for token in raw["added_tokens"]}
        merges = [m.split(" ", 1) if isinstance(m, str) else m for m in raw["model"]["merges"]]
        ranks = {"".join(m): -float(i) for i, m in reversed(list(enumerate(merges)))}
        fallback = bool(raw["model"].get("byte_fallback"))
        unknown_id = vocabulary.id(raw["model"].get("unk_token") or "")
        for token, i in vocabulary.inner.get_vocab(with_added_tokens=True).items():
            tokens[i], scores[i] = token, ranks.get(token, -1e6)
            types[i] = NORMAL if i not in special else CONTROL if special[i] else USER_DEFINED
            if fallback and len(token) == 6 and token.startswith("<0x"):
                types[i] = 6
        joined = [" ".join(m) for m in merges]
        rules = rules if fallback else [{"tokenizer.ggml.pre": rule, "tokenizer.ggml.merges": joined} for rule in RULES]
    for rule in rules:
        if rule:
            yield {**found, "tokenizer.ggml.model": "gpt2", **rule}
            continue
        found |= {"tokenizer.ggml.scores": scores, "tokenizer.ggml.unknown_token_id": unknown_id or 0}
        for space in (True, False):
            yield {**found, "tokenizer.ggml.model": "llama", "tokenizer.ggml.add_space_prefix": space}
