"""Every kernel on one GPU, beside its limit and its peers: python -m bench.bench_kernels [--quick] [--out DIR]

The limits are measured first: the bandwidth of reading, and the rate of a large bf16 product. Then nf4_linear in each
of its three ways, beside the library's bf16 product, decode-then-multiply and bitsandbytes (where it is installed), at
seven M and three shapes; LoRA linear, grouped LoRA, linear + cross-entropy (time and memory), norm, gate, rotation, row
norms; and a QLoRA training step. Cold figures rotate over weights of at least 4 times the L2 cache inside one CUDA
graph; hot ones use one weight. Medians of replays. Written: kernels-<device>.json, .md and .png in bench/results (or
--out), stamped with device and versions, and the best way for each M to the cache folder, where nf4_linear finds it.

--dry-run does all of it once at tiny sizes in Triton's interpreter on a CPU, to see that it runs: no figure counts.
"""

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

DRY = "--dry-run" in sys.argv
if DRY:
    os.environ |= {"TRITON_INTERPRET": "1", "LOWRANK_KERNELS": "triton"}

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.roofline import NF4_BYTES, ROWS, SHAPES, product
from lowrank.files import cache_folder, write_json
from lowrank.kernels import nf4_linear as nf4
from lowrank.kernels.cross_entropy import linear_cross_entropy, linear_cross_entropy_ref
from lowrank.kernels.dispatch import describe
from lowrank.kernels.lora_grouped import lora_grouped, lora_grouped_ref
from lowrank.kernels.lora_linear import lora_linear, lora_linear_ref
from lowrank.kernels.nf4_codec import dequantize_into, nf4_quantize
from lowrank.kernels.rms_norm import rms_norm, rms_norm_ref
from lowrank.kernels.rope import rope, rope_ref
from lowrank.kernels.row_norm import row_norm, row_norm_ref
from lowrank.kernels.swiglu import swiglu, swiglu_ref
from lowrank.quant.codebooks import codebook
from lowrank.quant.double import quantize_scales

DEVICE = torch.device("cpu" if DRY else "cuda")
HALF = torch.bfloat16
RESULTS = Path(__file__).parent / "results"
Call = Callable[[], Any]
if DRY:
    ROWS, SHAPES = (1, 17), {"24x128": (24, 128)}


def synchronize() -> None:
    if not DRY:
        torch.cuda.synchronize()


def graphed_us(calls: list[Call], replays: int = 15) -> float:
    """The median time of one call, all of them captured into one CUDA graph: no launch overhead of Python's."""
    for call in calls[:2]:
        call()
    if DRY:
        return timed_us(calls[0], 1)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        calls[0]()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return timed_us(graph.replay, replays) / len(calls)


def timed_us(call: Call, repeats: int = 15) -> float:
    """The median time of a call on the device's own clock."""
    for _ in range(1 if DRY else 3):
        call()
    synchronize()
    times = []
    for _ in range(repeats):
        if DRY:
            start = time.perf_counter()
            call()
            times.append((time.perf_counter() - start) * 1e6)
        else:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            call()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e3)
    return statistics.median(times)


def peak_mb(call: Call) -> float:
    """Memory that a call takes beyond what was there."""
    if DRY:
        call()
        return 0.0
    synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def measured_limits() -> dict[str, float]:
    """Bytes per second of reading and of copying, operations per second of a bf16 product. The best of each."""
    n = 2**12 if DRY else 2**29
    big, other = torch.ones(n, device=DEVICE), torch.empty(n, device=DEVICE)
    read = 4 * n / timed_us(big.sum) * 1e6
    copy = 8 * n / timed_us(lambda: other.copy_(big)) * 1e6
    n = 64 if DRY else 8192
    a, b = torch.randn(2, n, n, device=DEVICE).to(HALF)
    return {
        "read": read,
        "copy": copy,
        "bandwidth": max(read, copy),
        "matmul": 2 * n**3 / timed_us(lambda: a @ b) * 1e6,
    }


def rotation(size: float) -> int:
    """How many weights of that many bytes make 4 times the L2 cache; at least 2."""
    cache = 0 if DRY else torch.cuda.get_device_properties(DEVICE).L2_cache_size
    return max(2, math.ceil(4 * cache / size))


def weights(O: int, I: int, count: int) -> list[tuple[Tensor, tuple[Tensor, ...]]]:
    """Different weights with doubly quantized scales."""
    found = []
    for _ in range(count):
        packed, absmax = nf4_quantize(torch.randn(O, I, device=DEVICE))
        found.append((packed, (*quantize_scales(absmax), codebook("dynamic8", DEVICE))))
    return found


