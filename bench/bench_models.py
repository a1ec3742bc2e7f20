"""Loading, prefill and decoding on a CPU, transformers and bitsandbytes beside it: python -m bench.bench_models

SmolLM2-135M-Instruct from one bf16 safetensors folder, which is written first (ours also as the delivered GGUF, kept
in its own 4 bits). Each system runs in processes of its own, in turn with the others, `--repeats` times; the median
counts. The loops that `lowrank doctor --compile` builds are built first, and one row of ours runs without them too.

    first token   from the start of loading, imports done, to the first new token: weights, tokenizer, a prompt of 7
    prefill       512 tokens through the model, logits of the last, in tokens/s; ours inside `decoded`, as generation is
    decode        64 tokens after the first, greedy, for 1 row and for 8, in tokens/s of all rows

The limit of decoding one row is reading the weights once a token: their bytes over the bandwidth that one pass of sums
over 256 MB of fp32 shows. That of prefill is the layers' products alone, at the speed of one of 2048 x 2048 x 2048 in
bf16. Then the import of lowrank and of peft, and `lowrank --help`, as whole processes. --rows appends one JSON
line to bench/results/models.jsonl. Peers: pip install transformers peft bitsandbytes==0.50.2.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "models.jsonl"
EAGER = "lowrank bf16, not compiled"
OURS = {"lowrank bf16": None, EAGER: None, "lowrank nf4-dq": "nf4-dq", "lowrank keep (GGUF)": "keep"}
SYSTEMS = (*OURS, "transformers bf16", "bitsandbytes nf4-dq")
PROMPT = "The history of the village begins with"
NEW, LONG = 64, 512


def write_folder(folder: Path) -> None:
    """The quickstart's model as others take it: config.json, model.safetensors in bf16, tokenizer.json."""
    from safetensors.torch import save_file

    from lowrank.models.load import load

    model, tokenizer = load("quickstart", device="cpu", progress=False)
    c: Any = model.config
    state = {name: p.detach().contiguous() for name, p in model.named_parameters()}  # a tied head is there once
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.vocabulary.inner.save(str(folder / "tokenizer.json"))  # type: ignore[union-attr]
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": c.dim, "hidden_act": "silu",
              "intermediate_size": c.hidden_dim, "num_hidden_layers": c.n_layers, "num_attention_heads": c.n_heads,
              "num_key_value_heads": c.n_kv_heads, "vocab_size": c.vocab_size, "rms_norm_eps": c.norm_eps,
              "max_position_embeddings": c.max_positions, "rope_theta": c.rope.theta, "tie_word_embeddings": c.tied,
              "dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    special = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))


def seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def ours(system: str, folder: str) -> dict[str, float]:
    import torch

    from lowrank.models.decoder import KVCache
    from lowrank.models.generate import generate_ids
    from lowrank.models.load import load
    from lowrank.quant.linear import decoded

    quantize = OURS[system]
    start = time.perf_counter()
    model, tokenizer = load("quickstart" if quantize == "keep" else folder, quantize=quantize, device="cpu", progress=False)  # fmt: skip  # noqa: E501
    assert tokenizer is not None
    ids = tokenizer.encode(PROMPT)
    generate_ids(model, [ids], 1)
    first = time.perf_counter() - start

    @torch.no_grad()
    def prefill() -> None:
        cache = KVCache(model.config, 1, LONG, torch.bfloat16, torch.device("cpu"))  # type: ignore[arg-type]
        model.head(model.hidden(torch.arange(LONG)[None] + 100, None, None, cache)[:, -1])  # type: ignore[operator]

    block = decoded(model)
    return {"first token": first, **timed(prefill, lambda rows, new: generate_ids(model, [ids] * rows, new), block)}


def theirs(system: str, folder: str) -> dict[str, float]:
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    transformers.logging.disable_progress_bar()
    more: dict[str, Any] = {}
    if system.startswith("bitsandbytes"):
        import bitsandbytes as bitsandbytes  # its import is not part of loading

        more["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )  # fmt: skip
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **more).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]])

    @torch.no_grad()
    def generate(rows: int, new: int) -> None:
        batch = ids.expand(rows, -1)
        model.generate(
            batch, attention_mask=torch.ones_like(batch), min_new_tokens=new, max_new_tokens=new, do_sample=False
        )

    generate(1, 1)
    first = time.perf_counter() - start

    @torch.no_grad()
    def prefill() -> None:
        model(torch.arange(LONG)[None] + 100, use_cache=True, logits_to_keep=1)

    return {"first token": first, **timed(prefill, generate, nullcontext())}


