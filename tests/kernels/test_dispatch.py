"""Which version runs, and `store` and `dot` in the interpreter against torch."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from lowrank.kernels import dispatch
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
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
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


@pytest.mark.skipif(not dispatch.INSTALLED, reason="needs Triton")
def test_store_rounds_as_torch_and_dot_is_exact_in_bf16() -> None:
    script = ROOT / "tests" / "fixtures" / "quant" / "interpreted.py"
    assert python(str(script), TRITON_INTERPRET="1", LOWRANK_KERNELS="triton").endswith("ok\n")
