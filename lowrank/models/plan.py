"""How much memory a model takes to train and to run, from its configuration alone: no weight is read.

    peak = weights + adapters + optimizer + logits + workspace + max over backward (activations left + gradients so far)

Weights, adapters and optimizer are counted on the meta device. Activations are not a formula of their own: the model
itself, three and six layers of it, runs forward and backward on tensors without memory, and what is alive at each
moment is added up; every layer more costs the difference. So a method is planned as it is written, and a change of a
layer changes its plan. The trace takes the paths of a CPU; a GPU's differ a little (its attention keeps no copies).
"""

import re
import weakref
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowrank.adapter import METHODS
from lowrank.errors import ConfigError, did_you_mean
from lowrank.files import read_json
from lowrank.kernels.cross_entropy import CHUNK, LAUNCHED
from lowrank.models.checkpoint import open_checkpoint
from lowrank.models.decoder import KVCache
from lowrank.models.families import ModelConfig, config_from_json
from lowrank.models.load import quantizable, skeleton
from lowrank.quant.codec import PIECE
from lowrank.targets import Coverage, attach

HALF = 2  # bytes of a bf16 number
ALIGNED = 96  # bytes: an aligned piece asks for so much more, so that it does not fit where one as large was freed
ONCE = 140 * 10**6  # measured: what loading and a first step leave for good (oneDNN's code and scratch, library pages)
COMPILER = 77 * 10**6  # measured: torch's checkpointing imports torch's compiler


