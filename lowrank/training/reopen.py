"""A run's folder back to a model with its adapter."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowrank.errors import ConfigError
from lowrank.models.load import fast_dtype, load
from lowrank.store import load_adapter
from lowrank.training.config import RunConfig, read_config


def run_config(folder: str | Path) -> RunConfig:
    """The configuration that a run was made with. ConfigError where the folder holds no run."""
    path = Path(folder) / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{folder} holds no run: there is no {path}")
    return read_config(path)


def settled(config: RunConfig) -> RunConfig:
    """The configuration with a dtype of its own in place of "auto"."""
    if config.dtype != "auto":
        return config
    return replace(config, dtype=str(fast_dtype(config.device)).removeprefix("torch."))


def load_base(config: RunConfig, quantize: str | None) -> tuple[nn.Module, Any]:
    """(model, tokenizer) that a configuration names, in the format `quantize`."""
    dtype = getattr(torch, settled(config).dtype)
    return load(config.model, quantize=quantize, dtype=dtype, device=config.device, template=config.data.template)


def reopen(folder: str | Path, quantize: str | None = "as trained", adapter: bool = True) -> tuple[nn.Module, Any]:
    """(model, tokenizer) of a run, its adapter "default" active and frozen; `quantize` replaces the run's format."""
    config = run_config(folder)
    model, tokenizer = load_base(config, config.quantize if quantize == "as trained" else quantize)
    if adapter:
        if not (Path(folder) / "adapter" / "adapter.json").is_file():
            raise ConfigError(
                f"{folder} has no finished adapter; go on with: lowrank train {folder}/config.yaml --resume"
            )
        load_adapter(model, Path(folder) / "adapter", name="default")
    return model.eval(), tokenizer
