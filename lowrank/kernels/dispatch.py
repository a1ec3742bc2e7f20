"""Which version of a kernel runs, and the two Triton helpers that make interpreted and compiled runs agree.

    LOWRANK_KERNELS=auto     Triton where every tensor is on a GPU, else the plain reference (the default)
    LOWRANK_KERNELS=ref      the plain reference everywhere
    LOWRANK_KERNELS=triton   Triton everywhere; on a CPU this needs TRITON_INTERPRET=1, set before Python starts

Kernel files take `tl`, `triton`, `store` and `dot` from here, so that they import where Triton is not installed. A
public function launches inside `with torch.cuda.device_of(x):`, since Triton takes the current GPU, not the tensor's.
"""

import os
from typing import Any

import torch
from torch import Tensor

from lowrank.errors import unknown

try:
    import triton
    import triton.language as tl

    INSTALLED = True
except ImportError:
    INSTALLED = False

    class _Inert:
        """Stands in for `triton` and `tl`: decorates and annotates without effect; launching a kernel is an error."""

        def __getattr__(self, name: str) -> "_Inert":
            if name.startswith("__"):
                raise AttributeError(name)
            return self

        def __call__(self, *args: Any, **kwargs: Any) -> "_Inert":
            return self

        def __getitem__(self, grid: Any) -> Any:
            raise RuntimeError("this kernel needs Triton, which is not installed; LOWRANK_KERNELS=ref does without")

    triton = tl = _Inert()

_interpreted = os.environ.get("TRITON_INTERPRET") == "1"  # what `triton.jit` goes by; later changes have no effect
INTERPRETED = tl.constexpr(_interpreted)
MODES = ("auto", "ref", "triton")
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def cast(value, dtype: tl.constexpr):
    """value.to(dtype), rounded as torch does. The interpreter truncates fp32 to bf16: there it is done on the bits."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.float32).to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000  # to nearest, ties to even
        rounded = tl.where(value != value, 0x7FC00000, rounded)
        value = rounded.to(tl.uint32).to(tl.float32, bitcast=True)
    return value.to(dtype)


@triton.jit
def store(ptr, value, mask=None):
    """tl.store with the rounding of torch."""
    tl.store(ptr, cast(value, ptr.dtype.element_ty), mask=mask)


@triton.jit
def dot(a, b, acc):
    """acc + a b, accumulated in fp32. The interpreter multiplies bf16 wrongly: there both are widened (exactly)."""
    if INTERPRETED and a.dtype == tl.bfloat16:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision="ieee")


def mode() -> str:
    """The value of LOWRANK_KERNELS, checked. Read at each call, so that a benchmark can force either side."""
    value = os.environ.get("LOWRANK_KERNELS", "auto")
    if value not in MODES:
        raise unknown("value of LOWRANK_KERNELS", value, MODES)
    return value


def use_triton(*tensors: Tensor) -> bool:
    """Whether the Triton version of a kernel is the one to run on these tensors."""
    chosen = mode()
    if chosen == "ref" or (chosen == "auto" and not INSTALLED):
        return False
    on_gpu = all(t.is_cuda for t in tensors)
    if chosen == "auto" or on_gpu:
        return on_gpu and INSTALLED
    if not INSTALLED:
        raise RuntimeError(
            "LOWRANK_KERNELS=triton, but Triton is not installed: install it, or set LOWRANK_KERNELS=ref"
        )
    if not _interpreted:
        raise RuntimeError(
            "LOWRANK_KERNELS=triton with a tensor on the CPU needs TRITON_INTERPRET=1, set before Python starts; "
            "or set LOWRANK_KERNELS=ref"
        )
    return True


def launches(function: str, **tensors: Tensor | None) -> bool:
    """`use_triton` for the named arguments of a public function; ValueError for what no version of it can take."""
    given = {name: t for name, t in tensors.items() if t is not None}
    if len({t.device for t in given.values()}) > 1:
        found = ", ".join(f"{name} on {t.device}" for name, t in given.items())
        raise ValueError(f"{function} needs its tensors on one device, got {found}")
    if not use_triton(*given.values()) or any(t.numel() == 0 for t in given.values()):
        return False
    for name, t in given.items():
        if t.is_floating_point() and t.dtype not in FLOATS:
            raise ValueError(
                f"the kernel of {function} takes float32, float16 and bfloat16, got {name} in {t.dtype};"
                " LOWRANK_KERNELS=ref takes it"
            )
    return True


def multiplies(x: Tensor) -> bool:
    """Whether tl.dot pays here: Triton has given up sm_75's tensor cores, and spills in fp32 on AMD. Else torch's."""
    if not x.is_cuda:
        return True
    return x.dtype != torch.float32 if torch.version.hip else torch.cuda.get_device_capability(x.device) >= (8, 0)


def wide(x: Tensor) -> Tensor:
    """x in fp32, or in fp64 where it is that already: a definition in fp64 is what tests compare with."""
    return x if x.dtype == torch.float64 else x.float()


def rows(x: Tensor) -> Tensor:
    """x as rows whose numbers lie side by side; a view wherever that can be.  (..., D) -> (M, D)"""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def describe() -> dict[str, str]:
    """What `lowrank doctor` prints about kernels."""
    version = f"Triton {triton.__version__}" if INSTALLED else "Triton is not installed"
    if _interpreted:
        version += ", interpreted"
    runs = {"auto": "Triton on a GPU, the plain reference on a CPU", "ref": "the plain reference", "triton": "Triton"}
    return {"kernels": f"{runs[mode()]} (LOWRANK_KERNELS={mode()}; {version})"}
