"""Another adapter for each row equals two batched products: output and every gradient, rows that share adapters."""

import pytest
import torch

from lowrank.kernels.lora_grouped import lora_grouped, lora_grouped_ref

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# N, T, I, R, O: one token of one row; ragged tiles everywhere; more ranks than a tile has
SIZES = [(1, 1, 8, 1, 5), (3, 35, 150, 4, 133), (2, 3, 20, 70, 24)]


def tensors(size: tuple[int, ...], adapters: int, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    torch.manual_seed(0)
    n, t, i, r, o = size
    shapes = (n, t, i), (adapters, r, i), (adapters, o, r)
    return [(torch.randn(shape, device=device) / 2).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_it_equals_the_definition(size, dtype, device, agree) -> None:
    scaling = torch.linspace(0.5, 2, size[0], device=device)
    # sums of I, of R, of O and of T products of fp32; in 16 bits x Aᵀ and dy B are rounded on the way
    terms, inner = 2 * sum(size), 0 if dtype == torch.float32 else 4
    agree(
        lambda *a: lora_grouped(*a, scaling),
        lambda *a: lora_grouped_ref(*a, scaling.double()),
        tensors(size, size[0], dtype, device),
        terms,
        inner,
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_share_adapters_add_up_their_gradients(dtype, device, agree) -> None:
    index = torch.tensor([2, 0, 2], device=device)  # nobody has adapter 1
    inputs = tensors(SIZES[1], 4, dtype, device)
    inner = 0 if dtype == torch.float32 else 4
    agree(
        lambda *a: lora_grouped(*a, None, index),
        lambda *a: lora_grouped_ref(*a, None, index),
        inputs,
        4 * sum(SIZES[1]),
        inner,
    )
    A = inputs[1].requires_grad_()
    dA = torch.autograd.grad(lora_grouped(inputs[0], A, inputs[2], None, index).sum(), A)[0]
    assert dA[[0, 2]].any(-1).all() and not dA[[1, 3]].any()


def test_smaller_ranks_filled_up_with_zeros_change_nothing(device) -> None:
    x, A, B = tensors((2, 5, 12, 3, 7), 2, torch.float32, device)
    A[1, 1:], B[1, :, 1:] = 0, 0
    alone = x[1] @ A[1, :1].T @ B[1, :, :1].T
    torch.testing.assert_close(lora_grouped(x, A, B)[1], alone)


def test_strides_and_an_input_of_another_dtype(device, agree) -> None:
    x, A, B = tensors((2, 6, 10, 3, 7), 2, torch.float32, device)
    x = x.transpose(0, 1).contiguous()  # (T, N, I): its rows lie apart

    def of(f):
        return lambda x, A, B: f(x.transpose(0, 1), A.mT, B.mT).mT

    agree(of(lora_grouped), of(lora_grouped_ref), [x, A.mT.contiguous(), B.mT.contiguous()], 60)
    agree(lora_grouped, lora_grouped_ref, [x.transpose(0, 1).bfloat16(), A, B], 60)


def test_what_does_not_fit_is_refused_by_name(device) -> None:
    x, A, B = tensors((2, 3, 8, 4, 5), 2, torch.float32, device)
    for wrong in ([x, A, B[:1]], [x, A[:, :, :7], B], [x[0], A, B], [x, A, B, torch.ones(3)], [x[:1], A, B]):
        with pytest.raises(ValueError, match=r"lora_grouped needs x \(N, T, I\)"):
            lora_grouped(*wrong)
    with pytest.raises(ValueError, match=r"index in 0\.\.1, got 0\.\.2"):
        lora_grouped(x, A, B, None, torch.tensor([0, 2], device=device))
    with pytest.raises(ValueError, match="index int64"):
        lora_grouped(x, A, B, None, torch.tensor([0, 1], device=device, dtype=torch.int32))
    with pytest.raises(ValueError, match="one dtype"):
        lora_grouped(x, A, B.half())
    with pytest.raises(ValueError, match=r"on one device, got x on .*, A on meta"):
        lora_grouped(x, A.to("meta"), B)
