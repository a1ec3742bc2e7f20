"""Norm, gate and short attention equal their definitions: outputs and every gradient, in fp32 and bf16."""

import math

import pytest
import torch

from lowrank.kernels.rms_norm import rms_norm, rms_norm_ref
from lowrank.kernels.short_attention import short_attention, short_attention_ref
from lowrank.kernels.swiglu import swiglu, swiglu_ref

DTYPES = [torch.float32, torch.bfloat16]


def compare(ours, ref, inputs: list[torch.Tensor], dtype: torch.dtype, terms: int) -> None:
    """Both against the fp64 result of `ref`. `terms`: how many rounded numbers are added up in one output."""
    inputs = [t.to(dtype).requires_grad_() for t in inputs]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    y, want = ours(*inputs), ref(*exact)
    dy = torch.randn_like(want)
    got = [y, *torch.autograd.grad(y, inputs, dy.to(dtype))]
    wanted = [want, *torch.autograd.grad(want, exact, dy.to(dtype).double())]
    # a few roundings at each of the intermediate results, which add up like a random walk over `terms`
    unit = torch.finfo(dtype).eps
    for a, b in zip(got, wanted):
        assert a.dtype == dtype
        assert (a.double() - b).norm() <= 4 * unit * math.sqrt(max(1, math.log2(terms))) * b.norm()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(dtype) -> None:
    torch.manual_seed(0)
    x, w = 3 * torch.randn(2, 7, 24), torch.randn(24)

    def exact(x, w):
        return x * (x.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() * w

    compare(lambda x, w: rms_norm(x, w, 1e-5), exact, [x, w], dtype, 24)
    with torch.no_grad():
        torch.testing.assert_close(rms_norm(x, w, 1e-5), rms_norm_ref(x, w, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu(dtype) -> None:
    torch.manual_seed(0)
    compare(swiglu, swiglu_ref, [torch.randn(2, 7, 24), torch.randn(2, 7, 24)], dtype, 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(4, 4), (9, 3), (4, 1)])
def test_short_attention(dtype, heads) -> None:
    torch.manual_seed(0)
    (h, kv), t, k = heads, 13, 16
    q, key, v = torch.randn(2, t, h, k).transpose(1, 2), torch.randn(2, kv, t, k), torch.randn(2, kv, t, k)
    compare(lambda *a: short_attention(*a, 0.25), lambda *a: short_attention_ref(*a, 0.25), [q, key, v], dtype, t * k)


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="gate and up of one shape"):
        swiglu(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"rms_norm needs weight \(3,\)"):
        rms_norm(torch.zeros(2, 3), torch.zeros(4), 1e-5)
    with pytest.raises(ValueError, match="wanted q"):
        short_attention(torch.zeros(1, 3, 4, 8), torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 4, 8), 1.0)
