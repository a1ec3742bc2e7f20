"""Loading from folders: what must be refused, and what a model remembers of its source."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lowrank
from lowrank.errors import ConfigError, FileFormatError
from lowrank.models.decoder import Decoder
from lowrank.models.families import config_from_json
from lowrank.models.load import load
from lowrank.quant.linear import QuantizedLinear, quantize_model

MODELS = Path(__file__).parent.parent / "fixtures" / "models"


def test_missing_things(tmp_path: Path, copied) -> None:
    with pytest.raises(FileNotFoundError, match=r"wanted a folder with config\.json, a \.gguf file, or 'quickstart'"):
        load(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"neither config\.json nor a \.gguf"):
        load(tmp_path)
    folder = copied("llama")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no weights: wanted model\.safetensors"):
        load(folder)


def test_truncated_weights(copied) -> None:
    file = copied("llama") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(FileFormatError, match=r"model\.safetensors is truncated, damaged"):
        load(file.parent)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_a_pickle_is_refused_with_the_way_out(copied, name: str) -> None:
    folder = copied("llama")
    (folder / "model.safetensors").rename(folder / name)
    for source in (folder, folder / name):
        with pytest.raises(ValueError, match=r"is a pickle.*safetensors\.torch\.save_file"):
            load(source)


def test_a_tensor_missing_of_the_wrong_shape_or_left_over(copied) -> None:
    file = copied("llama") / "model.safetensors"
    whole, path = load_file(file), "model.layers.1.mlp.down_proj.weight"
    for tensors, message in (
        ({k: v for k, v in whole.items() if k != path}, r"no tensor for model\.layers\.1\.mlp\.down_proj\.weight"),
        ({**whole, path: whole[path].T.contiguous()}, r"down_proj\.weight is \[112, 64\], its configuration asks for"),
        ({**whole, "model.layers.7.mlp.x": torch.zeros(1)}, r"no place for: model\.layers\.7\.mlp\.x"),
        ({**whole, path: whole[path].to(torch.int8)}, r"type torch\.int8, wanted floats"),
    ):
        save_file(tensors, file)
        with pytest.raises(FileFormatError, match=message):
            load(file.parent, progress=False)


def test_shards(copied) -> None:
    folder = copied("llama_tied_sharded")
    index = folder / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    (folder / "model-00002-of-00004.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"names model-00002-of-00004\.safetensors, which is not in the folder"):
        load(folder)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(raw["weight_map"], "../secret.safetensors")}))
    with pytest.raises(FileFormatError, match="wanted a plain name in the same folder"):
        load(folder)
    index.write_text("[]")
    with pytest.raises(FileFormatError, match="weight_map"):
        load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "lama"}, r"'lama'.*did you mean 'llama'.*known: .*chatglm.*qwen3"),
        ({"model_type": None}, "known: "),
        ({"num_local_experts": 8}, "a mixture of experts"),
        ({"vision_config": {"a": 1}}, "a multimodal model"),
        ({"num_hidden_layers": 1 << 40}, "num_hidden_layers must be a whole number"),
        ({"num_hidden_layers": -1}, "num_hidden_layers must be a whole number"),
        ({"hidden_size": "64"}, "hidden_size must be a whole number"),
        ({"vocab_size": None}, "vocab_size must be a whole number"),
        ({"num_key_value_heads": 3}, "cannot share 3 key-value heads"),
        ({"hidden_act": "mish"}, "activation 'mish' is not implemented"),
        ({"rope_scaling": {"rope_type": "spiral"}}, "rope type 'spiral' is not implemented"),
        ({"rope_scaling": 3}, "must be an object"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a number"),
        ({"eos_token_id": "x"}, "eos_token_id must be a token id"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized with 'gptq'"),
    ],
)
def test_configurations_that_cannot_be_run(copied, change: dict, message: str) -> None:
    folder = copied("llama")
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, **change}))
    with pytest.raises(ConfigError, match=message):
        load(folder, progress=False)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "[" * 100_000])
def test_a_configuration_that_is_no_object(copied, text: str) -> None:
    folder = copied("llama")
    (folder / "config.json").write_text(text)
    with pytest.raises((FileFormatError, ConfigError), match=r"config\.json"):
        load(folder)


def test_a_huge_configuration_allocates_nothing(copied) -> None:
    """The shapes are compared with the file's before the first tensor is made."""
    folder = copied("llama")
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "intermediate_size": 1 << 23, "vocab_size": 1 << 23}))
    with pytest.raises(FileFormatError, match="its configuration asks for"):
        load(folder, progress=False)
    (folder / "config.json").write_text(json.dumps({**raw, "num_hidden_layers": 4096}))
    with pytest.raises(FileFormatError, match="has 21 tensors, its configuration asks for 4096 layers"):
        load(folder, progress=False)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="nf4-dq"):
        load(MODELS / "llama", quantize="nf5-dq")
    with pytest.raises(ValueError, match="floating-point type"):
        load(MODELS / "llama", dtype=torch.int8)


