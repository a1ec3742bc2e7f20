"""What adapters cost beside the model, PEFT in the same run where it is installed: python -m bench.bench_adapters

The model has SmolLM2-135M's shape (30 layers, dim 576, 210 linear layers) and random weights. Where transformers is
installed, both libraries adapt its own LlamaForCausalLM, and ours also adapts our decoder ("own"); without, only that.
LoRA r = 8 on all linear layers, B random. Each figure is the median of alternating runs, ours and theirs in turn, so
that a busy machine slows both. "base" is the model without adapters: the limit, for no library can be faster.

    attach     a new adapter on all 210 layers
    forward    one adapter; 4 x 128 tokens, and a decoding step of 8 rows (one token each, 64 in the cache)
    merged     the same after merging
    mixed      8 rows, each with its own adapter (rows; adapter_names): a decoding step, 8 x 32 and 8 x 128 tokens
    switch     activating one of 100 loaded adapters (rank 4, q and v)
    load       reading those 100 from their folders

--rows appends one JSON line to bench/results/adapters.jsonl. What `lowrank doctor --compile` built takes part.
"""

import argparse
import json
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lowrank
from lowrank.methods.lora import LoRAConfig
from lowrank.models.decoder import Decoder, KVCache
from lowrank.models.families import config_from_json
from lowrank.quant import compiled

try:
    import peft
    import transformers
except ImportError:
    peft = transformers = None

SHAPE = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
SHAPE |= {"num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True, "rms_norm_eps": 1e-5}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EIGHT = [f"n{i}" for i in range(8)]
CACHED = 64
Run = Callable[[], Any]
Times = dict[str, float]


def own(dtype: torch.dtype) -> nn.Module:
    """Our decoder."""
    model = Decoder(config_from_json(SHAPE | {"model_type": "llama", "max_position_embeddings": 2048}))
    for p in model.parameters():
        nn.init.normal_(p, std=0.02)
    return model.to(dtype).eval()


def theirs(dtype: torch.dtype) -> nn.Module:
    """transformers' model of the same shape."""
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).to(dtype).eval()


def tokens(rows: int, width: int) -> torch.Tensor:
    return torch.randint(SHAPE["vocab_size"], (rows, width), generator=torch.Generator().manual_seed(0))


def forward(model: nn.Module, rows: int, width: int, **extra: Any) -> Run:
    """width 1: a decoding step on top of CACHED tokens, the same one each time."""
    ids = tokens(rows, width)
    if width > 1:
        return lambda: model(ids, **extra)
    before = tokens(rows, CACHED)
    if isinstance(model, Decoder):
        weight = model.get_submodule(model.family.names.embed).weight
        cache = KVCache(model.config, rows, CACHED + 1, weight.dtype, weight.device)
        model(before, cache=cache)

        def step() -> None:
            cache.stored = CACHED
            model(ids, cache=cache)

        return step
    kept = model(before, use_cache=True, **extra).past_key_values

    def step_of_theirs() -> None:
        model(ids, past_key_values=kept, use_cache=True, **extra)
        kept.crop(-1)

    return step_of_theirs


def seconds(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def medians(repeats: int, runs: dict[str, Run]) -> Times:
    """Alternating runs, so that what else the machine does falls on all of them alike."""
    for run in runs.values():
        run()
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            taken[name].append(seconds(run))
    return {name: statistics.median(values) for name, values in taken.items()}


def randomise(model: nn.Module) -> nn.Module:
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.02)
    return model


def ours(model: nn.Module, names: list[str]) -> nn.Module:
    for name in names:
        lowrank.attach(model, LoRAConfig(rank=8), LINEAR, name=name)
    return randomise(model)


def with_peft(model: nn.Module, names: list[str]) -> nn.Module:
    config = peft.LoraConfig(r=8, target_modules=LINEAR)
    wrapped = peft.get_peft_model(model, config, adapter_name=names[0])
    for name in names[1:]:
        wrapped.add_adapter(name, config)
    return randomise(wrapped).eval()


def attach(repeats: int, dtype: torch.dtype) -> dict[str, Times]:
    model, other = (theirs(dtype), theirs(dtype)) if peft else (own(dtype), None)
    times: dict[str, list[float]] = {"ours": [], "peft": []}
    for _ in range(repeats):
        times["ours"].append(seconds(lambda: lowrank.attach(model, LoRAConfig(rank=8), LINEAR)))
        lowrank.detach(model)
        if peft:
            start = time.perf_counter()
            wrapped = peft.get_peft_model(other, peft.LoraConfig(r=8, target_modules=LINEAR))
            times["peft"].append(time.perf_counter() - start)
            wrapped.unload()
    return {"attach": {name: statistics.median(values) for name, values in times.items() if values}}


def single(repeats: int, dtype: torch.dtype) -> dict[str, Times]:
    name, sizes = str(dtype).removeprefix("torch."), {"4 x 128": (4, 128), "step of 8": (8, 1)}
    models = {"own base": own(dtype), "own": ours(own(dtype), ["n0"])}
    if peft:
        models |= {"base": theirs(dtype), "ours": ours(theirs(dtype), ["n0"]), "peft": with_peft(theirs(dtype), ["n0"])}
    found: dict[str, Times] = {}
    for size, (rows, width) in sizes.items():
        runs = {who: forward(model, rows, width) for who, model in models.items()}
        found[f"forward {name}, {size}"] = medians(repeats, runs)
    for who in ("ours", "own"):
        if who in models:
            lowrank.merge(models[who], "n0")
    if peft:
        models["peft"] = models["peft"].merge_and_unload()
    runs = {who: forward(model, 4, 128) for who, model in models.items()}
    return found | {f"merged {name}, 4 x 128": medians(repeats, runs)}


