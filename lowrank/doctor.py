"""`lowrank doctor`: versions, devices, memory, and what will be used on this machine."""

import os
import shutil
import sys
from pathlib import Path

import torch

from lowrank.files import cache_folder
from lowrank.kernels.dispatch import mode
from lowrank.training.run import versions


def report() -> str:
    """The page as text."""
    rows: list[tuple[str, str]] = list(versions().items())
    rows.append(
        (
            "processor",
            f"{torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        )
    )
    rows.append(("memory", _memory()))
    rows.append(("GPU", _gpus()))
    rows.append(("kernels", _kernels()))
    rows.append(("C++ compiler", shutil.which(os.environ.get("CXX", "g++")) or "none (nothing here needs one)"))
    folder = cache_folder()
    there = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) if folder.is_dir() else 0
    rows.append(("cache", f"{folder} ({there / 1e6:,.0f} MB)"))
    rows.append(
        (
            "plots",
            "matplotlib found" if _found("matplotlib") else 'matplotlib is missing: pip install "lowrank-engine[eval]"',
        )
    )
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _memory() -> str:
    if sys.platform != "linux":
        return "unknown on this system"
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    total, free = (int(fields[key].split()[0]) * 1024 / 1e9 for key in ("MemTotal", "MemAvailable"))
    return f"{total:.1f} GB, {free:.1f} GB available"


def _gpus() -> str:
    if not torch.cuda.is_available():
        return "none: everything runs on the CPU"
    found = []
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        found.append(f"{p.name} (sm_{p.major}{p.minor}, {p.total_memory / 1e9:.0f} GB)")
    return ", ".join(found)


def _kernels() -> str:
    if not _found("triton"):
        return "plain PyTorch: Triton is not installed"
    chosen = {"ref": "plain PyTorch", "triton": "Triton", "auto": "Triton on a GPU, plain PyTorch on a CPU"}[mode()]
    return f"LOWRANK_KERNELS={mode()}: {chosen}"


def _found(name: str) -> bool:
    from importlib.util import find_spec

    return find_spec(name) is not None
