"""How fast each kernel can be at best: python -m bench.roofline [--kernel NAME] [--json]

For each kernel, at shapes of real models: the bytes that have to pass the memory once, the arithmetic that has to be
done, and from the makers' data sheets the ideal time, max(bytes / bandwidth, operations / rate), on five GPUs. A time
measured on a GPU is judged by the share of this that it reaches. Nothing here was measured.
"""

import argparse
import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class GPU:
    bandwidth: float
    """Bytes per second."""
    tensor: float
    """16-bit products with fp32 sums, dense, operations per second."""
    fp32: float
    """Operations per second outside tensor cores."""
    issue: float
    """Instructions of a thread per second: 128 a clock on each multiprocessor."""


# NVIDIA's data sheets: GA102, AD102, GB202, A100 80 GB SXM, H100 SXM; boost clocks, no sparsity.
GPUS = {
    "RTX 3090": GPU(936e9, 71e12, 35.6e12, 82 * 128 * 1.695e9),
    "RTX 4090": GPU(1008e9, 165.2e12, 82.6e12, 128 * 128 * 2.52e9),
    "RTX 5090": GPU(1792e9, 209.5e12, 104.8e12, 170 * 128 * 2.407e9),
    "A100": GPU(2039e9, 312e12, 19.5e12, 108 * 128 * 1.41e9),
    "H100": GPU(3350e9, 989e12, 66.9e12, 132 * 128 * 1.98e9),
}
NF4_BYTES = 0.5 + (1 + 4 / 256) / 64  # a weight in blocks of 64, scales doubly quantized
ROWS = (1, 4, 16, 64, 256, 1024, 4096)
SHAPES = {"4096x4096": (4096, 4096), "4096x11008": (4096, 11008), "8192x28672": (8192, 28672)}  # (O, I)


@dataclass(frozen=True)
class Work:
    """What one call of a kernel has to do, whoever does it."""

    kernel: str
    shape: str
    bytes: float
    operations: float
    tensor_cores: bool = False

    def ideal_us(self, gpu: GPU) -> float:
        rate = gpu.tensor if self.tensor_cores else gpu.fp32
        return 1e6 * max(self.bytes / gpu.bandwidth, self.operations / rate)


def product(M: int, O: int, I: int, weight_bytes: float = 2.0) -> Work:
    """y = x Wᵀ in bf16, the weight read once."""
    name = "product, bf16" if weight_bytes == 2 else "nf4_linear"
    return Work(name, f"M={M} {O}x{I}", 2 * M * (I + O) + weight_bytes * O * I, 2 * M * O * I, True)


def dequantize(O: int, I: int) -> Work:
    return Work("nf4 dequantize", f"{O}x{I}", (NF4_BYTES + 2) * O * I, O * I)


def through_dequantize(M: int, O: int, I: int, gpu: GPU) -> float:
    """Ideal time of decoding into memory and then multiplying, in µs."""
    return dequantize(O, I).ideal_us(gpu) + product(M, O, I).ideal_us(gpu)


