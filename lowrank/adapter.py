"""What an adapter is, and the layer that carries several of them.

One method is one class with two views of one equation:

    forward(x, y, base)      adapts y = base(x)
    merge(weight, bias)      gives the dense layer that has the adapter inside

Acting together with weights w, adapters give  y + Σᵢ wᵢ (fᵢ(x, y, base) - y);
merged together they give                       W + Σᵢ wᵢ (mergeᵢ(W) - W).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from lowrank.errors import unknown
from lowrank.quant.linear import QuantizedLinear

METHODS: dict[str, type["Adapter"]] = {}
M = TypeVar("M", bound="type[Adapter]")
Weights = tuple[tuple[str, float], ...]  # adapter names with the weights they act with


def register(name: str) -> Callable[[M], M]:
    """Class decorator: the method is known as `name` in configurations and adapter files from here on."""

    def add(method: M) -> M:
        known = METHODS.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (method.__module__, method.__qualname__):
            raise ValueError(f"method {name!r} is registered already, by {known.__module__}.{known.__qualname__}")
        method.method = name
        METHODS[name] = method
        return method

    return add


class Adapter(nn.Module):
    """One adapter on one layer. Parameters are fp32; `forward` works in their dtype and returns y's."""

    Config: ClassVar[type]
    """The frozen dataclass of the method's own settings."""
    method: ClassVar[str]
    """The registered name."""
    place: ClassVar[str] = "linear"
    """"linear", "sublayer", "attention prefix", "embeddings" or "own"."""
    default_targets: ClassVar[str | tuple[str, ...]] = "all-linear"
    """Where `targets=None` puts it."""
    mergeable: ClassVar[bool] = True
    identity_at_init: ClassVar[bool] = True
    edits_base: ClassVar[bool] = False
    needs_y: ClassVar[bool] = True
    """False where the method computes its own y (it gets y = None, and the base runs once)."""

    def __init__(self, config: Any, base: nn.Module) -> None:
        super().__init__()

    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        """Adapt y = base(x).  (..., I), (..., O) -> (..., O)"""
        raise NotImplementedError

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The dense layer that has the adapter inside.  (O, I), (O,) -> (O, I), (O,)"""
        raise NotImplementedError

    def prepare(self, base: nn.Module, inputs: Sequence[Tensor]) -> None:
        """Data-driven initial values before step 1; `inputs` are x's that this layer saw."""

    def param_groups(self, lr: float) -> list[dict[str, Any]]:
        """Optimizer groups, for methods whose parameters learn at different rates."""
        return [{"params": [p for p in self.parameters() if p.requires_grad], "lr": lr}]

    def after_step(self, step: int, total_steps: int) -> None:
        """Called after each optimizer step (rank budgets)."""

    def penalty(self) -> Tensor | None:
        """A term added to the loss (orthogonality, distance from the start)."""
        return None

    def fused(self, x: Tensor, base: nn.Module) -> Tensor | None:
        """Base and adapter at once, or None where that does not apply.  (..., I) -> (..., O)"""
        return None


def may_fuse(adapter: Adapter) -> bool:
    """Whether the class that wrote `fused` (or one above it) also wrote the `forward` in use.

    A subclass that overrides `forward` alone has changed the equation, so its inherited `fused` must not run.
    """
    mro = type(adapter).__mro__
    fused_by = next(c for c in mro if "fused" in vars(c))
    forward_by = next(c for c in mro if "forward" in vars(c))
    return fused_by is not Adapter and issubclass(fused_by, forward_by)


class TrainedCopy(Adapter):
    """A trainable copy of a whole layer (a norm, a head, an embedding), which takes the layer's place (`train_also`)."""

    place = "own"
    needs_y = False

    def __init__(self, config: None, base: nn.Module) -> None:
        super().__init__(config, base)
        if isinstance(base, QuantizedLinear) or not isinstance(getattr(base, "weight", None), Tensor):
            raise ValueError(f"train_also needs a layer with its own dense weight, got {type(base).__name__}")
        self.weight = nn.Parameter(base.weight.detach().float().clone())  # type: ignore[union-attr, operator]
        bias = getattr(base, "bias", None)
        self.bias = nn.Parameter(bias.detach().float().clone()) if isinstance(bias, Tensor) else None

    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        state = {"weight": self.weight} | ({} if self.bias is None else {"bias": self.bias})
        # the layer's own dtype: embeddings and norms keep the type that the layers behind them expect
        cast = {name: value.to(base.weight.dtype) for name, value in state.items()}  # type: ignore[union-attr, arg-type]
        return torch.func.functional_call(base, cast, (x,))

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.weight.to(weight.dtype), None if self.bias is None else self.bias.to(weight.dtype)


