"""merge and unmerge: the layer that has the adapter inside, what of it survives, and the old layer bit for bit."""

import pytest
import torch

import lowrank
from lowrank.adapter import dense_weight
from lowrank.methods.lora import LoRAConfig
from lowrank.quant.linear import QuantizedLinear


def adapted(make, fill_randomly, std=0.2, quantize=None, dtype=torch.float32, **options):
    model = make(quantize, dtype)
    lowrank.attach(model, LoRAConfig(rank=4), **options)
    fill_randomly(model, std)
    return model


@pytest.mark.parametrize("quantize", [None, "nf4", "nf4-dq"])
def test_merged_gives_the_same_logits_and_unmerge_the_same_bits(make, ids, fill_randomly, quantize) -> None:
    model = adapted(make, fill_randomly, quantize=quantize, train_also=["norm"])
    logits = model(ids)
    old = {name: p.detach().clone() for name, p in model.named_parameters()}
    report = lowrank.merge(model)
    torch.testing.assert_close(model(ids), logits, rtol=1e-4, atol=1e-4)
    assert all(share > 0.999 for share in report.survival.values())
    lowrank.unmerge(model)
    assert torch.equal(model(ids), logits)
    now = dict(model.named_parameters())
    assert now.keys() == old.keys() and all(torch.equal(old[name], now[name]) for name in old)


def test_an_embedding_merges_even_when_its_matrix_is_square(fill_randomly) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(16, 16))
    lowrank.attach(model, LoRAConfig(rank=4), ["0"])
    fill_randomly(model)
    ids = torch.arange(16)
    before = model(ids)
    lowrank.merge(model)
    torch.testing.assert_close(model(ids), before)


def test_a_copied_embedding_and_head_merge(make, ids, fill_randomly) -> None:
    model = adapted(make, fill_randomly, targets=["q_proj"], train_also=["embed_tokens", "lm_head", "norm"])
    before = model(ids)
    lowrank.merge(model)
    torch.testing.assert_close(model(ids), before)


def test_bf16_rounds_once_and_says_what_is_lost(make, fill_randomly) -> None:
    model = adapted(make, fill_randomly, std=0.02, dtype=torch.bfloat16)
    layer = model.layers[0].q_proj
    with torch.no_grad():
        wanted, _ = layer.adapters["default"].merge(dense_weight(layer.base).float(), None)
    report = lowrank.merge(model)
    assert torch.equal(layer.base.weight, wanted.bfloat16())
    update = wanted - layer.unmerged[0].weight.float()
    share = 1 - (wanted.bfloat16().float() - wanted).norm() / update.norm()
    assert report.survival["layers.0.q_proj"] == pytest.approx(float(share), abs=1e-6)
    assert 0 < report.lowest[1] < report.mean < 1 and "survives" in str(report)


def test_merging_a_small_update_into_nf4_is_refused_with_the_number(make, ids, fill_randomly) -> None:
    model = adapted(make, fill_randomly, std=0.01, quantize="nf4")
    logits = model(ids)
    with pytest.raises(ValueError, match=r"would keep -?\d+\.\d% of the update in layers.*force=True"):
        lowrank.merge(model, to="nf4")
    assert torch.equal(model(ids), logits)
    report = lowrank.merge(model, to="nf4", force=True)
    assert report.lowest[1] < 0.5
    assert isinstance(model.layers[0].q_proj.base, QuantizedLinear)
    lowrank.unmerge(model)
    assert torch.equal(model(ids), logits)


def test_a_merged_model_takes_no_other_change(make, fill_randomly) -> None:
    model = adapted(make, fill_randomly)
    with pytest.raises(RuntimeError, match="not merged"):
        lowrank.unmerge(model)
    lowrank.merge(model)
    for change in (
        lambda: lowrank.merge(model),
        lambda: lowrank.attach(model, LoRAConfig(rank=2), name="b"),
        lambda: lowrank.detach(model),
        lambda: lowrank.activate(model, None),
        lambda: lowrank.rows(model, [None]).__enter__(),
    ):
        with pytest.raises(RuntimeError, match="unmerge it before"):
            change()
    lowrank.unmerge(model)
    lowrank.detach(model)


def test_bad_arguments(make, fill_randomly) -> None:
    model = adapted(make, fill_randomly)
    with pytest.raises(ValueError, match="unknown merge target 'int3'"):
        lowrank.merge(model, to="int3")
    with pytest.raises(ValueError, match="unknown adapter 'b'"):
        lowrank.merge(model, "b")
    with pytest.raises(ValueError, match="at least one adapter"):
        lowrank.merge(model, None)
