"""Another choice of adapters for each row of a batch.

The base runs once for all rows. Where a method has `grouped` (LoRA), the rows take part in one batched sum; else the
batch is taken apart by choice, and put together again. What a layer needs for that is worked out once for a `rows`
block, not at each forward.
"""

from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from lowrank.adapter import AdaptedLinear, Adapter, Weights

_version = attrgetter("_version")
Row = tuple["Adapter | None", float]  # what acts on it and its weight; None is the base alone
Sum = Callable[[Tensor, Tensor], Tensor]  # (x, y) -> adapted y, all rows at once


@dataclass
class _Kept:
    act: Sum | None
    parameters: list[nn.Parameter]
    versions: list[int]

    def fresh(self) -> bool:
        """Whether the parameters still hold what `act` was made from, and need no gradient through it."""
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters):
            return False
        return self.versions == list(map(_version, self.parameters))


class Rows:
    """What `rows` chose, and what each layer makes of it."""

    def __init__(self, choices: "tuple[Weights, ...]") -> None:
        self.choices = choices
        self.index: dict[AdaptedLinear, dict[Weights, Tensor]] = {}  # which rows have the same adapters
        self.kept: dict[Any, _Kept] = {}

    def __call__(self, layer: "AdaptedLinear", x: Tensor, context: tuple[Any, ...]) -> Tensor:
        """The adapted output of one layer.  (B, ..., I) -> (B, ..., O)"""
        if len(self.choices) != x.shape[0]:
            raise ValueError(f"rows() names adapters for {len(self.choices)} rows, the batch has {x.shape[0]}")
        if (act := self.act(layer, x.dtype)) is not None:
            return act(x, layer.base(x, *context))
        if layer not in self.index:
            self.index[layer] = self._groups(layer, x.device)
        groups = self.index[layer]
        if len(groups) == 1:
            return layer.adapted(x, context, next(iter(groups)))
        y, parts = layer.base(x, *context), []
        for weights, index in groups.items():
            part = tuple(c[index] if isinstance(c, Tensor) else c for c in context)
            parts.append(layer.adapted(x[index], part, weights, y[index]))
        if len(shapes := {part.shape[1:] for part in parts}) > 1:
            raise ValueError(
                f"the rows' adapters give outputs of {len(shapes)} shapes (virtual tokens?):"
                " rows of one batch need the same number of them"
            )
        return torch.cat(parts)[torch.cat(list(groups.values())).argsort()]

    def _groups(self, layer: "AdaptedLinear", device: torch.device) -> "dict[Weights, Tensor]":
        groups: dict[Weights, list[int]] = {}
        for i, row in enumerate(self.choices):
            groups.setdefault(tuple(item for item in row if item[0] in layer.adapters), []).append(i)
        return {weights: torch.tensor(index, device=device) for weights, index in groups.items()}

    def act(self, layer: "AdaptedLinear", dtype: torch.dtype) -> Sum | None:
        """The one sum of all rows, or None where the batch has to be taken apart."""
        key = layer, dtype, layer.training
        kept = self.kept.get(key)
        if kept is None or not kept.fresh():
            kept = self.kept[key] = self._keep(layer, dtype)
        return kept.act

    def _keep(self, layer: "AdaptedLinear", dtype: torch.dtype) -> _Kept:
        acting = [layer.acting(row) for row in self.choices]
        adapters = {adapter for row in acting for _, adapter, _ in row}
        methods = {type(adapter) for adapter in adapters}
        if (
            layer.edited
            or len(methods) != 1
            or any(len(row) > 1 for row in acting)
            or len(set(map(tuple, acting))) == 1
        ):
            return _Kept(None, [], [])
        method = methods.pop()
        rows: list[Row] = [(row[0][1], row[0][2]) if row else (None, 0.0) for row in acting]
        parameters = [p for adapter in adapters for p in adapter.parameters()]
        act = method.grouped(rows, dtype) if method.may("grouped") else None
        return _Kept(act, parameters, list(map(_version, parameters)))
