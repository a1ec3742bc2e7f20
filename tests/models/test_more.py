"""Stretched ropes, biases, BERT's sequence head against transformers; the page on adding a family, run."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lowrank.errors import ConfigError
from lowrank.models.families import FAMILIES, config_from_json
from lowrank.models.load import load

ROOT = Path(__file__).parents[2]
MODELS = ROOT / "tests" / "fixtures" / "models"
STRETCHED = json.loads((MODELS / "stretched.json").read_text())


@pytest.mark.parametrize("length", [24, 48])
@pytest.mark.parametrize("name", STRETCHED)
def test_stretched_ropes(copied, name: str, length: int) -> None:
    base, rope, positions = STRETCHED[name]
    folder, expected = copied(base), load_file(MODELS / "stretched.safetensors")
    raw = json.loads((folder / "config.json").read_text())
    raw |= {"rope_scaling": rope, "max_position_embeddings": positions}
    if base == "phi3":
        raw["original_max_position_embeddings"] = 32
    (folder / "config.json").write_text(json.dumps(raw))
    model, _ = load(folder, dtype=torch.float32, device="cpu", progress=False)
    plain, _ = load(MODELS / base, dtype=torch.float32, device="cpu", progress=False)
    ids = expected["input_ids"][:1, :length]
    with torch.no_grad():
        torch.testing.assert_close(model(ids)[:, -8:], expected[f"{name}.{length}"], atol=5e-5, rtol=0)
        assert (model(ids) - plain(ids)).abs().max() > 1e-3  # the stretching did something


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "llama3", "factor": 8.0}, r"'llama3' cannot work with (low|high)_freq_factor = None|original"),
        ({"rope_type": "linear"}, "'linear' cannot work with factor = None"),
        ({"rope_type": "linear", "factor": 0}, "factor = 0"),
        ({"rope_type": "yarn", "factor": "4"}, "factor = 4"),
        ({"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0] * 8}, "short_factor"),
        ({"rope_type": "dynamic", "factor": 1e39}, "factor"),
    ],
)
def test_ropes_that_cannot_be_computed_fail_when_they_are_read(rope: dict, message: str) -> None:
    raw = json.loads((MODELS / "mistral" / "config.json").read_text())
    with pytest.raises(ConfigError, match=message):
        config_from_json({**raw, "rope_scaling": rope})


def test_every_bias_and_a_head_dim_of_its_own() -> None:
    model, _ = load(MODELS / "llama_biased", dtype=torch.float32, device="cpu", progress=False)
    expected = load_file(MODELS / "llama_biased" / "logits.safetensors")
    assert model.model.layers[0].mlp.down_proj.bias is not None and model.config.head_dim == 12
    with torch.no_grad():
        torch.testing.assert_close(model(expected["input_ids"]), expected["logits"], atol=5e-5, rtol=0)


def test_chatglm_s_long_variant_multiplies_the_base_of_the_rope() -> None:
    raw = json.loads((MODELS / "chatglm3" / "config.json").read_text())
    assert config_from_json({**raw, "rope_ratio": 50}).rope.theta == 50 * config_from_json(raw).rope.theta == 500_000


def test_bert_s_sequence_head(copied) -> None:
    from safetensors.torch import save_file

    file, expected = copied("bert_token_cls") / "model.safetensors", load_file(MODELS / "bert_sequence.safetensors")
    raw = json.loads((file.parent / "config.json").read_text())
    raw |= {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "a", "1": "b", "2": "c"}}
    (file.parent / "config.json").write_text(json.dumps(raw))
    head = {k: v for k, v in expected.items() if k.startswith(("bert.", "classifier."))}
    save_file(load_file(file) | head, file)
    model, _ = load(file.parent, dtype=torch.float32, device="cpu", progress=False)
    ids, mask = expected["input_ids"], expected["mask"]
    with torch.no_grad():
        torch.testing.assert_close(model(ids, mask), expected["logits"], atol=5e-5, rtol=0)
        torch.testing.assert_close(model.hidden(ids, mask)[:, :2], expected["hidden"], atol=5e-5, rtol=0)


def test_the_page_on_adding_a_family(tmp_path: Path, monkeypatch) -> None:
    page = (ROOT / "docs" / "add-a-model.md").read_text()
    code = "\n".join(re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL))
    assert len(code.splitlines()) < 40 and "stablelm" not in FAMILIES
    shutil.copytree(MODELS / "stablelm", tmp_path / "tests" / "fixtures" / "models" / "stablelm")
    monkeypatch.chdir(tmp_path)
    try:
        exec(compile(code, "add-a-model.md", "exec"), {})
        raw = json.loads((MODELS / "stablelm" / "config.json").read_text())
        with pytest.raises(ConfigError, match="use_parallel_residual = True is not implemented for stablelm"):
            config_from_json({**raw, "use_parallel_residual": True})
    finally:
        FAMILIES.pop("stablelm", None)
    assert os.listdir(tmp_path) == ["tests"]
