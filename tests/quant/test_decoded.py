"""The dense cache of decoded weights: the same values, within its budget, gone afterwards, never in training."""

import torch
from torch import nn

from lowrank.quant.linear import decoded, quantize_model


def model_of_two() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 32))
    quantize_model(model, "nf4-dq")
    return model


def test_values_are_the_same_and_the_copies_go() -> None:
    model, x = model_of_two(), torch.randn(3, 64)
    with torch.no_grad():
        plain = model(x)
        with decoded(model):
            assert torch.equal(model(x), plain)
            assert torch.equal(model(x), plain)
            assert len(model[0]._kept.weights) == 2
    assert all(layer._kept is None for layer in model)


def test_the_budget_is_kept() -> None:
    model, x = model_of_two(), torch.randn(3, 64)
    with torch.no_grad(), decoded(model, budget_bytes=96 * 64 * 4 + 10):
        plain = model(x)
        kept = model[0]._kept
        assert sum(w.numel() * 4 for w in kept.weights.values()) == 96 * 64 * 4  # the second one did not fit
    with torch.no_grad():
        assert torch.equal(model(x), plain)


def test_training_keeps_no_copy() -> None:
    model, x = model_of_two(), torch.randn(3, 64, requires_grad=True)
    with decoded(model):
        model(x).float().sum().backward()
        assert model[0]._kept.weights == {}
    assert x.grad is not None
