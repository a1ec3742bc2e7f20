"""What adapters cost beside the model, PEFT in the same run where it is installed: python -m bench.bench_adapters

The model has SmolLM2-135M's shape (30 layers, dim 576, 210 linear layers) and random weights in fp32; where
transformers is installed both libraries adapt its own LlamaForCausalLM, else ours adapts our decoder. LoRA r = 8 on all
linear layers, B random. Each figure is the median of `--repeats` alternating runs, ours and theirs in turn, so that a
busy machine slows both. The limit: LoRA's products are R (I + O) / (I O) of the base's linear layers, 2.3 % here.

    attach      a new adapter on all 210 layers             overhead   forward of 4 x 128 tokens against the base's
    merged      the same forward after merging              mixed      8 rows of 32 tokens, each with its own adapter
    switch      activating one of 100 loaded adapters       load       reading 100 adapter folders (rank 4, q and v)

--rows appends one JSON line to bench/results/adapters.jsonl.
"""

import argparse
import json
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lowrank
from lowrank.methods.lora import LoRAConfig
from lowrank.models.decoder import Decoder

try:
    import peft
    import transformers
except ImportError:
    peft = transformers = None

SHAPE = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EXTRA = 8 * sum(
    i + o for i, o in ((576, 576), (576, 192), (576, 192), (576, 576), (576, 1536), (576, 1536), (1536, 576))
)
LIMIT = EXTRA / (576 * (576 + 192 + 192 + 576 + 1536 * 3))


def build() -> nn.Module:
    torch.manual_seed(0)
    if transformers is not None:
        config = transformers.LlamaConfig(vocab_size=49152, num_key_value_heads=3, tie_word_embeddings=True, **SHAPE)
        return transformers.LlamaForCausalLM(config).eval()
    from lowrank.models.families import ModelConfig, read_config

    settings = SHAPE | {
        "model_type": "llama",
        "vocab_size": 49152,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    }
    config = read_config(settings | {"rms_norm_eps": 1e-5, "max_position_embeddings": 2048})
    assert isinstance(config, ModelConfig)
    model = Decoder(config)
    for p in model.parameters():
        nn.init.normal_(p, std=0.02)
    return model.eval()


def seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def medians(repeats: int, **runs: Callable[[], Any]) -> dict[str, float]:
    """Alternating runs, so that what else the machine does falls on all of them alike."""
    for run in runs.values():
        run()
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            taken[name].append(seconds(run))
    return {name: statistics.median(values) for name, values in taken.items()}


def randomise(model: nn.Module) -> None:
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.02)


def attach_and_forward(repeats: int) -> dict[str, Any]:
    ids = torch.randint(49152, (4, 128), generator=torch.Generator().manual_seed(0))
    ours, theirs = build(), build() if peft else None
    rows: dict[str, Any] = {}

    def attach_ours() -> None:
        lowrank.attach(ours, LoRAConfig(rank=8), LINEAR)

    def attach_theirs() -> Any:
        config = peft.LoraConfig(r=8, target_modules=LINEAR, init_lora_weights=True)
        return peft.get_peft_model(theirs, config)

    times: dict[str, list[float]] = {"ours": [], "peft": []}
    for _ in range(repeats):
        times["ours"].append(seconds(attach_ours))
        lowrank.detach(ours)
        if peft:
            start = time.perf_counter()
            wrapped = attach_theirs()
            times["peft"].append(time.perf_counter() - start)
            wrapped.unload()
    rows["attach"] = {name: statistics.median(values) for name, values in times.items() if values}
    base = build()
    attach_ours()
    randomise(ours)
    runs: dict[str, Callable[[], Any]] = {"base": lambda: base(ids), "ours": lambda: ours(ids)}
    if peft:
        wrapped = attach_theirs().eval()
        randomise(wrapped)
        runs["peft"] = lambda: wrapped(ids)
    rows["forward"] = medians(repeats, **runs)
    lowrank.merge(ours)
    runs = {"base": lambda: base(ids), "ours": lambda: ours(ids)}
    if peft:
        unloaded = wrapped.merge_and_unload()
        runs["peft"] = lambda: unloaded(ids)
    rows["merged"] = medians(repeats, **runs)
    return rows


