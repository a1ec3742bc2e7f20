"""NF4 on a CPU beside bitsandbytes, bf16 and the limits: python -m bench.bench_quant [--threads N] [--seconds S]

Quantize, dequantize, and a linear layer at M rows: forward with gradients off, and forward + backward, also through
four layers in a row (times of one): in a model a layer finds its own codes cold, and what they are decoded into warm.
Everything runs twice, in processes of their own: with the allocator as it is, and tuned (MALLOC_MMAP_THRESHOLD_ and
MALLOC_TRIM_THRESHOLD_ large, so that freed memory is kept): else page faults are mistaken for arithmetic. Ours has its
compiled loops, built first (`lowrank doctor --compile`; without a C++ compiler all is eager), and none of them. The
limits beside each time: the plain bf16 product, and copying as many bytes as the decoded weight has. bitsandbytes is
measured where it is installed (pip install bitsandbytes==0.50.2). Results are appended to bench/results/quant.jsonl.
"""

import argparse
import functools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank.quant import compiled
from lowrank.quant.linear import QuantizedLinear, decoded
from lowrank.quant.tensor import QuantizedTensor

SHAPES = {"4096x4096 (Llama-2-7B q_proj)": (4096, 4096), "1536x576 (SmolLM2-135M up_proj)": (1536, 576)}  # (O, I)
ROWS = (1, 16, 256, 1024)
TUNED = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "4294967296", "MALLOC_TOP_PAD_": "268435456"}
RESULTS = Path(__file__).parent / "results" / "quant.jsonl"


