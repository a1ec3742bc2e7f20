"""Linear + loss in chunks equals the definition: value and every gradient, chunks ragged, labels at the edges."""

import pytest
import torch

from lowrank.kernels import cross_entropy as ce

SIZES = [(1, 8, 11), (ce.CHUNK, 16, 40), (2 * ce.CHUNK + 3, 16, 40)]  # (N, D, V)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def tensors(n: int, d: int, v: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return (
        torch.randn(n, d).to(dtype).requires_grad_(),
        torch.randn(v, d).to(dtype).requires_grad_(),
        torch.randint(0, v, (n,)),
    )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["cross-entropy", "kl"])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_value_and_gradients_equal_the_definition(size, kind, softcap) -> None:
    hidden, weight, labels = tensors(*size, torch.float32)
    if kind == "kl":
        other = hidden.detach().roll(1, 0) + 0.5
        ours, ref = ce.linear_kl(hidden, other, weight, softcap), ce.linear_kl_ref(hidden, other, weight, softcap)
    else:
        ours = ce.linear_cross_entropy(hidden, weight, labels, softcap)
        ref = ce.linear_cross_entropy_ref(hidden, weight, labels, softcap)
    torch.testing.assert_close(ours, ref, rtol=1e-5, atol=1e-5)
    inputs = (hidden,) if kind == "kl" else (hidden, weight)  # ref's KL also moves W through the teacher's logits
    mine = torch.autograd.grad(3 * ours, inputs)
    theirs = torch.autograd.grad(3 * ref, inputs)
    for a, b in zip(mine, theirs):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)  # sums of up to 259 products of order 1, fp32


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [None, 3.0])
# one row; two chunks, the last of one row; a vocabulary of several blocks, the last ragged
@pytest.mark.parametrize("size", [(1, 8, 11), (33, 16, 40), (2, 8, 4099)])
def test_the_kernel_equals_the_definition(size, softcap, dtype, device, agree, monkeypatch) -> None:
    monkeypatch.setattr(ce, "LAUNCHED", ce.ROUND)
    hidden, weight, labels = (t.detach().to(device) for t in tensors(*size, dtype))
    labels[0] = size[2] - 1  # the last token of a ragged block
    # fp32: sums of D products, of V exponentials and of N rows. In 16 bits the logits and dz are rounded on the way: a
    # logit of up to 16 is off by half a unit (so is each probability, relatively), dz by half a unit, and dh and dW
    # add up V and N of both; the loss has N rows of it
    terms, inner = 4 * (size[0] + size[1]) + 32, 0 if dtype == torch.float32 else 64
    # the definition's weight gets no gradient through the teacher
    agree(
        lambda h, w: ce.linear_cross_entropy(h, w, labels, softcap),
        lambda h, w: ce.linear_cross_entropy_ref(h, w, labels, softcap),
        [hidden, weight],
        terms,
        inner,
    )
    teacher = hidden.roll(1, 1) + 0.5

    def kl_ref(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        log_p = ce._capped(h @ w.T, softcap).log_softmax(-1)
        log_t = ce._capped(teacher.double() @ w.detach().T, softcap).log_softmax(-1)
        return torch.nn.functional.kl_div(log_p, log_t, reduction="sum", log_target=True)

    agree(lambda h, w: ce.linear_kl(h, teacher, w, softcap), kl_ref, [hidden, weight], terms, inner)


def test_rows_without_a_label_cost_nothing_and_change_nothing(device, monkeypatch) -> None:
    hidden, weight, labels = (t.detach().to(device) for t in tensors(9, 16, 40, torch.float32))
    some = labels.clone()
    some[[0, 3, 8]] = -100
    rows = []
    real = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, out: rows.append(len(a)) or real(a, b, out=out))
    x, y = hidden.clone().requires_grad_(), hidden[some >= 0].clone().requires_grad_()
    got, wanted = ce.linear_cross_entropy(x, weight, some), ce.linear_cross_entropy(y, weight, labels[some >= 0])
    assert rows == [ce.ROUND, ce.ROUND] and torch.equal(got, wanted)
    dx, dy = torch.autograd.grad(got, x)[0], torch.autograd.grad(wanted, y)[0]
    assert torch.equal(dx[some >= 0], dy) and not dx[some < 0].any()
    assert ce.linear_cross_entropy(x, weight, torch.full_like(labels, -100)).item() == 0


def test_large_logits_neither_overflow_nor_vanish(device) -> None:
    hidden = torch.tensor([[1.0], [-1.0]], device=device)
    weight = torch.tensor([[3e4], [-3e4], [0.0]], device=device)
    labels = torch.tensor([0, 0], device=device)
    assert ce.linear_cross_entropy(hidden, weight, labels).item() == 6e4  # the second row is wrong by 60,000
    assert ce.linear_kl(hidden, hidden.clone(), weight).item() == 0


@pytest.mark.parametrize("mode", ["ref", "triton"])
def test_kl_of_a_model_to_itself_is_zero_and_has_no_gradient(mode, device, monkeypatch) -> None:
    monkeypatch.setenv("LOWRANK_KERNELS", mode)
    hidden, weight, _ = (t.to(device) for t in tensors(5, 16, 40, torch.float32))
    loss = ce.linear_kl(hidden, hidden.detach().clone(), weight.detach())
    # the two products may round apart (the order of sums goes by alignment and threads): a logit is off by
    # at most D eps sum |h w|, a row's loss by as much again for log-sum-exp, and a gradient by that times sum |w|
    eps = torch.finfo(torch.float32).eps
    logit = 16 * eps * (hidden.abs() @ weight.abs().T).max().item()
    assert abs(loss.item()) <= 5 * 2 * logit
    assert torch.autograd.grad(loss, hidden)[0].abs().max() <= 2 * logit * weight.abs().sum(0).max()


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
    for wrong in (labels + 20, labels - 12):
        with pytest.raises(ValueError, match=r"labels must lie in 0..10"):
            ce.linear_cross_entropy(hidden, weight, wrong)
    with pytest.raises(ValueError, match="one dtype"):
        ce.linear_cross_entropy(hidden, weight.bfloat16(), labels)
    with pytest.raises(ValueError, match=r"wanted hidden \(N, D\)"):
        ce.linear_cross_entropy(hidden, weight[:, :4], labels)
    with pytest.raises(ValueError, match="softcap must be positive"):
        ce.linear_cross_entropy(hidden, weight, labels, softcap=0)
    with pytest.raises(ValueError, match="teacher must be"):
        ce.linear_kl(hidden, hidden[:2], weight)
    with pytest.raises(ValueError, match=r"on one device, got hidden on cpu, weight on cpu, labels on meta"):
        ce.linear_cross_entropy(hidden, weight, labels.to("meta"))
