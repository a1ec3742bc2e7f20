"""PEFT's files, both ways: its logits from its folders, and its own reading of ours where it is installed."""

import json
import re
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lowrank
from lowrank.errors import FileFormatError
from lowrank.methods.bottleneck import HoulsbyConfig
from lowrank.methods.lora import LoRAConfig
from lowrank.methods.olora import OLoRAConfig
from lowrank.methods.pissa import PiSSAConfig
from lowrank.targets import attachments

FIXTURES = Path(__file__).parents[1] / "fixtures"
FOLDERS = sorted(p.parent.name for p in (FIXTURES / "adapters").glob("*/adapter_config.json"))
INPUTS = load_file(FIXTURES / "adapters" / "inputs.safetensors")


def base():
    return lowrank.load(FIXTURES / "models" / "llama", dtype=torch.float32, progress=False)[0].eval()


def base_of(name: str):
    """The model that the adapter belongs to: PiSSA's was trained on a residual."""
    model = base()
    residual = FIXTURES / "adapters" / name / "residual.safetensors"
    if residual.is_file():
        with torch.no_grad():
            for key, value in load_file(residual).items():
                model.get_parameter(key.removeprefix("base_model.model.").replace(".base_layer", "")).copy_(value)
    return model


@torch.no_grad()
def logits(model, which: str = "input_ids"):
    return model(INPUTS[which], attention_mask=INPUTS["pad_mask"] if which == "pad_ids" else None)


def load(model, folder) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the raw PiSSA folder warns; that has a test of its own
        return lowrank.load_adapter(model, folder)


@pytest.mark.parametrize("name", FOLDERS)
def test_its_logits_come_out(name: str) -> None:
    model = base_of(name)
    adapter = load(model, FIXTURES / "adapters" / name)
    expected = load_file(FIXTURES / "adapters" / name / "expected.safetensors")
    assert (logits(model)[:, 3::4] - expected["input_ids"]).abs().max() < 5e-5
    got, real = logits(model, "pad_ids"), INPUTS["pad_mask"].bool()
    virtual = got.shape[1] - real.shape[1]
    real = torch.cat([real.new_ones(len(real), virtual), real], dim=1)[:, 3::4]
    assert (got[:, 3::4] - expected["pad_ids"])[real].abs().max() < 5e-5
    if "merged_input_ids" in expected:
        lowrank.merge(model, adapter)
        assert (logits(model)[:, 3::4] - expected["merged_input_ids"]).abs().max() < 1e-4


@pytest.mark.parametrize("name", FOLDERS)
def test_saved_and_read_again_every_tensor_is_the_same(name: str, tmp_path) -> None:
    model = base_of(name)
    adapter = load(model, FIXTURES / "adapters" / name)
    lowrank.save_adapter(model, tmp_path / "peft", adapter, format="peft")
    theirs = load_file(FIXTURES / "adapters" / name / "adapter_model.safetensors")
    ours = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    theirs = {key: value for key, value in theirs.items() if ".base_layer." not in key}
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    lowrank.save_adapter(model, tmp_path / "own", adapter)
    for folder in ("peft", "own"):
        other = base_of(name)
        lowrank.load_adapter(other, tmp_path / folder)
        assert torch.equal(logits(other), logits(model))


