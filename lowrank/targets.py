"""Which layers an adapter goes to: match, wrap, unwrap, freeze.

A list element matches a whole dotted suffix ("q_proj", "self_attn.q_proj"); a string is a regular expression that must
match the whole name. Each pattern must match something: a typing error is an error, never half an adapter.
"""

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lowrank import methods as methods  # registers them
from lowrank.adapter import (
    METHODS,
    Acting,
    AdaptedLinear,
    Adapter,
    Slot,
    Weights,
    adapted_layers,
    carried,
    features,
    is_linear,
    require_adapter,
    require_unmerged,
)
from lowrank.errors import did_you_mean
from lowrank.methods.trained_copy import TrainedCopy
from lowrank.quant.linear import QuantizedLinear
from lowrank.virtual import make_room

HEADS = {"lm_head", "output_layer", "classifier", "score", "decoder", "qa_outputs"}
Targets = str | Sequence[str] | None


@dataclass(frozen=True)
class Attachment:
    """What `attach` was asked for; kept on the model and written with the adapter."""

    method: str
    config: Any
    targets: str | list[str] | None
    train_also: tuple[str, ...]
    layers: tuple[str, ...]


@dataclass(frozen=True)
class Coverage:
    """What an attach reached. `layers`: pattern -> names of the layers it matched."""

    method: str
    name: str
    layers: dict[str, list[str]]
    trainable: int
    total: int
    fused: bool
    shapes: dict[str, tuple[int, int]] = field(default_factory=dict)

    def rows(self) -> list[tuple[str, int, str, str]]:
        """(pattern, layers, shapes I -> O, path) for the coverage table."""
        rows = []
        for pattern, names in self.layers.items():
            shapes = sorted({self.shapes[name] for name in names if name in self.shapes})
            text = ", ".join(f"{i} -> {o}" for i, o in shapes) or "copy"
            rows.append((pattern, len(names), text, "fused" if self.fused and shapes else "reference"))
        return rows

    def __str__(self) -> str:
        lines = [
            f"{pattern:<16} {count:>4} layers  {shapes:<24} {path}" for pattern, count, shapes, path in self.rows()
        ]
        share = 100 * self.trainable / max(self.total, 1)
        return "\n".join([*lines, f"trainable {self.trainable:,} of {self.total:,} ({share:.3f} %)"])


def attachments(model: nn.Module) -> dict[str, Attachment]:
    """The adapters of a model by name, each with what it was made from."""
    return carried(model).attachments


def places(model: nn.Module, path: str = "") -> dict[str, nn.Module]:
    """path -> layer of everything an adapter could be asked to go to; an adapted layer counts as its base."""
    found: dict[str, nn.Module] = {}
    for child, inner in model._modules.items():
        if inner is not None:
            name = f"{path}.{child}" if path else child
            if isinstance(inner, AdaptedLinear):
                found[name] = inner.base
            else:
                found |= {name: inner, **places(inner, name)}
    return found


def find_targets(
    model: nn.Module, targets: Targets, exclude: Sequence[str] = (), place: str = "linear"
) -> dict[str, list[str]]:
    """pattern -> names of the layers that it matches. ValueError where one matches nothing, naming what is near."""
    everything = places(model)
    candidates = [path for path, layer in everything.items() if fits(layer, place)]
    if not candidates:
        raise ValueError(_no_place(model, place))
    if targets == "all-linear":
        chosen = _by_leaf(p for p in candidates if is_linear(everything[p]) and _leaf(p) not in HEADS)
    elif targets == "all" and place != "linear":
        chosen = _by_leaf(candidates)
    else:
        if not targets:
            raise ValueError("targets must name at least one layer, or be None or 'all-linear'")
        chosen = {}
        for pattern in [targets] if isinstance(targets, str) else targets:
            found = named(pattern, isinstance(targets, str), everything, "target", candidates)
            chosen[pattern] = [path for path in found if fits(everything[path], place)]
            if not chosen[pattern]:
                kind = type(everything[found[0]]).__name__
                raise ValueError(f"target {pattern!r} matches {found[0]}, a {kind}; wanted {KINDS[place]}")
    dropped = {path for pattern in exclude for path in named(pattern, False, everything, "exclude", candidates)}
    kept = {pattern: [path for path in paths if path not in dropped] for pattern, paths in chosen.items()}
    if not any(kept.values()):
        raise ValueError(f"exclude={list(exclude)} leaves no layer of targets {targets!r} (heads are none of them)")
    return {pattern: paths for pattern, paths in kept.items() if paths}