def mixed(repeats: int, dtype: torch.dtype) -> dict[str, Times]:
    name, sizes = str(dtype).removeprefix("torch."), {"step of 8": 1, "8 x 32": 32, "8 x 128": 128}
    models = {"own base": own(dtype), "own": ours(own(dtype), EIGHT)}
    if peft:
        models |= {"base": theirs(dtype), "ours": ours(theirs(dtype), EIGHT), "peft": with_peft(theirs(dtype), EIGHT)}
    found: dict[str, Times] = {}
    for size, width in sizes.items():
        runs = {who: forward(models[who], 8, width) for who in models if who.endswith("base")}
        if peft:
            runs["peft"] = forward(models["peft"], 8, width, adapter_names=EIGHT)
        with lowrank.rows(models["own"], EIGHT):  # a serving loop holds the block open over many steps
            runs["own"] = forward(models["own"], 8, width)
            if not peft:
                found[f"mixed {name}, {size}"] = medians(repeats, runs)
                continue
            with lowrank.rows(models["ours"], EIGHT):
                runs["ours"] = forward(models["ours"], 8, width)
                found[f"mixed {name}, {size}"] = medians(repeats, runs)
    return found


def hundred(repeats: int, dtype: torch.dtype) -> dict[str, Times]:
    with tempfile.TemporaryDirectory() as folder:
        model = theirs(dtype) if peft else own(dtype)
        lowrank.attach(model, LoRAConfig(rank=4), ["q_proj", "v_proj"])
        lowrank.save_adapter(model, Path(folder) / "n0", format="peft")
        for i in range(1, 100):  # the same values: only the time counts
            shutil.copytree(Path(folder) / "n0", Path(folder) / f"n{i}")
        lowrank.detach(model)
        folders = [Path(folder) / f"n{i}" for i in range(100)]
        loading = {"ours": seconds(lambda: [lowrank.load_adapter(model, folder) for folder in folders])}
        switching: dict[str, Run] = {"ours": cycle(partial(lowrank.activate, model))}
        if peft:
            start = time.perf_counter()
            wrapped = peft.PeftModel.from_pretrained(theirs(dtype), folders[0], adapter_name="n0")
            for i in range(1, 100):
                wrapped.load_adapter(folders[i], adapter_name=f"n{i}")
            loading["peft"] = time.perf_counter() - start
            switching["peft"] = cycle(wrapped.set_adapter)
        return {"load 100": loading, "switch": medians(max(repeats, 20), switching)}


def cycle(act: Callable[[str], Any]) -> Run:
    state = {"i": 0}

    def run() -> None:
        state["i"] = (state["i"] + 37) % 100
        act(f"n{state['i']}")

    return run


COLUMNS = ("base", "ours", "peft", "own base", "own")
AIMS = {"attach": "5x", "forward": "overhead at most half", "mixed": "3x", "switch": "under 1 ms"}


def table(rows: dict[str, Times]) -> str:
    """As Markdown. Times in ms; the ratio is PEFT's time over ours on the same model."""
    lines = ["| | base | lowrank | PEFT | PEFT / lowrank | own decoder: base | with lowrank | aim |"]
    lines.append("| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |")
    for what, t in rows.items():
        ms = {who: 1e3 * seconds for who, seconds in t.items()}
        cells = [f"{ms[who]:.{1 if ms[who] > 1 else 3}f}" if who in ms else "" for who in COLUMNS]
        ratio = f"{t['peft'] / t['ours']:.1f}x" if "peft" in t else ""
        aim = AIMS.get(what.split()[0], "")
        lines.append(f"| {what} | {' | '.join(cells[:3])} | {ratio} | {' | '.join(cells[3:])} | {aim} |")
        if what.startswith("forward") and "peft" in t:
            over = [f"{100 * (t[who] / t['base'] - 1):.1f} %" for who in ("ours", "peft")]
            mine = f"{100 * (t['own'] / t['own base'] - 1):.1f} %"
            half = (t["peft"] - t["base"]) / max(t["ours"] - t["base"], 1e-9)
            lines.append(f"| ... over the base | | {' | '.join(over)} | {half:.1f}x | | {mine} | |")
    return "\n".join(lines)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--layers", type=int, default=30, help="fewer for a quick look on a busy machine")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16,float32", help="of the model; the second one for `single` alone")
    parser.add_argument("--only", default="attach,single,mixed,hundred", help="parts to run, separated by commas")
    parser.add_argument("--rows", action="store_true", help="append the result to bench/results/adapters.jsonl")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    SHAPE["num_hidden_layers"] = arguments.layers
    dtypes = [getattr(torch, name) for name in arguments.dtype.split(",")]
    rows: dict[str, Times] = {}
    for part in arguments.only.split(","):
        for dtype in dtypes if part == "single" else dtypes[:1]:
            rows |= {"attach": attach, "single": single, "mixed": mixed, "hundred": hundred}[part](
                arguments.repeats, dtype
            )
    print(table(rows))
    print("one-token rows:", "compiled" if compiled.loop("lora_rows") else "eager; `lowrank doctor --compile` compiles")
    if arguments.rows:
        target = Path(__file__).parent / "results" / "adapters.jsonl"
        target.parent.mkdir(exist_ok=True)
        where = {"machine": platform.machine(), "threads": arguments.threads, "layers": arguments.layers}
        where |= {"torch": torch.__version__, "peft": None if peft is None else peft.__version__}
        where |= {"compiled": compiled.loop("lora_rows") is not None}
        with open(target, "a", encoding="utf-8") as file:
            file.write(json.dumps(where | rows) + "\n")


if __name__ == "__main__":
    main()