def timed(
    prefill: Callable[[], None], generate: Callable[[int, int], Any], block: AbstractContextManager[Any]
) -> dict[str, float]:
    found: dict[str, float] = {}
    with block:
        prefill()
        found["prefill"] = LONG / min(seconds(prefill) for _ in range(3))
    for rows in (1, 8):
        one, all = (min(seconds(partial(generate, rows, n)) for _ in range(2)) for n in (1, NEW + 1))
        found[f"decode {rows}"] = rows * NEW / (all - one)
    return found


def bandwidth() -> float:
    """GB/s of reading."""
    import torch

    x = torch.ones(2**26)
    return x.numel() * 4 / min(seconds(x.sum) for _ in range(5)) / 1e9


def flops() -> float:
    """GFLOP/s of a large product in bf16."""
    import torch

    x = torch.ones(2048, 2048, dtype=torch.bfloat16)
    return 2 * 2048**3 / min(seconds(lambda: x @ x) for _ in range(5)) / 1e9


def process(*arguments: str) -> float:
    """The median of 5 runs of a Python process, in seconds."""
    command = [sys.executable, *arguments]
    return statistics.median(
        seconds(lambda: subprocess.run(command, check=True, capture_output=True)) for _ in range(5)
    )


def installed(module: str) -> bool:
    from importlib.util import find_spec

    return find_spec(module) is not None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", action="store_true", help="append a line to bench/results/models.jsonl")
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        system, folder = args.run
        print(json.dumps((ours if system.startswith("lowrank") else theirs)(system, folder)))
        return
    from bench.bench_quant import compiled_in
    from lowrank.models import one_row

    compile_s = compiled_in()
    print(f"generation: {one_row.describe()}")
    peers = installed("transformers") and installed("bitsandbytes")
    systems = [system for system in SYSTEMS if peers or system.startswith("lowrank")]
    found: dict[str, list[dict[str, float]]] = {system: [] for system in systems}
    with tempfile.TemporaryDirectory() as folder:
        write_folder(Path(folder))
        for _ in range(args.repeats):
            for system in systems:
                command = [sys.executable, "-W", "ignore", "-m", "bench.bench_models", "--run", system, folder]
                env = {**os.environ, "LOWRANK_COMPILED": "off" if system == EAGER else "auto"}
                out = subprocess.run(
                    command, env=env, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
                )
                found[system].append(json.loads(out.stdout.splitlines()[-1]))
    table = {s: {k: statistics.median(row[k] for row in rows) for k in rows[0]} for s, rows in found.items()}
    print("| system | first token | prefill 512 | decode 1 row | decode 8 rows |\n| --- | --- | --- | --- | --- |")
    for system, row in table.items():
        cells = f"{row['first token']:.2f} s | {row['prefill']:,.0f} | {row['decode 1']:.1f} | {row['decode 8']:.0f}"
        print(f"| {system} | {cells} |")
    speed, products = bandwidth(), flops()
    print(f"{speed:.0f} GB/s; the bf16 weights are 269 MB: at most {speed / 0.269:.0f} tokens/s at 1 row")
    print(f"{products:.0f} GFLOP/s; 106 M weights in the layers: at most {products / 0.212:,.0f} tokens/s in prefill")
    print(f"compiled in {compile_s} s, once for a machine")
    starts = {
        "import lowrank": process("-c", "import lowrank"),
        "lowrank --help": process("-m", "lowrank.cli", "--help"),
    }
    if installed("peft"):
        starts["import peft"] = process("-W", "ignore", "-c", "import peft")
    print(", ".join(f"{name} {value:.2f} s" for name, value in starts.items()))
    if args.rows:
        machine = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count()}
        line = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            **machine,
            "GB/s": speed,
            "GFLOP/s": products,
            "compile_s": compile_s,
            **starts,
            "runs": found,
        }
        RESULTS.parent.mkdir(exist_ok=True)
        with open(RESULTS, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
