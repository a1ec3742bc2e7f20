"""What each kernel compiles to, with no GPU: python -m bench.aot [--check] [--only NAME] [--targets sm_89]

For each entry of `bench.kernel_list` and each target: registers, spilled bytes, shared memory against the target's
limit, 128-bit loads, tensor-core instructions, and instructions per decoded weight in the main loop. Triton compiles to
machine code without a driver; the counts come from the disassembler that its wheel carries. The table is printed and
written to bench/results/aot.json, by Triton version. --check writes nothing and fails where a kernel spills, exceeds a
limit, loses its wide loads or tensor cores, or decodes with more instructions than the committed file says.

It runs in a process of its own: with Triton's interpreter on, nothing compiles.
"""

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.kernel_list import ENTRIES, Entry

RESULTS = Path(__file__).parent / "results" / "aot.json"
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Bytes of shared memory that one block can ask for (CUDA C++ Programming Guide, compute capabilities; RDNA 3: LDS).
SHARED = {"sm_75": 65536, "sm_80": 166912, "sm_86": 101376, "sm_89": 101376}
SHARED |= {"sm_90": 232448, "sm_120": 101376, "gfx1100": 65536}
GROWTH = 1.02  # decode instructions may grow by this much before --check fails: compilers shuffle a few moves


def compile_entry(entry: Entry, target: str) -> Any:
    """Triton's own compiled kernel for an entry; arguments in the kernel's order, pointers taken as aligned."""
    file, function = entry.kernel.split(":")
    kernel = getattr(importlib.import_module(f"lowrank.kernels.{file}"), function)
    while not isinstance(kernel, triton.JITFunction):  # under triton.autotune or triton.heuristics
        kernel = kernel.fn
    missing = set(kernel.arg_names) ^ (set(entry.arguments) | set(entry.constants))
    if missing:
        raise ValueError(f"{entry.name}: {', '.join(sorted(missing))} must be named in the list and in {entry.kernel}")
    signature = {name: entry.arguments.get(name, "constexpr").partition(":")[0] for name in kernel.arg_names}
    aligned = [i for i, name in enumerate(kernel.arg_names) if re.match(r"\*|.*:16", entry.arguments.get(name, ""))]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    gpu = GPUTarget("cuda", int(target[3:]), 32) if target.startswith("sm_") else GPUTarget("hip", target, 32)
    options = {"num_warps": entry.warps, "num_stages": entry.stages, **entry.options}
    return triton.compile(ASTSource(kernel, signature, entry.constants, attributes), target=gpu, options=options)


def measure(entry: Entry, target: str) -> dict[str, Any]:
    """One row of the table."""
    try:
        compiled = compile_entry(entry, target)
    except Exception as error:  # whatever a compiler throws: the other rows are wanted all the same
        cause = error.__cause__ or error
        return {"kernel": entry.name, "target": target, "error": f"{type(cause).__name__}: {cause}".strip()}
    row: dict[str, Any] = {"kernel": entry.name, "target": target, "shared": compiled.metadata.shared}
    if target.startswith("sm_"):
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            usage = tool("cuobjdump", "--dump-resource-usage", file.name)
            code = tool("nvdisasm", "-c", file.name)
        row["registers"] = int(re.search(r"REG:(\d+)", usage)[1])
        lines = instructions(code)
        # a spill is a store to local memory; a stack that is never stored to is none
        row["spilled"] = sum("STL" in text for _, text in lines)
        row["loads"] = sum(bool(re.search(r"\b(LDG|LDGSTS)\S*\.128|UTMALDG|UBLKCP", text)) for _, text in lines)
        row["stores"] = sum(bool(re.search(r"\bSTG\S*\.128|UTMASTG", text)) for _, text in lines)
        row["tensor_cores"] = sum(bool(re.match(r"(@\S+ )?[A-Z]+MMA\b", text)) for _, text in lines)
        body = main_loop(lines)
    else:
        code = compiled.asm["amdgcn"]
        row["registers"] = int(re.search(r"\.vgpr_count:\s+(\d+)", code)[1])
        row["spilled"] = int(re.search(r"\.vgpr_spill_count:\s+(\d+)", code)[1])
        row["loads"] = len(re.findall(r"(?:global|buffer)_load_(?:b128|dwordx4)", code))
        row["stores"] = len(re.findall(r"(?:global|buffer)_store_(?:b128|dwordx4)", code))
        row["tensor_cores"] = len(re.findall(r"v_wmma", code))
        body = []
    if entry.weights and body:
        row["decode"] = round(len(body) * 32 * entry.warps / entry.weights, 2)
    return row