def test_both_spellings_give_one_base_hash_and_other_weights_another(copied) -> None:
    old = load(MODELS / "llama", progress=False)[0].origin
    new = load(copied("llama", "config_transformers5.json"), quantize="nf4", progress=False)[0].origin
    assert old.base_hash == new.base_hash and old.quantize is None and new.quantize == "nf4"
    file = Path(new.path) / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, file)
    assert load(new.path, progress=False)[0].origin.base_hash != old.base_hash


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
def test_loading_quantized_is_quantize_model(name: str) -> None:
    direct, _ = load(MODELS / name, quantize="nf4-dq", dtype=torch.float32, device="cpu", progress=False)
    after, _ = load(MODELS / name, dtype=torch.float32, device="cpu", progress=False)
    if name != "gpt2":  # its Conv1D layers are quantized on loading alone
        quantize_model(after, "nf4-dq")
        a, b = direct.state_dict(), after.state_dict()
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert not isinstance(direct.get_submodule(direct.family.names.lm_head), QuantizedLinear)
    assert sum(isinstance(m, QuantizedLinear) for m in direct.modules()) in (4 * 3, 7 * 2)


def test_tied_head_stays_one_tensor() -> None:
    model, _ = load(MODELS / "llama_tied_sharded", progress=False)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.dtype == torch.bfloat16


def test_a_file_of_the_bare_body(copied) -> None:
    """Without the first part of the paths, as some hub files are."""
    file = copied("gpt2") / "model.safetensors"
    save_file({k.removeprefix("transformer."): v for k, v in load_file(file).items()}, file)
    bare, whole = load(file.parent, progress=False)[0], load(MODELS / "gpt2", progress=False)[0]
    assert all(torch.equal(a, b) for a, b in zip(bare.parameters(), whole.parameters()))


def test_public_name() -> None:
    assert lowrank.load is load


@pytest.mark.parametrize("name", ["nf4_single", "nf4_double", "fp4"])
def test_bitsandbytes_checkpoints_are_read_as_they_are(name: str) -> None:
    folder = MODELS / "bnb4bit" / name
    model, _ = load(folder, dtype=torch.float32, device="cpu", progress=False)
    expected = load_file(folder / "expected.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(model(expected["input_ids"]), expected["logits"], atol=5e-5, rtol=0)
    assert sum(isinstance(m, QuantizedLinear) for m in model.modules()) == 14 and model.origin.quantize == "keep"
    with pytest.raises(ValueError, match=r"quantized already \(bitsandbytes 4 bit\)"):
        load(folder, quantize="int8", progress=False)


def test_a_damaged_bitsandbytes_checkpoint(copied, tmp_path: Path) -> None:
    source, folder = MODELS / "bnb4bit" / "nf4_double", tmp_path / "damaged"
    folder.mkdir()
    (folder / "config.json").write_text((source / "config.json").read_text())
    tensors = load_file(source / "model.safetensors")
    path = "model.layers.0.mlp.down_proj.weight"
    for change in (
        {f"{path}.quant_state.bitsandbytes__nf4": None},
        {f"{path}.absmax": torch.zeros(3, dtype=torch.uint8)},
    ):
        kept = {**tensors, **change}
        save_file({k: v for k, v in kept.items() if v is not None}, folder / "model.safetensors")
        with pytest.raises(FileFormatError, match=r"model\.layers\.0\.mlp\.down_proj"):
            load(folder, progress=False)


def test_nothing_to_keep() -> None:
    with pytest.raises(ValueError, match="has nothing to keep"):
        load(MODELS / "llama", quantize="keep", progress=False)


STREAMED = """
import sys, threading, time
from pathlib import Path
import torch
from lowrank.models.load import load

def anonymous() -> int:
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024

load(sys.argv[1], quantize="nf4-dq", device="cpu", progress=False)  # libraries and their buffers
before, peak, done = anonymous(), 0, False

def watch() -> None:
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.001)

watcher = threading.Thread(target=watch)
watcher.start()
model, _ = load(sys.argv[2], quantize="nf4-dq", device="cpu", progress=False)
done = True
watcher.join()
size = sum(p.numel() * p.element_size() for p in model.parameters())
print(peak - before, size)
"""


def test_loading_streams(copied, tmp_path: Path) -> None:
    """Beyond the model's own size: the largest tensor in fp32 and what quantizing it needs; never the file."""
    folder = tmp_path / "wide"
    folder.mkdir()
    raw = json.loads((MODELS / "llama" / "config.json").read_text())
    raw |= {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "vocab_size": 256}
    (folder / "config.json").write_text(json.dumps(raw | {"num_attention_heads": 8, "num_key_value_heads": 8}))
    with torch.device("meta"):
        model = Decoder(config_from_json(raw | {"num_attention_heads": 8, "num_key_value_heads": 8}))
    save_file({k: torch.randn(v.shape) for k, v in model.state_dict().items()}, folder / "model.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", STREAMED, str(MODELS / "llama"), str(folder)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    growth, size = map(int, done.stdout.split())
    file, largest = (folder / "model.safetensors").stat().st_size, 4 * 512 * 2048
    assert file > 200e6 and size < 40e6
    assert growth < size + 3 * largest, f"{growth / 1e6:.0f} MB for a model of {size / 1e6:.0f} MB"