def their_gemm(O: int, I: int) -> Callable[[Tensor], Tensor] | None:
    """bitsandbytes' 4-bit product on a weight of its own, or None where it is not installed."""
    try:
        import bitsandbytes.functional as bnb
        from bitsandbytes import matmul_4bit
    except ImportError:
        return None
    packed, state = bnb.quantize_4bit(
        torch.randn(O, I, device=DEVICE).to(HALF), quant_type="nf4", compress_statistics=True
    )
    return lambda x: matmul_4bit(x, packed.t(), quant_state=state)


def bench_nf4_linear(limits: dict[str, float], quick: bool) -> list[dict[str, Any]]:
    rows = []
    for shape, (O, I) in SHAPES.items():
        stored = weights(O, I, rotation(NF4_BYTES * O * I))
        dense = [torch.randn(O, I, device=DEVICE).to(HALF) for _ in range(rotation(2 * O * I))]
        theirs = None if DRY else their_gemm(O, I)
        for M in ROWS[::2] if quick else ROWS:
            x = torch.randn(M, I, device=DEVICE).to(HALF)
            ways: dict[str, list[Call]] = {
                "bf16": [partial(F.linear, x, w) for w in dense],
                "dense": [partial(decode_then_multiply, x, packed, scales, O) for packed, scales in stored],
            }
            if M <= 16:
                ways["gemv"] = [partial(nf4.gemv, x, packed, scales, O, 64) for packed, scales in stored]
            if M <= 512:
                ways["tile"] = [partial(nf4.tile, x, packed, scales, O, 64) for packed, scales in stored]
            ideal = (
                max((2 * M * (I + O) + NF4_BYTES * O * I) / limits["bandwidth"], 2 * M * O * I / limits["matmul"]) * 1e6
            )
            row: dict[str, Any] = {
                "shape": shape,
                "M": M,
                "ideal_us": ideal,
                "bytes": product(M, O, I, NF4_BYTES).bytes,
            }
            for name, calls in ways.items():
                row[f"{name}_us"], row[f"{name}_hot_us"] = (
                    graphed_us(calls),
                    graphed_us([calls[0]] * min(4, len(calls))),
                )
            if theirs is not None:
                row["bitsandbytes_hot_us"] = timed_us(partial(theirs, x))
            ours = {name: row[f"{name}_us"] for name in ("gemv", "tile", "dense") if f"{name}_us" in row}
            row["best"] = min(ours, key=ours.__getitem__)
            row["speed_up"] = row["bf16_us"] / ours[row["best"]]
            row["share_of_ideal"] = ideal / ours[row["best"]]
            rows.append(row)
            print(json.dumps(row), flush=True)
        del stored, dense
    return rows


def decode_then_multiply(x: Tensor, packed: Tensor, scales: tuple[Tensor, ...], O: int) -> Tensor:
    w = dequantize_into(torch.empty(O, x.shape[1], dtype=x.dtype, device=x.device), packed, scales, 64)
    return F.linear(x, w)


def best_ways(rows: list[dict[str, Any]]) -> dict[str, int]:
    """The largest M up to which gemv is the fastest at every shape and every smaller M; the same for gemv or tile."""
    largest = {"gemv": 0, "tile": 0}
    for kind, names in (("gemv", ("gemv",)), ("tile", ("gemv", "tile"))):
        for M in sorted({row["M"] for row in rows}):
            if not all(row["best"] in names for row in rows if row["M"] == M):
                break
            largest[kind] = M
    return largest


def with_gradients(call: Callable[..., Tensor], inputs: list[Tensor]) -> Call:
    """Forward and backward of a call, gradients for the inputs that ask for one."""
    wanted = [t for t in inputs if t.requires_grad]

    def run() -> None:
        y = call(*inputs)
        torch.autograd.grad(y, wanted, torch.ones_like(y))

    return run


