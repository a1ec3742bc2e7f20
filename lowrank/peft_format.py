"""PEFT adapter folders, both ways: `adapter_config.json` and `adapter_model.safetensors`.

Reading is strict: each tensor of the file must find its place and each place its tensor, and a setting that we do not
know and that is switched on is an error, for it would change the numbers. Nothing of PEFT is imported.
"""

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.adapter import METHODS, Adapter, adapted_layers, features, is_conv1d, require_adapter, require_unmerged
from lowrank.errors import FileFormatError
from lowrank.files import read_json, read_tensors, write_json, write_tensors
from lowrank.filling import default_name, fill
from lowrank.methods.ia3 import IA3
from lowrank.methods.lora import LoRAConfig
from lowrank.methods.p_tuning import PTuning
from lowrank.methods.pissa import PiSSA
from lowrank.methods.prefix import Prefix
from lowrank.methods.trained_copy import TrainedCopy
from lowrank.methods.vera import VeRA, VeRAConfig
from lowrank.peft_table import FORMATS, PREFIX, Format
from lowrank.targets import (
    Attachment,
    attachments,
    build,
    check_name,
    find_targets,
    flat,
    matches,
    places,
    put,
    train_only,
)

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
LIKE = "0.21.2"  # the PEFT whose files these are: from 0.18 on it reads OFT's series in another way
TOKENS = ("prompt", "p_tuning", "prefix")  # one tensor for the whole model, "prompt_embeddings"


def load_peft(model: nn.Module, folder: str | Path, name: str | None = None, trainable: bool = False) -> str:
    """Attach the adapter of a PEFT folder, as the only active one, and return its name.

    Raises FileFormatError where a tensor is missing, foreign or of another shape, or where the configuration asks for
    what we do not have; the model is then as it was.
    """
    folder = Path(folder)
    theirs = read_json(folder / CONFIG)
    if not isinstance(theirs, dict):
        raise FileFormatError(f"{folder / CONFIG}: wanted a JSON object, got {type(theirs).__name__}")
    name = name or default_name(model, folder)
    check_name(model, name)
    require_unmerged(model, "loading another adapter")
    method, form = _method_of(theirs, folder)
    try:
        config = form.read(theirs)
    except (KeyError, TypeError, ValueError) as error:
        raise FileFormatError(f"{folder / CONFIG}: {error!r} in the settings of {form.peft_type}") from error
    tensors = {key.removeprefix(PREFIX): value for key, value in read_tensors(folder / TENSORS).items()}
    copies: list[str] = []
    if method in TOKENS:
        paths = flat(find_targets(model, "all", place=METHODS[method].place))
        tensors = _spread_tokens(tensors, paths, method == "prefix", config.tokens, folder)
    else:
        paths, copies = _paths(model, theirs, folder)
        tensors = _to_ours(model, tensors, form, copies, folder)
    if isinstance(config, VeRAConfig):
        config, tensors = _share_projections(model, config, tensors, paths, folder)
    config, adapters = build(model, config, paths, copies)
    for path, adapter in adapters.items():
        if isinstance(adapter, IA3) and f"{path}.ia3_l" in tensors:
            tensors[f"{path}.ia3_l"] = tensors[f"{path}.ia3_l"].flatten()  # theirs is (1, I) or (O, 1)
    fill(adapters, tensors, folder / TENSORS)
    saved = tuple(theirs.get("modules_to_save") or ())
    put(model, name, adapters, Attachment(method, config, theirs.get("target_modules"), saved, tuple(adapters)))
    if not trainable:
        train_only(model, None)
    return name


def _method_of(theirs: dict[str, Any], folder: Path) -> tuple[str, Format]:
    kind = theirs.get("peft_type")
    method = next((name for name, form in FORMATS.items() if form.peft_type == kind), None)
    if method is None:
        known = sorted({form.peft_type for form in FORMATS.values()})
        raise FileFormatError(f"{folder / CONFIG}: peft_type {kind!r} is not read; known: {', '.join(known)}")
    if method == "lora" and theirs.get("use_dora"):
        method = "dora"
    form = FORMATS[method]
    off: tuple[Any, ...] = (None, False, {}, [], "", 0, 0.0)
    strange = [key for key, value in theirs.items() if key not in form.known() and value not in off]
    if theirs.get("bias", "none") != "none":
        strange.append(f"bias={theirs['bias']!r}")
    if strange:
        raise FileFormatError(f"{folder / CONFIG}: {', '.join(strange)} would change the numbers and is not read")
    start = theirs.get("init_lora_weights")
    if isinstance(start, str) and start.split("_")[0] in ("pissa", "olora", "loftq", "corda"):
        warnings.warn(
            f"{folder} was trained on the residual base of {start!r}; it is applied to the base given, which is right"
            " only if that is the residual one (or the adapter was converted)",
            stacklevel=4,
        )
    return method, form


