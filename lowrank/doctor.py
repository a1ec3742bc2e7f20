"""`lowrank doctor`: versions, devices, memory, and what will be used on this machine."""

import os
import shutil
import sys
from collections import Counter
from pathlib import Path

import torch

from lowrank.adapter import METHODS
from lowrank.files import cache_folder
from lowrank.kernels import dispatch, nf4_linear
from lowrank.models import one_row
from lowrank.models.checkpoint import open_checkpoint
from lowrank.models.fetch import quickstart
from lowrank.models.load import fast_dtype, quantizable, skeleton
from lowrank.quant import compiled, packed
from lowrank.quant.product import bf16_products
from lowrank.training.run import versions

BF16_PRODUCTS = {
    "fast": "fast on this CPU",
    "slow": "half as fast as fp32 on this CPU; quantized layers multiply 64 rows and more in fp32",
    "none": "none on this CPU; quantized layers multiply in fp32",
}


def report(model: str | None = None) -> str:
    """The page as text; with a model's path, also what its layers will run as, once quantized."""
    rows: list[tuple[str, str]] = list(versions().items())
    rows.append(
        (
            "processor",
            f"{torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        )
    )
    rows.append(("bf16 products", BF16_PRODUCTS[bf16_products()]))
    rows.append(("dtype: auto", str(fast_dtype()).removeprefix("torch.")))
    rows.append(("memory", _memory()))
    rows.append(("GPU", _gpus()))
    rows.append(("kernels", _kernels()))
    rows += packed.describe().items()
    rows.append(("generation", one_row.describe()))
    fused = sorted(name for name, method in METHODS.items() if method.may("fused"))
    rows.append(("adapters", f"fused path: {', '.join(fused)}; the other {len(METHODS) - len(fused)} by their forward"))
    both = compiled.loop("lora_rows") and compiled.loop("lora_short")
    rows.append(("LoRA on a few tokens", "compiled for this machine" if both else "eager torch"))
    rows.append(
        (
            "C++ compiler",
            shutil.which(os.environ.get("CXX", "g++")) or "none (only `lowrank doctor --compile` needs one)",
        )
    )
    folder = cache_folder()
    there = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) if folder.is_dir() else 0
    rows.append(("cache", f"{folder} ({there / 1e6:,.0f} MB)"))
    rows.append(
        (
            "plots",
            "matplotlib found" if _found("matplotlib") else 'matplotlib is missing: pip install "lowrank-engine[eval]"',
        )
    )
    rows += _layers(model) if model else []
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
    if not dispatch.INSTALLED:
        return "plain PyTorch: Triton is not installed"
    if not torch.cuda.is_available() and dispatch.mode() == "auto":
        return "plain PyTorch, since there is no GPU (LOWRANK_KERNELS=auto)"
    return dispatch.describe()["kernels"]


def _layers(model: str) -> list[tuple[str, str]]:
    """One line for each shape of a linear layer: how many there are, and how they run in NF4."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    built = skeleton(open_checkpoint(quickstart() if model == "quickstart" else Path(model)).config)
    shapes = Counter(m.weight.shape for path, m in built.named_modules() if quantizable(m, path, built))
    lines = [("layers in NF4", f"{device}, bfloat16; M is the number of tokens in a call")]
    for (O, I), count in shapes.items():
        lines.append((f"  {count} x {O} x {I}", nf4_linear.describe(I, torch.bfloat16, device)))
    return lines


def _found(name: str) -> bool:
    from importlib.util import find_spec

    return find_spec(name) is not None
