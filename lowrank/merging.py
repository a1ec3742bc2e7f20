"""Merging adapters into the weights, and what survives of them.

    W' = W + Σᵢ wᵢ (mergeᵢ(W) - W)        in fp32, rounded once to the dtype or format that is stored

Rounding to the stored form loses part of the update U = W' - W. The report gives for each layer

    survival = 1 - |stored - W'| / |U|     (Frobenius norms; 1 where nothing is lost, 0 or less where nothing is left)

A 4-bit grid is far coarser than most updates, so merging into NF4 is refused below MIN_SURVIVAL unless forced.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowrank.active import Choice, as_weights
from lowrank.adapter import (
    AdaptedLinear,
    Adapter,
    adapted_layers,
    carried,
    dense_weight,
    require_adapter,
    require_unmerged,
    stores_transposed,
    with_weight,
)
from lowrank.errors import unknown
from lowrank.methods.trained_copy import TrainedCopy
from lowrank.quant.linear import QuantizedLinear
from lowrank.quant.tensor import QuantizedTensor

MIN_SURVIVAL = 0.5


@dataclass(frozen=True)
class MergeReport:
    """What a merge kept. `survival`: layer path -> share of the update that the stored weight holds."""

    to: str
    survival: dict[str, float]

    @property
    def lowest(self) -> tuple[str, float]:
        return min(self.survival.items(), key=lambda item: item[1])

    @property
    def mean(self) -> float:
        return sum(self.survival.values()) / max(len(self.survival), 1)

    def __str__(self) -> str:
        path, share = self.lowest
        return f"merged to {self.to}: {self.mean:.1%} of the update survives on average, {share:.1%} at least ({path})"


def merge(model: nn.Module, name: Choice = "default", to: str = "dense", force: bool = False) -> MergeReport:
    """Put adapters into the weights, in place; `unmerge` brings the old layers back bit for bit.

    `name` is what `activate` takes. `to="dense"` stores the layer's own dtype (a quantized base becomes dense, in the
    dtype that it was quantized from); `to="nf4"` quantizes again. Raises ValueError where less than half of the update
    would survive in some layer, unless `force`; the model is then as it was.
    """
    if to not in ("dense", "nf4"):
        raise unknown("merge target", to, ("dense", "nf4"))
    weights = as_weights(name)
    if not weights:
        raise ValueError("merge needs at least one adapter, got none")
    require_adapter(model, [n for n, _ in weights])
    require_unmerged(model, "merging again")
    layers = [(path, layer) for path, layer in adapted_layers(model) if layer.acting(weights)]
    for path, layer in layers:
        for _, adapter, _ in layer.acting(weights):
            if not adapter.mergeable:
                raise ValueError(
                    f"{path}: method {adapter.method!r} cannot be merged into a weight; keep it as an adapter"
                )
    merged: dict[str, nn.Module] = {}
    survival: dict[str, float] = {}
    for path, layer in layers:
        merged[path], survival[path] = _merged_layer(layer, layer.acting(weights), to)
    report = MergeReport(to, survival)
    path, share = report.lowest
    if to == "nf4" and share < MIN_SURVIVAL and not force:
        raise ValueError(
            f"merging into nf4 would keep {share:.1%} of the update in {path} ({report.mean:.1%} on average), below"
            f" {MIN_SURVIVAL:.0%}: merge to='dense', keep the adapter beside the base, or pass force=True"
        )
    for path, layer in layers:
        layer.unmerged = (layer.base,)
        layer.base = merged[path]
    carried(model).merged = True
    return report


def unmerge(model: nn.Module) -> None:
    """Bring back the layers as they were before `merge`. RuntimeError where the model is not merged."""
    layers = [layer for _, layer in adapted_layers(model) if layer.unmerged]
    if not layers:
        raise RuntimeError("the model is not merged")
    for layer in layers:
        (layer.base,) = layer.unmerged
        layer.unmerged = ()
    carried(model).merged = False


@torch.no_grad()
def merged_weight(
    layer: AdaptedLinear, acting: list[tuple[str, Adapter, float]]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(W, W', bias') in fp32, by the equation above.  (O, I), (O, I), (O,)"""
    copied = isinstance(acting[0][1], TrainedCopy) and not stores_transposed(layer.base)
    stored = layer.weight.detach() if copied else dense_weight(layer.base)  # a norm's weight is no linear layer's
    base_weight = stored.float()  # type: ignore[union-attr, operator]
    bias = getattr(layer.base, "bias", None)
    base_bias = None if bias is None else bias.detach().float()
    weight, new_bias = base_weight.clone(), None if base_bias is None else base_bias.clone()
    for _, adapter, share in acting:
        w, b = adapter.merge(base_weight, base_bias)
        weight += share * (w - base_weight)
        if b is not None:
            start = torch.zeros_like(b) if base_bias is None else base_bias
            new_bias = (start.clone() if new_bias is None else new_bias) + share * (b - start)
    return base_weight, weight, new_bias


def _merged_layer(layer: AdaptedLinear, acting: list[tuple[str, Adapter, float]], to: str) -> tuple[nn.Module, float]:
    before, weight, bias = merged_weight(layer, acting)
    base = layer.base
    if to == "nf4" and isinstance(base, QuantizedLinear):
        old = base.quantized
        q = QuantizedTensor.quantize(weight.to(old.dtype), "nf4", old.block_size, double_quant=old.double_quant)
        new: nn.Module = QuantizedLinear(
            q, None if bias is None else bias.to(base.bias.dtype if base.bias is not None else old.dtype)
        )
        stored = q.dequantize(torch.float32)
    elif isinstance(base, QuantizedLinear):
        new, stored = _dense_linear(weight.to(base.quantized.dtype), bias)
    else:
        dtype = base.weight.dtype
        stored = weight.to(dtype)  # type: ignore[arg-type]
        new = with_weight(base, stored, None if bias is None else bias.to(dtype))  # type: ignore[arg-type]
        stored = stored.float()
    update = (weight - before).norm()
    lost = (stored - weight).norm()
    return new, 1.0 if update == 0 else float(1 - lost / update)


def _dense_linear(weight: Tensor, bias: Tensor | None) -> tuple[nn.Linear, Tensor]:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta", dtype=weight.dtype)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.to(weight.dtype), requires_grad=False)
    return linear, weight.float()
