"""What is written for other tools reads back to equal numbers, by us and by the packages that own the formats."""

import json
from pathlib import Path

import gguf
import pytest
import torch
from torch import nn

import lowrank
from lowrank.methods.lora import LoRAConfig
from lowrank.methods.prompt import PromptConfig
from lowrank.models.export import _write_tokenizer, export_hf, own_generation, weights
from lowrank.models.export_gguf import export_gguf, tokenizer_metadata
from lowrank.models.gguf import GGUF
from lowrank.models.load import load
from lowrank.models.tokenizer import gguf_tokenizer, load_tokenizer
from lowrank.quant.linear import QuantizedLinear
from lowrank.training.contract import GREEDY

MODELS = Path(__file__).parent.parent / "fixtures" / "models"
DECODERS = sorted(p.parent.name for p in MODELS.glob("*/meta.json") if not p.parent.name.startswith("bert"))
IDS = torch.arange(3, 51).view(2, 24)


def opened(path: Path, **options: object) -> nn.Module:
    return load(path, dtype=torch.float32, device="cpu", progress=False, **options)[0]


def same(a: nn.Module, b: nn.Module, atol: float = 1e-5) -> None:
    with torch.no_grad():
        torch.testing.assert_close(a(IDS), b(IDS), atol=atol, rtol=0)


@pytest.mark.parametrize("quantize", [None, "nf4-dq", "int4"])
@pytest.mark.parametrize("name", DECODERS)
def test_a_merged_model_as_a_folder(tmp_path: Path, merged, name: str, quantize: str | None) -> None:
    model = merged(opened(MODELS / name, quantize=quantize), "all-linear")
    export_hf(model, None, tmp_path / "out", shard_bytes=100_000)
    assert len(list((tmp_path / "out").glob("model-0*.safetensors"))) > 2
    again = opened(tmp_path / "out")
    assert again.config == model.config and not any(isinstance(m, QuantizedLinear) for m in again.modules())
    same(again, model)
    with pytest.raises(FileExistsError, match="exists already"):
        export_hf(model, None, tmp_path / "out")


def test_an_encoder_as_a_folder(tmp_path: Path, merged) -> None:
    model = merged(opened(MODELS / "bert_token_cls"), ["query", "value"], train_also=["classifier"])
    export_hf(model, None, tmp_path / "out")
    same(opened(tmp_path / "out"), model)


