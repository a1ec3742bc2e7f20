"""What a kernel test needs: `device`, where Triton's version of each kernel runs while the test does."""

import pytest
import torch

from lowrank.kernels.dispatch import INSTALLED


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> str:
    """ "cuda" where there is a GPU: compiled. Else "cpu": interpreted, about 0.7 ms a program, so keep shapes small."""
    if not INSTALLED:
        pytest.skip("Triton is not installed")
    monkeypatch.setenv("LOWRANK_KERNELS", "triton")
    return "cuda" if torch.cuda.is_available() else "cpu"