def median_ms(calls: dict[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """The median time of each call; they take turns, so that a busy moment hits all of them."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    deadline = time.perf_counter() + seconds * len(calls)
    while time.perf_counter() < deadline or len(next(iter(times.values()))) < 3:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: sorted(t)[len(t) // 2] for name, t in times.items()}


def eager(call: Callable[[], Any]) -> Callable[[], Any]:
    """The same call without the compiled loops."""

    def run() -> Any:
        kept, compiled.loop = compiled.loop, lambda name: None
        try:
            return call()
        finally:
            compiled.loop = kept

    return run


def bitsandbytes() -> Any:
    """The module, or None where it is not installed."""
    try:
        import bitsandbytes as bnb
    except ImportError:
        return None
    return bnb


def worker(seconds: float) -> None:
    """Measure all and print one JSON line for each operation."""
    torch.manual_seed(0)
    for shape, size in SHAPES.items():
        w = torch.randn(size).to(torch.bfloat16)
        measure_weight(shape, w, seconds)
        layer = QuantizedLinear(QuantizedTensor.quantize(w, "nf4", double_quant=True))
        theirs = (their_layer(w, train=True), their_layer(w, train=False))
        for M in ROWS:
            measure_linear(shape, M, w, layer, theirs, seconds)
            measure_stack(shape, M, size, seconds)


def measure_weight(shape: str, w: Tensor, seconds: float) -> None:
    q, bnb, copy = QuantizedTensor.quantize(w, "nf4", double_quant=True), bitsandbytes(), torch.empty_like(w)
    settings = {"quant_type": "nf4", "compress_statistics": True, "blocksize": 64}
    quantize: dict[str, Callable[[], Any]] = {
        "ours": lambda: QuantizedTensor.quantize(w, "nf4", double_quant=True),
        "ours, eager": eager(lambda: QuantizedTensor.quantize(w, "nf4", double_quant=True)),
        "copy": lambda: copy.copy_(w),
    }
    dequantize: dict[str, Callable[[], Any]] = {
        "ours": q.dequantize,
        "ours, eager": eager(q.dequantize),
        "ours, into a buffer": lambda: q.dequantize(out=copy),
        "copy": lambda: copy.copy_(w),
    }
    if bnb is not None:
        packed, state = bnb.functional.quantize_4bit(w, **settings)
        quantize["bitsandbytes"] = lambda: bnb.functional.quantize_4bit(w, **settings)
        dequantize["bitsandbytes"] = lambda: bnb.functional.dequantize_4bit(packed, state)
        assert torch.equal(packed.view(-1), q.codes) and torch.equal(dequantize["bitsandbytes"](), q.dequantize())
    emit(shape, "quantize", median_ms(quantize, seconds))
    emit(shape, "dequantize", median_ms(dequantize, seconds))


def measure_linear(
    shape: str, M: int, w: Tensor, layer: QuantizedLinear, theirs: tuple[Any, Any], seconds: float
) -> None:
    x = torch.randn(M, w.shape[1]).to(torch.bfloat16).requires_grad_()
    dy = torch.randn(M, w.shape[0]).to(torch.bfloat16)

    @torch.no_grad()
    def kept() -> Tensor:
        return layer(x)

    contestants = {"ours": layer, "bf16": lambda v: F.linear(v, w)}
    if theirs[0] is not None:
        contestants["bitsandbytes"] = theirs[0]
    with torch.no_grad():
        calls: dict[str, Callable[[], Any]] = {name: (lambda f=f: f(x)) for name, f in contestants.items()}
        calls["ours, eager"] = eager(calls["ours"])
        if theirs[1] is not None:
            calls["bitsandbytes, eval"] = lambda: theirs[1](x)
        row = median_ms(calls, seconds)
        with decoded(layer):
            row |= {"ours, kept": median_ms({"kept": kept}, seconds)["kept"]}
    emit(shape, f"forward M={M}", row)
    decoded_weight = layer.quantized.dequantize()
    for got, want in zip(
        (layer(x), *torch.autograd.grad(layer(x), x, dy)), (x @ decoded_weight.T, dy @ decoded_weight)
    ):
        torch.testing.assert_close(got, want, rtol=2**-7, atol=1.0)  # a bf16 each; n² 2⁻²⁴ in fp32, n = 4096 of order 1
    calls = {name: (lambda f=f: torch.autograd.grad(f(x), x, dy)) for name, f in contestants.items()}
    calls["ours, eager"] = eager(calls["ours"])
    emit(shape, f"forward + backward M={M}", median_ms(calls, seconds))


def measure_stack(shape: str, M: int, size: tuple[int, int], seconds: float) -> None:
    """Four layers in a row, there and back: (O, I) and (I, O) in turn."""
    ws = [torch.randn(O, I).div(I**0.5).to(torch.bfloat16) for O, I in (size, size[::-1]) * 2]
    ours = [QuantizedLinear(QuantizedTensor.quantize(w, "nf4", double_quant=True)) for w in ws]
    contestants = {"ours": nn.Sequential(*ours), "bf16": lambda v: functools.reduce(F.linear, ws, v)}
    if bitsandbytes() is not None:
        contestants["bitsandbytes"] = nn.Sequential(*(their_layer(w, train=True) for w in ws))
    x = torch.randn(M, size[1]).to(torch.bfloat16).requires_grad_()
    dy = torch.randn(M, size[1]).to(torch.bfloat16)
    grads = {name: torch.autograd.grad(f(x), x, dy)[0] for name, f in contestants.items()}
    for got in grads.values():  # the same but for rounding and, of bf16, quantization (10 % a layer)
        assert (got - grads["ours"]).float().norm() < 0.4 * grads["ours"].float().norm()
    calls = {name: (lambda f=f: torch.autograd.grad(f(x), x, dy)) for name, f in contestants.items()}
    calls["ours, eager"] = eager(calls["ours"])
    times = median_ms(calls, seconds * len(ws))
    emit(shape, f"4 layers, forward + backward M={M}", {name: ms / len(ws) for name, ms in times.items()})


def their_layer(w: Tensor, train: bool) -> Any:
    """Linear4bit over the same weight; in eval mode its first forward repacks it, so each mode has its own."""
    bnb = bitsandbytes()
    if bnb is None:
        return None
    O, I = w.shape
    layer = bnb.nn.Linear4bit(I, O, bias=False, quant_type="nf4", compute_dtype=torch.bfloat16)
    layer.weight = bnb.nn.Params4bit(w.clone(), requires_grad=False, quant_type="nf4", compress_statistics=True)
    return layer.to("cpu").train(train)


def emit(shape: str, operation: str, times: dict[str, float]) -> None:
    print(json.dumps({"shape": shape, "operation": operation, "ms": times}), flush=True)


def table(allocator: str, rows: list[dict[str, Any]]) -> None:
    names = ("ours", "ours, eager", "ours, kept", "bitsandbytes", "bitsandbytes, eval", "bf16", "copy")
    for shape in SHAPES:
        print(
            f"\n{shape}, allocator {allocator}, times in ms\n{'':34}", *(f"{n:>18}" for n in names), "   theirs / ours"
        )
        for row in rows:
            if row["shape"] == shape:
                ms = row["ms"]
                cells = [f"{ms[n]:18.3f}" if n in ms else f"{'':18}" for n in names]
                ratio = f"{ms['bitsandbytes'] / ms['ours']:10.2f}" if "bitsandbytes" in ms else ""
                print(f"{row['operation']:34}", *cells, ratio)


def machine() -> dict[str, Any]:
    """What the figures depend on, the rates of a copy and of a large bf16 product included."""
    w = torch.randn(4096, 4096).to(torch.bfloat16)
    out, x = torch.empty_like(w), torch.randn(1024, 4096).to(torch.bfloat16)
    w32, x32 = w.float(), x.float()
    products = {"product": lambda: F.linear(x, w), "product32": lambda: F.linear(x32, w32)}
    ms = median_ms({"copy": lambda: out.copy_(w), **products}, 0.5)
    info = Path("/proc/cpuinfo")
    cpu = [line for line in info.read_text().splitlines() if "model name" in line] if info.exists() else []
    return {
        "when": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        "cpu": cpu[0].split(":")[1].strip() if cpu else platform.processor(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "torch": torch.__version__,
        "bitsandbytes": getattr(bitsandbytes(), "__version__", None),
        "copy_GB_s": round(2 * w.nbytes / ms["copy"] / 1e6, 1),  # read and written
        "product_GFLOP_s": round(2 * 1024 * 4096 * 4096 / ms["product"] / 1e6),
        "product_fp32_GFLOP_s": round(2 * 1024 * 4096 * 4096 / ms["product32"] / 1e6),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=1.0, help="for each operation of each contestant")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.worker:
        return worker(options.seconds)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LOWRANK_CACHE"] = folder  # so that the compilation is measured too
        compare(options)


def compiled_in() -> float | None:
    """Build the compiled loops; the seconds it took, None where that cannot be done."""
    try:
        return round(compiled.build(), 1)
    except RuntimeError as error:
        print(f"nothing is compiled here: {error}")
        return None


def compare(options: argparse.Namespace) -> None:
    about = {**machine(), "compile_s": compiled_in()}
    print(*(f"{name}: {value}" for name, value in about.items()), sep="\n")
    RESULTS.parent.mkdir(exist_ok=True)
    for allocator, extra in (("as it is", {}), ("tuned", TUNED)):
        command = [sys.executable, "-m", "bench.bench_quant", "--worker", "--threads", str(options.threads)]
        command += ["--seconds", str(options.seconds)]
        done = subprocess.run(command, env={**os.environ, **extra}, stdout=subprocess.PIPE, text=True, check=True)
        rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        table(allocator, rows)
        with open(RESULTS, "a", encoding="utf-8") as file:
            file.writelines(json.dumps({**about, "allocator": allocator, **row}) + "\n" for row in rows)


if __name__ == "__main__":
    main()
