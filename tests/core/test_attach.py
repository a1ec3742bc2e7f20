"""attach and detach: strict targets, exact removal, what trains, and a model left as it was after an error."""

import re

import pytest
import torch
from torch import nn

import lowrank
from lowrank.adapter import AdaptedLinear, adapted_layers, adapter_names
from lowrank.methods.lora import LoRAConfig
from lowrank.targets import attachments

CONFIG = LoRAConfig(rank=4, alpha=8)


def snapshot(model: nn.Module) -> tuple:
    return (
        [(name, type(m), id(m)) for name, m in model.named_modules()],
        [(name, id(p), p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()],
    )


def assert_same(model: nn.Module, before: tuple) -> None:
    now = snapshot(model)
    assert now[0] == before[0]
    for (name, which, trains, value), (name2, which2, trains2, value2) in zip(before[1], now[1], strict=True):
        assert (name, which, trains) == (name2, which2, trains2)
        assert torch.equal(value, value2)


@pytest.mark.parametrize("quantize", [None, "nf4-dq"])
def test_detach_brings_back_the_same_modules_and_bits(make, ids, fill_randomly, quantize) -> None:
    model = make(quantize)
    model.layers[0].norm.weight.requires_grad_(False)  # not everything trained before
    before, logits = snapshot(model), model(ids)
    lowrank.attach(model, CONFIG, train_also=["norm"], name="a")
    lowrank.attach(model, CONFIG, ["q_proj"], name="b")
    fill_randomly(model)
    assert not torch.equal(model(ids), logits)
    lowrank.detach(model, "a")
    assert adapter_names(model) == ["b"]
    lowrank.detach(model, "b")
    assert_same(model, before)
    assert torch.equal(model(ids), logits)
    assert "_lowrank" not in model.__dict__


def test_a_new_adapter_changes_nothing_yet(make, ids) -> None:
    model = make()
    logits = model(ids)
    lowrank.attach(model, CONFIG)
    assert torch.equal(model(ids), logits)


def test_only_the_new_adapter_trains(make, ids) -> None:
    model = make()
    lowrank.attach(model, CONFIG, name="a")
    lowrank.attach(model, CONFIG, ["q_proj"], train_also=["norm"], name="b")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(".adapters.b." in name for name in trained)
    model(ids).square().sum().backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None) == (name in trained), name


def test_all_linear_leaves_head_and_embedding_alone(make) -> None:
    coverage = lowrank.attach(make(), CONFIG, "all-linear")
    assert set(coverage.layers) == {"q_proj", "up_proj", "down_proj"}
    assert coverage.layers["q_proj"] == ["layers.0.q_proj", "layers.1.q_proj"]
    assert coverage.trainable == 2 * 4 * ((32 + 32) + (32 + 48) + (48 + 32))
    assert "q_proj" in str(coverage) and "trainable" in str(coverage)


def test_the_total_counts_a_quantized_weight_by_its_values(make) -> None:
    assert lowrank.attach(make("nf4"), CONFIG, ["q_proj"]).total == lowrank.attach(make(), CONFIG, ["q_proj"]).total


def test_a_list_matches_whole_suffixes_and_a_string_whole_names(make) -> None:
    assert lowrank.attach(make(), CONFIG, ["0.q_proj"]).layers == {"0.q_proj": ["layers.0.q_proj"]}
    assert len(lowrank.attach(make(), CONFIG, r"layers\.\d\.(q|up)_proj").layers[r"layers\.\d\.(q|up)_proj"]) == 4
    with pytest.raises(ValueError, match="no module matches"):
        lowrank.attach(make(), CONFIG, "q_proj")  # a regular expression for the whole name


def test_exclude_takes_layers_out(make) -> None:
    coverage = lowrank.attach(make(), CONFIG, exclude=["1.q_proj", "down_proj"])
    assert coverage.layers["q_proj"] == ["layers.0.q_proj"] and "down_proj" not in coverage.layers


BAD = [
    ({"targets": ["q_proj", "v_porj"]}, "no module matches target 'v_porj'"),
    ({"targets": ["q_porj"]}, "did you mean 'q_proj'"),
    ({"targets": ["norm"]}, "LayerNorm; wanted a linear layer"),
    ({"targets": []}, "at least one layer"),
    ({"targets": "(q_proj"}, "not a regular expression"),
    ({"exclude": ["nothing"]}, "no module matches exclude"),
    ({"targets": ["q_proj"], "exclude": ["q_proj"]}, "leaves no layer"),
    ({"train_also": ["layers"]}, "wanted a layer with a weight"),
    ({"name": ""}, "non-empty"),
    ({"name": "a.b"}, "without dots"),
    ({"name": "values"}, "no word of torch"),
]


