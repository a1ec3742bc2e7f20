"""Which kernels are compiled ahead of time, and with what: one entry for each version that a launch can ask for.

`python -m bench.aot` reads this list; a kernel that is not here is not checked. To add one, append an `Entry`: name
each argument of the kernel with its type ("*bf16": a pointer, taken as 16-byte aligned, as torch gives them; "i32",
"i64", "fp32": a number; "i32:16": a number divisible by 16), and each tl.constexpr with its value.
"""

from dataclasses import dataclass, field, replace
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
    stages: int = 3  # this and 4 warps are what a launch has that names neither
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


def half(*arguments: Any, **rest: Any) -> list[Entry]:
    """`fp` in 16 bits: bf16, and fp16 where there is no bf16."""
    return [
        replace(entry, targets=(SM75,)) if entry.name.endswith("fp16") else entry
        for entry in fp(*arguments, **rest)
        if not entry.name.endswith("fp32") and (SM75 in entry.targets or entry.name.endswith("bf16"))
    ]


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
        f"x_ptr: *T, words_ptr: *i32, {scales}, code_ptr: *fp32, bias_ptr: *T, y_ptr: *T, O: i32:16, N: i32",
        {"G": 64, "C": 64, "NESTED": nested, "BIAS": False, "ROWS": 4, "CHUNKS": 16},
        weights=4 * 1024,
    )
    for rows, (outputs, warps, stages, registers) in TILES.items():
        halves = fp(
            f"nf4 tile {outputs}x{rows}" + named,
            "nf4_linear:_tile",
            f"x_ptr: *T, words_ptr: *i32, {scales}, pairs_ptr: *i32, bias_ptr: *T, y_ptr: *fp32,"
            " M: i32, O: i32:16, N: i32, steps: i32",
            {"G": 64, "NESTED": nested, "BIAS": False, "PRMT": True} | {"BO": outputs, "BM": rows, "STAGES": stages},
            targets=AMPERE,
            warps=warps,
            options={"maxnreg": registers},
            weights=outputs * 64,
            tensor_cores=True,
        )
        ENTRIES += [entry for entry in halves if "fp32" not in entry.name]
ENTRIES += fp(
    "nf4 tile, adding splits",
    "nf4_linear:_add_splits",
    "parts_ptr: *fp32, bias_ptr: *T, y_ptr: *T, n: i32:16, O: i32:16",
    {"SPLITS": 4, "BIAS": True, "BLOCK": 1024},
)
ENTRIES += fp(
    "nf4 quantize",
    "nf4_codec:_quantize",
    "w_ptr: *T, bounds_ptr: *fp32, packed_ptr: *u8, absmax_ptr: *fp32, n: i64:16",
    {"G": 64, "BLOCKS": 32},
    options={"enable_fp_fusion": False},
)

