"""The smaller kernels equal their definitions: outputs and every gradient, in three dtypes."""

import math

import pytest
import torch
from torch import Tensor

from lowrank.kernels.rms_norm import rms_norm, rms_norm_ref
from lowrank.kernels.rope import rope, rope_ref
from lowrank.kernels.row_norm import row_norm, row_norm_ref
from lowrank.kernels.short_attention import short_attention, short_attention_ref
from lowrank.kernels.swiglu import swiglu, swiglu_ref

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def compare(ours, ref, inputs: list[Tensor], dtype: torch.dtype, terms: int) -> None:
    """The plain versions, against the fp64 result of `ref`. `terms`: how many rounded numbers one output adds up."""
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
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm_in_plain_torch(dtype, offset) -> None:
    torch.manual_seed(0)
    x, w = 3 * torch.randn(2, 7, 24), torch.randn(24)
    compare(lambda x, w: rms_norm(x, w, 1e-5, offset), lambda x, w: rms_norm_ref(x, w, 1e-5, offset), [x, w], dtype, 24)
    with torch.no_grad():
        torch.testing.assert_close(rms_norm(x, w, 1e-5, offset), rms_norm_ref(x, w, 1e-5, offset))


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu_in_plain_torch(dtype) -> None:
    torch.manual_seed(0)
    compare(swiglu, swiglu_ref, [torch.randn(2, 7, 24), torch.randn(2, 7, 24)], dtype, 1)


@pytest.mark.parametrize("dtype", DTYPES)
# one row; rows of several tiles and programs, the last ones ragged; heads of 5 (the least power of two is 8)
@pytest.mark.parametrize("shape", [(1, 24), (2, 1033, 5), (18, 300)])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm(shape, dtype, offset, device, agree) -> None:
    torch.manual_seed(0)
    x, w = 3 * torch.randn(shape, device=device).to(dtype), torch.randn(shape[-1], device=device).to(dtype)
    # sums of D squares and products, and over all rows in dw: fp32, in parts that halve the error
    terms = 2 * x.numel() // shape[-1] if shape[1] == 1033 else 2 * shape[-1]
    agree(lambda *a: rms_norm(*a, 1e-5, offset), lambda *a: rms_norm_ref(*a, 1e-5, offset), [x, w], terms)


def test_rms_norm_of_rows_that_lie_apart_and_with_a_frozen_weight(device, agree) -> None:
    torch.manual_seed(0)
    wide, w = torch.randn(6, 2, 40, device=device), torch.randn(20, device=device)
    agree(lambda x: rms_norm(x[:, 1, 7:27], w, 1e-5), lambda x: rms_norm_ref(x[:, 1, 7:27], w, 1e-5), [wide], 40)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (2, 3, 24), (3, 1500)])
def test_swiglu(shape, dtype, device, agree) -> None:
    torch.manual_seed(0)
    inputs = [(4 * torch.randn(shape, device=device)).to(dtype) for _ in "ab"]
    agree(swiglu, swiglu_ref, inputs, 16)  # about ten operations of fp32, exp among them


def test_swiglu_of_the_two_halves_of_one_product(device, agree) -> None:
    torch.manual_seed(0)
    both = torch.randn(2, 3, 50, device=device)
    agree(lambda x: swiglu(*x.chunk(2, -1)), lambda x: swiglu_ref(*x.chunk(2, -1)), [both], 16)
    a, b = (
        torch.randn(24, 6, device=device).T,
        torch.randn(6, 24, device=device),
    )  # no two numbers of a row side by side
    agree(lambda a: swiglu(a, b), lambda a: swiglu_ref(a, b), [a], 16)


