"""What a kernel test needs: `device`, where Triton's version of each kernel runs while the test does, and `agree`."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from lowrank.kernels.dispatch import INSTALLED


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> str:
    """ "cuda" where there is a GPU: compiled. Else "cpu": interpreted, about 0.7 ms a program, so keep shapes small."""
    if not INSTALLED:
        pytest.skip("Triton is not installed")
    monkeypatch.setenv("LOWRANK_KERNELS", "triton")
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def agree() -> Callable[..., None]:
    """Outputs and every gradient of `ours` against the fp64 result of its definition, number by number."""

    def check(ours: Callable, ref: Callable, inputs: Sequence[Tensor], terms: int, inner: int = 0) -> None:
        """`inputs` are leaves as `ours` takes them; the definition gets the same values in fp64.

        |error| <= half a unit in the last place of the result (its one rounding)
                 + `inner` such roundings of numbers on the way, and `terms` of fp32, of the size of the largest result.
        """
        inputs = [t.detach().requires_grad_() if t.is_floating_point() else t for t in inputs]
        exact = [t.detach().double().requires_grad_() if t.is_floating_point() else t for t in inputs]
        y, want = ours(*inputs), ref(*exact)
        outputs, wanted = (y, want) if isinstance(y, tuple) else ((y,), (want,))
        dys = [torch.randn_like(t) for t in outputs]
        leaves, exact_leaves = ([t for t in group if t.requires_grad] for group in (inputs, exact))
        got = [*outputs, *torch.autograd.grad(outputs, leaves, dys)]
        wanted = [*wanted, *torch.autograd.grad(wanted, exact_leaves, [d.double() for d in dys])]
        for i, (a, b) in enumerate(zip(got, wanted)):
            assert a.shape == b.shape and a.dtype == (*outputs, *leaves)[i].dtype
            unit, largest = torch.finfo(a.dtype).eps, b.abs().max().item()
            coarse = max(torch.finfo(t.dtype).eps for t in inputs if t.is_floating_point())
            slack = (inner * coarse / 2 + terms * 2**-24) * largest + torch.finfo(a.dtype).smallest_normal * unit
            over = ((a.double() - b).abs() - (unit / 2 * b.abs() * (1 + unit) + slack)).max().item()
            assert over <= 0, f"result {i}: {over:.3g} too far off, the largest is {largest:.3g}"

    return check
