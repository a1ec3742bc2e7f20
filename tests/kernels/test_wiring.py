"""The public path, QuantizedLinear and QuantizedTensor, reaches the kernels and gives what it gives without them."""

import pytest
import torch

from lowrank.kernels import nf4_codec
from lowrank.kernels import nf4_linear as kernel
from lowrank.quant.linear import QuantizedLinear, decoded
from lowrank.quant.tensor import QuantizedTensor


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the ways that were taken."""
    names: list[str] = []

    def spy(module, name):
        original = getattr(module, name)

        def call(*arguments, **options):
            names.append(name)
            return original(*arguments, **options)

        monkeypatch.setattr(module, name, call)

    for name in ("gemv", "tile", "dequantize_into"):
        spy(kernel, name)
    spy(nf4_codec, "as_words")
    return names


@pytest.mark.parametrize("format", ["nf4", "nf4-dq"])
@pytest.mark.parametrize("way,rows", [("gemv", 1), ("tile", 5), ("dequantize_into", 20)])
def test_a_quantized_layer_runs_the_kernels(format, way, rows, device, launched, monkeypatch) -> None:
    monkeypatch.setattr(kernel, "limits", lambda _: {"gemv": 1, "tile": 16})
    torch.manual_seed(0)
    q = QuantizedTensor.quantize(torch.randn(24, 128), format)
    layer = QuantizedLinear(q, torch.randn(24).to(torch.bfloat16)).to(device)
    layer.bias.requires_grad_()
    x = torch.randn(rows, 128).to(torch.bfloat16).to(device).requires_grad_()
    y = layer(x)
    assert way in launched
    dx, db = torch.autograd.grad(y, (x, layer.bias), torch.ones_like(y))
    assert "dequantize_into" in launched
    exact, ones = q.dequantize(torch.float32).double().to(device), torch.ones(rows, 24, device=device).double()
    # weights rounded to bf16 (2^-9), the result rounded once more
    for got, want, size in (
        (y, x.double() @ exact.T + layer.bias.double(), x.double().abs() @ exact.abs().T + layer.bias.double().abs()),
        (dx, ones @ exact, ones @ exact.abs()),
    ):
        assert got.dtype == torch.bfloat16 and ((got.double() - want).abs() <= 2**-8 * size * 1.01).all()
    assert torch.equal(db, torch.full_like(db, rows))
    launched.clear()
    with torch.no_grad(), decoded(layer):  # generation: no dense copy is kept beside a kernel that reads 4 bits
        assert torch.equal(layer(x), y) and way in launched


@pytest.mark.parametrize("format", ["nf4", "nf4-dq", "fp4"])
def test_quantizing_and_decoding_run_the_kernels_with_the_same_bits(format, device, launched, monkeypatch) -> None:
    torch.manual_seed(0)
    w = torch.randn(24, 130)
    got = QuantizedTensor.quantize(w.to(device), format)
    values = got.dequantize(torch.bfloat16)
    assert "as_words" in launched
    monkeypatch.setenv("LOWRANK_KERNELS", "ref")
    wanted = QuantizedTensor.quantize(w, format)
    assert torch.equal(values.cpu(), wanted.dequantize(torch.bfloat16))
    if format == "nf4":
        assert all(torch.equal(a.cpu(), b) for a, b in zip(got.parts().values(), wanted.parts().values()))
