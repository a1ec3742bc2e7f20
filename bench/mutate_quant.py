"""Break the quantization code in named ways and see that the tests notice: python -m bench.mutate_quant [WORD ...]

Each mutation in mutate_quant.txt is one replacement in one file of a COPY of the repository; the quick tests of
quantization run there and must fail. One that passes is a hole in the tests, and the exit status is 1. WORDs choose the
mutations whose names hold one of them.
"""

import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
QUICKEST = ("bitsandbytes", "compiled", "counter_examples", "tensor", "quantized_linear", "pool", "damaged_state")
TESTS = ("tests/kernels/test_nf4_codec.py", *(f"tests/quant/test_{name}.py" for name in QUICKEST), "tests/quant")


@dataclass(frozen=True)
class Mutation:
    """`old`, which stands exactly once in `file`, becomes `new`."""

    name: str
    file: str
    old: str
    new: str


def mutations() -> list[Mutation]:
    """What mutate_quant.txt lists."""
    blocks = (ROOT / "bench" / "mutate_quant.txt").read_text(encoding="utf-8").strip().split("\n\n")[1:]
    found = []
    for block in blocks:
        name, file, *lines = block.split("\n")
        old, new = ("\n".join(line[2:] for line in lines if line.startswith(sign)) for sign in "-+")
        found.append(Mutation(name, file, old, new))
    return found


def run(mutation: Mutation, folder: Path) -> tuple[str, float]:
    """ "caught" with the name of the test that failed, "MISSED", or what went wrong."""
    path = folder / mutation.file
    text = path.read_text(encoding="utf-8")
    if text.count(mutation.old) != 1:
        return f"the text to replace stands there {text.count(mutation.old)} times", 0.0
    path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
    start = time.perf_counter()
    try:
        done = pytest(folder, "-x")
    finally:
        path.write_text(text, encoding="utf-8")
    seconds = time.perf_counter() - start
    if done.returncode == 0:
        return "MISSED", seconds
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if not failed:
        return f"no test ran: {done.stdout[-200:]}", seconds
    return "caught by " + failed[0].split("::")[-1].split(" - ")[0], seconds


def pytest(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, *TESTS]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=900)


def main(words: list[str]) -> int:
    chosen = [m for m in mutations() if not words or any(word in m.name for word in words)]
    caught = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "copy"
        unneeded = shutil.ignore_patterns(".git", ".hypothesis", "__pycache__", "runs", ".venv", "venv", "*.egg-info")
        shutil.copytree(ROOT, folder, symlinks=True, ignore=unneeded)
        untouched = pytest(folder)
        if untouched.returncode:
            print(untouched.stdout[-2000:], "\nthe tests fail without any mutation", sep="")
            return 1
        for mutation in chosen:
            verdict, seconds = run(mutation, folder)
            caught += verdict.startswith("caught")
            print(f"{mutation.name:52} {verdict:85} {seconds:5.1f} s", flush=True)
    print(f"{caught} of {len(chosen)} mutations caught")
    return int(caught < len(chosen))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