def works() -> list[Work]:
    """Each kernel at one shape of Llama-3-8B with 4096 tokens in bf16; nf4_linear at all shapes and M."""
    M, D, F, V, R = 4096, 4096, 14336, 128256, 16
    found = [product(m, *shape, weight_bytes=NF4_BYTES) for shape in SHAPES.values() for m in ROWS]
    found += [dequantize(*shape) for shape in SHAPES.values()]
    found.append(Work("nf4 quantize", "4096x4096", (2 + 0.5 + 4 / 64) * D * D, 35 * D * D))
    adapter = 2 * (2 * M * D + M * R) + 4 * 2 * R * D  # x, y, h in bf16; A and B in fp32
    found.append(
        Work("lora_linear, forward", f"M={M} {D}x{D} R={R}", adapter + 2 * D * D, 2 * M * D * (D + 2 * R), True)
    )
    found.append(
        Work(
            "lora_linear, nf4, forward",
            f"M={M} {D}x{D} R={R}",
            adapter + NF4_BYTES * D * D,
            2 * M * D * (D + 2 * R),
            True,
        )
    )
    found.append(
        Work("lora_linear, backward", f"M={M} {D}x{D} R={R}", 2 * adapter + 2 * D * D, 2 * M * D * (D + 6 * R), True)
    )
    rows = 32
    found.append(
        Work(
            "lora_grouped, decode",
            f"{rows} rows, 8 adapters, R={R}",
            2 * rows * 3 * D + 8 * 4 * 2 * R * D,
            4 * rows * R * D,
            True,
        )
    )
    found.append(
        Work("cross_entropy, forward + dhidden", f"N={M} D={D} V={V}", 2 * (2 * M * D + V * D), 4 * M * D * V, True)
    )
    found.append(Work("rms_norm, forward", f"({M}, {D})", 2 * 2 * M * D, 5 * M * D))
    found.append(Work("rms_norm, backward", f"({M}, {D})", 2 * 3 * M * D, 12 * M * D))
    found.append(Work("swiglu, forward", f"({M}, {F})", 2 * 3 * M * F, 6 * M * F))
    found.append(Work("swiglu, backward", f"({M}, {F})", 2 * 5 * M * F, 14 * M * F))
    found.append(Work("rope, q and k", f"({M}, 32 + 8 heads, 128)", 2 * 2 * M * 40 * 128, 3 * M * 40 * 128))
    found.append(Work("row_norm (DoRA)", f"{D}x{D} R={R}", 2 * D * D + 4 * 2 * R * D, 2 * D * D * R + 4 * D * D, True))
    return found


def table(kernel: str = "") -> str:
    lines = [
        "| kernel | shape | MB | Gop | " + " | ".join(f"{name}, µs" for name in GPUS) + " |",
        "| --- | --- | ---: | ---: | " + " | ".join("---:" for _ in GPUS) + " |",
    ]
    for w in works():
        if kernel in w.kernel:
            times = " | ".join(f"{w.ideal_us(gpu):,.1f}" for gpu in GPUS.values())
            lines.append(f"| {w.kernel} | {w.shape} | {w.bytes / 1e6:,.1f} | {w.operations / 1e9:,.2f} | {times} |")
    return "\n".join(lines)


def speed_ups() -> str:
    """The ideal of nf4_linear beside a bf16 product and beside decoding first, 4096x4096."""
    lines = [
        "| 4096x4096 | " + " | ".join(f"{name}: x bf16 / x decode first" for name in GPUS) + " |",
        "| --- | " + " | ".join("---:" for _ in GPUS) + " |",
    ]
    for M in ROWS:
        cells = []
        for gpu in GPUS.values():
            ours = product(M, 4096, 4096, NF4_BYTES).ideal_us(gpu)
            bf16 = product(M, 4096, 4096).ideal_us(gpu)
            cells.append(f"{bf16 / ours:.2f} / {through_dequantize(M, 4096, 4096, gpu) / ours:.2f}")
        lines.append(f"| M = {M} | " + " | ".join(cells) + " |")
    budgets = (f"{gpu.issue / (gpu.bandwidth / NF4_BYTES):.1f}" for gpu in GPUS.values())
    lines.append("| instructions issued while one weight is read | " + " | ".join(budgets) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.roofline", description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", default="", help="only kernels whose name holds this text")
    parser.add_argument("--json", action="store_true", help="one JSON line for each kernel and shape")
    options = parser.parse_args()
    if options.json:
        for w in works():
            if options.kernel in w.kernel:
                print(json.dumps(asdict(w) | {name: round(w.ideal_us(gpu), 2) for name, gpu in GPUS.items()}))
        return
    print(table(options.kernel))
    if options.kernel in "nf4_linear":
        print("\n" + speed_ups())


if __name__ == "__main__":
    main()