class AdaptedLinear(nn.Module):
    """A layer with its adapters by name. `active` says which act; `rows` says it for each row of the batch."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.adapters = nn.ModuleDict()
        self.active: Weights = ()
        self.rows: tuple[Weights, ...] | None = None
        self.unmerged: tuple[
            nn.Module, ...
        ] = ()  # the layer as it was before `merge`; a tuple hides it from state_dict

    @property
    def weight(self) -> Any:
        """The base's own weight, for code that looks at dtype or device."""
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        if self.unmerged:
            return self.base(x)
        if self.rows is not None:
            return self._by_row(x, self.rows)
        return self._adapted(x, self.acting(self.active))

    def acting(self, weights: Weights) -> list[tuple[Adapter, float]]:
        """The adapters of this layer among `weights`, each with its weight."""
        return [(self.adapters[name], weight) for name, weight in weights if name in self.adapters]  # type: ignore[misc]

    def _adapted(self, x: Tensor, acting: list[tuple[Adapter, float]]) -> Tensor:
        if not acting:
            return self.base(x)
        if len(acting) == 1 and acting[0][1] == 1.0:
            adapter = acting[0][0]
            if may_fuse(adapter) and (fused := adapter.fused(x, self.base)) is not None:
                return fused
            return adapter(x, self.base(x) if adapter.needs_y else None, self.base)
        y = self.base(x)
        return y + sum(
            weight * (adapter(x, y if adapter.needs_y else None, self.base) - y) for adapter, weight in acting
        )

    def _by_row(self, x: Tensor, rows: tuple[Weights, ...]) -> Tensor:
        if len(rows) != x.shape[0]:
            raise ValueError(f"rows() names adapters for {len(rows)} rows, the batch has {x.shape[0]}")
        groups: dict[Weights, list[int]] = {}
        for i, weights in enumerate(rows):
            groups.setdefault(weights, []).append(i)
        if len(groups) == 1:
            return self._adapted(x, self.acting(rows[0]))
        parts = [self._adapted(x[index], self.acting(weights)) for weights, index in groups.items()]
        order = torch.tensor([i for index in groups.values() for i in index], device=x.device)
        return torch.cat(parts)[order.argsort()]


def project(x: Tensor, *layers: nn.Module) -> tuple[Tensor, ...]:
    """Several layers on one input (q, k, v; gate, up), so that a fused path may do them at once."""
    return tuple(layer(x) for layer in layers)


def features(layer: nn.Module) -> tuple[int, int]:
    """(I, O) of a linear layer, whatever its class. ValueError for anything else."""
    if isinstance(layer, AdaptedLinear):
        return features(layer.base)
    if isinstance(layer, nn.Embedding):  # W = Eᵀ on one-hot ids
        return layer.num_embeddings, layer.embedding_dim
    if is_conv1d(layer):
        rows, columns = layer.weight.shape  # type: ignore[union-attr]
        return int(rows), int(columns)
    if isinstance(layer, nn.Linear | QuantizedLinear):
        return layer.in_features, layer.out_features
    raise ValueError(f"wanted a linear layer (Linear, QuantizedLinear, Conv1D, Embedding), got {type(layer).__name__}")


def is_conv1d(layer: nn.Module) -> bool:
    """GPT-2's layer: a linear one whose weight is stored as (I, O)."""
    return type(layer).__name__ == "Conv1D" and getattr(layer, "weight", torch.empty(0)).dim() == 2


def is_linear(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear | QuantizedLinear) or is_conv1d(layer)


def dense_weight(layer: nn.Module) -> Tensor:
    """An (O, I) copy of the weight: fp32 for a quantized layer, else in the stored dtype; Conv1D and Embedding transposed."""
    if isinstance(layer, AdaptedLinear):
        return dense_weight(layer.base)
    if isinstance(layer, QuantizedLinear):
        return layer.quantized.dequantize(torch.float32)
    features(layer)  # raises for what is no linear layer
    weight: Tensor = layer.weight.detach()  # type: ignore[union-attr, operator, assignment]
    return weight.T.clone() if is_conv1d(layer) or isinstance(layer, nn.Embedding) else weight.clone()


def adapted_layers(model: nn.Module, name: str | None = None) -> Iterator[tuple[str, AdaptedLinear]]:
    """(path, layer) of every layer that carries an adapter, or the adapter `name`."""
    for path, module in model.named_modules():
        if isinstance(module, AdaptedLinear) and (name is None or name in module.adapters):
            yield path, module


def adapter_names(model: nn.Module) -> list[str]:
    """The adapters of a model, in the order in which they were attached."""
    return list(dict.fromkeys(name for _, layer in adapted_layers(model) for name in layer.adapters))


def require_adapter(model: nn.Module, names: Iterable[str]) -> None:
    known = adapter_names(model)
    for name in names:
        if name not in known:
            if not known:
                raise ValueError(f"the model has no adapter {name!r}: it has none at all; attach or load one first")
            raise unknown("adapter", name, known)
