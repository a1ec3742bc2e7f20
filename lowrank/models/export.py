"""A model as a Hugging Face folder, which transformers and vLLM load. (As a GGUF file: export_gguf.py.)

Adapters have to be merged first (`lowrank.merge`). Quantized weights are decoded, or written as bitsandbytes stores
them. Nothing is half written: the folder gets its name when all of it is there.
"""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors.torch import save_file
from tokenizers import processors
from torch import Tensor

from lowrank.adapter import AdaptedLinear, adapted_layers
from lowrank.files import read_json, staged, write_json, write_text
from lowrank.models.decoder import Conv1D
from lowrank.models.families import Rope, config_to_json
from lowrank.models.load import skeleton
from lowrank.models.rope import divisors
from lowrank.models.tokenizer import FastVocabulary, Tokenizer
from lowrank.quant.linear import QuantizedLinear
from lowrank.quant.tensor import QuantizedTensor

Weight = Tensor | QuantizedTensor


def weights(model: Any) -> dict[str, Weight]:
    """Every parameter by the checkpoint's own name, as it acts now, merged adapters inside; a tied head is left out."""
    for path, adapted in adapted_layers(model):
        if not adapted.unmerged and adapted.acting(adapted.active):
            raise ValueError(f"{path} carries an adapter that is not merged: call lowrank.merge(model) first")
    plain = skeleton(model.config)
    found: dict[str, Weight] = {}
    for path, _ in plain.named_parameters(remove_duplicate=False):
        parent, _, leaf = path.rpartition(".")
        layer = model.get_submodule(parent)
        layer = layer.base if isinstance(layer, AdaptedLinear) else layer
        if leaf == "weight" and isinstance(layer, QuantizedLinear):
            found[path] = layer.quantized
        else:
            found[path] = getattr(layer, leaf).detach()
        if leaf == "weight" and isinstance(plain.get_submodule(parent), Conv1D) and not isinstance(layer, Conv1D):
            found[path] = dense(found[path]).T  # as GPT-2 stores it
    for path, adapted in adapted_layers(model):
        if getattr(adapted.base, "bias", None) is not None and f"{path}.bias" not in found:
            raise ValueError(f"{path} has a bias from its adapter, which this family's files have no place for")
    names = model.family.names
    head, embed = (found.get(f"{module}.weight") for module in (names.lm_head, names.embed))
    if head is not None and embed is not None and model.config.tied and torch.equal(dense(head), dense(embed)):
        del found[f"{names.lm_head}.weight"]
    return found


def dense(weight: Weight) -> Tensor:
    """The numbers, in the dtype that the model works in."""
    return weight.dequantize(weight.dtype) if isinstance(weight, QuantizedTensor) else weight


# ---- a Hugging Face folder

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "vocab.txt",
)  # fmt: skip


def export_hf(
    model: Any,
    tokenizer: Tokenizer | None,
    folder: str | Path,
    shard_bytes: int = 5 * 10**9,
    quantized: bool = False,
    generation: dict[str, Any] | None = None,
) -> None:
    """config.json, safetensors in shards of `shard_bytes`, tokenizer, chat template, generation_config.json.

    `quantized` writes NF4 and FP4 weights as bitsandbytes' 4-bit checkpoint, else they are decoded. `generation` are
    the settings that servers take where a request says nothing (training/contract.py).
    """
    source = Path(model.origin.path)
    found = weights(model)
    with staged(folder) as target:
        target.mkdir()
        write_json(target / "config.json", _config(model, found, source, quantized))
        _write_shards(found, target, shard_bytes, quantized)
        if tokenizer is not None:
            _write_tokenizer(tokenizer, source, target)
            write_json(target / "generation_config.json", _generation(tokenizer, source, generation))


def _config(model: Any, found: dict[str, Weight], source: Path, quantized: bool) -> dict[str, Any]:
    if (source / "config.json").is_file():
        raw = read_json(source / "config.json")
        for key in ("quantization_config", "auto_map"):  # what no longer holds, and code, which is not copied
            raw.pop(key, None)
    else:
        raw = config_to_json(replace(model.config, rope=_as_llama3(model.config.rope)))
    names = model.family.names
    raw["dtype" if "dtype" in raw else "torch_dtype"] = str(dense(found[f"{names.embed}.weight"]).dtype)[6:]
    if model.config.tied and f"{names.lm_head}.weight" in found:
        raw["tie_word_embeddings"] = False  # an adapter trained one of the two
    kept = {path: w for path, w in found.items() if quantized and _as_bitsandbytes(w)}
    if kept:
        first = next(iter(kept.values()))
        assert isinstance(first, QuantizedTensor)
        linear = [path.removesuffix(".weight") for path, w in found.items() if path not in kept and w.shape[1:]]
        raw["quantization_config"] = {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": first.format,
            "bnb_4bit_use_double_quant": first.double_quant,
            "bnb_4bit_compute_dtype": str(first.dtype)[6:],
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": sorted({*linear, names.lm_head} - {names.embed}),
        }
    return dict(raw)


