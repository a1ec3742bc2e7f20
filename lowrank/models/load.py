"""`load`: a model and its tokenizer from a folder, a GGUF file or the quickstart's package.

Weights stream: one tensor is read and put into its final form (dtype, or quantized codes) before the next, so that
memory peaks at the final size and the largest tensor.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import nn
from torch.overrides import TorchFunctionMode

from lowrank.errors import FileFormatError
from lowrank.models.checkpoint import Checkpoint, base_hash, open_checkpoint
from lowrank.models.decoder import Conv1D, Decoder
from lowrank.models.encoder import Encoder
from lowrank.models.families import ModelConfig, family_of
from lowrank.models.fetch import quickstart
from lowrank.models.tokenizer import Tokenizer, tokenizer_of
from lowrank.quant.formats import parse_format
from lowrank.quant.linear import QuantizedLinear
from lowrank.quant.product import bf16_products
from lowrank.quant.tensor import QuantizedTensor

KEEP = "keep"


@dataclass(frozen=True)
class Origin:
    """Where a model came from: what an adapter's file has to remember of its base."""

    path: str
    base_hash: str
    tokenizer_hash: str | None
    chat_template: str | None
    quantize: str | None
    special_tokens: dict[str, Any] | None = None
    """What begins, ends and fills up a text: Tokenizer.policy."""
    generation: dict[str, Any] | None = None
    """How answers are asked for; training sets it, for the adapter's file."""


def load(
    source: str | Path,
    quantize: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "auto",
    template: str | None = None,
    progress: bool = True,
) -> tuple[nn.Module, Tokenizer | None]:
    """(model, tokenizer or None) from "quickstart", a folder or a .gguf file.

    `quantize` (nf4, nf4-dq, ...) rounds every linear layer but the head, from the file's own values in fp32; "keep"
    takes a GGUF's Q4_0, Q4_1 and Q8_0 blocks (and bitsandbytes' 4-bit weights) as they are stored. `template` is a
    built-in chat template's name or its text; without it the checkpoint's own is used.
    """
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating-point type such as torch.bfloat16, got {dtype}")
    if quantize not in (None, KEEP):
        parse_format(quantize)  # a bad name fails before anything is read
    path = quickstart(progress=progress) if source == "quickstart" else Path(source)
    checkpoint = open_checkpoint(path)
    if checkpoint.quantized is not None:
        if quantize not in (None, KEEP):
            raise ValueError(
                f"{path} is quantized already ({checkpoint.quantized}); its weights stay as they are: leave out "
                f"quantize={quantize!r}, or load the original checkpoint"
            )
        quantize = KEEP
    tokenizer = tokenizer_of(checkpoint)
    if tokenizer is not None and template is not None:
        tokenizer = tokenizer.with_template(template)
    where = device_of(device)
    held, layers = len(checkpoint.unused(set())), checkpoint.config.n_layers
    if held < layers:  # before so many layers are made
        raise FileFormatError(f"{path} has {held} tensors, its configuration asks for {layers} layers: not complete")
    model = skeleton(checkpoint.config)
    fill(model, checkpoint, quantize, dtype, where, progress)
    model.origin = Origin(  # type: ignore[assignment]
        path=str(path),
        base_hash=base_hash(checkpoint),
        tokenizer_hash=None if tokenizer is None else tokenizer.hash,
        chat_template=None if tokenizer is None else tokenizer.chat_template,
        quantize=quantize,
        special_tokens=None if tokenizer is None else tokenizer.policy,
    )
    return model.eval(), tokenizer


def device_of(device: str | torch.device) -> torch.device:
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)


def fast_dtype(device: str | torch.device = "auto") -> torch.dtype:
    """float32 on a CPU that does not multiply bfloat16 (`bf16_products`), else bfloat16."""
    slow = device_of(device).type == "cpu" and bf16_products() == "none"
    return torch.float32 if slow else torch.bfloat16


