"""Layers with LoRA that share an input, as one function: every output and gradient, what is kept, what is refused."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowrank
from lowrank.adapter import project
from lowrank.kernels.lora_linear import add_low_rank, lora_linear, lora_linear_ref
from lowrank.kernels.nf4_codec import nf4_dequantize_ref, nf4_quantize_ref
from lowrank.methods.lora import LoRA, LoRAConfig
from lowrank.quant.linear import quantize_model

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SCALINGS = [2.0, 0.5, 1.0]


def layers(dtype: torch.dtype, device: str, ranks: tuple[int, ...], wide: int = 24) -> tuple[list, list, list, list]:
    """Weights (one in NF4, with a ragged last block), biases, A and B of three layers."""
    torch.manual_seed(0)
    sizes = (40, 12, 133)[: len(ranks)]
    weights = [(torch.randn(o, wide, device=device) / 5).to(dtype) for o in sizes]
    if len(sizes) > 1:
        packed, absmax = nf4_quantize_ref(weights[1].cpu())
        decode = partial(nf4_dequantize_ref, packed.to(device), absmax.to(device), weights[1].numel())
        weights[1] = (
            lambda x, bias: F.linear(x, decode(x.dtype).view(12, wide), bias),
            lambda dy: dy @ decode(dy.dtype).view(12, wide),
        )
    biases = [torch.randn(o, device=device).to(dtype) if o != 133 else None for o in sizes]
    A = [torch.randn(r, wide, device=device) / 5 for r in ranks]
    B = [torch.randn(o, r, device=device) / 5 for o, r in zip(sizes, ranks)]
    return weights, biases, A, B


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["ref", "triton"])
# one row and one layer; ranks of one to more than a tile, rows of a ragged tile
@pytest.mark.parametrize("shape, ranks", [((1, 24), (1,)), ((2, 35, 24), (4, 70, 3))])
def test_it_equals_the_definition(shape, ranks, dtype, mode, device, agree, monkeypatch) -> None:
    monkeypatch.setenv("LOWRANK_KERNELS", mode)
    weights, biases, A, B = layers(dtype, device, ranks)
    n = len(ranks)

    def exact(x: Tensor, *factors: Tensor) -> tuple[Tensor, ...]:
        eye = torch.eye(24, device=device, dtype=dtype)
        dense = [w.double() if isinstance(w, Tensor) else w[0](eye, bias=None).T.double() for w in weights]
        plain = [None if b is None else b.double() for b in biases]
        return tuple(
            lora_linear_ref(x, *layer) for layer in zip(dense, plain, factors[:n], factors[n:], SCALINGS, strict=False)
        )

    x = torch.randn(shape, device=device).to(dtype)
    # x Aᵀ, dy B, A, B and each sum are rounded to 16 bits on the way, as are the gradients of A and B before they
    # become fp32: about ten roundings of the size of the largest number; fp32 has sums of up to 70 products
    inner = 0 if dtype == torch.float32 else 10
    agree(lambda x, *f: lora_linear(x, weights, biases, f[:n], f[n:], SCALINGS[:n]), exact, [x, *A, *B], 300, inner)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stored", [torch.float32, None])
def test_adding_in_place_rounds_once(dtype, stored, device) -> None:
    torch.manual_seed(0)
    y, both, w = (torch.randn(s, device=device).to(dtype) for s in ((70, 133), (70, 2 * 20), (20, 133)))
    h, w = both[:, 20:], w.to(stored or dtype).T  # a part of a stacked product; a factor that is transposed
    before, kept = y.double(), y.data_ptr()
    assert add_low_rank(y, h, w, 0.5).data_ptr() == kept
    exact = before + 0.5 * h.double() @ w.to(dtype).double().T
    assert ((y.double() - exact).abs() <= torch.finfo(dtype).eps / 2 * exact.abs() + 40 * 2**-24 * 20).all()


def test_x_is_kept_once_and_nothing_else_of_its_size(device) -> None:
    weights, biases, A, B = layers(torch.bfloat16, device, (4, 4, 4))
    x = torch.randn(64, 24, device=device).bfloat16().requires_grad_()
    for factor in (*A, *B):
        factor.requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        lora_linear(x, weights, biases, A, B, SCALINGS)
    own = {t.data_ptr() for t in (*A, *B, *weights) if isinstance(t, Tensor)}
    assert sorted(tuple(t.shape) for t in kept if t.data_ptr() not in own) == [(64, 12), (64, 24)]  # x Aᵀ and x


def test_frozen_parts_cost_nothing(device) -> None:
    weights, biases, A, B = layers(torch.float32, device, (4, 4, 4))
    decoded = []
    weights[1] = weights[1][0], lambda dy: decoded.append(dy)
    x = torch.randn(5, 24, device=device)
    ys = lora_linear(x, weights, biases, [a.requires_grad_() for a in A], B, SCALINGS)
    grads = torch.autograd.grad(ys, A, [torch.ones_like(y) for y in ys])
    assert not decoded and all(g.any() for g in grads)  # no dx is wanted, so W is not decoded again


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(64, 40, bias=False), nn.Linear(64, 24)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(project(x, self.q, self.k), dim=-1)


def adapted(quantize: str | None = None, dtype: torch.dtype = torch.float32, config: object = None) -> nn.Module:
    torch.manual_seed(0)
    model = Two().to(dtype)
    if quantize:
        quantize_model(model, quantize)
    lowrank.attach(model, config or LoRAConfig(rank=4), targets="all-linear")
    for name, p in model.named_parameters():
        if "lora" in name:
            nn.init.normal_(p)
    return model


@pytest.mark.parametrize("quantize", [None, "nf4-dq", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_of_one_input_are_projected_together_and_equal_forward(quantize, dtype, monkeypatch) -> None:
    model = adapted(quantize, dtype)
    x = torch.randn(3, 40, 64).to(dtype).requires_grad_()
    wanted = torch.cat([layer.adapters["default"](x, layer.base(x), layer.base) for layer in (model.q, model.k)], -1)
    calls = []
    real = LoRA.projected.__func__
    monkeypatch.setattr(LoRA, "projected", classmethod(lambda *a: calls.append(real(*a)) or calls[-1]))
    got = model(x)
    assert len(calls) == 1 and len(calls[0]) == 2
    trained = [x, *(p for p in model.parameters() if p.requires_grad)]
    dy = torch.randn_like(got)
    pairs = [(got, wanted), *zip(torch.autograd.grad(got, trained, dy), torch.autograd.grad(wanted, trained, dy))]
    for a, b in pairs:  # the same sums in another order; in bf16 both round A, B, x Aᵀ and the update
        assert (a - b).float().norm() <= 4 * torch.finfo(dtype).eps * 3 * b.float().norm()


def test_what_is_not_plain_goes_the_long_way(monkeypatch) -> None:
    calls: list[int] = []  # how many layers at once
    monkeypatch.setattr("lowrank.methods.lora_paths.lora_linear", lambda *a: calls.append(len(a[1])) or lora_linear(*a))
    x = torch.randn(2, 40, 64, requires_grad=True)
    model = adapted()
    adapted()(x)
    assert calls == [2]

    class Edited(LoRA):
        def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
            return y + 1

    calls.clear()
    model.q.adapters["default"].__class__ = model.k.adapters["default"].__class__ = Edited
    torch.testing.assert_close(model(x), torch.cat([model.q.base(x), model.k.base(x)], -1) + 1)
    adapted(config=LoRAConfig(rank=4, dropout=0.5))(x)
    model = adapted()
    with lowrank.rows(model, ["default", None]):
        model(x)
    lowrank.activate(model, {"default": 0.5})
    model(x)
    with torch.no_grad():
        adapted()(x)
    assert calls == []
    seen: list[Tensor] = []
    model = adapted()
    model.q.base.register_forward_hook(lambda *a: seen.append(a[2]))
    model(x)
    assert calls == [1] and len(seen) == 1  # k by itself
    model = adapted()
    model.k.base.bias.requires_grad_()
    assert torch.autograd.grad(model(x).sum(), model.k.base.bias)[0].any()
    assert calls == [1, 1]  # q by itself


def test_what_does_not_fit_is_refused_by_name() -> None:
    weights, biases, A, B = layers(torch.float32, "cpu", (4, 4, 4))
    x = torch.randn(2, 24)
    with pytest.raises(ValueError, match=r"lora_linear needs A \(R, 24\) and B \(O, R\)"):
        lora_linear(x, weights, biases, A, [B[0][:, :3], *B[1:]], SCALINGS)
    with pytest.raises(ValueError, match=r"needs weight \(40, 24\) torch.bfloat16, got \(40, 24\) torch.float32"):
        lora_linear(x.bfloat16(), weights, biases, A, B, SCALINGS)
    with pytest.raises(ValueError, match=r"no gradient to weight 0"):
        lora_linear(x, [weights[0].clone().requires_grad_(), *weights[1:]], biases, A, B, SCALINGS)
    with pytest.raises(ValueError, match=r"on one device, got x on cpu, .*A 1 on meta"):
        lora_linear(x, weights, biases, [A[0], A[1].to("meta"), A[2]], B, SCALINGS)
    with pytest.raises(ValueError, match=r"add_low_rank needs y \(M, O\)"):
        add_low_rank(torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(3, 5))
