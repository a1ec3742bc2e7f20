"""Merging adapters into the weights, and what survives of them.

    W' = W + Σᵢ wᵢ (mergeᵢ(W) - W)        in fp32, rounded once to the dtype or format that is stored

Rounding to the stored form loses part of the update U = W' - W. The report gives for each layer

    survival = 1 - |stored - W'| / |U|     (Frobenius norms; 1 where nothing is lost, 0 or less where nothing is left)

A 4-bit grid is far coarser than most updates, so merging into NF4 is refused below MIN_SURVIVAL unless forced. On an
NF4 base the better of two roundings is taken: with new scales, or with the base's own. With calibration text the codes
are chosen for the layer's output instead (`rounding.py`), and survival is measured there:

    survival = 1 - |X (stored - W')ᵀ| / |X Uᵀ|      X: the layer's inputs on that text
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from lowrank.active import Choice, acting, as_weights
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
from lowrank.rounding import collect, compensated, on_scales_of, output_survival

MIN_SURVIVAL = 0.5


@dataclass(frozen=True)
class MergeReport:
    """What a merge kept. `survival`: layer path -> share of the update that the stored weight holds."""

    to: str
    survival: dict[str, float]
    dense: dict[str, float] = field(default_factory=dict)
    """The same share in the layer's dense dtype, whatever was stored."""
    nf4: dict[str, float] = field(default_factory=dict)
    """The same share after plain rounding to NF4, whatever was stored."""
    nearest: dict[str, float] = field(default_factory=dict)
    """With calibration: the share in the output that plain rounding would keep; `survival` has the compensated one."""
    logit_change: float | None = None
    """On the given text: |logits merged - logits with the adapter| / |logits with the adapter - logits of the base|."""

    @property
    def lowest(self) -> tuple[str, float]:
        return min(self.survival.items(), key=lambda item: item[1])

    @property
    def mean(self) -> float:
        return _mean(self.survival)

    def __str__(self) -> str:
        path, share = self.lowest
        text = f"merged to {self.to}: {self.mean:.1%} of the update survives on average, {share:.1%} at least ({path})"
        if self.nearest:
            text += f"; plain rounding would keep {_mean(self.nearest):.1%} of it in the layers' output"
        elif self.nf4 and self.dense:
            text += f" (dense {_mean(self.dense):.1%}, nf4 {_mean(self.nf4):.1%})"
        if self.logit_change is not None:
            text += f"; logits are off by {self.logit_change:.1%} of what the adapter changes"
        return text


def _mean(shares: Mapping[str, float]) -> float:
    return sum(shares.values()) / max(len(shares), 1)


def merge(
    model: nn.Module,
    name: Choice = "default",
    to: str = "dense",
    force: bool = False,
    *,
    calibration: Tensor | Sequence[Tensor] | None = None,
    text: Tensor | None = None,
) -> MergeReport:
    """Put adapters into the weights, in place; `unmerge` brings the old layers back bit for bit.

    `name` is what `activate` takes. `to="dense"` stores the layer's own dtype (a quantized base becomes dense, in the
    dtype that it was quantized from); `to="nf4"` quantizes again. `calibration`, batches of token ids (B, T), rounds to
    NF4 for the layers' outputs on that text; `text`, ids too, measures the change of the logits. Raises ValueError
    where less than half of the update would survive in some layer, unless `force`; the model is then as it was.
    """
    if to not in ("dense", "nf4"):
        raise unknown("merge target", to, ("dense", "nf4"))
    weights = as_weights(name)
    if not weights:
        raise ValueError("merge needs at least one adapter, got none")
    require_adapter(model, [n for n, _ in weights])
    require_unmerged(model, "merging again")
    layers = {path: layer for path, layer in adapted_layers(model) if layer.acting(weights)}
    for path, layer in layers.items():
        for _, adapter, _ in layer.acting(weights):
            if not adapter.mergeable:
                raise ValueError(
                    f"{path}: method {adapter.method!r} cannot be merged into a weight; it stays beside it"
                )
    grams: dict[str, Tensor] = {}
    if calibration is not None and to == "nf4":
        quantizable = {path: layer for path, layer in layers.items() if _goes_to_nf4(layer)}
        with acting(model, name):
            grams = collect(model, quantizable, [calibration] if isinstance(calibration, Tensor) else list(calibration))
    logits = None if text is None else _logits(model, name, text)
    report, merged = MergeReport(to, {}), {}
    for path, layer in layers.items():
        merged[path], shares = _merged_layer(layer, layer.acting(weights), to, grams.get(path))
        for column, share in shares.items():
            getattr(report, column)[path] = share
    path, share = report.lowest
    if to == "nf4" and share < MIN_SURVIVAL and not force:
        other = "" if grams else " round for the output with calibration=ids,"
        raise ValueError(
            f"merging into nf4 would keep {share:.1%} of the update in {path} ({report.mean:.1%} on average), below"
            f" {MIN_SURVIVAL:.0%}: merge to='dense',{other} keep the adapter beside the base, or pass force=True"
        )
    for path, layer in layers.items():
        layer.unmerged = (layer.base,)
        layer.base = merged[path]
    carried(model).merged = True
    if logits is not None and text is not None:
        report = replace(report, logit_change=_change(model, text, *logits))
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
def _logits(model: nn.Module, name: Choice, text: Tensor) -> tuple[Tensor, Tensor]:
    """Of the adapted model and of the base."""
    outputs = []
    for choice in (name, None):
        with acting(model, choice):
            outputs.append(_tensor(model(text)))
    return outputs[0], outputs[1]