def _paths(model: nn.Module, theirs: dict[str, Any], folder: Path) -> tuple[list[str], list[str]]:
    """The layers that the configuration names, and those of modules_to_save."""
    everything = places(model)
    targets = theirs.get("target_modules") or []
    if targets == "all-linear":
        found = flat(find_targets(model, "all-linear"))
    else:
        found = _named(targets, everything, folder, "target_modules")
    dropped = set(_named(theirs.get("exclude_modules") or [], everything, folder, "exclude_modules"))
    chosen = theirs.get("layers_to_transform")
    if chosen is not None:
        numbers = {chosen} if isinstance(chosen, int) else set(chosen)
        patterns = theirs.get("layers_pattern") or r"\w+"
        among = "|".join([patterns] if isinstance(patterns, str) else patterns)
        number = {path: re.match(rf"(?:.*\.)?(?:{among})\.(\d+)\.", path) for path in found}
        found = [path for path in found if (m := number[path]) and int(m.group(1)) in numbers]
    copies = _named(theirs.get("modules_to_save") or [], everything, folder, "modules_to_save")
    return [path for path in found if path not in dropped], copies


def _named(patterns: str | Sequence[str], everything: Mapping[str, nn.Module], folder: Path, field: str) -> list[str]:
    found: dict[str, None] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        hits = matches(pattern, isinstance(patterns, str), everything)
        if not hits:
            raise FileFormatError(f"{folder / CONFIG}: {field} {pattern!r} matches no layer of this model")
        found |= dict.fromkeys(hits)
    return [path for path in everything if path in found]


def _to_ours(
    model: nn.Module, tensors: dict[str, Tensor], form: Format, copies: list[str], folder: Path
) -> dict[str, Tensor]:
    """Their names -> ours. What is no tensor of the method keeps its name, and `fill` then calls it foreign."""
    ours: dict[str, Tensor] = {}
    for key, value in tensors.items():
        suffix = next((s for s in form.tensors if key.endswith("." + s)), None)
        if suffix is not None:
            leaf = suffix.removesuffix(".weight").replace("lora_embedding_", "lora_")
            ours[key.removesuffix(suffix) + leaf] = value
            continue
        path = key.removesuffix(".weight").removesuffix(".base_layer")
        if key.endswith(".weight") and path not in copies and path in places(model):  # a copy of the base's own matrix
            own = places(model)[path].get_parameter("weight")
            if own.shape != value.shape or not torch.equal(own.detach().to(value.dtype), value):
                raise FileFormatError(
                    f"{folder / TENSORS}: {key} is not the base's own {path}: another or a resized base"
                )
            continue
        ours[key] = value
    return ours


def _spread_tokens(
    tensors: dict[str, Tensor], paths: list[str], prefix: bool, tokens: int, folder: Path
) -> dict[str, Tensor]:
    if set(tensors) != {"prompt_embeddings"}:
        raise FileFormatError(f"{folder / TENSORS}: wanted the one tensor prompt_embeddings, got {sorted(tensors)[:3]}")
    if not prefix:
        return {f"{paths[0]}.prompt_embeddings": tensors["prompt_embeddings"]}
    parts = tensors["prompt_embeddings"].chunk(len(paths), dim=1)  # (P, L · 2 · Hkv · K)
    return {f"{path}.prompt_embeddings": part.contiguous() for path, part in zip(paths, parts)}


def _share_projections(
    model: nn.Module, config: VeRAConfig, tensors: dict[str, Tensor], paths: list[str], folder: Path
) -> tuple[VeRAConfig, dict[str, Tensor]]:
    """Their vera_A and vera_B, once a file, become each layer's corner of them."""
    A, B = tensors.pop("base_model.vera_A", None), tensors.pop("base_model.vera_B", None)
    if A is None or B is None:
        if config.save_projection:
            raise FileFormatError(
                f"{folder / TENSORS}: save_projection is set, and base_model.vera_A or vera_B is missing"
            )
        return config, tensors
    config = replace(config, largest=(A.shape[1], B.shape[0]), save_projection=True)
    for path in paths:
        in_features, out_features = features(places(model)[path])
        tensors[f"{path}.vera_A"], tensors[f"{path}.vera_B"] = A[:, :in_features], B[:out_features]
    return config, tensors