KINDS = {
    "linear": "a linear layer or an embedding",
    "own": "a layer with a weight of its own (a norm, a head, an embedding)",
    "sublayer": "the output of a sub-layer",
    "attention prefix": "an attention prefix slot",
    "embeddings": "the input embedding",
}


def fits(layer: nn.Module, place: str) -> bool:
    """Whether a method of this place may go to `layer`: decided by what the layer is, never by the model's class."""
    if place == "linear":
        return is_linear(layer) or isinstance(layer, nn.Embedding)
    if place == "own":
        return isinstance(getattr(layer, "weight", None), torch.Tensor) and not isinstance(layer, QuantizedLinear)
    if place == "embeddings":
        return isinstance(layer, nn.Embedding)
    return isinstance(layer, Slot) and layer.place == place


def _no_place(model: nn.Module, place: str) -> str:
    if place in ("sublayer", "attention prefix"):
        return (
            f"{type(model).__name__} does not offer {KINDS[place]}: lowrank's own models do (lowrank.load), or put a"
            f" lowrank.adapter.Slot({place!r}, ...) into yours"
        )
    return f"{type(model).__name__} has nothing that an adapter of place {place!r} could go to ({KINDS[place]})"


def _leaf(path: str) -> str:
    return path.rsplit(".", 1)[-1]