class _NoInitialValues(TorchFunctionMode):
    """Leaves out what torch.nn.init would do: on meta tensors it does nothing, but imports torch's compiler (0.9 s)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return (*args, *(kwargs or {}).values())[0]
        return func(*args, **(kwargs or {}))


def skeleton(config: ModelConfig) -> nn.Module:
    """The model with its parameters on the meta device: shapes, and no memory."""
    with torch.device("meta"), _NoInitialValues():
        return (Encoder if family_of(config).encoder else Decoder)(config)


def fill(
    model: nn.Module,
    checkpoint: Checkpoint,
    quantize: str | None,
    dtype: torch.dtype,
    device: torch.device,
    progress: bool,
) -> None:
    """Replace each meta parameter of `model` by the checkpoint's, quantizing linear layers on the way."""
    tied = tied_paths(model)
    paths = [path for path, _ in model.named_parameters(remove_duplicate=False) if path not in tied]
    check(model, checkpoint, paths, tied)
    for path in track(paths, f"loading {checkpoint.path.name}", transient=True, disable=not progress):
        parent_path, _, leaf = path.rpartition(".")
        parent = model.get_submodule(parent_path)
        if leaf == "bias" and isinstance(parent, QuantizedLinear):
            continue  # read with its weight
        if quantize is not None and leaf == "weight" and quantizable(parent, parent_path, model):
            layer = quantized(parent, parent_path, checkpoint, quantize, dtype, device)
            if layer is not None:
                model.set_submodule(parent_path, layer)
                continue
        parent.register_parameter(leaf, nn.Parameter(checkpoint.tensor(path, dtype).to(device)))
    if isinstance(model, Decoder):
        model.tie()
    if quantize == KEEP and not any(isinstance(module, QuantizedLinear) for module in model.modules()):
        raise ValueError(
            f"{checkpoint.path} has nothing to keep: quantize='keep' is for GGUF files with Q4_0, Q4_1 or Q8_0 weights "
            "and for bitsandbytes 4-bit checkpoints; choose a format such as nf4-dq"
        )


def check(model: nn.Module, checkpoint: Checkpoint, paths: list[str], tied: set[str]) -> None:
    """Every parameter is there and has its shape, and nothing is left over, before the first one is read."""
    for path in paths:
        wanted, found = tuple(model.get_parameter(path).shape), checkpoint.shape(path)
        if found is None:
            raise FileFormatError(f"{checkpoint.path} has no tensor for {path} {list(wanted)}: it is not complete")
        if found != wanted:
            raise FileFormatError(
                f"{checkpoint.path}: the tensor for {path} is {list(found)}, its configuration asks for {list(wanted)}"
            )
    left = [n for n in checkpoint.unused(set(paths) | tied) if not n.endswith(IGNORED)]
    if family_of(checkpoint.config).encoder:  # a checkpoint may carry the heads of other tasks
        left = [n for n in left if not n.startswith(("cls.", "pooler.", "bert.pooler."))]
    if left:
        raise FileFormatError(
            f"{checkpoint.path} holds {len(left)} tensors that this architecture has no place for: "
            f"{', '.join(left[:4])}{', ...' if len(left) > 4 else ''}; it would be loaded half, so it is refused"
        )


IGNORED = (".rotary_emb.inv_freq", "rotary_pos_emb.inv_freq", ".attn.bias", ".attn.masked_bias", ".position_ids")
"""Constants that some checkpoints store; they are computed here."""


def tied_paths(model: nn.Module) -> set[str]:
    """Parameters that are another one's second name."""
    first = {path for path, _ in model.named_parameters()}
    return {path for path, _ in model.named_parameters(remove_duplicate=False)} - first


def quantizable(layer: nn.Module, path: str, model: nn.Module) -> bool:
    """Linear layers but the head, as `quantize_model` takes them."""
    head = path.startswith("cls.") or path == model.family.names.lm_head  # type: ignore[union-attr]
    return isinstance(layer, nn.Linear | Conv1D) and not head


def quantized(
    layer: nn.Module, path: str, checkpoint: Checkpoint, quantize: str, dtype: torch.dtype, device: torch.device
) -> QuantizedLinear | None:
    """The layer over its quantized weight; None where `keep` finds a weight that is stored as numbers."""
    remembered = dtype if dtype in (torch.bfloat16, torch.float16) else torch.float32
    if quantize == KEEP:
        q = checkpoint.kept(f"{path}.weight", remembered)
        if q is None:
            return None
        q = q.to(device)
    else:
        format, double = parse_format(quantize)
        weight = checkpoint.tensor(f"{path}.weight", torch.float32).to(device)
        weight = weight.T.contiguous() if isinstance(layer, Conv1D) else weight
        # rounded from fp32, whatever dtype says
        q = replace(QuantizedTensor.quantize(weight, format, double_quant=double), dtype=remembered)
    bias = None if layer.bias is None else checkpoint.tensor(f"{path}.bias", dtype).to(device)
    return QuantizedLinear(q, bias)


def load_tokenizer_of(source: str | Path, template: str | None = None) -> Tokenizer:
    """The tokenizer that `load` would give, without the weights."""
    checkpoint = open_checkpoint(quickstart() if source == "quickstart" else source)
    tokenizer = tokenizer_of(checkpoint)
    if tokenizer is None:
        raise FileNotFoundError(f"{checkpoint.path} comes without a tokenizer")
    return tokenizer if template is None else tokenizer.with_template(template)
