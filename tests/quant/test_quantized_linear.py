"""QuantizedLinear: values, gradients, memory, moving, saving; quantize_model."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lowrank.quant.linear import QuantizedLinear, decoded, linear, quantize_model
from lowrank.quant.tensor import QuantizedTensor

FORMATS = ("nf4", "nf4-dq", "fp4", "fp4-dq", "int8", "int4", "int4-affine")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_are_those_of_the_decoded_weight(format: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q = QuantizedTensor.quantize(torch.randn(40, 72), format)
    bias = torch.randn(40, dtype=dtype, requires_grad=True)
    x = torch.randn(2, 3, 72, dtype=dtype, requires_grad=True)
    y = linear(x, q, bias)
    want = F.linear(x, q.dequantize(dtype), bias)
    assert torch.equal(y, want)
    dy = torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad(y, (x, bias), dy), torch.autograd.grad(want, (x, bias), dy))


def test_no_dense_copy_is_kept_for_backward() -> None:
    saved: list[torch.Tensor] = []
    layers = nn.Sequential(*(nn.Linear(256, 256) for _ in range(3)))
    quantize_model(layers)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layers(torch.randn(2, 256, requires_grad=True)).sum().backward()
    assert all(t.numel() < 256 * 256 for t in saved)


def test_layers_of_one_shape_share_the_workspace_without_mixing() -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(4)))
    model = copy.deepcopy(dense)
    quantize_model(model, "nf4")
    with torch.no_grad():
        for layer, quantized in zip(dense, model):
            layer.weight.copy_(quantized.quantized.dequantize())
    x = torch.randn(5, 64, requires_grad=True)
    y, want = model(x), dense(x)
    assert torch.equal(y, want)
    assert torch.equal(*(torch.autograd.grad(v.square().sum(), x)[0] for v in (y, want)))


def test_changing_the_dtype_leaves_the_scales_alone() -> None:
    layer = QuantizedLinear(QuantizedTensor.quantize(torch.randn(32, 64), "nf4-dq"), torch.randn(32))
    want = layer.quantized.dequantize(torch.float32)
    for change in (lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.to("cpu", torch.bfloat16)):
        changed = change(copy.deepcopy(layer))
        assert torch.equal(changed.quantized.dequantize(torch.float32), want)
        assert changed.bias is not None and changed.bias.dtype != torch.float32
        assert changed(torch.randn(2, 64, dtype=changed.bias.dtype)).dtype == changed.bias.dtype


def test_parts_are_frozen_parameters_of_the_layer() -> None:
    layer = QuantizedLinear(QuantizedTensor.quantize(torch.randn(32, 64), "nf4-dq"))
    assert dict(layer.named_parameters()).keys() == {"codes", "scales", "nested_absmax", "nested_offset"}
    assert not any(p.requires_grad for p in layer.parameters())
    layer.codes = nn.Parameter(torch.zeros_like(layer.codes), requires_grad=False)  # what sharding does
    assert layer.quantized.codes.sum() == 0


@pytest.mark.parametrize("format", FORMATS)
def test_using_a_layer_never_changes_how_it_is_stored(format: str) -> None:
    """Generate, then train, then decode: eval mode, kept weights, two dtypes. Nothing is repacked in place."""
    torch.manual_seed(0)
    layer = QuantizedLinear(QuantizedTensor.quantize(torch.randn(32, 96), format)).eval()
    before = {name: part.clone() for name, part in layer.quantized.parts().items()}
    dense = layer.quantized.dequantize(torch.float32)
    for dtype in (torch.bfloat16, torch.float32):
        with torch.no_grad(), decoded(layer):
            layer(torch.randn(2, 96, dtype=dtype))
        x = torch.randn(2, 96, dtype=dtype, requires_grad=True)
        layer.train()(x).sum().backward()
        assert x.grad is not None and x.grad.abs().sum() > 0
    assert all(torch.equal(part, before[name]) for name, part in layer.quantized.parts().items())
    assert torch.equal(layer.quantized.dequantize(torch.float32), dense)


@pytest.mark.parametrize("format", FORMATS)
def test_a_model_is_saved_under_the_weights_names(format: str) -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 16, bias=False))
    quantize_model(model, format, 32)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    assert all(key.startswith(("0.weight", "0.bias", "1.weight")) for key in state)
    other = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 16, bias=False))
    quantize_model(other, format, 32)
    other.load_state_dict(state)
    x = torch.randn(3, 64)
    assert torch.equal(model(x), other(x))
    wrong = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 16, bias=False))
    quantize_model(wrong, format, 64)
    with pytest.raises(RuntimeError, match=r"0\.weight holds .* this layer"):
        wrong.load_state_dict(state)


def test_a_copied_layer_has_its_own_weight() -> None:
    layer = QuantizedLinear(QuantizedTensor.quantize(torch.randn(32, 64), "nf4"))
    layer.quantized  # noqa: B018 (made before the copy)
    other = copy.deepcopy(layer)
    other.codes.zero_()
    assert other.quantized.codes.sum() == 0 and layer.quantized.codes.sum() > 0


def test_quantize_model_replaces_in_place_and_names_what_it_did() -> None:
    model = nn.ModuleDict({"q_proj": nn.Linear(8, 8), "sub": nn.ModuleDict({"lm_head": nn.Linear(8, 8)})})
    model["lm_head"] = nn.Linear(8, 8)
    model["my_lm_head"] = nn.Linear(8, 8)
    model.eval()
    assert quantize_model(model) == ["q_proj", "my_lm_head"]
    assert isinstance(model["q_proj"], QuantizedLinear) and not model["q_proj"].training
    assert type(model["lm_head"]) is nn.Linear
    model["q_proj"].train()
    bad = nn.Sequential(nn.Linear(8, 8))
    bad[0].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"0\.weight has 1 of 64 values"):
        quantize_model(bad)


def test_the_head_of_a_sequential_can_be_quantized_at_the_root() -> None:
    with pytest.raises(ValueError, match="two dimensions"):
        QuantizedLinear(QuantizedTensor.quantize(torch.randn(8), "nf4"))
