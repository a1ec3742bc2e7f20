"""Another choice of adapters for each row of a batch.

The base runs once for all rows. Where a method has `grouped` (LoRA), the rows take part in one batched sum; else the
batch is taken apart by choice, and put together again. What a layer needs for that is worked out at each forward that
takes gradients, and without gradients once: the adapters' values are then those of the last forward that took some, or
of the block's first one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lowrank.quant.linear import fresh

if TYPE_CHECKING:
    from lowrank.adapter import AdaptedLinear, Adapter, Weights

Row = tuple["Adapter | None", float]  # what acts on it and its weight; None is the base alone
Sum = Callable[[Tensor, Tensor], Tensor]  # (x, y) -> adapted y, all rows at once; without gradients y may be its place


@dataclass
class _Plan:
    """What one layer does with the rows."""

    parts: list[tuple[list[tuple[str, "Adapter", float]], Tensor]]
    """What acts, and the rows that have it."""
    act: Sum | None


class Rows:
    """What `rows` chose, and what each layer makes of it."""

    def __init__(self, choices: "tuple[Weights, ...]") -> None:
        self.choices = choices
        self.plans: dict[Any, _Plan | None] = {}

    def __call__(self, layer: "AdaptedLinear", x: Tensor, *context: Any) -> Tensor:
        """The adapted output of one layer.  (B, ..., I) -> (B, ..., O)"""
        if len(self.choices) != x.shape[0]:
            raise ValueError(f"rows() names adapters for {len(self.choices)} rows, the batch has {x.shape[0]}")
        key = layer, x.dtype, layer.training
        plan = self.plans.get(key)
        if plan is None or torch.is_grad_enabled():
            plan = self._plan(layer, x)
            self.plans[key] = None if torch.is_grad_enabled() else plan
        if len(plan.parts) == 1:
            return layer.adapted(plan.parts[0][0], x, *context)
        base: Any = layer._modules["base"]
        if plan.act is not None:
            return plan.act(x, base(x, *context) if torch.is_grad_enabled() else fresh(base, x, *context))
        y = base(x, *context)
        parts = []
        for acting, index in plan.parts:
            part = tuple(c[index] if isinstance(c, Tensor) else c for c in context)
            parts.append(layer.adapted(acting, x[index], *part, y=y[index]))
        if len(shapes := {part.shape[1:] for part in parts}) > 1:
            raise ValueError(
                f"the rows' adapters give outputs of {len(shapes)} shapes (virtual tokens?):"
                " rows of one batch need the same number of them"
            )
        return torch.cat(parts)[torch.cat([index for _, index in plan.parts]).argsort()]

    def _plan(self, layer: "AdaptedLinear", x: Tensor) -> _Plan:
        rows, same = [tuple(layer.acting(row)) for row in self.choices], dict[Any, list[int]]()
        for i, row in enumerate(rows):
            same.setdefault(row, []).append(i)
        plan = _Plan([(list(row), torch.tensor(index, device=x.device)) for row, index in same.items()], None)
        adapters = {adapter for row in rows for _, adapter, _ in row}
        methods = {type(adapter) for adapter in adapters}
        if len(same) > 1 and len(methods) == 1 and not layer.edited and all(len(row) < 2 for row in rows):
            method = methods.pop()
            if method.may("grouped"):
                plan.act = method.grouped([row[0][1:] if row else (None, 0.0) for row in rows], x.dtype)
        return plan
