"""Which version runs, and `store` and `dot` in the interpreter against torch."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from lowrank.kernels import dispatch
from lowrank.kernels.dispatch import dot, store, tl, triton
from lowrank.quant import packed

ROOT = Path(__file__).parents[2]


def python(*arguments: str, **environment: str) -> str:
    """Run Python in a fresh process: the interpreter has to be chosen before Triton is imported."""
    command = [sys.executable, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_mode_is_read_at_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(1)
    for value in ("ref", "auto"):
        monkeypatch.setenv("LOWRANK_KERNELS", value)
        assert not dispatch.use_triton(x)
    monkeypatch.setenv("LOWRANK_KERNELS", "tritn")
    with pytest.raises(ValueError, match=r"unknown value of LOWRANK_KERNELS 'tritn' \(did you mean 'triton'\?\)"):
        dispatch.use_triton(x)


def test_triton_on_the_cpu_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWRANK_KERNELS", "triton")
    monkeypatch.setattr(dispatch, "_interpreted", False)
    with pytest.raises(RuntimeError, match=r"TRITON_INTERPRET=1|not installed"):
        dispatch.use_triton(torch.ones(1))


def test_what_doctor_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWRANK_KERNELS", "ref")
    assert "LOWRANK_KERNELS=ref" in dispatch.describe()["kernels"]
    assert packed.describe()["quantized weights"].startswith("decoded by")


def test_kernel_files_import_without_triton() -> None:
    code = """
        import sys
        sys.modules["triton"] = None
        import torch
        from lowrank.kernels.dispatch import INSTALLED, describe, store, tl, triton, use_triton

        @triton.autotune(configs=[triton.Config({"BLOCK": 16})], key=["n"])
        @triton.jit
        def kernel(x, n, BLOCK: tl.constexpr):
            store(x, tl.arange(0, BLOCK))

        print(INSTALLED, use_triton(torch.ones(1)))
        try:
            kernel[(1,)](torch.ones(1), 1)
        except RuntimeError as error:
            print(error)
    """
    out = python("-c", textwrap.dedent(code))
    assert out.startswith("False False") and "needs Triton, which is not installed" in out


@triton.jit
def copy(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    store(y + i, tl.load(x + i, mask=i < n), i < n)


@triton.jit
def square(a, b, c, N: tl.constexpr):
    i = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    store(c + i, dot(tl.load(a + i), tl.load(b + i), tl.zeros((N, N), tl.float32)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_store_rounds_as_torch(dtype, device) -> None:
    ties = (torch.arange(256, dtype=torch.int32) << 15 | 0x3F800000).view(torch.float32)  # halfway between two bf16
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-41, 3.4e38])
    x = torch.cat((special, ties, torch.randn(5000))).to(device)
    y = torch.empty(len(x), dtype=dtype, device=device)
    copy[(triton.cdiv(len(x), 4096),)](x, y, len(x), BLOCK=4096)
    assert torch.equal(y.nan_to_num(7), x.to(dtype).nan_to_num(7)) and torch.equal(y.isnan(), x.isnan())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dot_is_within_the_rounding_of_its_result(dtype, device) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2, 32, 32, device=device).to(dtype)
    c = torch.empty(32, 32, dtype=dtype, device=device)
    square[(1,)](a, b, c, N=32)
    exact = a.double() @ b.double()
    # sums of 32 products in fp32, then one rounding to dtype
    assert ((c.double() - exact).abs() <= torch.finfo(dtype).eps / 2 * exact.abs() + 32 * 2**-23 * 8).all()
