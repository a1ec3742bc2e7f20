"""Which kernels are compiled ahead of time, and with what: one entry for each version that a launch can ask for.

`python -m bench.aot` reads this list; a kernel that is not here is not checked. To add one, append an `Entry`: name
each argument of the kernel with its type ("*bf16": a pointer, taken as 16-byte aligned, as torch gives them; "i32",
"i64", "fp32": a number; "i32:16": a number divisible by 16), and each tl.constexpr with its value.
"""

from dataclasses import dataclass, field
from typing import Any

from lowrank.kernels.nf4_linear import TILES

SM75, SM80, SM86, SM89, SM90, SM120, GFX1100 = "sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_120", "gfx1100"
AMPERE = (SM80, SM86, SM89, SM90, SM120)  # with bf16 tensor cores
NVIDIA = (SM75, *AMPERE)
EVERY = (*NVIDIA, GFX1100)


@dataclass(frozen=True)
class Entry:
    name: str
    """The row of the table; unique."""

    kernel: str
    """ "file:function" under lowrank.kernels."""

    arguments: dict[str, str]
    constants: dict[str, Any]
    targets: tuple[str, ...] = EVERY
    warps: int = 4
    stages: int = 1
    options: dict[str, Any] = field(default_factory=dict)
    weights: int = 0
    """4-bit weights that one pass of the main loop (of the program, where it has none) decodes; 0: it decodes none."""

    tensor_cores: bool = False
    """A product that has to run on tensor cores wherever the target has them for this type."""

    wide: str = "loads"
    """What has to go 128 bits at a time on NVIDIA: "loads", "stores" (a kernel that mainly writes) or "" (neither)."""


def fp(name: str, kernel: str, arguments: str, constants: dict[str, Any], **rest: Any) -> list[Entry]:
    """One entry each for fp32, fp16 and bf16: "*T" in the arguments, written "a: *T, n: i64", stands for the type."""
    entries = []
    for dtype in ("fp32", "fp16", "bf16"):
        named = dict(part.strip().split(": ") for part in arguments.replace("*T", f"*{dtype}").split(","))
        targets = tuple(t for t in rest.get("targets", EVERY) if dtype != "bf16" or t != SM75)  # sm_75 has no bf16
        entries.append(Entry(f"{name} {dtype}", kernel, named, constants, **{**rest, "targets": targets}))
    return entries


ENTRIES: list[Entry] = []

SCALES = "scale_ptr: *fp32, nested_ptr: *fp32, offset_ptr: *fp32, levels_ptr: *fp32"
NESTED_SCALES = SCALES.replace("*fp32", "*u8", 1)

for scales, nested in ((SCALES, False), (NESTED_SCALES, True)):
    ENTRIES += fp(
        "nf4 dequantize" + ", nested scales" * nested,
        "nf4_codec:_dequantize",
        f"words_ptr: *i32, {scales}, code_ptr: *fp32, w_ptr: *T, n: i64:16",
        {"G": 64, "BLOCKS": 64, "NESTED": nested},
        weights=4096,
        wide="stores",  # 4 bytes read for 16 or more written: a warp reads 128 bytes side by side
        options={"enable_fp_fusion": False},
    )
for scales, nested in ((SCALES, False), (NESTED_SCALES, True)):
    named = ", nested scales" * nested
    ENTRIES += fp(
        "nf4 gemv" + named,
        "nf4_linear:_gemv",
        f"x_ptr: *T, words_ptr: *i32, {scales}, code_ptr: *fp32, bias_ptr: *T, y_ptr: *T, O: i32:16, I: i32:16",
        {"G": 64, "C": 64, "NESTED": nested, "BIAS": False, "ROWS": 4, "CHUNKS": 16},
        weights=4 * 1024,
    )
    for rows, (outputs, unroll, stages) in TILES.items():
        halves = fp(
            f"nf4 tile {outputs}x{rows}" + named,
            "nf4_linear:_tile",
            f"x_ptr: *T, words_ptr: *i32, {scales}, pairs_ptr: *i32, bias_ptr: *T, y_ptr: *fp32,"
            " M: i32, O: i32:16, I: i32:16, per_split: i32:16",
            {"G": 64, "NESTED": nested, "BIAS": False, "PRMT": True}
            | {"BO": outputs, "BM": rows, "UNROLL": unroll, "STAGES": stages},
            targets=AMPERE,
            weights=outputs * 64 * unroll,
            tensor_cores=True,
        )
        ENTRIES += [entry for entry in halves if "fp32" not in entry.name]
ENTRIES += fp(
    "nf4 quantize",
    "nf4_codec:_quantize",
    "w_ptr: *T, bounds_ptr: *fp32, packed_ptr: *u8, absmax_ptr: *fp32, n: i64:16",
    {"G": 64, "BLOCKS": 32},
    options={"enable_fp_fusion": False},
)
