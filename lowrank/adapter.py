"""What an adapter is, and the layer that carries several of them.

One method is one class with two views of one equation:

    forward(x, y, base)      adapts y = base(x)
    merge(weight, bias)      gives the dense layer that has the adapter inside

Acting together with weights w, adapters give  y + Σᵢ wᵢ (fᵢ(x, y, base) - y);
merged together they give                       W + Σᵢ wᵢ (mergeᵢ(W) - W).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank.by_row import Row, Rows, Sum
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
        if any(method.Config is other.Config for other in METHODS.values() if other is not known):
            # a subclass that inherits its Config gets one of its own, so that a configuration names one method
            method.Config = type(f"{method.__name__}Config", (method.Config,), {"__module__": method.__module__})
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
    """True where the method changes what the base is, see `edit`."""
    exact_gradient: ClassVar[bool] = True
    """False where backward holds something constant on purpose (DoRA's norm)."""
    needs_y: bool = True
    """False where the method computes its own y (it gets y = None, and the base runs once)."""
    dropout: Any
    """The share of its inputs that `dropped` sets to zero in training, where the method has one."""
    tokens: int = 0
    """Virtual tokens that it puts before the first one (prompt, prefix)."""
    peers: "tuple[Adapter, ...]" = ()
    """All adapters of the same attach, this one included; the first does what concerns all (a shared budget)."""

    def __init__(self, config: Any, base: nn.Module) -> None:
        super().__init__()

    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        """Adapt y = base(x).  (..., I), (..., O) -> (..., O)"""
        raise NotImplementedError

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The dense layer that has the adapter inside.  (O, I), (O,) -> (O, I), (O,)"""
        raise NotImplementedError

    def dropped(self, x: Tensor) -> Tensor:
        """x after dropout; ids stay as they are."""
        share = getattr(self, "dropout", 0.0)
        return F.dropout(x, share, self.training) if share and x.is_floating_point() else x

    @classmethod
    def complete(cls, config: Any, layers: Mapping[str, nn.Module]) -> Any:
        """The configuration with what all its layers decide together (the size of a shared projection)."""
        return config

    def edit(self, base: nn.Module) -> nn.Module:
        """The frozen layer that stands in for the base while this adapter acts; only where `edits_base`."""
        return base

    def prepare(self, model: nn.Module, batches: Iterable[Any]) -> None:
        """Data-driven initial values or rank allocation, before step 1."""

    def param_groups(self, lr: float) -> list[dict[str, Any]]:
        """Optimizer groups, for methods whose parameters learn at different rates."""
        return [{"params": [p for p in self.parameters() if p.requires_grad], "lr": lr}]

    def after_step(self, step: int, total_steps: int) -> None:
        """Called after each optimizer step, while the gradients are still there (rank budgets)."""

    def penalty(self) -> Tensor | None:
        """A term added to the loss (orthogonality, distance from the start)."""
        return None

    def fused(self, x: Tensor, base: nn.Module) -> Tensor | None:
        """Base and adapter at once, or None where that does not apply.  (..., I) -> (..., O)"""
        return None

    @classmethod
    def projected(cls, adapters: "list[Any]", x: Tensor, bases: list[nn.Module]) -> tuple[Tensor, ...] | None:
        """`fused` of layers that share their input, where gradients are taken; None: then each layer runs by itself."""
        return None

    @classmethod
    def grouped(cls, rows: list[Row], dtype: torch.dtype) -> Sum | None:
        """`forward` of batches whose row i has the adapter and weight rows[i] (None: the base alone) and this dtype.

        What is returned runs at each forward as (x, y) -> adapted y. None: then a loop does it.
        """
        return None

    @classmethod
    @cache
    def may(cls, shortcut: str) -> bool:
        """Whether the class that wrote `fused` (or `grouped`) has this `forward` too: an edit is never bypassed."""
        written_by = next(c for c in cls.__mro__ if shortcut in vars(c))
        used = (next(c for c in cls.__mro__ if name in vars(c)) for name in ("forward", "dropped"))
        return all(issubclass(written_by, c) for c in used)


@dataclass(frozen=True)
class Acting:
    """Which adapters act: everywhere, on single layers, or for each row of the batch."""

    everywhere: Weights = ()
    layers: "Mapping[AdaptedLinear, Weights]" = field(default_factory=dict)
    rows: Rows | None = None


class Selection:
    """What acts now. All adapted layers of a model share this one object: to switch is one assignment."""

    def __init__(self) -> None:
        self.now = Acting()


_NOWHERE: Any = (None, None, ())


class AdaptedLinear(nn.Module):
    """A layer with its adapters by name; the shared selection says which of them act."""

    def __init__(self, base: nn.Module, selection: Selection | None = None) -> None:
        super().__init__()
        self.base = base
        self.adapters = nn.ModuleDict()
        self.edited: Any = {}  # name -> the layer that stands in for the base (methods that edit it)
        self.selection = selection or Selection()
        self.unmerged: tuple[nn.Module, ...] = ()  # as it was before `merge`; a tuple hides it from state_dict
        self.path: tuple[Acting | None, Callable[..., Tensor], tuple[Any, ...]] = _NOWHERE

    @property
    def weight(self) -> Any:
        """The base's own weight, for code that looks at dtype or device."""
        return self.base.weight

    @property
    def bias(self) -> Any:
        return self.base.bias

    @property
    def active(self) -> Weights:
        """What acts here, rows left aside."""
        now = self.selection.now
        return now.layers.get(self, now.everywhere) if now.layers else now.everywhere

    def put(self, name: str, adapter: Adapter) -> None:
        self.path = _NOWHERE
        self.adapters[name] = adapter.train(self.base.training)
        if adapter.edits_base:
            edited = adapter.edit(self.base).requires_grad_(False)
            self.edited = nn.ModuleDict({**self.edited, name: edited})

    def remove(self, name: str) -> None:
        self.path = _NOWHERE
        del self.adapters[name]
        if name in self.edited:
            del self.edited[name]

    def forward(self, x: Tensor, *context: Any) -> Tensor:
        if self.unmerged:
            return self.base(x, *context)  # type: ignore[no-any-return]
        now = self.selection.now
        if now.rows is not None:
            return now.rows(self, x, *context)
        path = self.path
        if path[0] is not now:
            path = self.path = now, *self._path()
        _, run, given = path
        return run(self, *given, x, *context)

    def _path(self) -> tuple[Callable[..., Tensor], tuple[Any, ...]]:
        """What runs, after this layer, and what it is given first: looked up once for as long as the same acts."""
        acting = self.acting(self.active)
        if len(acting) != 1 or acting[0][2] != 1.0:
            return AdaptedLinear.adapted, (acting,)
        name, adapter, _ = acting[0]
        at_once = adapter.may("fused") and name not in self.edited
        return AdaptedLinear._at_once if at_once else AdaptedLinear._one, (name, adapter)

    def _at_once(self, name: str, adapter: Adapter, x: Tensor, *context: Any) -> Tensor:
        """`_one` with less to look up."""
        if not context and (y := adapter.fused(x, self._modules["base"])) is not None:  # type: ignore[arg-type]
            return y
        return self._one(name, adapter, x, *context)

    def needs_rows(self) -> bool:
        """Whether what acts here looks at the batch row by row, so that a model must not take its rows apart."""
        if self.selection.now.rows is not None:
            return True
        return any(adapter.place in ("attention prefix", "embeddings") for _, adapter, _ in self.acting(self.active))

    def virtual_tokens(self) -> int:
        """How many tokens the adapters here put before the first one. Rows of one batch must agree."""
        now = self.selection.now
        counts = {
            sum(a.tokens for _, a, _ in self.acting(w)) for w in (now.rows.choices if now.rows else (self.active,))
        }
        if len(counts) > 1:
            raise ValueError(
                f"the rows' adapters add {sorted(counts)} virtual tokens; rows of one batch need one number"
            )
        return counts.pop()

    def acting(self, weights: Weights) -> list[tuple[str, Adapter, float]]:
        """The adapters of this layer among `weights`: (name, adapter, weight)."""
        return [(name, self.adapters[name], weight) for name, weight in weights if name in self.adapters]  # type: ignore[misc]

    def adapted(
        self, acting: list[tuple[str, Adapter, float]], x: Tensor, *context: Any, y: Tensor | None = None
    ) -> Tensor:
        """y + Σᵢ wᵢ (fᵢ(x, y, base) - y); y = base(x), unless given."""
        if len(acting) == 1 and acting[0][2] == 1.0:
            return self._one(*acting[0][:2], x, *context, y=y)
        if y is None:
            y = self.base(x, *context)
        if len(acting) == 0:
            return y
        if any(adapter.place in ("embeddings", "attention prefix") for _, adapter, _ in acting):
            given = {name: weight for name, _, weight in acting}
            raise ValueError(f"a method that adds virtual tokens acts alone and with weight 1, got {given}")
        return y + sum(w * (self._one(name, adapter, x, *context, y=y) - y) for name, adapter, w in acting)

    def _one(self, name: str, adapter: Adapter, x: Tensor, *context: Any, y: Tensor | None = None) -> Tensor:
        base = self.base
        if name in self.edited:
            base, y = self.edited[name], None
        if y is None and not context and adapter.may("fused") and (fused := adapter.fused(x, base)) is not None:
            return fused
        if y is None and adapter.needs_y:
            y = base(x, *context)
        return adapter(x, y if adapter.needs_y else None, base)  # type: ignore[no-any-return]


class Slot(nn.Module):
    """A place in a model that is no layer; without an adapter it changes nothing.

    "sublayer":          slot(x, y) -> y, where y (B, T, D) is what attention or MLP made of x, before the residual sum.
    "attention prefix":  slot(x) -> (B, P, 2, H, K): keys and values of P positions before the first token, here P = 0.
    """

    def __init__(self, place: str, *shape: int) -> None:
        super().__init__()
        self.place = place
        self.shape = shape  # (D,) or (kv heads H, head dim K)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return x.new_empty(x.shape[0], 0, 2, *self.shape) if y is None else y


def project(x: Tensor, *layers: nn.Module) -> tuple[Tensor, ...]:
    """Several layers on one input (q, k, v; gate, up), at once where weights are kept (`decoded`) or adapters can."""
    kept = layers[0].__dict__.get("_kept")
    if kept is not None and not torch.is_grad_enabled() and (y := kept.product(layers, x)) is not None:
        return y.split([layer.out_features for layer in layers], dim=-1)  # type: ignore[no-any-return]
    if torch.is_grad_enabled() and (together := _together(x, layers)) is not None:
        return together
    return tuple(layer(x) for layer in layers)


def _together(x: Tensor, layers: tuple[nn.Module, ...]) -> tuple[Tensor, ...] | None:
    """`projected` of the method that acts alone, with weight 1, on each of these layers; None where that is not so."""
    adapters: list[Adapter] = []
    for layer in layers:
        if not isinstance(layer, AdaptedLinear) or layer.unmerged or layer.selection.now.rows or layer._forward_hooks:
            return None
        acting = layer.acting(layer.active)
        if len(acting) != 1 or acting[0][2] != 1.0 or acting[0][0] in layer.edited:
            return None
        adapters.append(acting[0][1])
    method = type(adapters[0])
    if any(type(adapter) is not method for adapter in adapters) or not method.may("projected"):
        return None
    return method.projected(adapters, x, [layer.base for layer in layers])  # type: ignore[misc]


def features(layer: nn.Module) -> tuple[int, int]:
    """(I, O) of a linear layer, whatever its class. ValueError for anything else."""
    if isinstance(layer, AdaptedLinear):
        return features(layer.base)
    if isinstance(layer, nn.Embedding):  # W = Eᵀ on one-hot ids
        return layer.num_embeddings, layer.embedding_dim
    if is_conv1d(layer):
        rows, columns = layer.weight.shape  # type: ignore[union-attr, misc]
        return int(rows), int(columns)
    if isinstance(layer, nn.Linear | QuantizedLinear):
        return layer.in_features, layer.out_features
    raise ValueError(f"wanted a linear layer (Linear, QuantizedLinear, Conv1D, Embedding), got {type(layer).__name__}")


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x Wᵀ in the weight's dtype; integer x are ids, which count as one-hot vectors.  (..., I), (R, I) -> (..., R)"""
    if x.is_floating_point():
        return F.linear(x.to(weight.dtype), weight)
    return F.embedding(x, weight.T)


def stores_transposed(layer: nn.Module) -> bool:
    """Whether the stored weight is (I, O): Conv1D, and Embedding with W = Eᵀ."""
    return is_conv1d(layer) or isinstance(layer, nn.Embedding)


def is_conv1d(layer: nn.Module) -> bool:
    """GPT-2's layer: a linear one whose weight is stored as (I, O)."""
    return type(layer).__name__ == "Conv1D" and getattr(layer, "weight", torch.empty(0)).dim() == 2


def is_linear(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear | QuantizedLinear) or is_conv1d(layer)


def dense_weight(layer: nn.Module) -> Tensor:
    """An (O, I) copy of the weight (Conv1D, Embedding transposed): fp32 of a quantized layer, else the stored dtype."""
    if isinstance(layer, AdaptedLinear):
        return dense_weight(layer.base)
    if isinstance(layer, QuantizedLinear):
        return layer.quantized.dequantize(torch.float32)
    features(layer)  # raises for what is no linear layer
    weight: Tensor = layer.weight.detach()  # type: ignore[union-attr, operator, assignment]
    return weight.T.clone(memory_format=torch.contiguous_format) if stores_transposed(layer) else weight.clone()


_KEEP = object()


def with_weight(base: nn.Module, weight: Tensor, bias: Any = _KEEP) -> nn.Module:
    """A frozen layer of base's class with another weight (O, I), and bias if given. All else is shared."""
    new = base.__class__.__new__(base.__class__)
    new.__dict__ = {
        k: (v.copy() if isinstance(v, dict) else v) for k, v in base.__dict__.items() if k not in ("forward", "_kept")
    }
    stored = weight.T.contiguous() if stores_transposed(base) else weight
    new._parameters["weight"] = nn.Parameter(stored, requires_grad=False)
    if bias is not _KEEP and "bias" in new._parameters:
        new._parameters["bias"] = None if bias is None else nn.Parameter(bias, requires_grad=False)
    return new


def adapted_layers(model: nn.Module, name: str | None = None, path: str = "") -> Iterator[tuple[str, AdaptedLinear]]:
    """(path, layer) of every layer that carries an adapter, or the adapter `name`."""
    if isinstance(model, AdaptedLinear):  # nothing inside: a layer in a layer would be ambiguous
        if name is None or name in model.adapters:
            yield path, model
        return
    for child, module in model._modules.items():
        if module is not None:
            yield from adapted_layers(module, name, f"{path}.{child}" if path else child)


@dataclass
class Carried:
    """What a model with adapters keeps beside them. It lives in the model's __dict__, outside its state_dict."""

    attachments: dict[str, Any] = field(default_factory=dict)
    selection: Selection = field(default_factory=Selection)
    trained_before: list[nn.Parameter] = field(default_factory=list)
    merged: bool = False
    hooks: dict[str, Any] = field(default_factory=dict)


def carried(model: nn.Module, create: bool = False) -> Carried:
    found: Carried = model.__dict__.get("_lowrank") or Carried()
    if create:
        model.__dict__["_lowrank"] = found
    return found


def adapter_names(model: nn.Module) -> list[str]:
    """The adapters of a model, in the order in which they were attached."""
    return list(carried(model).attachments)


def training_adapters(model: nn.Module) -> Iterator[Adapter]:
    """The adapters that train; the hooks `param_groups`, `after_step` and `penalty` are for these."""
    for _, layer in adapted_layers(model):
        for adapter in layer.adapters.values():
            if any(p.requires_grad for p in adapter.parameters()):
                yield adapter  # type: ignore[misc]


def require_adapter(model: nn.Module, names: Iterable[str]) -> None:
    known = carried(model).attachments
    for name in names:
        if name not in known:
            if not known:
                raise ValueError(f"the model has no adapter {name!r}: it has none at all; attach or load one first")
            raise unknown("adapter", name, known)


def require_unmerged(model: nn.Module, what: str) -> None:
    if carried(model).merged:
        raise RuntimeError(f"the model is merged: unmerge it before {what}")
