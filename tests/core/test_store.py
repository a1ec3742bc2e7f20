"""Adapter folders: every byte comes back, and a file that is not this adapter's is an error that names the reason."""

import json

import pytest
import torch

import lowrank
from lowrank.errors import FileFormatError
from lowrank.files import read_tensors, write_tensors
from lowrank.filling import adapter_state
from lowrank.methods.lora import LoRAConfig
from lowrank.targets import attachments


@pytest.fixture
def saved(make, fill_randomly, tmp_path):
    model = make()
    lowrank.attach(model, LoRAConfig(rank=4, alpha=8), train_also=["norm", "lm_head"], name="a")
    fill_randomly(model)
    lowrank.save_adapter(model, tmp_path / "mine", "a")
    return model, tmp_path / "mine"


def state(model) -> tuple:
    return [(n, id(m)) for n, m in model.named_modules()], [(n, p.requires_grad) for n, p in model.named_parameters()]


def test_every_byte_comes_back(saved, make, ids, tmp_path) -> None:
    model, folder = saved
    other = make()
    assert lowrank.load_adapter(other, folder) == "mine"
    first, second = adapter_state(model, "a"), adapter_state(other, "mine")
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    assert torch.equal(model(ids), other(ids))
    lowrank.save_adapter(other, tmp_path / "again", "mine")
    for file in ("adapter.safetensors", "adapter.json"):
        assert (folder / file).read_bytes() == (tmp_path / "again" / file).read_bytes()


def test_a_loaded_adapter_acts_alone_and_is_frozen_unless_asked(saved, make) -> None:
    _, folder = saved
    model = make()
    lowrank.attach(model, LoRAConfig(rank=2), ["q_proj"], name="b")
    assert lowrank.load_adapter(model, folder, name="loaded") == "loaded"
    assert model.layers[0].q_proj.active == (("loaded", 1.0),)
    assert not any(p.requires_grad for p in model.parameters())
    lowrank.load_adapter(model, folder, name="again", trainable=True)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all(".adapters.again." in name for name in trained)


def test_a_folder_loaded_twice_gets_a_number(saved, make) -> None:
    _, folder = saved
    model = make()
    assert [lowrank.load_adapter(model, folder) for _ in range(3)] == ["mine", "mine-2", "mine-3"]
    assert attachments(model)["mine-2"].config == LoRAConfig(rank=4, alpha=8)


def test_loading_goes_to_the_very_layers_of_the_file(make, fill_randomly, tmp_path, ids) -> None:
    """Where one layer's full name is another's suffix, a pattern would reach both."""
    from torch import nn

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj, self.inner = nn.Linear(4, 4), nn.ModuleDict({"proj": nn.Linear(4, 4)})

    model = Two()
    lowrank.attach(model, LoRAConfig(rank=2), r"proj", name="a")
    lowrank.save_adapter(model, tmp_path / "a", "a")
    other = Two()
    lowrank.load_adapter(other, tmp_path / "a")
    assert attachments(other)["a"].layers == ("proj",)


def test_a_rank_above_the_layer_loads_without_a_warning(make, tmp_path, recwarn) -> None:
    model = make()
    with pytest.warns(UserWarning, match="rank 40"):
        lowrank.attach(model, LoRAConfig(rank=40), ["q_proj"])
    lowrank.save_adapter(model, tmp_path / "wide")
    recwarn.clear()
    lowrank.load_adapter(make(), tmp_path / "wide")
    assert not recwarn.list


def damage(folder, kind: str) -> None:
    path = folder / "adapter.safetensors"
    tensors = read_tensors(path)
    key = sorted(tensors)[0]
    description = json.loads((folder / "adapter.json").read_text())
    if kind == "missing":
        del tensors[key]
    elif kind == "foreign":
        tensors["layers.9.q_proj.lora_A"] = torch.zeros(4, 32)
    elif kind == "shape":
        tensors[key] = torch.zeros(3, 3)
    elif kind == "config":
        description["config"]["rankk"] = 3
    elif kind == "rank":
        description["config"]["rank"] = 0
    elif kind == "method":
        description["method"] = "lorra"
    elif kind == "version":
        description["version"] = 99
    elif kind == "field":
        del description["layers"]
    elif kind == "layer":
        description["layers"][0] = "layers.7.q_proj"
    write_tensors(path, tensors)
    (folder / "adapter.json").write_text(json.dumps(description))
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-20])
    elif kind == "garbage":
        path.write_bytes(b"not tensors")
    elif kind == "json":
        (folder / "adapter.json").write_text('{"format": ')
    elif kind == "no tensors":
        path.unlink()


KINDS = {
    "missing": (FileFormatError, "missing 1 .*layers.0"),
    "foreign": (FileFormatError, "foreign 1 .*layers.9.q_proj.lora_A"),
    "shape": (FileFormatError, r"has shape \(3, 3\), wanted"),
    "config": (FileFormatError, "does not fit method 'lora'.*rankk"),
    "rank": (FileFormatError, "rank must be at least 1"),
    "method": (ValueError, "did you mean 'lora'"),
    "version": (FileFormatError, "version 99.*upgrade"),
    "field": (FileFormatError, "field 'layers' must be a list"),
    "layer": (ValueError, "no layer 'layers.7.q_proj'"),
    "truncated": (FileFormatError, "damaged"),
    "garbage": (FileFormatError, "damaged"),
    "json": (FileFormatError, "not valid JSON"),
    "no tensors": (FileNotFoundError, "adapter.safetensors"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_folder_is_an_error_and_the_model_stays(saved, make, ids, kind) -> None:
    _, folder = saved
    damage(folder, kind)
    model = make()
    lowrank.attach(model, LoRAConfig(rank=2), ["q_proj"], name="b")
    before, logits = state(model), model(ids)
    error, message = KINDS[kind]
    with pytest.raises(error, match=message):
        lowrank.load_adapter(model, folder, name="new")
    assert state(model) == before and torch.equal(model(ids), logits)
    assert model.layers[0].q_proj.active == (("b", 1.0),)


def test_an_empty_folder_and_an_unknown_format_are_errors(make, tmp_path) -> None:
    model = make()
    with pytest.raises(FileNotFoundError, match="holds no adapter"):
        lowrank.load_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="none at all"):
        lowrank.save_adapter(model, tmp_path)
    lowrank.attach(model, LoRAConfig(rank=2), ["q_proj"])
    with pytest.raises(ValueError, match="unknown adapter format 'pickle'"):
        lowrank.save_adapter(model, tmp_path, format="pickle")


def test_another_base_is_refused_unless_forced(make, tmp_path) -> None:
    class Origin:
        def __init__(self, base: str) -> None:
            self.base_hash, self.tokenizer_hash, self.chat_template, self.path = base, None, None, "here"

    model = make()
    model.origin = Origin("a" * 64)
    lowrank.attach(model, LoRAConfig(rank=2), ["q_proj"])
    lowrank.save_adapter(model, tmp_path / "x")
    other = make()
    other.origin = Origin("b" * 64)
    with pytest.raises(ValueError, match=r"another base model .*aaaaaaaaaaaa.*bbbbbbbbbbbb.*force=True"):
        lowrank.load_adapter(other, tmp_path / "x")
    assert "_lowrank" not in other.__dict__
    assert lowrank.load_adapter(other, tmp_path / "x", force=True) == "x"