def bench_others() -> list[dict[str, Any]]:
    """Each kernel and its reference, forward + backward, and for the loss the memory too."""
    M, D, F_, V, R, heads = (3, 64, 96, 200, 4, 2) if DRY else (4096, 4096, 14336, 128256, 16, 32)

    def new(*size: int, dtype: torch.dtype = HALF, grad: bool = True) -> Tensor:
        return torch.randn(*size, device=DEVICE).to(dtype).requires_grad_(grad)

    rows: list[dict[str, Any]] = []

    def compare(
        name: str, shape: str, ours: Callable[..., Tensor], ref: Callable[..., Tensor], inputs: list[Tensor]
    ) -> None:
        row: dict[str, Any] = {"kernel": name, "shape": shape}
        for version, call in (("ours", ours), ("reference", ref)):
            run = with_gradients(call, inputs)
            row[f"{version}_us"], row[f"{version}_mb"] = timed_us(run, 1 if DRY else 9), peak_mb(run)
        rows.append(row | {"speed_up": row["reference_us"] / row["ours_us"]})
        print(json.dumps(rows[-1]), flush=True)

    A, B = new(R, D, dtype=torch.float32), new(D, R, dtype=torch.float32)
    W = new(D, D, grad=False)
    x = new(M, D)
    compare(
        "lora_linear", f"M={M} {D}x{D} R={R}",
        lambda x, A, B: lora_linear(x, [W], [None], [A], [B], [2.0])[0],
        lambda x, A, B: lora_linear_ref(x, W, None, A, B, 2.0), [x, A, B],
    )  # fmt: skip
    n, adapters = (2, 2) if DRY else (32, 8)
    many = new(n, 1, D), new(adapters, R, D), new(adapters, D, R)
    index = torch.arange(n, device=DEVICE) % adapters
    compare(
        "lora_grouped", f"{n} rows, {adapters} adapters, {D} R={R}",
        lambda x, A, B: lora_grouped(x, A, B, None, index),
        lambda x, A, B: lora_grouped_ref(x, A, B, None, index), list(many),
    )  # fmt: skip
    head, labels = new(V, D, grad=False), torch.randint(0, V, (M,), device=DEVICE)
    compare(
        "linear_cross_entropy", f"N={M} D={D} V={V}",
        lambda h: linear_cross_entropy(h, head, labels), lambda h: linear_cross_entropy_ref(h, head, labels), [x],
    )  # fmt: skip
    scale = new(D)
    compare(
        "rms_norm", f"({M}, {D})", lambda x, w: rms_norm(x, w, 1e-5), lambda x, w: rms_norm_ref(x, w, 1e-5), [x, scale]
    )
    compare("swiglu", f"({M}, {F_})", swiglu, swiglu_ref, [new(M, F_), new(M, F_)])
    angles = torch.randn(1, M, 1, D // heads, device=DEVICE)
    cos, sin = angles.cos(), angles.sin()
    compare(
        "rope", f"({M}, {heads}, {D // heads})",
        lambda x: rope(x, cos, sin), lambda x: rope_ref(x, cos, sin), [new(1, M, heads, D // heads)],
    )  # fmt: skip
    compare(
        "row_norm", f"{D}x{D} R={R}",
        lambda A, B: row_norm(W, A, B, 2.0), lambda A, B: row_norm_ref(W, A, B, 2.0), [A, B],
    )  # fmt: skip
    return rows


def bench_step() -> list[dict[str, Any]]:
    """A training step, LoRA on all linear layers of a model with random weights: bf16 base and NF4 base."""
    import lowrank
    from lowrank.methods.lora import LoRAConfig
    from lowrank.models.decoder import Decoder
    from lowrank.models.families import config_from_json
    from lowrank.quant.linear import quantize_model
    from lowrank.training.losses import summed_loss

    fixture = Path(__file__).parents[1] / "tests" / "fixtures" / "models" / "llama" / "config.json"
    raw = json.loads(fixture.read_text())
    if not DRY:  # four layers of Llama-3-8B's sizes, a smaller vocabulary
        raw |= {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 4, "num_attention_heads": 32}
        raw |= {"num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": 8192, "rope_scaling": None}
    B, T = (1, 5) if DRY else (4, 1024)
    rows = []
    for base in ("bf16", "nf4-dq"):
        torch.manual_seed(0)
        with torch.device(DEVICE):
            model = Decoder(config_from_json(raw)).to(HALF)
        if base != "bf16":
            quantize_model(model, base)
        lowrank.attach(model, LoRAConfig(rank=16, alpha=32), targets="all-linear")
        model.to(DEVICE).train()
        ids = torch.randint(0, raw["vocab_size"], (B, T), device=DEVICE)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        trained = [p for p in model.parameters() if p.requires_grad]

        def step(model: Any = model, batch: Any = batch, trained: list[Tensor] = trained) -> None:
            torch.autograd.grad(summed_loss(model, batch), trained, allow_unused=True)

        us = timed_us(step, 1 if DRY else 5)
        rows.append({"base": base, "tokens": B * T, "us": us, "tokens_per_s": B * T / us * 1e6, "mb": peak_mb(step)})
        print(json.dumps(rows[-1]), flush=True)
        del model, trained
    return rows


def stamp() -> dict[str, str]:
    import triton

    device = "CPU, dry run: no figure counts" if DRY else torch.cuda.get_device_name(DEVICE)
    found = {
        "device": device,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": str(torch.version.cuda),
    }
    return found | describe() | {"time": datetime.now(UTC).isoformat(timespec="seconds")}


def report(results: dict[str, Any]) -> str:
    """The page of tables."""
    limits = results["limits"]
    lines = [
        f"# Kernels on {results['stamp']['device']}",
        "",
        *(f"- {key}: {value}" for key, value in results["stamp"].items()),
        f"- measured limits: {limits['bandwidth'] / 1e9:,.0f} GB/s, {limits['matmul'] / 1e12:,.0f} TFLOP/s in bf16",
        f"- chosen from this: {results['limits_of_ways']}",
        "",
        "| shape | M | bf16, µs | gemv | tile | decode first | best | x bf16 | share of limit | bitsandbytes, hot |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- | ---: | ---: | ---: |",
    ]
    for r in results["nf4_linear"]:
        times = (f"{r[f'{way}_us']:,.1f}" if f"{way}_us" in r else "" for way in ("bf16", "gemv", "tile", "dense"))
        theirs = f"{r['bitsandbytes_hot_us']:,.1f}" if "bitsandbytes_hot_us" in r else ""
        cells = (r["shape"], r["M"], *times, r["best"], f"{r['speed_up']:.2f}", f"{r['share_of_ideal']:.0%}", theirs)
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += ["", "| kernel, forward + backward | shape | ours, µs | reference, µs | x | ours, MB | reference, MB |"]
    lines.append("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for r in results["others"]:
        lines.append(
            f"| {r['kernel']} | {r['shape']} | {r['ours_us']:,.0f} | {r['reference_us']:,.0f} | {r['speed_up']:.2f} |"
            f" {r['ours_mb']:,.0f} | {r['reference_mb']:,.0f} |"
        )
    lines += [
        "",
        "| training step, LoRA on all linear layers | tokens | ms | tokens/s | MB |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {r['base']} | {r['tokens']} | {r['us'] / 1e3:,.1f} | {r['tokens_per_s']:,.0f} | {r['mb']:,.0f} |"
        for r in results["step"]
    ]
    return "\n".join(lines) + "\n"


def plot(results: dict[str, Any], path: Path) -> None:
    """Speed-up over the bf16 product against M, one line for each shape; the ideal dotted."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for shape in SHAPES:
        rows = [r for r in results["nf4_linear"] if r["shape"] == shape]
        line = axes.plot([r["M"] for r in rows], [r["speed_up"] for r in rows], "o-", label=shape)[0]
        ideal = [r["bf16_us"] / r["ideal_us"] for r in rows]
        axes.plot([r["M"] for r in rows], ideal, ":", color=line.get_color())
    axes.axhline(1, color="gray", linewidth=0.8)
    axes.set(
        xscale="log", xlabel="rows of x (M)", ylabel="speed-up over the bf16 product", title=results["stamp"]["device"]
    )
    axes.set_xscale("log", base=2)
    axes.legend(title="O x I; dotted: the limit")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.bench_kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="every other M")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on a CPU, to see that it runs")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the results go")
    options = parser.parse_args()
    if not DRY and not torch.cuda.is_available():
        parser.error("no GPU here; --dry-run shows that the script runs")
    if DRY and options.out == RESULTS:
        parser.error("--dry-run needs --out DIR: its figures mean nothing and do not belong in bench/results")
    torch.manual_seed(0)
    limits = measured_limits()
    print(json.dumps(limits), flush=True)
    rows = bench_nf4_linear(limits, options.quick)
    results: dict[str, Any] = {
        "stamp": stamp(),
        "limits": limits,
        "nf4_linear": rows,
        "limits_of_ways": best_ways(rows),
    }
    results |= {"others": bench_others(), "step": bench_step()}
    options.out.mkdir(parents=True, exist_ok=True)
    name = "kernels-dry-run" if DRY else "kernels-" + results["stamp"]["device"].replace(" ", "-")
    write_json(options.out / f"{name}.json", results)
    (options.out / f"{name}.md").write_text(report(results), encoding="utf-8")
    plot(results, options.out / f"{name}.png")
    folder = options.out if DRY else cache_folder()
    file = folder / nf4.MEASURED
    known = json.loads(file.read_text()) if file.is_file() else {}
    write_json(file, known | {results["stamp"]["device"]: results["limits_of_ways"]})
    print(report(results) + f"\nwritten: {options.out}/{name}.json, .md, .png and {file}")


if __name__ == "__main__":
    main()
