"""What kernels compile to, with no GPU: `bench.aot`, in a process without the interpreter that is on in this one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lowrank.kernels.dispatch import INSTALLED

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not INSTALLED or sys.platform != "linux", reason="needs Triton")


def aot(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.aot", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)


def test_every_kernel_that_is_launched_is_in_the_list() -> None:
    launched = set()
    for path in (ROOT / "lowrank" / "kernels").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        kernels = set(re.findall(r"@triton\.jit\ndef (\w+)\(", text))
        launched |= {f"{path.stem}:{name}" for name in kernels if re.search(rf"\b{name}\[", text)}
    listed = aot("--list").stdout.split()
    assert launched and not launched - set(listed)


def test_no_kernel_spills_exceeds_a_limit_or_decodes_more_slowly() -> None:
    """In bf16 for one consumer GPU; every dtype and target in the slow one."""
    done = aot("--check", "--only", "bf16", "--targets", "sm_89")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_no_kernel_spills_exceeds_a_limit_or_decodes_more_slowly_anywhere() -> None:
    done = aot("--check")
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_spill_a_limit_a_lost_instruction_and_a_slower_decode_are_faults(tmp_path) -> None:
    code = """
from bench.aot import faults
from bench.kernel_list import Entry
entry = Entry("k", "f:k", {}, {}, tensor_cores=True)
good = {"kernel": "k", "target": "sm_89", "spilled": 0, "shared": 101376, "loads": 1, "tensor_cores": 1, "decode": 5.0}
assert faults(entry, good, good) == []
for change, word in (
    ({"spilled": 1}, "spills"),
    ({"shared": 101377}, "asks for 101377 bytes"),
    ({"loads": 0}, "no 128-bit loads"),
    ({"tensor_cores": 0}, "no tensor-core"),
    ({"decode": 5.2}, "decodes with 5.2 instructions per weight; it was 5.0"),
    ({"error": "x"}, "does not compile"),
):
    (fault,) = faults(entry, good | change, good)
    assert word in fault, (word, fault)
"""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
