"""What we write, opened by the programs it is for: transformers, llama.cpp (by xllamacpp). Skipped where they are not.

pip install transformers xllamacpp && pytest -m peers tests/models
"""

import json
import shutil
from pathlib import Path

import pytest
import torch

import lowrank
from lowrank.files import read_tensors, write_tensors
from lowrank.models.export import export_hf
from lowrank.models.export_gguf import export_gguf
from lowrank.models.generate import generate_ids
from lowrank.models.load import load

pytestmark = pytest.mark.peers
MODELS = Path(__file__).parent.parent / "fixtures" / "models"
DECODERS = ["gemma2", "gemma3", "gpt2", "llama", "llama_tied_sharded", "mistral", "phi3", "qwen2", "qwen3"]
IDS = torch.arange(3, 51).view(2, 24)


def opened(path: Path) -> torch.nn.Module:
    return load(path, dtype=torch.float32, device="cpu", progress=False)[0]


def by_transformers(folder: Path):
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


@pytest.mark.parametrize("name", DECODERS)
def test_transformers_loads_a_merged_folder_to_equal_logits(tmp_path: Path, merged, name: str) -> None:
    pytest.importorskip("transformers")
    model = merged(opened(MODELS / name))
    export_hf(model, None, tmp_path / "out", shard_bytes=100_000)
    with torch.no_grad():
        torch.testing.assert_close(by_transformers(tmp_path / "out")(IDS).logits, model(IDS), atol=5e-5, rtol=0)


@pytest.mark.parametrize("name", ["llama_tied_sharded", "qwen2", "qwen3", "gemma2", "gemma3"])
def test_transformers_loads_what_was_a_gguf_file(tmp_path: Path, sayable, name: str) -> None:
    pytest.importorskip("transformers")
    export_gguf(opened(sayable(name)), None, tmp_path / "m.gguf")
    model = opened(tmp_path / "m.gguf")
    export_hf(model, None, tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(by_transformers(tmp_path / "out")(IDS).logits, model(IDS), atol=5e-5, rtol=0)


def test_transformers_reads_the_quickstart_model_and_its_tokenizer(tmp_path: Path, smollm2) -> None:
    transformers = pytest.importorskip("transformers")
    model, tokenizer = smollm2
    export_hf(model, tokenizer, tmp_path / "out", shard_bytes=200_000_000)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    cases = json.loads((MODELS.parent / "tokenizer" / "smollm2_cases.json").read_text(encoding="utf-8"))["cases"]
    assert all(theirs.encode(case["text"]) == case["ids"] for case in cases)
    talk = [{"role": "user", "content": "In 2024, what is 12 + 7?"}]
    text = theirs.apply_chat_template(talk, add_generation_prompt=True, tokenize=False)
    assert text == tokenizer.apply_chat_template(talk, add_generation_prompt=True)
    assert (theirs.eos_token_id, theirs.pad_token_id) == (tokenizer.eos_id, tokenizer.pad_id)
    ids = torch.tensor([theirs.encode(text)])
    with torch.no_grad():
        torch.testing.assert_close(by_transformers(tmp_path / "out")(ids).logits, model(ids), atol=2e-4, rtol=0)


def test_bitsandbytes_reads_our_four_bits(tmp_path: Path) -> None:
    bitsandbytes, transformers = map(pytest.importorskip, ("bitsandbytes", "transformers"))
    model, _ = load(MODELS / "qwen2", quantize="nf4-dq", dtype=torch.float32, device="cpu", progress=False)
    export_hf(model, None, tmp_path / "out", quantized=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    layers = {path: m for path, m in theirs.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}
    assert len(layers) == 14
    for path, layer in layers.items():
        ours = model.get_submodule(path).quantized
        if ours.shape[1] % 64 == 0:  # its CPU decoder is wrong where rows are no whole blocks
            got = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            torch.testing.assert_close(got.float(), ours.dequantize(torch.float32), rtol=0, atol=0)


def test_repetition_penalty_is_the_one_of_transformers(tiny, tmp_path: Path) -> None:
    export_hf(tiny, None, tmp_path / "out")
    theirs = by_transformers(tmp_path / "out")
    prompts = [[5, 9, 33, 9], [101, 7, 7, 12]]
    for penalty in (1.3, 0.8):
        wanted = theirs.generate(
            torch.tensor(prompts), max_new_tokens=16, do_sample=False, repetition_penalty=penalty, eos_token_id=None,
            pad_token_id=0,
        )[:, 4:]  # fmt: skip
        assert generate_ids(tiny, prompts, 16, repetition_penalty=penalty) == wanted.tolist()


# ---- llama.cpp


def answers(file: Path, path: str, request: dict) -> dict:
    xllamacpp = pytest.importorskip("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.verbosity = str(file), 512, -1
    params.cpuparams.n_threads = 1
    return getattr(xllamacpp.Server(params), path)(request)


@pytest.mark.parametrize("name", ["llama", "llama_tied_sharded", "qwen2", "qwen3", "gemma2", "gemma3"])
def test_llama_cpp_gives_our_probabilities(tmp_path: Path, sayable, talking_folder: Path, name: str) -> None:
    """Architecture, permutation, norms, rope and tokenizer at once: log-probabilities of the five likeliest tokens."""
    pytest.importorskip("xllamacpp")
    folder = with_words(sayable(name), talking_folder)
    model, tokenizer = load(folder, dtype=torch.float32, device="cpu", progress=False)
    export_gguf(model, tokenizer, tmp_path / "m.gguf")
    for text in (f"the 12 men {i} on a boat" for i in range(50)):
        with torch.no_grad():
            ours = model(torch.tensor([tokenizer.encode(text)]))[0, -1].log_softmax(-1)
        if tokenizer.decode([int(ours.argmax())]).strip().isalnum():  # the server shows no half character
            break
    request = {"prompt": text, "max_tokens": 1, "temperature": 0, "logprobs": 5}
    found = answers(tmp_path / "m.gguf", "handle_completions", request)["choices"][0]["logprobs"]["content"][0]
    for token in found["top_logprobs"]:
        assert abs(token["logprob"] - float(ours[token["id"]])) < 0.02, (token, float(ours[token["id"]]))
    assert found["id"] == int(ours.argmax())


def with_words(folder: Path, talking: Path) -> Path:
    """The tiny model with the talking one's tokenizer and as many embeddings."""
    tensors = {}
    for file in folder.glob("model*.safetensors"):
        tensors |= read_tensors(file)
        file.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    generator = torch.Generator().manual_seed(0)
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        if key in tensors:
            tensors[key] = 0.3 * torch.randn(264, 64, generator=generator)
    write_tensors(folder / "model.safetensors", tensors)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"vocab_size": 264}))
    for file in talking.glob("tokenizer*"):
        shutil.copyfile(file, folder / file.name)
    return folder


def test_llama_cpp_talks_as_we_do(tmp_path: Path, smollm2) -> None:
    pytest.importorskip("xllamacpp")
    model, tokenizer = smollm2
    export_gguf(model, tokenizer, tmp_path / "m.gguf")
    for question in ("What is the capital of France?", "Who wrote Hamlet?", "Count from 17 to 23."):
        talk = [{"role": "user", "content": question}]
        request = {"messages": talk, "max_tokens": 24, "temperature": 0}
        found = answers(tmp_path / "m.gguf", "handle_chat_completions", request)["choices"][0]["message"]["content"]
        assert found.strip() == lowrank.generate(model, tokenizer, talk, max_new_tokens=24).strip()
