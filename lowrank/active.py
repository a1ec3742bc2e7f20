"""Which adapters act: none, one, a weighted set, or one choice for each row of a batch.

This changes what acts, never what trains.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import nn

from lowrank.adapter import Weights, adapted_layers, require_adapter
from lowrank.targets import find_targets

Choice = None | str | Sequence[str] | Mapping[str, float]


def as_weights(choice: Choice) -> Weights:
    """None -> (), "a" -> a alone, ["a", "b"] -> each with weight 1, {"a": 0.7} -> as given."""
    if choice is None:
        return ()
    if isinstance(choice, str):
        return ((choice, 1.0),)
    if isinstance(choice, Mapping):
        return tuple((name, float(weight)) for name, weight in choice.items())
    return tuple((name, 1.0) for name in choice)


def activate(model: nn.Module, choice: Choice, layers: str | Sequence[str] | None = None) -> None:
    """Let these adapters act: None is the base model. `layers` (as targets are written) changes those layers only."""
    weights = as_weights(choice)
    require_adapter(model, [name for name, _ in weights])
    chosen = None if layers is None else {path for paths in find_targets(model, layers).values() for path in paths}
    for path, layer in adapted_layers(model):
        if chosen is None or path in chosen:
            layer.active = weights


@contextmanager
def rows(model: nn.Module, choices: Sequence[Choice]) -> Iterator[None]:
    """Inside the block, row i of the batch runs with choices[i]; each is what `activate` takes."""
    weights = tuple(as_weights(choice) for choice in choices)
    require_adapter(model, [name for row in weights for name, _ in row])
    layers = [layer for _, layer in adapted_layers(model)]
    before = [layer.rows for layer in layers]
    try:
        for layer in layers:
            layer.rows = weights
        yield
    finally:
        for layer, old in zip(layers, before):
            layer.rows = old


@contextmanager
def acting(model: nn.Module, choice: Choice) -> Iterator[None]:
    """Inside the block `choice` acts everywhere; afterwards each layer is as it was."""
    layers = [layer for _, layer in adapted_layers(model)]
    before = [layer.active for layer in layers]
    try:
        activate(model, choice)
        yield
    finally:
        for layer, old in zip(layers, before):
            layer.active = old


def active_names(model: nn.Module) -> list[str]:
    """The adapters that act somewhere."""
    return list(dict.fromkeys(name for _, layer in adapted_layers(model) for name, _ in layer.active))