@pytest.mark.parametrize("arguments, message", BAD)
def test_a_bad_argument_is_an_error_and_leaves_the_model_alone(make, arguments, message) -> None:
    model = make()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        lowrank.attach(model, CONFIG, **arguments)
    assert_same(model, before)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"rank": 0}, "rank must be at least 1"),
        ({"rank": -2}, "rank"),
        ({"alpha": 0}, "alpha"),
        ({"alpha": -1}, "alpha"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_settings_that_make_no_sense_are_errors(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        LoRAConfig(**arguments)


def test_a_rank_above_the_layer_is_a_warning(make) -> None:
    with pytest.warns(UserWarning, match=re.escape("rank 33 is above min(I, O) = 32")):
        lowrank.attach(make(), LoRAConfig(rank=33), ["q_proj"])


def test_a_taken_name_and_a_foreign_configuration_are_errors(make) -> None:
    model = make()
    lowrank.attach(model, CONFIG, name="a")
    before = snapshot(model)
    with pytest.raises(ValueError, match="an adapter 'a' already"):
        lowrank.attach(model, CONFIG, ["q_proj"], name="a")
    with pytest.raises(ValueError, match="method's configuration"):
        lowrank.attach(model, object(), name="b")
    with pytest.raises(ValueError, match="unknown adapter 'aa'"):
        lowrank.detach(model, "aa")
    assert_same(model, before)


def test_train_also_trains_a_copy_and_never_the_layer(make, ids) -> None:
    model = make()
    head, embedding = model.lm_head.weight, model.embed_tokens.weight
    old = head.detach().clone()
    lowrank.attach(model, CONFIG, ["q_proj"], train_also=["lm_head", "embed_tokens", "norm"], name="a")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = model(ids)
    before.square().mean().backward()
    optimizer.step()
    assert not torch.equal(model(ids), before)
    lowrank.activate(model, None)
    lowrank.detach(model, "a")
    assert model.lm_head.weight is head and model.embed_tokens.weight is embedding and torch.equal(head, old)


def test_a_layer_with_adapters_is_still_a_target(make) -> None:
    model = make()
    lowrank.attach(model, CONFIG, name="a")
    coverage = lowrank.attach(model, CONFIG, ["layers.0.q_proj"], name="b")
    assert coverage.layers == {"layers.0.q_proj": ["layers.0.q_proj"]}
    layer = model.layers[0].q_proj
    assert isinstance(layer, AdaptedLinear) and list(layer.adapters) == ["a", "b"]
    assert not any(isinstance(m, AdaptedLinear) for m in layer.base.modules())
    assert [path for path, _ in adapted_layers(model, "b")] == ["layers.0.q_proj"]
    assert attachments(model)["b"].layers == ("layers.0.q_proj",)


def test_an_embedding_is_a_linear_layer_on_one_hot_ids(make, ids, fill_randomly) -> None:
    model = make()
    lowrank.attach(model, CONFIG, ["embed_tokens"])
    fill_randomly(model)
    adapter = model.embed_tokens.adapters["default"]
    one_hot = torch.nn.functional.one_hot(ids, 40).float()
    update = adapter.scaling * one_hot @ adapter.lora_A.T @ adapter.lora_B.T
    torch.testing.assert_close(model.embed_tokens(ids), model.embed_tokens.base(ids) + update)


class Conv1D(nn.Module):
    """GPT-2's layer: the weight is (I, O)."""

    def __init__(self, out_features: int, in_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(in_features, out_features))
        self.bias = nn.Parameter(torch.randn(out_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight + self.bias


def test_conv1d_is_a_linear_layer(fill_randomly) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(24, 16))
    lowrank.attach(model, CONFIG, ["0"])
    fill_randomly(model)
    x = torch.randn(3, 16)
    y = model(x)
    lowrank.merge(model)
    torch.testing.assert_close(model(x), y)
    lowrank.unmerge(model)
    assert torch.equal(model(x), y)