def _llama(dim: int, hidden: int, layers: int, heads: int, kv: int, vocabulary: int, **more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": dim, "intermediate_size": hidden, "num_hidden_layers": layers, "vocab_size": vocabulary}
    return {"model_type": "llama", **sizes, "num_attention_heads": heads, "num_key_value_heads": kv, **more}


_CHATGLM3 = {"multi_query_group_num": 2, "kv_channels": 128, "add_qkv_bias": True, "seq_length": 8192}
_BERT = {"model_type": "bert", "architectures": ["BertForTokenClassification"], "num_labels": 9}
BUILT_IN: dict[str, dict[str, Any]] = {
    "smollm2-135m": _llama(576, 1536, 30, 9, 3, 49152, tie_word_embeddings=True, rope_theta=1e5),
    "bert-base": _llama(768, 3072, 12, 12, 12, 30522, **_BERT),
    "qwen2-1.5b": _llama(1536, 8960, 28, 12, 2, 151936, model_type="qwen2", tie_word_embeddings=True),
    "chatglm3-6b": _llama(4096, 13696, 28, 32, 2, 65024, model_type="chatglm", **_CHATGLM3),
    "llama-7b": _llama(4096, 11008, 32, 32, 32, 32000),
    "llama-8b": _llama(4096, 14336, 32, 32, 8, 128256, rope_theta=5e5),
    "llama-70b": _llama(8192, 28672, 80, 64, 8, 128256, rope_theta=5e5),
    "qwen-72b": _llama(8192, 29568, 80, 64, 8, 152064, model_type="qwen2"),
}


def read_model(source: str) -> ModelConfig:
    """A built-in name, a config.json or a folder that has one, or a GGUF file, of which the header is read."""
    path, name = Path(source), source.lower()
    if name in BUILT_IN or name == "quickstart":
        return config_from_json(BUILT_IN[name if name in BUILT_IN else "smollm2-135m"], source)
    if path.is_dir() and (path / "config.json").is_file():
        path = path / "config.json"
    if path.is_file() or path.is_dir():
        return config_from_json(read_json(path), str(path)) if path.suffix == ".json" else open_checkpoint(path).config
    near, known = did_you_mean(name, BUILT_IN), ", ".join(BUILT_IN)
    raise ConfigError(f"no model {source!r}{near}: wanted a folder, a config.json, a GGUF file, or one of {known}")


@dataclass(frozen=True)
class Way:
    """A way to train, or to run, a model."""

    name: str
    method: str | None = "lora"
    """The adapter's method; None runs the model."""
    quantized: bool = False
    """The base in double-quantized NF4 instead of bf16."""
    checkpointing: bool = False


WAYS = (
    Way("full", "full"), Way("full, checkpointed", "full", checkpointing=True),
    Way("LoRA"), Way("LoRA, checkpointed", checkpointing=True),
    Way("QLoRA", quantized=True), Way("QLoRA, checkpointed", quantized=True, checkpointing=True),
    Way("run bf16", None), Way("run nf4-dq", None, True),
)  # fmt: skip


@dataclass(frozen=True)
class Load:
    """What is asked of each device."""

    batch: int = 1
    """Examples at a time: train.micro_batch_size."""
    length: int = 1024
    devices: int = 1
    """Above 1 everything but activations is sharded among them (FSDP2)."""
    rank: int = 8
    targets: str | tuple[str, ...] | None = None
    cpu: bool = False


@dataclass(frozen=True)
class Memory:
    """Bytes on each device. Gradients grow while activations go, so `peak` lies below the sum."""

    weights: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    workspace: int
    peak: int


class _Heap:
    """Where a best-fit allocator (the C library's) puts each tensor: gaps between those that stay are held, too."""

    def __init__(self) -> None:
        self.top = self.most = 0
        self.gaps: dict[int, int] = {}  # start -> end

    def take(self, size: int) -> int:
        fitting = [(end - start, start) for start, end in self.gaps.items() if end - start >= size + ALIGNED]
        if not fitting:
            start, self.top = self.top, self.top + size
            self.most = max(self.most, self.top)
            return start
        start = min(fitting)[1]
        end = self.gaps.pop(start)
        if start + size < end:
            self.gaps[start + size] = end
        return start

    def give(self, start: int, size: int) -> None:
        end = self.gaps.pop(start + size, start + size)
        if (before := next((s for s, e in self.gaps.items() if e == start), None)) is not None:
            del self.gaps[before]
            start = before
        if end == self.top:
            self.top = start
        else:
            self.gaps[start] = end


class _Live(TorchDispatchMode):
    """Adds up the storages that are alive; each leaves when its last tensor does."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: set[int] = set()
        self.heap = _Heap()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        self.known.update(given)  # what was there before, weights above all, does not count
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and (key := (storage := t.untyped_storage())._cdata) not in self.known:
                self.known.add(key)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                gone = partial(self.gone, key, storage.nbytes(), self.heap.take(storage.nbytes()))
                weakref.finalize(storage, gone).atexit = False
        return out

    def gone(self, key: int, size: int, start: int) -> None:
        self.known.discard(key)
        self.now -= size
        self.heap.give(start, size)


def adapted(config: ModelConfig, way: Way, load: Load) -> tuple[nn.Module, int, int]:
    """(the model on the meta device with the way's adapter, trainable parameters, all parameters)"""
    model = skeleton(config)
    if way.method is None:
        return model, 0, sum(p.numel() for p in model.parameters())
    with torch.device("meta"):
        found = _attach(model, way, load)
    return model, found.trainable, found.total


def _attach(model: nn.Module, way: Way, load: Load) -> Coverage:
    config: Any = METHODS[way.method or ""].Config
    if "rank" in config.__dataclass_fields__:
        return attach(model, config(rank=load.rank), targets=load.targets)
    return attach(model, config())  # all linear layers, or wherever the method goes


@cache
def traced(config: ModelConfig, layers: int, way: Way, load: Load) -> tuple[int, int, int]:
    """(bytes alive after forward, bytes held then, the most held until backward's end), with so many layers.

    On a CPU the C library's heap also holds its gaps; a GPU's allocator moves whole pages, and its gaps are in ROOM.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode  # takes a second to import

    still = {"dynamic": "default", "longrope": "default"}  # their frequencies ask the positions, which have no values
    rope = None if config.rope is None else replace(config.rope, kind=still.get(config.rope.kind, config.rope.kind))
    config = replace(shortened(config, layers), rope=rope)
    live, before = _Live(), torch.get_default_dtype()
    with FakeTensorMode():
        torch.set_default_dtype(torch.bfloat16)
        try:
            model: Any = type(skeleton(config))(config).requires_grad_(False)
        finally:
            torch.set_default_dtype(before)
        ids = torch.zeros(load.batch, load.length, dtype=torch.long)
        if way.method is None:
            with torch.no_grad(), live:
                encoder = model.family.encoder
                cache = None if encoder else KVCache(config, load.batch, load.length, torch.bfloat16, ids.device)
                hidden = model.hidden(ids) if encoder else model.hidden(ids, None, None, cache)
                return live.now, live.now, live.most
        _attach(model, way, load)
        model.train().checkpointing = way.checkpointing
        with live:
            hidden = model.hidden(ids)
            alive, held = live.now, live.heap.top if load.cpu else live.now
            hidden.backward(torch.empty_like(hidden))
    return alive, held, live.heap.most if load.cpu else live.most


def shortened(config: ModelConfig, layers: int) -> ModelConfig:
    return replace(config, n_layers=layers, windows=config.windows[:layers])


def stored(model: nn.Module, quantized: bool) -> int:
    """Bytes of the weights: bf16, linear layers but the head in nf4-dq where asked (4.127 bits a weight)."""
    sizes: dict[int, int] = {}
    for path, module in model.named_modules():
        for name, p in module._parameters.items():
            if p is not None:
                blocks = -(-p.numel() // 64)
                four_bit = -(-p.numel() // 2) + blocks + 4 * -(-blocks // 256) + 4
                in_four = quantized and name == "weight" and quantizable(module, path, model)
                sizes[id(p)] = four_bit if in_four else HALF * p.numel()  # by id: a tied weight counts once
    return sum(sizes.values())


def memory(config: ModelConfig, way: Way, load: Load) -> Memory:
    """What one device holds at most, and what of."""
    _, trainable, _ = adapted(config, way, load)
    share, tokens = load.devices, load.batch * load.length
    weights = stored(skeleton(config), way.quantized) // share
    adapters = gradients = 4 * trainable // share  # fp32
    optimizer = 2 * adapters
    asked = replace(way, name="", quantized=False), replace(load, devices=1)  # a frozen base's format does not matter
    three, six = traced(config, 3, *asked), traced(config, 6, *asked)
    activations, held, moving = (a + (config.n_layers - 3) * (b - a) // 3 for a, b in zip(three, six))
    # activations and gradients as they are alive together; of several devices each keeps its share of the gradients
    moving = max(moving - (4 * trainable - gradients), held + three[2] - three[1])
    one, two = (sum(p.numel() for p in skeleton(shortened(config, n)).parameters()) for n in (1, 2))
    workspace = 2 * HALF * (two - one) if share > 1 else 0  # a layer gathered whole, and the next
    linear = [m.weight.numel() for m in skeleton(shortened(config, 1)).modules() if isinstance(m, nn.Linear)]
    if way.quantized:  # where weights are decoded
        workspace += 16 * PIECE if load.cpu else HALF * max(linear)
    workspace += (ONCE + COMPILER * way.checkpointing) if load.cpu else 0
    outputs = {"causal": config.vocab_size, "mlm": config.vocab_size}.get(config.head, len(config.labels))
    if way.method is None:
        logits = load.batch * outputs * (HALF + 4)
        workspace += min(2**30, HALF * sum(p.numel() for p in skeleton(config).parameters())) if load.cpu else 0  # kept
    else:
        rows = min(CHUNK if load.cpu else LAUNCHED, tokens)
        logits = rows * outputs * (HALF + 8 * load.cpu) + 2 * tokens * config.dim * HALF  # the states again, and dh
    peak = weights + adapters + optimizer + workspace + max(held + logits, moving)
    workspace += max(moving - max(activations, gradients), 0)
    return Memory(weights, adapters, gradients, optimizer, activations, logits, workspace, peak)


@dataclass(frozen=True)
class Aim:
    """What the fine-tune is for; the recommendation goes by it."""

    samples: int = 10_000
    general: bool = False
    """General ability must stay as it is."""
    domains: int = 1
    """Brands, customers or fields that are to be told apart."""
    light: bool = False
    """Many small tasks over one base."""


ROOM = 0.92  # of the memory: a device's context and its allocator's gaps take the rest
MANY = 50_000  # samples from which on all weights have something to learn


def advice(peaks: dict[str, float], limit: float, aim: Aim) -> list[str]:
    """What to train, each line with its reason. `peaks`: bytes by way's name."""

    def first(*names: str) -> str | None:
        return next((name for name in names if peaks[name] <= ROOM * limit), None)

    full, lora = first("full", "full, checkpointed"), first("LoRA", "LoRA, checkpointed")
    qlora = first("QLoRA", "QLoRA, checkpointed")
    gb = f"{limit / 1e9:g} GB"  # of which ROOM may be used
    if not (lora or qlora):
        need = f"{peaks['QLoRA, checkpointed'] / 1e9:.1f} GB"
        return [f"It does not train in {gb}: QLoRA with checkpointing takes {need}."]
    if aim.light:
        lines = ["Prefix tuning: a few thousand numbers a task, which many tasks keep beside one base."]
    elif aim.samples > MANY and full:
        lines = [f"Full fine-tuning ({full}): {aim.samples:,} samples can move all weights, and {gb} hold them."]
    elif aim.samples > MANY:
        why = f"full fine-tuning takes {peaks['full, checkpointed'] / 1e9:.1f} GB"
        lines = [f"{lora or qlora}, r = 16 to 32: {aim.samples:,} samples fill a larger rank; {why}."]
    elif aim.general:
        lines = [f"{lora or qlora}, r = 4 to 8, with a regulariser (data.general_loss=kl): general ability must stay."]
    else:
        why = f"{aim.samples:,} samples are few: a small rank on a 4-bit base, and more wordings of each"
        lines = [f"{qlora or lora} with augmentation: {why}."]
    if not lora and not aim.light:
        lines.append(f"Not LoRA over bf16: that takes {peaks['LoRA, checkpointed'] / 1e9:.1f} GB.")
    if aim.domains > 1:
        lines.append(
            f"One adapter for each of the {aim.domains} domains: none overwrites another, switching is instant."
        )
    return lines


def screen(source: str, limit: float, load: Load, aim: Aim) -> Group:
    """The page that `lowrank plan` prints."""
    config = read_model(source)
    plans = {way.name: memory(config, way, load) for way in WAYS}
    _, trainable, total = adapted(config, Way("LoRA"), load)
    targets = "all linear layers" if load.targets is None else ", ".join(load.targets)
    table = Table(box=None, padding=(0, 1), header_style="bold")
    table.add_column("GB on each device")
    for way in WAYS:
        table.add_column(way.name.replace(", checkpointed", "\nckpt").replace(" ", "\n"), justify="right")
    for part in Memory.__dataclass_fields__:
        cells = []
        for plan in plans.values():
            size = getattr(plan, part) / 1e9
            style = "" if part != "peak" else "bold green" if size * 1e9 <= ROOM * limit else "bold red"
            cells.append(Text("-" if size == 0 else f"{size:.1f}" if size >= 9.95 else f"{size:.2f}", style=style))
        table.add_row(Text(part, style="bold" if part == "peak" else ""), *cells)
    table.add_row(f"fits {limit / 1e9:g} GB", *("yes" if p.peak <= ROOM * limit else "no" for p in plans.values()))
    room = f"{ROOM:.0%} of {limit / 1e9:g} GB may be used, the rest is for the device's context and gaps"
    room = "Python and torch, about 0.4 GB, come on top; " * load.cpu + room
    where = f"{load.devices} devices, sharded (FSDP2)" if load.devices > 1 else "one device"
    lines = advice({name: plan.peak for name, plan in plans.items()}, limit, aim)
    if lines[0].startswith("It does not"):
        lines.append(_way_out(config, limit, load))
    return Group(
        Text(f"{source} ({config.family}): {total - trainable:,} parameters, {config.n_layers} layers", style="bold"),
        f"LoRA r = {load.rank} on {targets}: {trainable:,} of {total:,} parameters train ({trainable / total:.3%})",
        f"{where}; {load.batch} x {load.length:,} tokens at a time; adapters and AdamW in fp32; ckpt: checkpointing",
        "", table, Text(room, style="dim"), "", *lines,
    )  # fmt: skip


def _way_out(config: ModelConfig, limit: float, load: Load) -> str:
    alone = stored(skeleton(config), quantized=True) / 1e9
    text = f"Its weights alone are {alone:.1f} GB in double-quantized NF4"
    for devices in (2, 4, 8, 16, 32):
        need = memory(config, WAYS[5], replace(load, devices=devices)).peak
        if devices > load.devices and need <= ROOM * limit:
            return f"{text}; on {devices} such devices, sharded, QLoRA takes {need / 1e9:.1f} GB on each."
    return f"{text}; a shorter length or a smaller batch is the next thing to try."


def parse_size(text: str) -> float:
    """Bytes of "24GB", "24" (GB), "512MB" or "16GiB"."""
    found = re.fullmatch(r"\s*([\d.]+)\s*([kmgt]i?b?)?\s*", text.lower())
    if not found or not 0 < (number := float(found[1])) < 1e6:
        raise ConfigError(f"wanted a memory size such as 24GB, got {text!r}")
    unit = found[2] or "gb"
    return number * (1024 if "i" in unit else 1000) ** ("kmgt".index(unit[0]) + 1)