@torch.no_grad()
def _change(model: nn.Module, text: Tensor, adapted: Tensor, base: Tensor) -> float:
    effect = (adapted - base).norm()
    return float((_tensor(model(text)) - adapted).norm() / effect) if effect > 0 else 0.0


def _tensor(output: object) -> Tensor:
    logits = output if isinstance(output, Tensor) else output.logits  # type: ignore[attr-defined]
    return logits.float()  # type: ignore[no-any-return]


@torch.no_grad()
def merged_weight(
    layer: AdaptedLinear, acting: list[tuple[str, Adapter, float]]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(W, W', bias') in fp32, by the equation above.  (O, I), (O, I), (O,)"""
    copied = isinstance(acting[0][1], TrainedCopy) and not stores_transposed(layer.base)
    stored = layer.weight.detach() if copied else dense_weight(layer.base)  # a norm's weight is no linear layer's
    base_weight = stored.float()
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


def _goes_to_nf4(layer: AdaptedLinear) -> bool:
    return isinstance(layer.base, nn.Linear | QuantizedLinear) and not any(
        isinstance(adapter, TrainedCopy) for adapter in layer.adapters.values()
    )


@torch.no_grad()
def _merged_layer(
    layer: AdaptedLinear, acting: list[tuple[str, Adapter, float]], to: str, gram: Tensor | None
) -> tuple[nn.Module, dict[str, float]]:
    """The layer that holds the adapters, and what it keeps of them, by the report's columns."""
    before, weight, bias = merged_weight(layer, acting)
    base = layer.base
    quantized = base.quantized if isinstance(base, QuantizedLinear) else None
    dtype = layer.weight.dtype if quantized is None else quantized.dtype
    bias_dtype = dtype if getattr(base, "bias", None) is None else base.bias.dtype  # type: ignore[union-attr]
    bias = None if bias is None else bias.to(bias_dtype)  # type: ignore[arg-type]
    update = (weight - before).norm()

    def survival(stored: Tensor) -> float:
        return 1.0 if update == 0 else float(1 - (stored.float() - weight).norm() / update)

    rounded = weight.to(dtype)
    shares = {"survival": survival(rounded), "dense": survival(rounded)}
    if _goes_to_nf4(layer):
        block_size, double = (quantized.block_size, quantized.double_quant) if quantized else (64, False)
        fresh = QuantizedTensor.quantize(weight, "nf4", block_size, double_quant=double)
        plain = [replace(fresh, dtype=torch.float32 if dtype == torch.float64 else dtype)]
        if quantized is not None and quantized.format == "nf4":  # new scales would move every weight, changed or not
            plain.append(on_scales_of(quantized, weight))
        shares["nf4"], q = _best(plain, survival)
        if to == "nf4":
            shares["survival"] = shares["nf4"]
            if gram is not None:
                in_output = partial(output_survival, wanted=weight, before=before, gram=gram)
                shares["nearest"], _ = _best(plain, in_output)
                shares["survival"], q = _best([*plain, *(compensated(weight, p, gram) for p in plain)], in_output)
            return QuantizedLinear(q, bias), shares
    return with_weight(base, rounded, bias) if quantized is None else _dense_linear(rounded, bias), shares


def _best(candidates: list[QuantizedTensor], kept: Callable[[Tensor], float]) -> tuple[float, QuantizedTensor]:
    scored = [(kept(q.dequantize(torch.float32)), q) for q in candidates]
    return max(scored, key=lambda item: item[0])


def _dense_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta", dtype=weight.dtype)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.to(weight.dtype), requires_grad=False)
    return linear