def _as_bitsandbytes(weight: Weight) -> bool:
    return isinstance(weight, QuantizedTensor) and weight.format in ("nf4", "fp4")


def _write_shards(found: dict[str, Weight], target: Path, shard_bytes: int, quantized: bool) -> None:
    """One file, or several and their index. Weights are decoded a shard at a time."""
    shards: list[list[str]] = [[]]
    size = total = 0
    for path, weight in found.items():
        numel = weight.numel if isinstance(weight, QuantizedTensor) else weight.numel()
        kept = quantized and _as_bitsandbytes(weight)
        n = weight.nbytes if kept else numel * weight.dtype.itemsize
        if shards[-1] and size + n > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(path)
        size, total = size + n, total + n
    where: dict[str, str] = {}
    for i, paths in enumerate(shards, start=1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{i:05}-of-{len(shards):05}.safetensors"
        tensors: dict[str, Tensor] = {}
        for path in paths:
            weight = found[path]
            if quantized and isinstance(weight, QuantizedTensor) and _as_bitsandbytes(weight):
                tensors |= weight.state_dict(path)
            else:
                tensors[path] = dense(weight)
        save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, target / name, {"format": "pt"})
        where |= dict.fromkeys(tensors, name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": where}
        write_json(target / "model.safetensors.index.json", index)


def _write_tokenizer(tokenizer: Tokenizer, source: Path, target: Path) -> None:
    """The source's own files, or tokenizer.json made of what a GGUF file says; in both the template as it is used."""
    folder = source if source.is_dir() else source.parent
    settings: dict[str, Any] = {}
    if isinstance(tokenizer.vocabulary, FastVocabulary) and not (folder / "config.json").is_file():
        inner, token = tokenizers.Tokenizer.from_str(tokenizer.vocabulary.inner.to_str()), tokenizer.vocabulary.token
        if (bos := tokenizer.vocabulary.add_bos) is not None:
            inner.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
                single=f"{token(bos)} $A", pair=f"{token(bos)} $A $B", special_tokens=[(token(bos), bos)]
            )
        write_text(target / "tokenizer.json", inner.to_str())
        ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "pad_token": tokenizer.pad_id}
        settings = {name: token(id) for name, id in ids.items() if id is not None}
        settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    else:
        for name in TOKENIZER_FILES:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, target / name)
        if (target / "tokenizer_config.json").is_file():
            settings = read_json(target / "tokenizer_config.json")
    if tokenizer.chat_template is not None:
        settings["chat_template"] = tokenizer.chat_template
        write_text(target / "chat_template.jinja", tokenizer.chat_template)
    write_json(target / "tokenizer_config.json", settings)


DRAWN = ("temperature", "top_k", "top_p", "repetition_penalty")


def _generation(tokenizer: Tokenizer, source: Path, generation: dict[str, Any] | None) -> dict[str, Any]:
    raw = own_generation(source)
    ends = sorted(tokenizer.eos_ids)
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": ends or None, "pad_token_id": tokenizer.pad_id}
    if generation is not None:
        raw = {key: value for key, value in raw.items() if key not in (*DRAWN, "do_sample")}
        drawn = generation["temperature"] > 0
        raw |= {key: generation[key] for key in DRAWN if drawn or key == "repetition_penalty"} | {"do_sample": drawn}
    return raw | {key: value for key, value in ids.items() if value is not None}


def own_generation(source: str | Path) -> dict[str, Any]:
    """A checkpoint's generation_config.json, {} where it has none."""
    path = Path(source) / "generation_config.json"
    raw = read_json(path) if path.is_file() else {}
    return raw if isinstance(raw, dict) else {}


def _as_llama3(rope: Rope | None) -> Rope | None:
    """The divisors in a Llama 3 GGUF file as the scaling that they were computed from."""
    if rope is None or rope.kind != "factors":
        return rope
    factors = torch.tensor(dict(rope.options)["factors"])
    guess = {"high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192}
    options = tuple(sorted({"factor": float(factors.max()), **guess}.items()))
    scaled = replace(rope, kind="llama3", options=options)
    if not torch.allclose(divisors(scaled), factors, rtol=1e-3):
        raise ValueError("the file's rope_freqs are not those of a Llama 3 model, so config.json cannot say them")
    return scaled
