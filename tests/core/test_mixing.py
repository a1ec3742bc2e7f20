"""combine: each method acts on the updates themselves, so the true weighted sum is what `linear` gives."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import lowrank
from lowrank.active import acting, active_names
from lowrank.methods.dora import DoRAConfig
from lowrank.methods.full import FullConfig
from lowrank.methods.lora import LoRAConfig
from lowrank.methods.oft import OFTConfig
from lowrank.mixing import drop, keep_largest, ties

FIXTURES = Path(__file__).parents[1] / "fixtures"
WEIGHTED = FIXTURES / "adapters" / "weighted"
COMBOS = json.loads((WEIGHTED / "combos.json").read_text())
METHOD = {"cat": "cat", "svd": "svd", "ties_svd": "ties", "magnitude_prune_svd": "magnitude"}


@pytest.mark.parametrize("combo", COMBOS, ids=[c["name"] for c in COMBOS])
def test_where_peft_combines_deltas_we_agree(combo) -> None:
    expected = load_file(WEIGHTED / "expected.safetensors")
    model = lowrank.load(FIXTURES / "models" / "llama", dtype=torch.float32, progress=False)[0].eval()
    for name in "abc":
        lowrank.load_adapter(model, WEIGHTED / name)
    options = {"rank": combo["r"]} if combo["type"] != "cat" else {}
    if "density" in combo:
        options["density"] = combo["density"]
    weights = dict(zip(combo["adapters"], combo["weights"], strict=True))
    lowrank.combine(model, weights, METHOD[combo["type"]], name="mix", **options)
    adapter = model.get_submodule("model.layers.1.self_attn.q_proj").adapters["mix"]
    torch.testing.assert_close(
        adapter.scaling * adapter.lora_B @ adapter.lora_A, expected[f"{combo['name']}.delta"], atol=5e-6, rtol=0
    )
    with torch.no_grad():
        assert (model(expected["input_ids"])[:, 3::4] - expected[f"{combo['name']}.logits"]).abs().max() < 5e-5


@pytest.fixture
def three(make, fill_randomly):
    """Adapters of three ranks, one rank-stabilized, one on fewer layers, two with copied norms."""
    model = make()
    lowrank.attach(model, LoRAConfig(rank=4), train_also=["norm"], name="a")
    fill_randomly(model, seed=1)
    lowrank.attach(model, LoRAConfig(rank=2, rank_stabilized=True), train_also=["norm"], name="b")
    fill_randomly(model, seed=2)
    lowrank.attach(model, LoRAConfig(rank=3, alpha=5), ["q_proj", "embed_tokens"], name="c")
    fill_randomly(model, seed=3)
    return model


@pytest.mark.parametrize("method", ["linear", "cat"])
def test_linear_and_cat_are_the_true_weighted_sum(three, ids, method) -> None:
    weights = {"a": 0.7, "b": -0.4, "c": 1.5}
    with acting(three, weights):
        wanted = three(ids)
    assert lowrank.combine(three, weights, method) == "mix"
    assert active_names(three) == ["mix"]
    torch.testing.assert_close(three(ids), wanted, rtol=1e-4, atol=1e-4)
    assert three.layers[0].q_proj.adapters["mix"].lora_A.shape[0] == 4 + 2 + 3
    assert three.layers[0].up_proj.adapters["mix"].lora_A.shape[0] == 4 + 2


def test_a_combined_adapter_saves_and_loads(three, ids, make, tmp_path) -> None:
    lowrank.combine(three, {"a": 0.7, "c": 0.3}, "linear")
    for format in ("lowrank", "peft"):
        lowrank.save_adapter(three, tmp_path / format, "mix", format=format)
        other = make()
        lowrank.load_adapter(other, tmp_path / format)
        torch.testing.assert_close(other(ids), three(ids))


def test_combining_changes_neither_the_parts_nor_what_trains(three, ids) -> None:
    trained = [name for name, p in three.named_parameters() if p.requires_grad]
    outputs = []
    for _ in range(2):
        for name in "abc":
            with acting(three, name):
                outputs.append(three(ids))
        if len(outputs) == 3:
            lowrank.combine(three, {"a": 1, "b": 1, "c": 1}, "svd")
    assert all(torch.equal(x, y) for x, y in zip(outputs[:3], outputs[3:], strict=True))
    assert [name for name, p in three.named_parameters() if p.requires_grad] == trained


def test_svd_takes_the_largest_input_rank_and_is_the_best_of_its_rank(three) -> None:
    lowrank.combine(three, {"a": 1.0, "b": 1.0}, "svd")
    layer = three.layers[0].up_proj
    mix = layer.adapters["mix"]
    assert mix.lora_A.shape[0] == 4
    a, b = layer.adapters["a"], layer.adapters["b"]
    true = (a.scaling * a.lora_B @ a.lora_A + b.scaling * b.lora_B @ b.lora_A).detach()
    left = (true - mix.scaling * mix.lora_B @ mix.lora_A).norm()
    torch.testing.assert_close(left, torch.linalg.svdvals(true)[4:].norm(), rtol=1e-4, atol=1e-5)


def test_any_method_with_a_merge_can_be_part(make, ids, fill_randomly) -> None:
    model = make()
    for seed, (name, config) in enumerate([("d", DoRAConfig(rank=2)), ("o", OFTConfig()), ("l", LoRAConfig(rank=2))]):
        lowrank.attach(model, config, ["q_proj"], name=name)
        fill_randomly(model, seed=seed)
    weights = {"d": 0.5, "o": 0.5, "l": -1.0}
    with acting(model, weights):
        wanted = model(ids)
    lowrank.combine(model, weights, "linear")
    torch.testing.assert_close(model(ids), wanted, rtol=1e-3, atol=1e-3)


def test_density_one_makes_every_pruning_the_plain_sum(three, ids) -> None:
    weights = {"a": 0.5, "b": 0.25}
    with acting(three, weights):
        wanted = three(ids)
    for method in ("dare", "magnitude"):
        lowrank.combine(three, weights, method, name=method, density=1.0)
        torch.testing.assert_close(three(ids), wanted, rtol=1e-4, atol=1e-4)


floats = st.floats(-8, 8, width=32).map(lambda x: round(x, 3))
matrices = st.lists(floats, min_size=12, max_size=12).map(lambda v: torch.tensor(v).view(3, 4))


@settings(max_examples=50, deadline=None)
@given(matrices, st.floats(0.1, 1.0))
def test_what_is_kept_is_larger_than_what_is_not(delta, density) -> None:
    kept = keep_largest(delta, density)
    alive = kept != 0
    assert torch.equal(kept[alive], delta[alive]) and int(alive.sum()) <= int(density * 12)
    if alive.any() and not alive.all():
        assert kept[alive].abs().min() >= delta[~alive].abs().max()


@settings(max_examples=50, deadline=None)
@given(st.lists(matrices, min_size=2, max_size=4))
def test_ties_lies_between_the_deltas_that_agree(deltas) -> None:
    mixed = ties(deltas, [1.0] * len(deltas), density=1.0)
    stacked = torch.stack(deltas)
    assert (mixed <= stacked.clamp(min=0).amax(0) + 1e-5).all() and (mixed >= stacked.clamp(max=0).amin(0) - 1e-5).all()
    assert ((mixed * stacked.sum(0)) >= -1e-5).all()  # never against the majority


def test_dare_keeps_the_expectation() -> None:
    ones = torch.ones(400, 400)
    dropped = drop(ones, 0.3, torch.Generator().manual_seed(0))
    assert set(dropped.unique().tolist()) == {0.0, float(torch.tensor(1.0) / 0.3)}
    # the mean of 160,000 draws: standard deviation sqrt(0.7 / 0.3) / 400 = 0.0038
    assert abs(float(dropped.mean()) - 1) < 4 * 0.0038


def test_dare_is_the_same_for_the_same_seed(three, ids) -> None:
    outputs = []
    for name, seed in (("x", 1), ("y", 1), ("z", 2)):
        lowrank.combine(three, {"a": 1.0, "b": 1.0}, "dare", name=name, seed=seed)
        outputs.append(three(ids))
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])


BAD = [
    ({"a": 1.0}, {"method": "tie"}, "did you mean 'ties'"),
    ({"a": 1.0}, {"densty": 0.5}, "did you mean 'density'"),
    ({"a": 1.0}, {"density": 0.0}, "density must lie"),
    ({"a": 1.0}, {"rank": 0}, "rank must be at least 1"),
    ({"a": 1.0}, {"method": "ties", "majority": "most"}, "majority must be"),
    ({"a": 1.0}, {"name": "b"}, "an adapter 'b' already"),
    ({"z": 1.0}, {}, "unknown adapter 'z'"),
    ({}, {}, "adapters with weights"),
]


@pytest.mark.parametrize("weights, options, message", BAD)
def test_bad_arguments(three, ids, weights, options, message) -> None:
    before = three(ids)
    with pytest.raises(ValueError, match=message):
        lowrank.combine(three, weights, **options)
    assert torch.equal(three(ids), before) and active_names(three) == ["c"]


def test_a_bias_cannot_go_into_a_lora(make, fill_randomly) -> None:
    model = make()
    lowrank.attach(model, FullConfig(), ["up_proj"], name="f")
    fill_randomly(model)
    with pytest.raises(ValueError, match="changes the bias"):
        lowrank.combine(model, {"f": 1.0})
