"""An adapter's tensors by name, and loaded ones put in their place: all of them, each of the right shape, or none."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from lowrank.adapter import Adapter, adapted_layers
from lowrank.errors import FileFormatError
from lowrank.targets import attachments


def adapter_state(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The adapter's own tensors: "model.layers.0.self_attn.q_proj.lora_A" -> (R, I)."""
    return state_of({path: layer.adapters[name] for path, layer in adapted_layers(model, name)})  # type: ignore[misc]


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
