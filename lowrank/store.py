"""Adapter folders: `adapter.safetensors` (the tensors) and `adapter.json` (what they are and what they belong to).

The file holds no time of day: the same run gives the same bytes. Loading is strict: a missing, foreign or misshapen
tensor is an error, and so is another base model, unless forced.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from lowrank.adapter import METHODS, require_adapter, require_unmerged
from lowrank.errors import FileFormatError, unknown
from lowrank.files import read_json, read_tensors, write_json, write_tensors
from lowrank.filling import adapter_state, default_name, fill
from lowrank.peft_format import load_peft, save_peft
from lowrank.targets import Attachment, attachments, build, check_name, put, train_only

VERSION = 1
TENSORS, DESCRIPTION = "adapter.safetensors", "adapter.json"


def save_adapter(model: nn.Module, folder: str | Path, name: str = "default", format: str = "lowrank") -> None:
    """Write the adapter `name` into `folder`, atomically, file by file; the description comes last."""
    require_adapter(model, [name])
    if format == "peft":
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
        "special_tokens": getattr(origin, "special_tokens", None),
        "generation": getattr(origin, "generation", None),
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
    also, layers = tuple(description["train_also"]), tuple(description["layers"])
    put(model, name, adapters, Attachment(description["method"], config, description.get("targets"), also, layers))
    if not trainable:
        train_only(model, None)
    return name


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
    """ValueError where the folder and the model differ in one of these; what one of them does not know passes."""
    origin = getattr(model, "origin", None)
    hashed = "(hash {saved:.12}), this one has {here:.12} ({path}): load the base that it was trained on"
    sayings = {
        "chat_template": "with another chat template than the model has: load the model with template=... as in"
        " training (it begins {saved!r:.42})",
        "base_hash": "on another base model " + hashed,
        "tokenizer_hash": "on another tokenizer " + hashed,
        "special_tokens": "with the special tokens {saved}, the model's tokenizer has {here}: answers would begin or"
        " end elsewhere. Load the base with the tokenizer files of the training",
    }
    for field, saying in sayings.items():
        saved, here = description.get(field), getattr(origin, field, None)
        if saved and here and saved != here and not force:
            text = saying.format(saved=saved, here=here, path=getattr(origin, "path", "?"))
            raise ValueError(f"{folder} was trained {text}, or pass force=True")