def tool(name: str, *arguments: str) -> str:
    return subprocess.run([str(TOOLS / name), *arguments], capture_output=True, text=True, check=True).stdout


def instructions(code: str) -> list[tuple[int, str]]:
    """(address, text) of each machine instruction; labels are (-1, name)."""
    found = []
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            found.append((-1, label[1]))
        elif text := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", line):
            found.append((int(text[1], 16), text[2]))
    return found


def main_loop(lines: Sequence[tuple[int, str]]) -> list[str]:
    """The instructions of the loop that does most of the work (the longest innermost one), else of everything."""
    place = {text: i for i, (address, text) in enumerate(lines) if address < 0}
    loops = []
    for i, (_, text) in enumerate(lines):
        jump = re.search(r"\bBRA\S*\s.*?(\.L_x_\d+)", text)
        if jump and (start := place.get(jump[1], i)) < i - 1:  # a jump to itself ends the program
            loops.append((start, i))
    inner = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    start, end = max(inner, key=lambda loop: loop[1] - loop[0], default=(0, len(lines) - 1))
    return [text for address, text in lines[start : end + 1] if address >= 0 and not text.startswith("NOP")]


def faults(entry: Entry, row: dict[str, Any], before: dict[str, Any] | None) -> list[str]:
    """What is wrong with a row, each in words; `before` is the committed one."""
    if "error" in row:
        return [f"{row['kernel']} for {row['target']} does not compile: {row['error']}"]
    found = []
    if row["spilled"]:
        found.append(f"spills ({row['spilled']} stores to local memory)")
    if row["shared"] > SHARED[row["target"]]:
        found.append(f"asks for {row['shared']} bytes of shared memory; {row['target']} has {SHARED[row['target']]}")
    if entry.wide and not row[entry.wide] and row["target"].startswith("sm_"):
        found.append(f"has no 128-bit {entry.wide}")
    if entry.tensor_cores and not row["tensor_cores"]:
        found.append("has no tensor-core instruction")
    if before and row.get("decode", 0) > before.get("decode", row.get("decode", 0)) * GROWTH:
        found.append(f"decodes with {row['decode']} instructions per weight; it was {before['decode']}")
    return [f"{row['kernel']} for {row['target']} {fault}" for fault in found]


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| kernel | target | registers | spilled | shared | 128-bit loads | stores | tensor cores | instr. / weight |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for r in rows:
        columns = ("registers", "spilled", "shared", "loads", "stores", "tensor_cores", "decode")
        numbers = (r.get(column, "") for column in columns)
        lines.append(f"| {r['kernel']} | {r['target']} | " + " | ".join(map(str, numbers)) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.aot", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with bench/results/aot.json instead of writing")
    parser.add_argument("--only", default="", help="entries whose name holds this text")
    parser.add_argument("--targets", default="", help="comma-separated, e.g. sm_89,sm_90")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--list", action="store_true", help="print the kernels in the list, and compile nothing")
    options = parser.parse_args()
    if options.list:
        print("\n".join(sorted({entry.kernel for entry in ENTRIES})))
        return
    chosen = [t for t in options.targets.split(",") if t]
    jobs = [(e, t) for e in ENTRIES if options.only in e.name for t in e.targets if not chosen or t in chosen]
    if not jobs:
        parser.error(f"no entry matches --only {options.only!r} --targets {options.targets!r}")
    with ProcessPoolExecutor(options.jobs, get_context("spawn")) as pool:
        rows = list(pool.map(measure, *zip(*jobs)))
    saved = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    before = {(r["kernel"], r["target"]): r for r in saved.get(triton.__version__, [])}
    print(table(rows))
    wrong = [
        fault
        for (entry, _), row in zip(jobs, rows)
        for fault in faults(entry, row, before.get((entry.name, row["target"])) if options.check else None)
    ]
    print("\n".join(wrong) if wrong else f"{len(rows)} kernels compiled with Triton {triton.__version__}: no fault")
    if not options.check:  # a run of some replaces those; what has left the list goes
        known = before | {(row["kernel"], row["target"]): row for row in rows}
        keys = [(entry.name, target) for entry in ENTRIES for target in entry.targets]
        saved[triton.__version__] = [known[key] for key in keys if key in known]
        RESULTS.parent.mkdir(exist_ok=True)
        lines = [
            f" {json.dumps(v)}: [\n" + ",\n".join(f"  {json.dumps(r)}" for r in saved[v]) + "\n ]"
            for v in sorted(saved)
        ]
        RESULTS.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