@pytest.mark.parametrize("name", FOLDERS)
def test_peft_itself_reads_what_we_write(name: str, tmp_path) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    model = base_of(name)
    adapter = load(model, FIXTURES / "adapters" / name)
    lowrank.save_adapter(model, tmp_path / "peft", adapter, format="peft")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(FIXTURES / "models" / "llama", dtype=torch.float32)
    theirs.load_state_dict(base_of(name).state_dict(), strict=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # a missing key is only a warning there
        wrapped = peft.PeftModel.from_pretrained(theirs, tmp_path / "peft").eval()
    with torch.no_grad():
        assert (wrapped(INPUTS["input_ids"]).logits - logits(model)).abs().max() < 5e-5


def test_a_pissa_adapter_becomes_a_lora_of_twice_the_rank(tmp_path) -> None:
    patterns = {"rank_pattern": {r"layers\.1\..*": 2}, "alpha_pattern": {r"layers\.0\..*": 3.0}}
    for config in (PiSSAConfig(rank=4, alpha=8, **patterns), OLoRAConfig(rank=4, alpha=8, rank_stabilized=True)):
        model = base()
        lowrank.attach(model, config, ["q_proj"])
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
        lowrank.save_adapter(model, tmp_path / "x", format="peft")
        other = base()
        lowrank.load_adapter(other, tmp_path / "x", name="lora")
        assert attachments(other)["lora"].config.rank == 8
        assert (logits(other) - logits(model)).abs().max() < 5e-5


def test_a_raw_pissa_folder_warns_that_it_needs_its_own_base() -> None:
    with pytest.warns(UserWarning, match="residual base of 'pissa'"):
        lowrank.load_adapter(base(), FIXTURES / "adapters" / "pissa")


def test_a_method_that_peft_has_not_is_refused(tmp_path) -> None:
    model = base()
    lowrank.attach(model, HoulsbyConfig())
    with pytest.raises(ValueError, match="PEFT has no file for method 'houlsby'"):
        lowrank.save_adapter(model, tmp_path / "x", format="peft")
    assert not (tmp_path / "x").exists()


def test_target_names_are_short_where_they_say_the_same(tmp_path) -> None:
    for targets, written in (
        (["q_proj", "v_proj"], ["q_proj", "v_proj"]),
        (r"model\.layers\.0\..*q_proj", ["model.layers.0.self_attn.q_proj"]),
    ):
        model = base()
        lowrank.attach(model, LoRAConfig(rank=2), targets)
        lowrank.save_adapter(model, tmp_path / "x", format="peft")
        assert json.loads((tmp_path / "x" / "adapter_config.json").read_text())["target_modules"] == written


def changed(tmp_path, name: str, settings: dict | None = None, tensors=None) -> Path:
    folder = tmp_path / "changed"
    shutil.copytree(FIXTURES / "adapters" / name, folder)
    if settings:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    if tensors:
        values = load_file(folder / "adapter_model.safetensors")
        tensors(values)
        save_file(values, folder / "adapter_model.safetensors")
    return folder


ROOT = "base_model.model."
KEY = f"{ROOT}model.layers.0.self_attn.q_proj.lora_A.weight"
STRICT = [
    ("lora", {"peft_type": "POLY"}, None, "peft_type 'POLY' is not read; known: ADALORA"),
    ("lora", {"use_qalora": True}, None, "use_qalora would change the numbers"),
    ("lora", {"bias": "all"}, None, "bias='all' would change"),
    ("lora", {"a_field_of_the_future": 3}, None, "a_field_of_the_future would change"),
    ("lora", {"r": 0}, None, "rank must be at least 1"),
    ("lora", {"lora_alpha": -1}, None, "alpha must be positive"),
    ("lora", {"target_modules": ["q_proj", "w_proj"]}, None, "target_modules 'w_proj' matches no layer"),
    ("lora", {"target_modules": ["q_proj"]}, None, "foreign 4 .*v_proj"),
    ("lora", None, lambda t: t.pop(KEY), "missing 1 .*layers.0.self_attn.q_proj.lora_A"),
    ("lora", None, lambda t: t.update({KEY.replace("q_", "z_"): t[KEY].clone()}), "foreign 1 .*z_proj"),
    ("lora", None, lambda t: t.update({KEY: torch.zeros(3, 3)}), r"has shape \(3, 3\)"),
    ("lora_embedding_lmhead", None, lambda t: t[f"{ROOT}lm_head.base_layer.weight"].add_(1), "not the base's own"),
    ("vera", None, lambda t: t.pop("base_model.vera_A"), "vera_A or vera_B is missing"),
    ("prompt", None, lambda t: t.update(more=torch.zeros(1)), "wanted the one tensor prompt_embeddings"),
]  # fmt: skip


@pytest.mark.parametrize("name, settings, tensors, message", STRICT)
def test_a_folder_that_says_something_else_is_an_error(tmp_path, name, settings, tensors, message) -> None:
    model = base()
    before = [(n, id(m)) for n, m in model.named_modules()]
    with pytest.raises(FileFormatError, match=message):
        lowrank.load_adapter(model, changed(tmp_path, name, settings, tensors))
    assert [(n, id(m)) for n, m in model.named_modules()] == before
    assert all(p.requires_grad for p in model.parameters()) or not any(p.requires_grad for p in model.parameters())


def test_a_truncated_file_is_an_error(tmp_path) -> None:
    folder = changed(tmp_path, "lora")
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(FileFormatError, match=re.escape(str(path))):
        lowrank.load_adapter(base(), folder)
