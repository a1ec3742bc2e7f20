"""Weights kept dense, or packed, while text is generated."""

import copy

import pytest
import torch
from torch import nn

from lowrank.adapter import project
from lowrank.quant import linear as linear_module
from lowrank.quant import packed as packed_module
from lowrank.quant.linear import QuantizedLinear, decoded, quantize_model
from lowrank.quant.packed import packable, packed_product_works
from lowrank.quant.tensor import QuantizedTensor


def model(format: str, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    m = nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 64, bias=False), nn.Linear(64, 32))
    quantize_model(m, format)
    return m.to(dtype)


@pytest.mark.parametrize("format", ["nf4-dq", "fp4", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_are_the_same_inside(format: str, dtype: torch.dtype) -> None:
    m = model(format, dtype)
    x = torch.randn(3, 64, dtype=dtype, requires_grad=True)
    want = m(x)
    want_dx = torch.autograd.grad(want.sum(), x)[0]
    with decoded(m):
        for _ in range(2):
            with torch.no_grad():
                assert torch.equal(m(x), want)
            got = m(x)
            assert torch.equal(got, want)
            assert torch.equal(torch.autograd.grad(got.sum(), x)[0], want_dx)
    assert all(layer._kept is None for layer in m)


def test_a_weight_is_decoded_once_and_within_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    m = model("nf4")
    calls: list[QuantizedTensor] = []
    original = QuantizedTensor.dequantize
    monkeypatch.setattr(QuantizedTensor, "dequantize", lambda q, *a, **k: calls.append(q) or original(q, *a, **k))
    x = torch.randn(3, 64)
    want = m(x)
    sizes = [4 * layer.quantized.numel for layer in m]
    with decoded(m, budget_bytes=sizes[0] + sizes[2]), torch.no_grad():  # the second does not fit beside the first
        for _ in range(3):
            assert torch.equal(m(x), want)
        assert m[0]._kept.left == 0
    assert [q.shape for q in calls] == [(128, 64), (32, 64)]


def test_replaced_parts_are_noticed() -> None:
    m = model("nf4")
    x = torch.randn(3, 64)
    with decoded(m), torch.no_grad():
        m(x)
        other = QuantizedTensor.quantize(torch.randn(128, 64), "nf4")
        m[0].codes = nn.Parameter(other.codes, requires_grad=False)
        m[0].scales = nn.Parameter(other.scales, requires_grad=False)
        inside = m(x)
    assert torch.equal(inside, m(x))


def test_nesting_and_copies_leave_no_shortcut_behind() -> None:
    m = model("nf4")
    with decoded(m):
        assert all(layer._kept is None for layer in copy.deepcopy(m))
        with decoded(m):
            pass
        assert all(layer._kept is not None for layer in m)
    with pytest.raises(RuntimeError, match="boom"), decoded(m):
        raise RuntimeError("boom")
    assert all(layer._kept is None for layer in m)


@pytest.mark.parametrize("format", ["int4", "int4-affine"])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("block_size", [32, 64])
def test_the_packed_product_is_as_good_as_the_bf16_product(
    format: str, scale_dtype: torch.dtype, block_size: int
) -> None:
    if not packed_product_works():
        pytest.skip("this torch has no packed product for a CPU")
    torch.manual_seed(0)
    q = QuantizedTensor.quantize(torch.randn(48, 256), format, block_size, scale_dtype=scale_dtype)
    layer = QuantizedLinear(q, torch.randn(48, dtype=torch.bfloat16))
    x = torch.randn(2, 3, 256, dtype=torch.bfloat16)
    exact = x.double() @ q.dequantize(torch.float32).double().T + layer.bias.double()
    with torch.no_grad():
        plain = layer(x)
        with decoded(layer):
            packed = layer(x)
            assert packable(q, x) and not torch.equal(packed, plain)
            many = layer(x.repeat(2, 1, 1))  # 12 rows: decoded and dense
    assert torch.equal(many, torch.cat((plain, plain)))
    error = [((y.double() - exact).norm() / exact.norm()).item() for y in (plain, packed)]
    assert error[1] < 2 * error[0] < 0.02


def test_without_the_private_operator_int4_is_kept_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_module, "packed_product_works", lambda: False)
    m = model("int4", torch.bfloat16)
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    want = m(x)
    with decoded(m), torch.no_grad():
        assert torch.equal(m(x), want)


@pytest.mark.parametrize("bias", [True, False])
def test_a_bf16_layer_gives_the_same_bits_and_is_itself_again(bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(96, 160, bias=bias, dtype=torch.bfloat16)
    x = torch.randn(2, 3, 96, dtype=torch.bfloat16)
    want = layer(x)
    with decoded(layer):
        with torch.no_grad():
            assert torch.equal(layer(x), want) and torch.equal(layer(x[:, 0]), want[:, 0])
            layer.weight.mul_(2)  # noticed, though it is the same parameter
            doubled = layer(x)
        other = copy.deepcopy(layer)
        layer(x).sum().backward()  # gradients take the plain way
    assert layer.weight.grad is not None and "forward" not in layer.__dict__ and "_kept" not in layer.__dict__
    assert torch.equal(doubled, layer(x)) and torch.equal(doubled, other(x)) and not torch.equal(doubled, want)


@pytest.mark.parametrize("format", [None, "nf4-dq", "int4-affine"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_that_share_an_input_work_as_one(format: str | None, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    m = nn.ModuleList(nn.Linear(64, out) for out in (128, 32, 32)).to(dtype)
    if format:
        quantize_model(m, format)
    for rows in (1, 12):
        x = torch.randn(1, rows, 64, dtype=dtype)
        with torch.no_grad(), decoded(m):
            alone = [layer(x) for layer in m]
            together = project(x, *m)
            assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
        if not (format == "int4-affine" and dtype == torch.bfloat16 and rows == 1):
            assert all(torch.equal(layer(x), b) for layer, b in zip(m, together, strict=True))


def test_without_oneDNNs_order_a_bf16_layer_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_module, "ordered_product_works", lambda: False)
    layer = nn.Linear(64, 32, dtype=torch.bfloat16)
    with decoded(layer):
        assert "forward" not in layer.__dict__
