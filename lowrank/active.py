"""Which adapters act: none, one, a weighted set, or one choice for each row of a batch.

This changes what acts, never what trains. All adapted layers share one `Selection`, so a switch costs one assignment.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace

from torch import nn

from lowrank.adapter import (
    Acting,
    AdaptedLinear,
    Selection,
    Weights,
    adapted_layers,
    carried,
    require_adapter,
    require_unmerged,
)
from lowrank.by_row import Rows
from lowrank.targets import named

Choice = None | str | Sequence[str] | Mapping[str, float]


def as_weights(choice: Choice) -> Weights:
    """None -> (), "a" -> a alone, ["a", "b"] -> each with weight 1, {"a": 0.7} -> as given."""
    if choice is None:
        return ()
    if isinstance(choice, str):
        return ((choice, 1.0),)
    if isinstance(choice, Mapping):
        return tuple((name, float(weight)) for name, weight in choice.items())
    if len(set(choice)) != len(choice):
        raise ValueError(f"an adapter is named twice in {list(choice)}; a weight is written {{name: weight}}")
    return tuple((name, 1.0) for name in choice)


def activate(model: nn.Module, choice: Choice, layers: str | Sequence[str] | None = None) -> None:
    """Let these adapters act: None is the base model. `layers` (as targets are written) changes those layers only."""
    weights = as_weights(choice)
    require_adapter(model, [name for name, _ in weights])
    selection = carried(model).selection
    require_unmerged(model, "activating another adapter")
    if layers is None:
        selection.now = Acting(weights)
        return
    adapted = dict(adapted_layers(model))
    chosen = dict(selection.now.layers)
    for pattern in [layers] if isinstance(layers, str) else layers:
        chosen |= {
            adapted[path]: weights for path in named(pattern, isinstance(layers, str), adapted, "layers", adapted)
        }
    selection.now = replace(selection.now, layers=chosen)


@contextmanager
def rows(model: nn.Module, choices: Sequence[Choice]) -> Iterator[None]:
    """Inside the block, row i of the batch runs with choices[i]; each is what `activate` takes.

    Values that adapters are given by hand inside the block count from the next block on (see `by_row.py`).
    """
    weights = tuple(as_weights(choice) for choice in choices)
    require_adapter(model, [name for row in weights for name, _ in row])
    require_unmerged(model, "choosing adapters for rows")
    selection = carried(model).selection
    with _held(selection, replace(selection.now, rows=Rows(weights))):
        yield


@contextmanager
def acting(model: nn.Module, choice: Choice) -> Iterator[None]:
    """Inside the block `choice` acts everywhere; afterwards each layer is as it was."""
    weights = as_weights(choice)
    require_adapter(model, [name for name, _ in weights])
    with _held(carried(model).selection, Acting(weights)):
        yield


@contextmanager
def _held(selection: Selection, now: Acting) -> Iterator[None]:
    before, selection.now = selection.now, now
    try:
        yield
    finally:
        selection.now = before


def checkpoint_contexts(module: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The `context_fn` of torch.utils.checkpoint: backward recomputes with the adapters that acted in forward.

    Without it, a backward pass outside a `rows` block would recompute the layers with other adapters.
    """
    layer = next((m for m in module.modules() if isinstance(m, AdaptedLinear)), None)
    if layer is None:
        return nullcontext(), nullcontext()
    return nullcontext(), _held(layer.selection, layer.selection.now)


def active_names(model: nn.Module) -> list[str]:
    """The adapters that act somewhere."""
    return list(dict.fromkeys(name for _, layer in adapted_layers(model) for name, _, _ in layer.acting(layer.active)))