def save_peft(model: nn.Module, folder: str | Path, name: str = "default") -> None:
    """Write the adapter `name` as PEFT would. ValueError where PEFT has no such method."""
    require_adapter(model, [name])
    attachment = attachments(model)[name]
    adapters: dict[str, Adapter] = {path: layer.adapters[name] for path, layer in adapted_layers(model, name)}  # type: ignore[misc]
    method, config = attachment.method, attachment.config
    if issubclass(METHODS[method], PiSSA):
        method, config = "lora", _doubled(config)
    if method not in FORMATS:
        raise ValueError(
            f"PEFT has no file for method {method!r}: save it in lowrank's own format, or merge it;"
            f" it has one for {', '.join(FORMATS)}"
        )
    form, layers = FORMATS[method], places(model)
    own = [path for path, adapter in adapters.items() if not isinstance(adapter, TrainedCopy)]
    copies = [path for path in adapters if path not in own]
    written = {"peft_type": form.peft_type, "task_type": "CAUSAL_LM", "inference_mode": True, "peft_version": LIKE}
    written |= form.write(config)
    if method in TOKENS:
        written |= _token_settings(model, layers, own, method)
        tensors = {"prompt_embeddings": _gather_tokens([adapters[path] for path in own])}
    else:
        written |= {"target_modules": _leaves(model, own), "modules_to_save": copies or None}
        if any(is_conv1d(layers[path]) for path in own):
            written["fan_in_fan_out"] = True
        tensors = {}
        for path in own:
            for suffix, value in _to_theirs(adapters[path], layers[path], form).items():
                tensors[f"{PREFIX}{path}.{suffix}"] = value
        for path in copies:
            tensors |= {f"{PREFIX}{path}.{key}": value for key, value in adapters[path].state_dict().items()}
        if method == "vera" and config.save_projection:
            tensors |= _whole_projections(config, [adapters[path] for path in own])
    write_tensors(Path(folder) / TENSORS, tensors, {"format": "pt"})
    write_json(Path(folder) / CONFIG, written)


def _doubled(c: LoRAConfig) -> LoRAConfig:
    """PiSSA as a LoRA of twice the rank on the original base, with the same scaling."""
    factor = 2**0.5 if c.rank_stabilized else 2
    ranks = {key: 2 * rank for key, rank in c.rank_pattern.items()}
    alphas = {key: factor * alpha for key, alpha in c.alpha_pattern.items()}
    stabilized = c.rank_stabilized
    return LoRAConfig(2 * c.rank, factor * c.alpha, c.dropout, stabilized, rank_pattern=ranks, alpha_pattern=alphas)


def _leaves(model: nn.Module, own: list[str]) -> list[str]:
    """The shortest list that names exactly these layers: their last names, else their full ones."""
    leaves = sorted({path.rsplit(".", 1)[-1] for path in own})
    reached = {path for leaf in leaves for path in matches(leaf, False, places(model))}
    return leaves if reached == set(own) else sorted(own)


def _to_theirs(adapter: Adapter, layer: nn.Module, form: Format) -> dict[str, Tensor]:
    state = {key: value.detach() for key, value in adapter.state_dict().items()}
    if isinstance(adapter, PiSSA):
        state = {
            "lora_A": torch.cat([state["lora_A"], state["initial_A"]]),
            "lora_B": torch.cat([state["lora_B"], -state["initial_B"]], dim=1),
        }
    if isinstance(adapter, IA3):
        state["ia3_l"] = state["ia3_l"][None] if adapter.on_input else state["ia3_l"][:, None]
    if isinstance(adapter, VeRA):
        state = {key: value for key, value in state.items() if "lambda" in key}
    theirs = {}
    for key, value in state.items():
        if isinstance(layer, nn.Embedding) and key in ("lora_A", "lora_B"):
            theirs[key.replace("lora_", "lora_embedding_")] = value
        else:
            theirs[key + ".weight" if key + ".weight" in form.tensors else key] = value
    return theirs


def _whole_projections(config: VeRAConfig, adapters: Sequence[Adapter]) -> dict[str, Tensor]:
    """vera_A and vera_B at the largest size, put together from the layers' corners."""
    A, B = torch.zeros(config.rank, config.largest[0]), torch.zeros(config.largest[1], config.rank)
    for adapter in adapters:
        assert isinstance(adapter, VeRA)
        A[:, : adapter.vera_A.shape[1]] = adapter.vera_A
        B[: adapter.vera_B.shape[0]] = adapter.vera_B
    return {"base_model.vera_A": A, "base_model.vera_B": B}


def _token_settings(model: nn.Module, layers: Mapping[str, nn.Module], own: list[str], method: str) -> dict[str, Any]:
    if method == "prefix":
        heads, head_dim = layers[own[0]].shape  # type: ignore[misc]
        sizes = {"num_attention_heads": heads, "token_dim": heads * head_dim, "num_layers": len(own)}  # type: ignore[operator]
    else:
        config = getattr(model, "config", None)
        sizes = {
            "token_dim": layers[own[0]].embedding_dim,
            "num_attention_heads": getattr(config, "n_heads", 1),
            "num_layers": getattr(config, "n_layers", 1),
        }
    return sizes | {"num_transformer_submodules": 1}


@torch.no_grad()
def _gather_tokens(adapters: Sequence[Adapter]) -> Tensor:
    first = adapters[0]
    if isinstance(first, Prefix):
        return torch.cat([adapter.prefix().flatten(1) for adapter in adapters], dim=1)  # type: ignore[operator]
    return first.prompt().clone() if isinstance(first, PTuning) else first.prompt_embeddings.detach()  # type: ignore[operator, return-value, union-attr]
