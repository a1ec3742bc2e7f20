"""Resumable states: everything that a step depends on, written so that a crash leaves the last whole one.

checkpoints/step-N/   adapter.safetensors   what trains, by name
                      optimizer.safetensors  AdamW's moments by parameter name, and the random state
                      state.json             step, data position, best loss so far; written last: it marks a whole state
"""

import re
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.adapter import training_adapters
from lowrank.errors import FileFormatError
from lowrank.files import read_json, read_tensors, write_json, write_tensors
from lowrank.training.optim import AdamW

STATE = "state.json"


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def scores(model: nn.Module) -> dict[str, Tensor]:
    """What training adapters keep beside their parameters: buffers that an adapter file leaves out (rank budgets)."""
    return {
        f"{i}.{name}": buffer
        for i, adapter in enumerate(training_adapters(model))
        for name, buffer in adapter.named_buffers()
        if name in adapter._non_persistent_buffers_set
    }


def save_checkpoint(folder: Path, model: nn.Module, optimizer: AdamW, state: dict[str, Any], keep: int) -> Path:
    """Write checkpoints/step-N for N = state["step"], then drop all but the newest `keep`."""
    target = folder / "checkpoints" / f"step-{state['step']}"
    parameters = trained(model)
    write_tensors(target / "adapter.safetensors", parameters)
    moments: dict[str, Tensor] = {"random.cpu": torch.get_rng_state()}
    moments |= {f"buffer.{name}": buffer for name, buffer in scores(model).items()}
    if torch.cuda.is_available():
        moments["random.cuda"] = torch.cuda.get_rng_state()
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            moments[f"{key}.{name}"] = value
    write_tensors(target / "optimizer.safetensors", moments)
    write_json(target / STATE, state)
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    found = []
    for path in (folder / "checkpoints").glob("step-*"):
        match = re.fullmatch(r"step-(\d+)", path.name)
        if match and (path / STATE).is_file():
            found.append((int(match[1]), path))
    return [path for _, path in sorted(found)]


def load_checkpoint(path: Path, model: nn.Module, optimizer: AdamW) -> dict[str, Any]:
    """Put a checkpoint back into model, optimizer and random state; returns its state dictionary."""
    parameters = trained(model)
    saved = read_tensors(path / "adapter.safetensors")
    if saved.keys() != parameters.keys():
        wrong = sorted(saved.keys() ^ parameters.keys())
        raise FileFormatError(f"{path} is of another adapter: {len(wrong)} names differ, first {wrong[0]}")
    moments = read_tensors(path / "optimizer.safetensors")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(saved[name])
            state = optimizer.state[parameter]
            for key in state:
                if f"{key}.{name}" not in moments:
                    raise FileFormatError(f"{path}/optimizer.safetensors has no {key}.{name}; it is damaged or too old")
                state[key].copy_(moments[f"{key}.{name}"])
        for name, buffer in scores(model).items():
            buffer.copy_(moments[f"buffer.{name}"])
    torch.set_rng_state(moments["random.cpu"])
    if "random.cuda" in moments and torch.cuda.is_available():
        torch.cuda.set_rng_state(moments["random.cuda"])
    return read_json(path / STATE)