# Dim 4096, heads of 128, a vocabulary of 128,256 (Llama 3), rank 16, contiguous tensors
ROWS_3 = "a_row: i32:16, b_row: i32:16"
ENTRIES += half("swiglu", "swiglu:_fwd", f"a_ptr: *T, b_ptr: *T, c_ptr: *T, {ROWS_3}, F: i32:16", {"BLOCK": 1024})
ENTRIES += half(
    "swiglu backward",
    "swiglu:_bwd",
    f"a_ptr: *T, b_ptr: *T, dc_ptr: *T, da_ptr: *T, db_ptr: *T, {ROWS_3}, dc_row: i32:16, F: i32:16",
    {"BLOCK": 1024},
)
for dim, warps in ((128, 4), (4096, 8), (8192, 16)):
    rows = max(1, 2048 // dim)
    ENTRIES += half(
        f"rms_norm {dim}",
        "rms_norm:_fwd",
        "x_ptr: *T, w_ptr: *T, y_ptr: *T, r_ptr: *fp32, x_row: i32:16, M: i32, D: i32:16, eps: fp32, offset: fp32",
        {"ROWS": rows, "BLOCK": dim},
        warps=warps,
    )
    ENTRIES += half(
        f"rms_norm {dim} backward, with dw",
        "rms_norm:_bwd",
        "x_ptr: *T, w_ptr: *T, r_ptr: *fp32, dy_ptr: *T, dx_ptr: *T, dw_ptr: *fp32, x_row: i32:16, dy_row: i32:16,"
        " M: i32, D: i32:16, offset: fp32",
        {"TILES": 8, "ROWS": rows, "BLOCK": dim, "DW": True},
        warps=warps,
    )
for name, step in (("rope", 1), ("rope, interleaved", 2)):
    ENTRIES += half(
        name,
        "rope:_turn",
        "x_ptr: *T, cos_ptr: *fp32, sin_ptr: *fp32, y_ptr: *T, x_b: i32:16, x_t: i32:16, x_h: i32:16, table_b: i32:16,"
        " sign: fp32, T: i32, H: i32:16, K: i32:16, PAIRS: i32:16",
        {"STEP": step, "HEADS": 16, "BLOCK": 64, "REST": 0},
        wide="loads" if step == 1 else "",  # neighbours in a pair go to different registers
    )
for name, kl, capped in (("cross_entropy", False, False), ("KL", True, False), ("KL, softcap", True, True)):
    ENTRIES += half(
        name,
        "cross_entropy:_rows",
        "z_ptr: *T, t_ptr: *T, label_ptr: *i64, loss_ptr: *fp32, cap: fp32",
        {"V": 128256, "KL": kl, "CAPPED": capped, "BLOCK": 4096},
        warps=8,
    )
TILE = {"TOKENS": 32, "WIDTH": 128, "RANKS": 16}
PRODUCTS = {"targets": (*AMPERE, GFX1100), "stages": 3, "tensor_cores": True}  # sm_75 takes torch's products
for entries in (
    fp(
        "lora_linear, adding rank 16",
        "lora_linear:_add",
        "y_ptr: *T, h_ptr: *T, w_ptr: *fp32, scaling: fp32, y_m: i32:16, h_m: i32:16, w_o: i32:16, M: i32, O: i32:16,"
        " R: i32:16",
        {"w_r": 1, "ROWS": 64, "WIDTH": 128, "RANKS": 16},
        **PRODUCTS,
    ),
    fp(
        "lora_grouped down",
        "lora_grouped:_down",
        "x_ptr: *T, w_ptr: *T, index_ptr: *i64, h_ptr: *T, x_n: i32:16, x_t: i32:16, w_k: i32:16, w_r: i32:16, T: i32,"
        " I: i32:16, R: i32:16",
        {"w_i": 1, **TILE},
        **PRODUCTS,
    ),
    fp(
        "lora_grouped up",
        "lora_grouped:_up",
        "h_ptr: *T, w_ptr: *T, index_ptr: *i64, s_ptr: *fp32, y_ptr: *T, w_k: i32:16, w_o: i32:16, T: i32, O: i32:16,"
        " R: i32:16",
        {"w_r": 1, **TILE},
        **PRODUCTS,
    ),
    fp(
        "lora_grouped outer",
        "lora_grouped:_outer",
        "h_ptr: *T, x_ptr: *T, index_ptr: *i64, s_ptr: *fp32, dw_ptr: *T, x_n: i32:16, x_t: i32:16, dw_k: i32:16,"
        " dw_r: i32:16, N: i32, T: i32, I: i32:16, R: i32:16",
        {"dw_i": 1, **TILE},
        **PRODUCTS,
    ),
    fp(
        "row_norm",
        "row_norm:_change",
        "w_ptr: *T, a_ptr: *fp32, b_ptr: *fp32, change_ptr: *fp32, scaling: fp32, w_o: i32:16, O: i32:16, I: i32:16,"
        " R: i32:16",
        {"w_i": 1, "ROWS": 32, "WIDTH": 128, "RANKS": 16},
        **PRODUCTS,
    ),
):
    ENTRIES += [entry for entry in entries if entry.name.endswith("bf16")]
    ENTRIES += [
        replace(e, tensor_cores=False, targets=AMPERE, warps=8 if "outer" in e.name else 4)
        for e in entries
        if e.name.endswith("fp32")
    ]