def test_what_is_not_merged_is_refused_and_nothing_is_left(tmp_path: Path, tiny: nn.Module) -> None:
    lowrank.attach(tiny, LoRAConfig(rank=2))
    with pytest.raises(ValueError, match="not merged"):
        export_hf(tiny, None, tmp_path / "out")
    lowrank.attach(tiny, PromptConfig(tokens=2), name="p")
    with pytest.raises(ValueError, match="not merged"):
        export_gguf(tiny, None, tmp_path / "out.gguf")
    lowrank.activate(tiny, None)
    tiny.config = None
    with pytest.raises(AttributeError):
        export_hf(tiny, None, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_bias_that_the_files_have_no_place_for_is_not_dropped(tmp_path: Path, tiny: nn.Module, merged) -> None:
    merged(tiny).model.layers[0].self_attn.q_proj.base.bias = nn.Parameter(torch.ones(64))
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj has a bias from its adapter"):
        export_hf(tiny, None, tmp_path / "out")


def test_a_failure_in_the_middle_leaves_nothing(tmp_path: Path, tiny: nn.Module, monkeypatch) -> None:
    monkeypatch.setattr("lowrank.models.export.save_file", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        export_hf(tiny, None, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("also", ["lm_head", "embed_tokens"])
def test_a_tied_head_that_was_trained_is_written(tmp_path: Path, merged, also: str) -> None:
    model = merged(opened(MODELS / "llama_tied_sharded"), ["q_proj"], train_also=[also])
    export_hf(model, None, tmp_path / "out")
    again = opened(tmp_path / "out")
    same(again, model)
    export_gguf(model, None, tmp_path / "out.gguf")
    assert ("output.weight" in GGUF(tmp_path / "out.gguf").tensors) == (not again.config.tied)


def test_nf4_as_bitsandbytes_stores_it(tmp_path: Path) -> None:
    model = opened(MODELS / "qwen2", quantize="nf4-dq")
    export_hf(model, None, tmp_path / "out", quantized=True)
    again = opened(tmp_path / "out")
    assert again.origin.quantize == "keep" and sum(isinstance(m, QuantizedLinear) for m in again.modules()) == 14
    same(again, model, atol=0)
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert settings["bnb_4bit_use_double_quant"] and settings["llm_int8_skip_modules"] == ["lm_head"]


def rounded(model: nn.Module, kind: str) -> nn.Module:
    """The model with its matrices as the gguf package would store and read them."""
    for path, value in weights(model).items():
        if value.dim() == 2:
            stored = gguf.GGMLQuantizationType[kind if value.shape[1] % 32 == 0 else "F16"]
            values = gguf.quants.dequantize(gguf.quants.quantize(value.numpy(), stored), stored)
            model.get_parameter(path).data.copy_(torch.from_numpy(values.astype("float32")))
    return model


@pytest.mark.parametrize("name", ["llama", "llama_tied_sharded", "mistral", "qwen2", "qwen3", "gemma2", "gemma3"])
def test_a_gguf_file_reads_back(tmp_path: Path, sayable, name: str) -> None:
    model = opened(sayable(name))
    notes = export_gguf(model, None, tmp_path / "out.gguf")
    assert bool(notes) == (name == "mistral")  # which loses its window of 8 tokens there
    again, model = opened(tmp_path / "out.gguf"), rounded(model, "F16")
    with torch.no_grad():
        for ids in (IDS[:, :8], IDS) if name != "mistral" else (IDS[:, :8],):
            torch.testing.assert_close(again(ids), model(ids), atol=2e-5, rtol=0)


CANNOT = {"phi3": "'phi3'", "gpt2": "'gpt2'", "chatglm3": "'chatglm'", "gemma2": "attn_scale would be read as"}


@pytest.mark.parametrize(("name", "says"), CANNOT.items())
def test_what_a_gguf_file_cannot_say_is_refused(tmp_path: Path, name: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        export_gguf(opened(MODELS / name), None, tmp_path / "out.gguf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
def test_the_gguf_package_reads_what_it_would_have_written(tmp_path: Path, tiny: nn.Module, kind: str) -> None:
    export_gguf(tiny, None, tmp_path / "out.gguf", kind)
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    assert reader.fields["general.architecture"].contents() == "llama"
    assert reader.fields["general.file_type"].contents() == {"F16": 1, "Q8_0": 7}[kind]
    assert reader.fields["llama.rope.freq_base"].contents() == 500000.0
    rows = {t.name: t for t in reader.tensors}
    assert len(rows) == 2 * 9 + 3 + 1 and rows["blk.0.attn_norm.weight"].tensor_type.name == "F32"
    up, wanted = rows["blk.1.ffn_up.weight"], weights(tiny)["model.layers.1.mlp.up_proj.weight"].numpy()
    assert up.tensor_type.name == kind and list(up.shape) == [64, 112]
    raw = gguf.quants.quantize(wanted, gguf.GGMLQuantizationType[kind])
    assert up.data.tobytes() == raw.tobytes()
    down = rows["blk.1.ffn_down.weight"]  # rows of 112 are no whole blocks of 32
    assert down.tensor_type.name == "F16"
    same(opened(tmp_path / "out.gguf"), rounded(tiny, kind))


def test_llama_3_s_frequencies_go_through_gguf_and_back(tmp_path: Path, copied) -> None:
    folder = copied("llama")
    raw = json.loads((folder / "config.json").read_text())
    raw["rope_scaling"] |= {"original_max_position_embeddings": 8192, "factor": 32.0}
    (folder / "config.json").write_text(json.dumps(raw))
    model = opened(folder)
    export_gguf(model, None, tmp_path / "m.gguf")
    middle = opened(tmp_path / "m.gguf")
    assert middle.config.rope.kind == "factors"
    same(middle, rounded(model, "F16"))
    export_hf(middle, None, tmp_path / "back")
    again = opened(tmp_path / "back")
    assert again.config.rope == model.config.rope
    same(again, middle)


@pytest.mark.parametrize("name", ["llama_tied_sharded", "qwen2", "qwen3", "gemma2", "gemma3"])
def test_a_config_json_is_made_for_a_gguf(tmp_path: Path, sayable, name: str) -> None:
    model = opened(sayable(name))
    export_gguf(model, None, tmp_path / "m.gguf")
    middle = opened(tmp_path / "m.gguf")
    export_hf(middle, None, tmp_path / "back")
    same(opened(tmp_path / "back"), middle, atol=0)
    raw = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (
        raw["architectures"] == [f"{model.config.family.capitalize()}ForCausalLM"] and raw["torch_dtype"] == "float32"
    )


def test_tokenizer_template_and_settings_of_a_folder(tmp_path: Path, talking_folder: Path) -> None:
    model, tokenizer = load(talking_folder, dtype=torch.float32, progress=False)
    other = tokenizer.with_template("plain")
    export_hf(model, other, tmp_path / "out", generation={**GREEDY, "repetition_penalty": 1.1})
    again = load_tokenizer(tmp_path / "out")
    assert again.hash == tokenizer.hash and again.policy == tokenizer.policy
    assert again.chat_template == other.chat_template == (tmp_path / "out" / "chat_template.jinja").read_text()
    wanted = {"do_sample": False, "repetition_penalty": 1.1, "bos_token_id": 1, "eos_token_id": [2], "pad_token_id": 0}
    assert own_generation(tmp_path / "out") == wanted


def test_a_byte_level_tokenizer_through_gguf_and_back(tmp_path: Path, talking_folder: Path) -> None:
    model, tokenizer = load(talking_folder, dtype=torch.float32, progress=False)
    export_gguf(model, tokenizer, tmp_path / "m.gguf")
    metadata = GGUF(tmp_path / "m.gguf").metadata
    assert metadata["tokenizer.ggml.pre"] == "smollm" and metadata["general.name"] == "tiny-llama"
    middle, from_file = load(tmp_path / "m.gguf", dtype=torch.float32, progress=False)
    export_hf(middle, from_file, tmp_path / "back")
    back = load_tokenizer(tmp_path / "back")
    for text in ("the 12 men of 2024", "on a\n\n line  é你😀", "<|im_start|>user"):
        ids = tokenizer.encode(text, parse_special=True)
        assert from_file.encode(text, parse_special=True) == ids == back.encode(text, parse_special=True)
        assert back.decode(ids, skip_special=False) == text
    assert from_file.policy == tokenizer.policy == back.policy and back.chat_template == tokenizer.chat_template


def sentencepiece_metadata() -> dict[str, object]:
    pieces = ["▁", "a", "b", "c", "bc", "ab", "▁ab", "▁▁", "l", "o", "▁l", "▁lo"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *pieces]
    return {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + [-9e3, -9e3, -9e3, -9e3, -3.0, -2.0, -4.0, -1.0, -9e3, -9e3, -5.0, -6.0],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces), "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.unknown_token_id": 0,
    }  # fmt: skip


def test_a_sentencepiece_vocabulary_through_gguf_and_back(tmp_path: Path, talking_folder: Path) -> None:
    """Its BOS comes from the post-processor in tokenizer.json, its scores from the order of the merges."""
    tokenizer = gguf_tokenizer(sentencepiece_metadata(), "x")
    (tmp_path / "t").mkdir()
    _write_tokenizer(tokenizer, tmp_path / "x.gguf", tmp_path / "t")
    back = load_tokenizer(tmp_path / "t")
    for text in ("abc", "a  b", "é", "lo\n ab", "hello</s>"):
        ids = tokenizer.encode(text, add_special=True, parse_special=True)
        assert back.encode(text, add_special=True, parse_special=True) == ids and ids[0] == 1
    model, _ = load(talking_folder, dtype=torch.float32, progress=False)
    grown = type(model.config)(**{**vars(model.config), "vocab_size": 280})
    model.config = grown
    metadata = tokenizer_metadata(model, back)
    again = gguf_tokenizer(metadata, "y")
    assert metadata["tokenizer.ggml.add_bos_token"] and metadata["tokenizer.ggml.tokens"][-1] == "[PAD279]"
    for text in ("abc", "a  b", "é", "lo\n ab", "hello</s>"):
        ids = tokenizer.encode(text, parse_special=True)
        assert again.encode(text, parse_special=True) == ids


def test_a_tokenizer_that_gguf_cannot_say_is_refused(tmp_path: Path, talking_folder: Path) -> None:
    model, tokenizer = load(talking_folder, dtype=torch.float32, progress=False)
    raw = json.loads(tokenizer.vocabulary.inner.to_str())
    raw["pre_tokenizer"]["pretokenizers"][1]["pattern"]["Regex"] = "."  # every character alone
    folder = tmp_path / "t"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=r"no rule that GGUF metadata can name.*smollm"):
        export_gguf(model, load_tokenizer(folder), tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()
