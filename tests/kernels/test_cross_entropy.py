"""Linear + loss in chunks equals the definition: value and every gradient, chunks ragged, labels at the edges."""

import pytest
import torch

from lowrank.kernels import cross_entropy as ce

SIZES = [(1, 8, 11), (ce.CHUNK, 16, 40), (2 * ce.CHUNK + 3, 16, 40)]  # (N, D, V)


def tensors(n: int, d: int, v: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return (
        torch.randn(n, d).to(dtype).requires_grad_(),
        torch.randn(v, d).to(dtype).requires_grad_(),
        torch.randint(0, v, (n,)),
    )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["cross-entropy", "kl"])
def test_value_and_gradients_equal_the_definition(size, kind) -> None:
    hidden, weight, labels = tensors(*size, torch.float32)
    if kind == "kl":
        other = hidden.detach().roll(1, 0) + 0.5
        ours, ref = ce.linear_kl(hidden, other, weight), ce.linear_kl_ref(hidden, other, weight)
    else:
        ours, ref = ce.linear_cross_entropy(hidden, weight, labels), ce.linear_cross_entropy_ref(hidden, weight, labels)
    torch.testing.assert_close(ours, ref, rtol=1e-5, atol=1e-5)
    inputs = (hidden,) if kind == "kl" else (hidden, weight)  # ref's KL also moves W through the teacher's logits
    mine = torch.autograd.grad(3 * ours, inputs)
    theirs = torch.autograd.grad(3 * ref, inputs)
    for a, b in zip(mine, theirs):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)  # sums of up to 259 products of order 1, fp32


def test_kl_of_a_model_to_itself_is_zero_and_has_no_gradient() -> None:
    hidden, weight, _ = tensors(5, 16, 40, torch.float32)
    loss = ce.linear_kl(hidden, hidden.detach().clone(), weight.detach())
    assert loss.item() == 0
    assert torch.autograd.grad(loss, hidden)[0].abs().max() == 0


def test_bf16_stays_within_the_rounding_of_its_logits() -> None:
    hidden, weight, labels = tensors(200, 64, 300, torch.bfloat16)
    ours = ce.linear_cross_entropy(hidden, weight, labels)
    exact = ce.linear_cross_entropy_ref(hidden.double().detach(), weight.double().detach(), labels)
    largest = (hidden.double() @ weight.double().T).abs().max().item()
    # one logit is off by at most 2^-9 of its size, and a row's loss by at most twice that
    assert abs(ours.item() - exact.item()) <= 200 * 2 * largest * 2**-9
    grad = torch.autograd.grad(ours, hidden)[0]
    assert grad.dtype == torch.bfloat16 and torch.isfinite(grad).all()


def test_bad_input_is_refused_by_name() -> None:
    hidden, weight, labels = tensors(4, 8, 11, torch.float32)
    with pytest.raises(ValueError, match=r"labels must lie in 0..10"):
        ce.linear_cross_entropy(hidden, weight, labels + 20)
    with pytest.raises(ValueError, match="one dtype"):
        ce.linear_cross_entropy(hidden, weight.bfloat16(), labels)
    with pytest.raises(ValueError, match=r"wanted hidden \(N, D\)"):
        ce.linear_cross_entropy(hidden, weight[:, :4], labels)
    with pytest.raises(ValueError, match="teacher must be"):
        ce.linear_kl(hidden, hidden[:2], weight)
