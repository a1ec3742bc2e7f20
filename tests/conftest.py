"""Kernels run in Triton's interpreter where there is no GPU. Triton reads this once, when it is first imported.

And a tiny model that talks, with a run of it: for the tests of what comes after training.
"""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

LLAMA = Path(__file__).parent / "fixtures" / "models" / "llama_tied_sharded"


def byte_level_metadata() -> dict[str, object]:
    """A vocabulary of 3 control tokens, the 256 bytes and 5 merges, with SmolLM's rule of single digits."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that stand for themselves in GPT-2's table
    others = [b for b in range(256) if b not in visible]
    letters = {b: chr(b) for b in visible} | {b: chr(256 + i) for i, b in enumerate(others)}
    merges = [("t", "h"), ("th", "e"), (letters[32], "a"), ("o", "n"), ("1", "2")]
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *letters.values(), *(a + b for a, b in merges)]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(tokens) - 3),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
    }


@pytest.fixture(scope="session")
def talking_folder(tmp_path_factory) -> Path:
    """A Llama of two layers with tied embeddings, 264 tokens, tokenizer.json and ChatML."""
    from lowrank.files import read_tensors, write_tensors
    from lowrank.models.gguf_vocabulary import build

    folder = tmp_path_factory.mktemp("talking") / "tiny-llama"
    folder.mkdir()
    metadata = byte_level_metadata()
    size = len(metadata["tokenizer.ggml.tokens"])
    tensors = {}
    for file in LLAMA.glob("*.safetensors"):
        if file.name.startswith("model-"):
            tensors |= read_tensors(file)
    generator = torch.Generator().manual_seed(0)
    tensors["model.embed_tokens.weight"] = 0.5 * torch.randn(size, 64, generator=generator)
    write_tensors(folder / "model.safetensors", {k: v.float() for k, v in tensors.items()}, {"format": "pt"})
    config = json.loads((LLAMA / "config.json").read_text()) | {"vocab_size": size, "pad_token_id": 0}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(build(metadata, "test").to_str())
    template = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    template += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    settings = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def shaken(model: nn.Module) -> nn.Module:
    """The model with an adapter that changes something."""
    import lowrank
    from lowrank.adapter import adapted_layers
    from lowrank.methods.lora import LoRAConfig

    lowrank.attach(model, LoRAConfig(rank=4, alpha=16))
    torch.manual_seed(1)
    for _, layer in adapted_layers(model, "default"):
        for p in layer.adapters["default"].parameters():
            nn.init.normal_(p, std=0.1)
    return model


@pytest.fixture
def talking_run(talking_folder: Path, tmp_path: Path):
    """A function: the folder of a run on that model, its adapter trained to answer as `generation` says."""

    from lowrank.models.load import load
    from lowrank.store import save_adapter
    from lowrank.training.config import read_config, to_yaml
    from lowrank.training.contract import GREEDY

    def make(quantize: str | None = None, source: Path = talking_folder, **generation: object) -> Path:
        folder = tmp_path / "run"
        values = {"model": str(source), "quantize": quantize, "dtype": "float32", "adapter": {"method": "lora"}}
        (folder / "adapter").mkdir(parents=True)
        (folder / "config.yaml").write_text(to_yaml(read_config(values)))
        model = shaken(load(source, quantize=quantize, dtype=torch.float32, device="cpu", progress=False)[0])
        model.origin = replace(model.origin, generation={**GREEDY, **generation})
        save_adapter(model, folder / "adapter")
        return folder

    return make
