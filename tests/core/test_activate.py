"""activate and rows: what acts, one sentence each, and the same in backward as in forward."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

import lowrank
from lowrank.active import acting, active_names, checkpoint_contexts
from lowrank.methods.lora import LoRAConfig


@pytest.fixture
def three(make, fill_randomly):
    """A model with adapters a, b (all layers) and c (q_proj alone, another rank)."""
    model = make()
    for seed, (name, rank, targets) in enumerate([("a", 4, None), ("b", 4, None), ("c", 2, ["q_proj"])]):
        lowrank.attach(model, LoRAConfig(rank=rank), targets, name=name)
        fill_randomly(model, seed=seed + 10)
    return model


def alone(model, ids, choice):
    with acting(model, choice):
        return model(ids)


def test_none_is_the_base_model(three, ids, make) -> None:
    lowrank.activate(three, None)
    assert torch.equal(three(ids), make()(ids))
    assert active_names(three) == []


def test_attach_activates_the_new_adapter_alone(three) -> None:
    assert active_names(three) == ["c"]


def test_several_add_their_differences_layer_by_layer(three) -> None:
    layer, x = three.layers[0].q_proj, torch.randn(2, 3, 32)
    y = layer.base(x)
    f = {name: layer.adapters[name](x, y, layer.base) for name in "abc"}
    lowrank.activate(three, {"a": 0.7, "b": -0.3, "c": 2.0})
    torch.testing.assert_close(layer(x), y + 0.7 * (f["a"] - y) - 0.3 * (f["b"] - y) + 2.0 * (f["c"] - y))
    lowrank.activate(three, ["a", "b"])
    torch.testing.assert_close(layer(x), f["a"] + f["b"] - y)


def test_layers_changes_the_matching_layers_only(three, ids) -> None:
    lowrank.activate(three, "a")
    lowrank.activate(three, "b", layers=r"layers\.1\..*")
    assert three.layers[0].q_proj.active == (("a", 1.0),)
    assert three.layers[1].up_proj.active == (("b", 1.0),)
    mixed = three(ids)
    assert not torch.equal(mixed, alone(three, ids, "a")) and not torch.equal(mixed, alone(three, ids, "b"))
    assert torch.equal(three(ids), mixed)  # `acting` put the layers' own choices back
    lowrank.activate(three, "a")
    assert three.layers[1].up_proj.active == (("a", 1.0),)
    with pytest.raises(ValueError, match="no module matches layers"):
        lowrank.activate(three, "a", layers=["k_proj"])


def test_activate_never_changes_what_trains(three) -> None:
    trains = {name for name, p in three.named_parameters() if p.requires_grad}
    lowrank.activate(three, ["a", "b"])
    assert {name for name, p in three.named_parameters() if p.requires_grad} == trains


@pytest.mark.parametrize("choice", ["d", ["a", "d"], {"d": 1.0}])
def test_an_unknown_name_is_an_error_and_changes_nothing(three, ids, choice) -> None:
    lowrank.activate(three, "a")
    before = three(ids)
    with pytest.raises(ValueError, match="unknown adapter 'd'"):
        lowrank.activate(three, choice)
    with pytest.raises(ValueError, match="unknown adapter 'd'"), lowrank.rows(three, [choice] * 4):
        pass
    assert torch.equal(three(ids), before)


def test_the_same_name_twice_and_no_adapter_at_all_are_errors(three, make) -> None:
    with pytest.raises(ValueError, match="named twice"):
        lowrank.activate(three, ["a", "a"])
    with pytest.raises(ValueError, match="none at all"):
        lowrank.activate(make(), "a")


def test_each_row_runs_as_if_alone(three, ids) -> None:
    choices = ["a", {"a": 0.5, "b": 0.5}, None, "c"]
    with lowrank.rows(three, choices):
        together = three(ids)
    for i, choice in enumerate(choices):
        torch.testing.assert_close(together[i : i + 1], alone(three, ids[i : i + 1], choice))


@pytest.mark.parametrize("tokens", [2, 40])  # 8: fp32 products; 160: products in 16 bits
def test_each_row_of_a_16_bit_model_runs_as_if_alone(make, fill_randomly, tokens) -> None:
    model = make(dtype=torch.bfloat16)
    for seed, (name, rank) in enumerate([("a", 4), ("b", 2)]):
        lowrank.attach(model, LoRAConfig(rank=rank), name=name)
        fill_randomly(model, seed=seed)
    long, choices = torch.arange(4 * tokens).view(4, tokens) % 40, ["a", {"b": 0.5}, None, "a"]
    with torch.no_grad(), lowrank.rows(model, choices):
        together = model(long)
    for i, choice in enumerate(choices):
        with torch.no_grad():
            wanted = alone(model, long[i : i + 1], choice)
        # a few roundings to 8 bits in each of six layers
        assert (together[i : i + 1] - wanted).abs().max() <= 0.03 * wanted.abs().max()


def test_rows_needs_one_choice_for_each_row(three, ids) -> None:
    with pytest.raises(ValueError, match="3 rows, the batch has 4"), lowrank.rows(three, ["a"] * 3):
        three(ids)
    assert three(ids) is not None  # the block's end put everything back


def test_rows_train_each_adapter_on_its_own_rows(three, ids) -> None:
    for p in three.parameters():
        p.requires_grad_(True)

    def gradients(run):
        three.zero_grad(set_to_none=True)
        run()
        return {name: p.grad for name, p in three.named_parameters() if ".adapters." in name}

    def rows():
        with lowrank.rows(three, ["a", "b", None, "a"]):
            three(ids).square().sum().backward()

    def one_by_one():
        for i, choice in enumerate(["a", "b", None, "a"]):
            with acting(three, choice):
                three(ids[i : i + 1]).square().sum().backward()

    got, wanted = gradients(rows), gradients(one_by_one)
    for name, gradient in wanted.items():
        assert (gradient is None) == (got[name] is None or not got[name].any()), name
        if gradient is not None:  # sums in another order: relative to the whole, fp32
            torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))


def test_an_evaluation_inside_the_block_sees_what_training_changed(three, ids) -> None:
    for p in three.parameters():
        p.requires_grad_(True)
    with lowrank.rows(three, ["a", "b", None, "a"]):
        for _ in range(2):
            with torch.no_grad():
                seen = three(ids)
                assert torch.equal(three(ids), seen)
            three(ids).square().mean().backward()
            with torch.no_grad():
                for name, p in three.named_parameters():
                    if ".adapters." in name and p.grad is not None:
                        p -= 0.1 * p.grad
                now = three(ids)
            assert not torch.equal(now, seen)
    with torch.no_grad(), lowrank.rows(three, ["a", "b", None, "a"]):
        assert torch.equal(three(ids), now)


def test_backward_recomputes_with_the_adapters_of_forward(three, ids) -> None:
    """Activation checkpointing runs the layers again in backward, perhaps after the block has ended."""
    for p in three.parameters():
        p.requires_grad_(True)
    x = torch.randn(4, 6, 32)

    def gradients(through_checkpoint: bool):
        three.zero_grad(set_to_none=True)
        with lowrank.rows(three, ["a", "b", None, {"c": 0.5}]):
            h = x
            for layer in three.layers:
                context = partial(checkpoint_contexts, layer)
                h = checkpoint(layer, h, use_reentrant=False, context_fn=context) if through_checkpoint else layer(h)
        h.square().sum().backward()  # outside the block
        return {name: p.grad.clone() for name, p in three.named_parameters() if p.grad is not None}

    got, wanted = gradients(True), gradients(False)
    assert got.keys() == wanted.keys()
    for name in wanted:
        assert torch.equal(got[name], wanted[name]), name
    assert active_names(three) == ["c"]


@settings(max_examples=25, deadline=None)
@given(st.dictionaries(st.sampled_from("abc"), st.floats(-2, 2, width=32), min_size=1))
def test_merged_is_forward_for_any_weighted_set(weights) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(12, 20), torch.nn.Linear(20, 12, bias=False)).double()
    for name, rank in (("a", 2), ("b", 3), ("c", 1)):
        lowrank.attach(model, LoRAConfig(rank=rank), ["0", "1"] if name != "c" else ["1"], name=name)
        for p in model.parameters():
            if p.requires_grad:
                torch.nn.init.normal_(p)
    x = torch.randn(5, 12, dtype=torch.float64)
    lowrank.activate(model, weights)
    forward = model(x)
    lowrank.merge(model, weights)
    merged = model(x)
    lowrank.unmerge(model)
    # both sums run in fp32 somewhere (adapters are fp32): 3 terms of size <= |weights| * 50, eps 6e-8, 20 products
    torch.testing.assert_close(merged, forward, rtol=1e-4, atol=1e-3)
    assert torch.equal(model(x), forward)


def test_a_hundred_adapters_switch_in_one_assignment(make) -> None:
    model = make()
    for i in range(20):
        lowrank.attach(model, LoRAConfig(rank=1), ["q_proj"], name=f"n{i}")
    selection = model.layers[0].q_proj.selection
    assert all(layer.selection is selection for layer in (model.layers[1].q_proj, model.layers[0].q_proj))
    lowrank.activate(model, "n7")
    assert selection.now.everywhere == (("n7", 1.0),) and not selection.now.layers