def _by_leaf(paths: Iterable[str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for path in paths:
        groups.setdefault(_leaf(path), []).append(path)
    return groups


def matches(pattern: str, is_regex: bool, everything: Iterable[str]) -> list[str]:
    """The paths that a pattern names: by whole dotted suffix, or by a regular expression for the whole path."""
    if not is_regex:
        return [path for path in everything if path == pattern or path.endswith("." + pattern)]
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"target {pattern!r} is not a regular expression: {error}") from error
    return [path for path in everything if compiled.fullmatch(path)]


def named(pattern: str, is_regex: bool, paths: Iterable[str], what: str, likely: Iterable[str]) -> list[str]:
    """What `matches` finds; where that is nothing, a ValueError with the names that are likely to be meant."""
    if found := matches(pattern, is_regex, paths):
        return found
    leaves = sorted({_leaf(path) for path in likely})
    near = did_you_mean(_leaf(pattern), leaves)
    raise ValueError(
        f"no module matches {what} {pattern!r}{near}; the layers that it may name end in {', '.join(leaves)}"
    )


def check_targets(
    model: nn.Module, config: Any, targets: Targets, exclude: Sequence[str] = (), train_also: Sequence[str] = ()
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Where `attach` would put the method, and which layers it would copy (pattern -> names); nothing is changed."""
    method = method_of(config)
    wanted = list(method.default_targets) if isinstance(method.default_targets, tuple) else method.default_targets
    found = find_targets(model, wanted if targets is None else targets, exclude, method.place)
    return found, find_targets(model, list(train_also), place="own") if train_also else {}


def attach(
    model: nn.Module,
    config: Any,
    targets: Targets = None,
    exclude: Sequence[str] = (),
    train_also: Sequence[str] = (),
    name: str = "default",
) -> Coverage:
    """Put a new adapter on `model`, in place, make it the only active one and the only one that trains.

    `config` is a method's configuration, such as LoRAConfig(rank=8); `targets=None` is that method's own choice.
    `train_also` names norms, heads or embeddings that train as a whole, each in a copy of its own.
    Raises ValueError where a pattern matches nothing, the name is taken, or a layer cannot carry the method; the model
    is then as it was.
    """
    method = method_of(config)
    check_name(model, name)
    require_unmerged(model, "attaching another adapter")
    found, copies = check_targets(model, config, targets, exclude, train_also)
    config, adapters = build(model, config, flat(found), flat(copies))
    _warn_of_rank(config, adapters, places(model))
    asked: Any = targets if targets is None or isinstance(targets, str) else list(targets)
    put(model, name, adapters, Attachment(method.method, config, asked, tuple(train_also), tuple(adapters)))
    return coverage(model, name, found | copies)


def flat(found: dict[str, list[str]]) -> list[str]:
    return list(dict.fromkeys(path for paths in found.values() for path in paths))


def check_name(model: nn.Module, name: str) -> None:
    if name in attachments(model):
        raise ValueError(f"the model has an adapter {name!r} already; detach it or choose another name")
    if not name or "." in name or hasattr(nn.ModuleDict(), name):
        raise ValueError(
            f"an adapter's name must be non-empty, without dots and no word of torch's modules (train, values, ...),"
            f" got {name!r}"
        )


def build(
    model: nn.Module, config: Any, paths: Iterable[str], copies: Iterable[str] = ()
) -> tuple[Any, dict[str, Adapter]]:
    """The completed configuration and path -> adapter for exactly these layers. The model is not touched."""
    layers, method = places(model), method_of(config)
    paths = list(paths)
    if absent := [path for path in (*paths, *copies) if path not in layers]:
        raise ValueError(f"the model has no layer {absent[0]!r}{did_you_mean(absent[0], layers)}")
    config = method.complete(config, {path: layers[path] for path in paths})
    adapters = {path: _build(method, config, layers[path], path) for path in paths}
    if both := sorted(adapters.keys() & set(copies)):
        raise ValueError(f"{both[0]} is a target and in train_also: it takes an adapter or trains in a copy, not both")
    adapters |= {path: _build(TrainedCopy, config, layers[path], path) for path in copies}
    own = tuple(adapter for adapter in adapters.values() if not isinstance(adapter, TrainedCopy))
    for adapter in own:
        adapter.__dict__["peers"] = own  # past nn.Module, which would register them
    return config, adapters


def put(model: nn.Module, name: str, adapters: Mapping[str, Adapter], attachment: Attachment) -> None:
    """Set built adapters on the model, as the only active one and the only one that trains."""
    state = carried(model, create=True)
    if not state.attachments:
        state.trained_before = trainable_parameters(model)
    for path, adapter in adapters.items():
        layer = wrap(model, path)
        layer.put(name, adapter)
        if adapter.place == "embeddings":
            state.hooks[name] = make_room(model, layer)
    state.attachments[name] = attachment
    state.selection.now = Acting(((name, 1.0),))
    train_only(model, name)


def coverage(model: nn.Module, name: str, found: dict[str, list[str]] | None = None) -> Coverage:
    """What the adapter `name` reaches, for the coverage table."""
    layers = places(model)
    adapters = {path: layer.adapters[name] for path, layer in adapted_layers(model, name)}
    own = {path: adapter for path, adapter in adapters.items() if not isinstance(adapter, TrainedCopy)}
    trainable, total = count_parameters(model)
    return Coverage(
        method=attachments(model)[name].method,
        name=name,
        layers=found or _by_leaf(adapters),
        trainable=trainable,
        total=total,
        fused=all(adapter.may("fused") for adapter in own.values()),  # type: ignore[operator]
        shapes={path: shape for path in own if (shape := shape_of(layers[path])) is not None},
    )


def shape_of(layer: nn.Module) -> tuple[int, int] | None:
    return None if isinstance(layer, Slot) else features(layer)


def method_of(config: Any) -> type[Adapter]:
    """The method whose configuration this is."""
    for method in METHODS.values():
        if type(config) is method.Config:
            return method
    known = ", ".join(sorted(m.Config.__name__ for m in METHODS.values()))
    raise ValueError(f"wanted a method's configuration ({known}), got {type(config).__name__}")


def _build(method: type[Adapter], config: Any, base: nn.Module, path: str) -> Adapter:
    own = config.at(path) if hasattr(config, "at") else config  # settings that differ by layer (rank patterns)
    try:
        adapter = method(None if method is TrainedCopy else own, base)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    parameter = next(base.parameters(), None)
    return adapter if parameter is None or parameter.device.type == "cpu" else adapter.to(parameter.device)


def _warn_of_rank(config: Any, adapters: dict[str, Adapter], layers: dict[str, nn.Module]) -> None:
    rank = getattr(config, "rank", 0)
    own = [path for path, adapter in adapters.items() if not isinstance(adapter, TrainedCopy)]
    small = [path for path in own if (shape := shape_of(layers[path])) is not None and rank > min(shape)]
    if small:
        size = min(features(layers[small[0]]))
        warnings.warn(
            f"rank {rank} is above min(I, O) = {size} of {small[0]} and {len(small) - 1} more: {size} says as much",
            stacklevel=3,
        )


def wrap(model: nn.Module, path: str) -> AdaptedLinear:
    """The AdaptedLinear at `path`, put around the layer where there is none yet."""
    parent, _, leaf = path.rpartition(".")
    owner = model.get_submodule(parent)
    layer = owner._modules[leaf]
    if not isinstance(layer, AdaptedLinear):
        layer = AdaptedLinear(layer, carried(model).selection)  # type: ignore[arg-type]
        layer.training = layer.base.training
        setattr(owner, leaf, layer)
    return layer


def train_only(model: nn.Module, name: str | None) -> None:
    """Only the adapter `name` gets gradients; the base, and every other adapter, is frozen."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for _, layer in adapted_layers(model):
        if name is not None and name in layer.adapters:
            for parameter in layer.adapters[name].parameters():
                parameter.requires_grad_(True)


def detach(model: nn.Module, name: str = "default") -> None:
    """Take an adapter off, in place. With the last one gone the model is what it was before the first."""
    require_adapter(model, [name])
    require_unmerged(model, "detaching an adapter")
    state = carried(model)
    for path, layer in list(adapted_layers(model)):
        if name in layer.adapters:
            layer.remove(name)
        if not layer.adapters:
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, layer.base)
    now, left = state.selection.now, set(dict(adapted_layers(model)).values())

    def others(weights: Weights) -> Weights:
        return tuple(item for item in weights if item[0] != name)

    state.selection.now = Acting(others(now.everywhere), {at: others(w) for at, w in now.layers.items() if at in left})
    del state.attachments[name]
    if (hook := state.hooks.pop(name, None)) is not None:
        hook.remove()
    if not state.attachments:
        for parameter in state.trained_before:
            parameter.requires_grad_(True)
        del model.__dict__["_lowrank"]


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) of base and adapters, a quantized weight counted by its values and not by its bytes."""
    sizes: dict[int, int] = {}  # by id: a shared parameter counts once
    trainable = 0
    for module in model.modules():
        for p in module._parameters.values():
            if p is not None and id(p) not in sizes:
                sizes[id(p)] = p.numel()
                trainable += p.numel() if p.requires_grad else 0
        if isinstance(module, QuantizedLinear):
            parts = module.quantized.parts()
            sizes |= {id(module._parameters[name]): 0 for name in parts}
            sizes[id(module)] = module.in_features * module.out_features
    return trainable, sum(sizes.values())


def trainable_parameters(model: nn.Module) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]