def mixed(repeats: int, tokens: int) -> dict[str, float]:
    names = [f"n{i}" for i in range(8)]
    ids = torch.randint(49152, (8, tokens), generator=torch.Generator().manual_seed(0))
    ours = build()
    for name in names:
        lowrank.attach(ours, LoRAConfig(rank=8), LINEAR, name=name)
    randomise(ours)

    def run_ours() -> Tensor:
        with lowrank.rows(ours, names):
            return ours(ids)

    base = build()
    runs: dict[str, Callable[[], Any]] = {"base": lambda: base(ids), "ours": run_ours}
    if peft:
        config = peft.LoraConfig(r=8, target_modules=LINEAR)
        wrapped = peft.get_peft_model(build(), config, adapter_name=names[0])
        for name in names[1:]:
            wrapped.add_adapter(name, config)
        wrapped.eval()
        randomise(wrapped)
        runs["peft"] = lambda: wrapped(ids, adapter_names=names)
    return medians(repeats, **runs)


def hundred(repeats: int) -> dict[str, dict[str, float]]:
    with tempfile.TemporaryDirectory() as folder:
        maker = build()
        lowrank.attach(maker, LoRAConfig(rank=4), ["q_proj", "v_proj"])
        lowrank.save_adapter(maker, Path(folder) / "n0", format="peft")
        for i in range(1, 100):  # the same values: only the time counts
            shutil.copytree(Path(folder) / "n0", Path(folder) / f"n{i}")
        lowrank.detach(maker)
        ours = maker

        def load_ours() -> None:
            for i in range(100):
                lowrank.load_adapter(ours, Path(folder) / f"n{i}")

        loading = {"ours": seconds(load_ours)}
        switching: dict[str, Callable[[], Any]] = {"ours": cycle(lambda i: lowrank.activate(ours, f"n{i}"))}
        if peft:
            first = time.perf_counter()
            wrapped = peft.PeftModel.from_pretrained(build(), Path(folder) / "n0", adapter_name="n0")
            for i in range(1, 100):
                wrapped.load_adapter(Path(folder) / f"n{i}", adapter_name=f"n{i}")
            loading["peft"] = time.perf_counter() - first
            switching["peft"] = cycle(lambda i: wrapped.set_adapter(f"n{i}"))
        return {"load": loading, "switch": medians(max(repeats, 20), **switching)}


def cycle(act: Callable[[int], Any]) -> Callable[[], None]:
    state = {"i": 0}

    def run() -> None:
        state["i"] = (state["i"] + 37) % 100
        act(state["i"])

    return run


def show(what: str, times: dict[str, float], aim: str) -> None:
    ours, theirs = 1e3 * times["ours"], 1e3 * times["peft"] if "peft" in times else None
    other = "-" if theirs is None else f"{theirs:.2f} ms"
    ratio = "" if theirs is None else f"{theirs / ours:.1f}x"
    base = f" (base {1e3 * times['base']:.0f} ms)" if "base" in times else ""
    print(f"{what + base:<34}{f'{ours:.2f} ms':>13}{other:>13}{ratio:>9}   {aim}", flush=True)
    if "base" in times and not what.startswith("mixed"):
        over = {who: 100 * (times[who] / times["base"] - 1) for who in ("ours", "peft") if who in times}
        print(
            f"{'  over the base':<34}{over['ours']:>11.1f} %" + (f"{over['peft']:>11.1f} %" if "peft" in over else "")
        )


AIMS = {"attach": "5x", "forward": f"half of theirs; limit {100 * LIMIT:.1f} %", "merged": "0 %", "mixed 32": "3x",
        "mixed 1": "3x", "load": "", "switch": "under 1 ms"}  # fmt: skip


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--layers", type=int, default=30, help="fewer for a quick look on a busy machine")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default="single,mixed,hundred", help="parts to run, separated by commas")
    parser.add_argument("--rows", action="store_true", help="append the result to bench/results/adapters.jsonl")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    SHAPE["num_hidden_layers"] = arguments.layers
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "single": lambda: attach_and_forward(arguments.repeats),
        "mixed": lambda: {f"mixed {n}": mixed(arguments.repeats, n) for n in (1, 32)},
        "hundred": lambda: hundred(arguments.repeats),
    }
    print(f"{'':<34}{'lowrank':>13}{'peft':>13}{'ratio':>9}   aim")
    rows: dict[str, Any] = {}
    for part in arguments.only.split(","):
        new = parts[part]()
        for what, times in new.items():
            show(what, times, AIMS[what])
        rows |= new
    if arguments.rows:
        target = Path(__file__).parent / "results" / "adapters.jsonl"
        target.parent.mkdir(exist_ok=True)
        where = {
            "machine": platform.machine(),
            "threads": arguments.threads,
            "layers": arguments.layers,
            "torch": torch.__version__,
        }
        where["peft"] = None if peft is None else peft.__version__
        with open(target, "a", encoding="utf-8") as file:
            file.write(json.dumps(where | rows) + "\n")


if __name__ == "__main__":
    main()
