"""The memory that `lowrank plan` predicts beside what training takes: python -m bench.bench_plan [--only NAME]

Each configuration trains SmolLM2-135M for three steps in a process of its own, on full batches of random tokens. The
measured figure is the peak that the training loop reports (ru_maxrss). A CPU's figure holds the process itself, Python,
torch and its libraries, too: it is read before the model is loaded and added to the prediction. The limit is 10 %.
One JSON line is appended to bench/results/plan.jsonl.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "plan.jsonl"
CASES: dict[str, tuple[str, bool, bool, int, int]] = {  # method, quantized, checkpointing, batch, length
    "LoRA 4x256": ("lora", False, False, 4, 256),
    "LoRA 4x256 checkpointed": ("lora", False, True, 4, 256),
    "LoRA 1x1024": ("lora", False, False, 1, 1024),
    "QLoRA 4x256": ("lora", True, False, 4, 256),
    "QLoRA 8x128": ("lora", True, False, 8, 128),
    "QLoRA 2x1024 checkpointed": ("lora", True, True, 2, 1024),
    "full 2x256": ("full", False, False, 2, 256),
    "full 4x256 checkpointed": ("full", False, True, 4, 256),
}


def measure(name: str) -> None:
    """Train and print {process, peak} in MB; runs in a process of its own."""
    import torch

    from lowrank.methods.full import FullConfig
    from lowrank.methods.lora import LoRAConfig
    from lowrank.models.load import load
    from lowrank.targets import attach
    from lowrank.training.loop import TrainConfig, fit, peak_memory_mb

    method, quantized, checkpointing, batch, length = CASES[name]
    # not ru_maxrss: a child begins with the peak of the process that started it
    process = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    model, _ = load("quickstart", quantize="nf4-dq" if quantized else None, device="cpu", progress=False)
    loaded = peak_memory_mb()
    attach(model, LoRAConfig(rank=8) if method == "lora" else FullConfig(), targets="all-linear")
    torch.manual_seed(0)
    ids = torch.randint(0, 49152, (batch, length))
    data = [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}]
    seen: list[float] = []
    fit(
        model,
        data,
        TrainConfig(steps=3, checkpointing=checkpointing),
        on_step=lambda r: seen.append(r["peak_memory_mb"]),
    )
    print(json.dumps({"process": process, "loaded": loaded, "peak": seen[-1]}))


def predict(name: str) -> float:
    from lowrank.models.plan import Load, Way, memory, read_model

    method, quantized, checkpointing, batch, length = CASES[name]
    way = Way(name, method, quantized, checkpointing)
    return memory(read_model("smollm2-135m"), way, Load(batch, length, cpu=True)).peak / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="one configuration by name, or a part of it")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args.measure)
        return
    rows: list[dict[str, Any]] = []
    print("| configuration | process | predicted | measured | error |\n| --- | --- | --- | --- | --- |")
    for name in CASES:
        if args.only and args.only not in name:
            continue
        command = [sys.executable, "-m", "bench.bench_plan", "--measure", name]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        predicted = found["process"] + predict(name)
        error = predicted / found["peak"] - 1
        rows.append({"name": name, **found, "predicted": round(predicted), "error": round(error, 4)})
        print(
            f"| {name} | {found['process']:.0f} MB | {predicted:.0f} MB | {found['peak']:.0f} MB | {error:+.1%} |",
            flush=True,
        )
    RESULTS.parent.mkdir(exist_ok=True)
    machine = {"machine": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}
    with open(RESULTS, "a", encoding="utf-8") as file:
        file.write(
            json.dumps({"time": datetime.now(UTC).isoformat(timespec="seconds"), **machine, "rows": rows}) + "\n"
        )


if __name__ == "__main__":
    main()