def tables(rows: int, tokens: int, dim: int, interleaved: bool, device: str) -> tuple[Tensor, Tensor]:
    angle = torch.randn(rows, tokens, 1, dim // 2, device=device) * 100
    pair = (lambda a, b: torch.stack([a, b], -1).flatten(-2)) if interleaved else (lambda a, b: torch.cat([a, b], -1))
    return pair(angle.cos(), angle.cos()), pair(-angle.sin(), angle.sin())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
# (B, T, H, K), rows of the table, dim: one number's pair; a part of the head, ragged; more heads than a program takes
@pytest.mark.parametrize("size", [((1, 1, 1, 2), 1, 2), ((2, 3, 5, 24), 2, 12), ((2, 2, 18, 6), 1, 6)])
def test_rope(size, interleaved, dtype, device, agree) -> None:
    torch.manual_seed(0)
    shape, rows, dim = size
    cos, sin = tables(rows, shape[1], dim, interleaved, device)
    x = torch.randn(shape, device=device).to(dtype)
    # 3: two products and a sum
    agree(
        lambda x: rope(x, cos, sin, interleaved),
        lambda x: rope_ref(x, cos.double(), sin.double(), interleaved),
        [x],
        3,
    )
    assert torch.equal(rope(x, cos, sin, interleaved)[..., dim:], x[..., dim:])


def test_rope_turns_a_pair_by_its_angle(device) -> None:
    angle = torch.tensor(math.pi / 2)
    cos, sin = angle.cos().repeat(1, 1, 1, 2), torch.stack([-angle.sin(), angle.sin()]).view(1, 1, 1, 2)
    turned = rope(torch.tensor([3.0, 4.0], device=device).view(1, 1, 1, 2), cos.to(device), sin.to(device))
    torch.testing.assert_close(turned.flatten().cpu(), torch.tensor([-4.0, 3.0]))


def test_rope_of_heads_that_are_a_part_of_a_product_and_are_transposed_later(device, agree) -> None:
    torch.manual_seed(0)
    cos, sin = tables(1, 3, 8, False, device)
    qkv, mix = torch.randn(2, 3, 7 * 8, device=device), torch.randn(3, 3, dtype=torch.float64, device=device)

    def q(x: Tensor, turn, cos: Tensor, sin: Tensor) -> Tensor:
        heads = x[..., 8:40].view(2, 3, 4, 8)
        return mix.to(x.dtype) @ turn(heads, cos, sin).transpose(1, 2)  # the gradient comes back transposed

    agree(lambda x: q(x, rope, cos, sin), lambda x: q(x, rope_ref, cos.double(), sin.double()), [qkv], 16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["ref", "triton"])
@pytest.mark.parametrize("size", [(1, 1, 1), (37, 150, 5), (7, 24, 70)])  # (O, I, R), ragged in each
def test_row_norm(size, mode, dtype, device, agree, monkeypatch) -> None:
    monkeypatch.setenv("LOWRANK_KERNELS", mode)
    torch.manual_seed(0)
    O, I, R = size
    W, A, B = (torch.randn(s, device=device) for s in ((I, O), (R, I), (O, R)))
    W = W.to(dtype).T  # rows that lie apart
    # W Aᵀ, A, B and cB are rounded to W's dtype, a few times the size of the largest result; fp32: sums of I and R
    inner = 0 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps / 2**-23
    agree(
        lambda A, B: row_norm(W, A, B, 0.5),
        lambda A, B: row_norm_ref(W.double(), A, B, 0.5),
        [A, B],
        16 * sum(size),
        inner,
    )
    squares = W.double().square().sum(1)
    unchanged = row_norm(W, A, torch.zeros_like(B), 0.5, squares)
    assert torch.equal(unchanged, squares.sqrt().float())  # to the last bit: DoRA's m / |V| is 1 at the start


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(4, 4), (9, 3), (4, 1)])
def test_short_attention(dtype, heads) -> None:
    torch.manual_seed(0)
    (h, kv), t, k = heads, 13, 16
    q, key, v = torch.randn(2, t, h, k).transpose(1, 2), torch.randn(2, kv, t, k), torch.randn(2, kv, t, k)
    compare(lambda *a: short_attention(*a, 0.25), lambda *a: short_attention_ref(*a, 0.25), [q, key, v], dtype, t * k)


def test_empty_tensors_have_nothing_to_launch(device) -> None:
    x = torch.zeros(0, 4, device=device, requires_grad=True)
    for y in (swiglu(x, x), rms_norm(x, torch.ones(4, device=device), 1e-5)):
        assert y.shape == (0, 4) and torch.autograd.grad(y.sum(), x)[0].shape == (0, 4)


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="gate and up of one shape"):
        swiglu(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"rms_norm needs weight \(3,\)"):
        rms_norm(torch.zeros(2, 3), torch.zeros(4), 1e-5)
    with pytest.raises(ValueError, match="wanted q"):
        short_attention(torch.zeros(1, 3, 4, 8), torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 4, 8), 1.0)
    x, table = torch.zeros(2, 3, 4, 8), torch.zeros(1, 3, 1, 8)
    with pytest.raises(ValueError, match=r"cos \(B or 1, T, 1, dim\)"):
        rope(x, table[:, :2], table[:, :2])
    with pytest.raises(ValueError, match=r"row_norm needs weight \(O, I\), A \(R, I\), B \(O, R\)"):
        row_norm(torch.zeros(4, 3), torch.zeros(2, 3), torch.zeros(3, 2), 1.0)
    with pytest.raises(ValueError, match=r"squares \(4,\)"):
        row_norm(torch.zeros(4, 3), torch.zeros(2, 3), torch.zeros(4, 2), 1.0, torch.zeros(3))
    with pytest.raises(ValueError, match="cos and sin alike, dim even and <= K"):
        rope(x, table.repeat(1, 1, 1, 2), table.repeat(1, 1, 1, 2))


def test_devices_and_dtypes_that_do_not_fit_are_refused_by_name(device) -> None:
    x = torch.zeros(2, 3, device=device)
    with pytest.raises(ValueError, match=r"rms_norm needs its tensors on one device, got x on .*, weight on meta"):
        rms_norm(x, torch.zeros(3, device="meta"), 1e-5)
    with pytest.raises(
        ValueError, match=r"kernel of swiglu takes float32, float16 and bfloat16, got a in torch.float64"
    ):
        swiglu(x.double(), x.double())
    table = torch.zeros(1, 1, 1, 4, dtype=torch.bfloat16, device=device)
    with pytest.raises(ValueError, match="cos and sin in float32"):
        rope(torch.zeros(1, 1, 1, 4, device=device), table, table)
