"""Adapter folders: `adapter.safetensors` (the tensors) and `adapter.json` (what they are and what they belong to).

The file holds no time of day: the same run gives the same bytes. Loading is strict: a missing, foreign or misshapen
tensor is an error, and so is another base model, unless forced.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.adapter import METHODS, Adapter, adapted_layers, require_adapter, require_unmerged
from lowrank.errors import FileFormatError, unknown
from lowrank.files import read_json, read_tensors, write_json, write_tensors
from lowrank.targets import Attachment, attachments, build, check_name, put, train_only

VERSION = 1
TENSORS, DESCRIPTION = "adapter.safetensors", "adapter.json"


def adapter_state(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The adapter's own tensors: "model.layers.0.self_attn.q_proj.lora_A" -> (R, I)."""
    return state_of({path: layer.adapters[name] for path, layer in adapted_layers(model, name)})  # type: ignore[misc]


def save_adapter(model: nn.Module, folder: str | Path, name: str = "default", format: str = "lowrank") -> None:
    """Write the adapter `name` into `folder`, atomically, file by file; the description comes last."""
    require_adapter(model, [name])
    if format == "peft":
        from lowrank.peft_format import save_peft

        save_peft(model, folder, name)
        return
    if format != "lowrank":
        raise unknown("adapter format", format, ("lowrank", "peft"))
    attachment = attachments(model)[name]
    write_tensors(Path(folder) / TENSORS, adapter_state(model, name), {"format": "lowrank"})
    write_json(Path(folder) / DESCRIPTION, describe(model, name) | {"layers": list(attachment.layers)})


def describe(model: nn.Module, name: str) -> dict[str, Any]:
    """What adapter.json says of an adapter, its layers left out."""
    attachment = attachments(model)[name]
    origin = getattr(model, "origin", None)
    return {
        "format": "lowrank",
        "version": VERSION,
        "method": attachment.method,
        "config": asdict(attachment.config),
        "targets": attachment.targets,
        "train_also": list(attachment.train_also),
        "base_hash": getattr(origin, "base_hash", None),
        "tokenizer_hash": getattr(origin, "tokenizer_hash", None),
        "chat_template": getattr(origin, "chat_template", None),
    }


def load_adapter(
    model: nn.Module, folder: str | Path, name: str | None = None, trainable: bool = False, force: bool = False
) -> str:
    """Attach the adapter in `folder`, make it the only active one and return its name (the folder's, unless given).

    It is frozen unless `trainable`. Raises FileFormatError for a damaged or foreign file and ValueError for another
    base model (`force=True` loads it all the same); the model is then as it was.
    """
    folder = Path(folder)
    if (folder / "adapter_config.json").is_file() and not (folder / DESCRIPTION).is_file():
        from lowrank.peft_format import load_peft

        return load_peft(model, folder, name, trainable)
    if not (folder / DESCRIPTION).is_file():
        raise FileNotFoundError(f"{folder} holds no adapter: neither {DESCRIPTION} nor adapter_config.json is there")
    description = _checked_description(folder)
    _check_base(model, description, folder, force)
    method = METHODS[description["method"]]
    try:
        config = method.Config(**description["config"])
    except (TypeError, ValueError) as error:
        raise FileFormatError(
            f"{folder / DESCRIPTION}: the configuration does not fit method {description['method']!r}: {error}"
        ) from error
    name = name or default_name(model, folder)
    check_name(model, name)
    require_unmerged(model, "loading another adapter")
    copies = [path for path in description["layers"] if _is_copy(path, set(description["train_also"]))]
    paths = [path for path in description["layers"] if path not in copies]
    tensors = read_tensors(folder / TENSORS)
    config, adapters = build(model, config, paths, copies)  # not on the model yet: an error leaves it as it was
    fill(adapters, tensors, folder)
    attachment = Attachment(
        method=description["method"],
        config=config,
        targets=description.get("targets"),
        train_also=tuple(description["train_also"]),
        layers=tuple(description["layers"]),
    )
    put(model, name, adapters, attachment)
    if not trainable:
        train_only(model, None)
    return name


def default_name(model: nn.Module, folder: Path) -> str:
    """The folder's name, with a number where it is taken. A run's own folder `adapter` takes the name of the run."""
    folder = folder.resolve()
    stem = (folder.parent.name if folder.name == "adapter" else folder.name).replace(".", "-") or "default"
    taken, name, number = attachments(model), stem, 2
    while name in taken:
        name, number = f"{stem}-{number}", number + 1
    return name


def state_of(adapters: Mapping[str, Adapter]) -> dict[str, Tensor]:
    """ "model.layers.0.self_attn.q_proj.lora_A" -> the tensor itself."""
    return {f"{path}.{key}": value for path, a in adapters.items() for key, value in a.state_dict().items()}


def fill(adapters: Mapping[str, Adapter], tensors: Mapping[str, Tensor], where: str | Path) -> None:
    """Copy all `tensors` into the adapters, each of the right shape; or raise FileFormatError and copy none."""
    own = state_of(adapters)
    missing, foreign = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or foreign:
        parts = [
            f"{kind} {len(keys)} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
            for kind, keys in (("missing", missing), ("foreign", foreign))
            if keys
        ]
        raise FileFormatError(f"{where}: the tensors are not those of this adapter: {'; '.join(parts)}")
    for key, tensor in tensors.items():
        if tensor.shape != own[key].shape:
            raise FileFormatError(f"{where}: {key} has shape {tuple(tensor.shape)}, wanted {tuple(own[key].shape)}")
    with torch.no_grad():
        for key, tensor in tensors.items():
            own[key].copy_(tensor)


def _is_copy(path: str, train_also: set[str]) -> bool:
    return any(path == pattern or path.endswith("." + pattern) for pattern in train_also)


def _checked_description(folder: Path) -> dict[str, Any]:
    path = folder / DESCRIPTION
    description = read_json(path)
    wanted = {"version": int, "method": str, "config": dict, "train_also": list, "layers": list}
    if not isinstance(description, dict):
        raise FileFormatError(f"{path}: wanted a JSON object, got {type(description).__name__}")
    for key, kind in wanted.items():
        if not isinstance(description.get(key), kind):
            raise FileFormatError(f"{path}: field {key!r} must be a {kind.__name__}, got {description.get(key)!r}")
    if description["version"] > VERSION:
        raise FileFormatError(
            f"{path} has version {description['version']}, this lowrank reads up to {VERSION}: upgrade lowrank"
        )
    if description["method"] not in METHODS:
        raise unknown("method", description["method"], METHODS)
    return description


def _check_base(model: nn.Module, description: dict[str, Any], folder: Path, force: bool) -> None:
    origin = getattr(model, "origin", None)
    for field, what in (("base_hash", "base model"), ("tokenizer_hash", "tokenizer")):
        saved, here = description.get(field), getattr(origin, field, None)
        if saved and here and saved != here and not force:
            raise ValueError(
                f"{folder} was trained on another {what} (hash {saved[:12]}), this one has {here[:12]}"
                f" ({getattr(origin, 'path', '?')}):"
                " load the base that it was trained on, or pass force=True"
            )
