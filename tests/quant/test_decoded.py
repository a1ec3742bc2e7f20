"""Weights kept dense, or packed, while text is generated."""

import copy

import pytest
import torch
from torch import nn

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
