"""nf4_linear on plain tensors equals the product with the decoded weight: output and gradients, a ragged last block."""

import pytest
import torch
import torch.nn.functional as F

from lowrank.kernels.nf4_linear import nf4_linear
from lowrank.quant import nf4


@pytest.mark.parametrize("shape", [(40, 64), (5, 39)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_it_is_the_product_with_the_decoded_weight(shape, with_bias) -> None:
    torch.manual_seed(0)
    packed, absmax = nf4.quantize(torch.randn(shape))
    weight = nf4.dequantize(packed, absmax, shape, torch.float32)
    x = torch.randn(2, 3, shape[1], requires_grad=True)
    bias = torch.randn(shape[0], requires_grad=True) if with_bias else None
    inputs = [t for t in (x, bias) if t is not None]
    got, wanted = nf4_linear(x, packed, absmax, shape[0], bias=bias), F.linear(x, weight, bias)
    assert torch.equal(got, wanted)
    dy = torch.randn_like(got)
    for a, b in zip(torch.autograd.grad(got, inputs, dy), torch.autograd.grad(wanted, inputs, dy)):
        torch.testing.assert_close(a, b)


def test_what_does_not_fit_is_refused_by_name() -> None:
    packed, absmax = nf4.quantize(torch.randn(8, 64))
    x = torch.randn(2, 64)
    with pytest.raises(ValueError, match="packed must be 288 uint8"):
        nf4_linear(x, packed, absmax, 9)
    with pytest.raises(ValueError, match="absmax must be 16 float32 at block size 32"):
        nf4_linear(x, packed, absmax, 8, block_size=32)
    with pytest.raises(ValueError, match=r"bias must be \(8,\)"):
        nf4_linear(x, packed, absmax, 8, bias=torch.zeros(7))
