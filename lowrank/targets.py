"""Which layers an adapter goes to: match, wrap, unwrap, freeze.

A list element matches a whole dotted suffix ("q_proj", "self_attn.q_proj"); a string is a regular expression that must
match the whole name. Each pattern must match something: a typing error is an error, never half an adapter.
"""

import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lowrank import methods as methods  # registers them
from lowrank.adapter import (
    METHODS,
    AdaptedLinear,
    Adapter,
    TrainedCopy,
    adapted_layers,
    features,
    is_linear,
    may_fuse,
    require_adapter,
)
from lowrank.errors import did_you_mean
from lowrank.quant.linear import QuantizedLinear

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
    return model.__dict__.setdefault("_lowrank_attachments", {})


def places(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, layer) of everything an adapter could be asked to go to; an adapted layer counts as its base."""
    inside: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if path == "" or path.startswith(inside):
            continue
        if isinstance(module, AdaptedLinear):
            inside = (*inside, f"{path}.")
            yield path, module.base
        else:
            yield path, module


def find_targets(
    model: nn.Module, targets: Targets, exclude: Sequence[str] = (), linear_only: bool = True
) -> dict[str, list[str]]:
    """pattern -> names of the layers that it matches. ValueError where a pattern matches nothing, naming what is near."""
    everything = dict(places(model))
    candidates = {
        path: layer for path, layer in everything.items() if is_linear(layer) or isinstance(layer, nn.Embedding)
    }
    if targets == "all-linear":
        chosen = {
            "all-linear": [
                p for p, layer in everything.items() if is_linear(layer) and p.rsplit(".", 1)[-1] not in HEADS
            ]
        }
        if not chosen["all-linear"]:
            raise ValueError("the model has no linear layer beside its head")
        chosen = _by_leaf(chosen["all-linear"])
    else:
        if not targets:
            raise ValueError("targets must name at least one layer, or be None or 'all-linear'")
        patterns = [targets] if isinstance(targets, str) else list(targets)
        chosen = {}
        for pattern in patterns:
            matches = _matches(pattern, isinstance(targets, str), everything)
            if linear_only:
                linear = [path for path in matches if path in candidates]
                if matches and not linear:
                    kind = type(everything[matches[0]]).__name__
                    raise ValueError(
                        f"target {pattern!r} matches {matches[0]}, a {kind}; wanted a linear layer or an embedding"
                    )
                matches = linear
            if not matches:
                leaves = sorted({path.rsplit(".", 1)[-1] for path in (candidates if linear_only else everything)})
                near = did_you_mean(pattern.rsplit(".", 1)[-1], leaves)
                what = "linear layers" if linear_only else "layers"
                raise ValueError(
                    f"no module matches target {pattern!r}{near}; the {what} of this model end in {', '.join(leaves)}"
                )
            chosen[pattern] = matches
    dropped = {path for pattern in exclude for path in _excluded(pattern, everything)}
    kept = {pattern: [path for path in paths if path not in dropped] for pattern, paths in chosen.items()}
    if not any(kept.values()):
        raise ValueError(f"exclude={list(exclude)} leaves no layer of targets {targets!r}")
    return {pattern: paths for pattern, paths in kept.items() if paths}


def _by_leaf(paths: Iterable[str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for path in paths:
        groups.setdefault(path.rsplit(".", 1)[-1], []).append(path)
    return groups


def _matches(pattern: str, is_regex: bool, everything: Iterable[str]) -> list[str]:
    if not is_regex:
        return [path for path in everything if path == pattern or path.endswith("." + pattern)]
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"target {pattern!r} is not a regular expression: {error}") from error
    return [path for path in everything if compiled.fullmatch(path)]


def _excluded(pattern: str, everything: dict[str, nn.Module]) -> list[str]:
    matches = _matches(pattern, False, everything)
    if not matches:
        raise ValueError(
            f"exclude={pattern!r} matches no module{did_you_mean(pattern, [p.rsplit('.', 1)[-1] for p in everything])}"
        )
    return matches


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
    if name in attachments(model):
        raise ValueError(f"the model has an adapter {name!r} already; detach it or choose another name")
    if not name or "." in name:
        raise ValueError(f"an adapter's name must be non-empty and without dots, got {name!r}")
    if any(layer.unmerged for _, layer in adapted_layers(model)):
        raise RuntimeError("the model is merged: unmerge it before attaching another adapter")
    wanted = list(method.default_targets) if isinstance(method.default_targets, tuple) else method.default_targets
    found = find_targets(model, wanted if targets is None else targets, exclude)
    copies = find_targets(model, list(train_also), linear_only=False) if train_also else {}
    layers = dict(places(model))
    adapters: dict[str, Adapter] = {}
    for paths, make in [*((p, method) for p in found.values()), *((p, TrainedCopy) for p in copies.values())]:
        for path in paths:
            if path not in adapters:
                adapters[path] = _build(make, config, layers[path], path)
    _warn_of_rank(config, adapters, layers)
    model.__dict__.setdefault("_lowrank_trained_before", trainable_parameters(model))
    for path, adapter in adapters.items():
        wrap(model, path).adapters[name] = adapter
    attachments(model)[name] = Attachment(
        method=method.method,
        config=config,
        targets=list(targets) if isinstance(targets, list | tuple) else targets,  # type: ignore[arg-type]
        train_also=tuple(train_also),
        layers=tuple(adapters),
    )
    for _, layer in adapted_layers(model):
        layer.active = ((name, 1.0),)
    train_only(model, name)
    own = [adapter for path, adapter in adapters.items() if not isinstance(adapter, TrainedCopy)]
    return Coverage(
        method=method.method,
        name=name,
        layers=found | copies,
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        total=count_parameters(model),
        fused=all(may_fuse(adapter) for adapter in own),
        shapes={path: features(layers[path]) for path in adapters if not isinstance(adapters[path], TrainedCopy)},
    )


def method_of(config: Any) -> type[Adapter]:
    """The method whose configuration this is."""
    for method in METHODS.values():
        if type(config) is method.Config:
            return method
    known = ", ".join(sorted(m.Config.__name__ for m in METHODS.values()))
    raise ValueError(f"wanted a method's configuration ({known}), got {type(config).__name__}")


def _build(method: type[Adapter], config: Any, base: nn.Module, path: str) -> Adapter:
    try:
        adapter = method(None if method is TrainedCopy else config, base)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return adapter.to(next(base.parameters()).device)


def _warn_of_rank(config: Any, adapters: dict[str, Adapter], layers: dict[str, nn.Module]) -> None:
    rank = getattr(config, "rank", 0)
    own = [path for path, adapter in adapters.items() if not isinstance(adapter, TrainedCopy)]
    small = [path for path in own if rank > min(features(layers[path]))]
    if small:
        size = min(features(layers[small[0]]))
        warnings.warn(
            f"rank {rank} is above min(I, O) = {size} of {small[0]} and {len(small) - 1} more: rank {size} says as much",
            stacklevel=3,
        )


def wrap(model: nn.Module, path: str) -> AdaptedLinear:
    """The AdaptedLinear at `path`, put around the layer where there is none yet."""
    layer = model.get_submodule(path)
    if not isinstance(layer, AdaptedLinear):
        layer = AdaptedLinear(layer)
        _replace(model, path, layer)
    return layer


def _replace(model: nn.Module, path: str, layer: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, layer)


def train_only(model: nn.Module, name: str | None) -> None:
    """Only the adapter `name` gets gradients; the base, and every other adapter, is frozen."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for _, layer in adapted_layers(model):
        if name in layer.adapters:
            for parameter in layer.adapters[name].parameters():
                parameter.requires_grad_(True)


def detach(model: nn.Module, name: str = "default") -> None:
    """Take an adapter off, in place. With the last one gone the model is what it was before the first."""
    require_adapter(model, [name])
    if any(layer.unmerged for _, layer in adapted_layers(model)):
        raise RuntimeError("the model is merged: unmerge it before detaching an adapter")
    for path, layer in list(adapted_layers(model)):
        if name in layer.adapters:
            del layer.adapters[name]
        layer.active = tuple((other, weight) for other, weight in layer.active if other != name)
        if not layer.adapters:
            _replace(model, path, layer.base)
    del attachments(model)[name]
    if not attachments(model):
        for parameter in model.__dict__.pop("_lowrank_trained_before"):
            parameter.requires_grad_(True)


def count_parameters(model: nn.Module) -> int:
    """Parameters of base and adapters, a quantized weight counted by its values and not by its bytes."""
    total, inside = 0, set()
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            total += module.in_features * module.out_features
            total += 0 if module.bias is None else module.bias.numel()
            inside.update(map(id, module.parameters()))
    return total + sum(p.numel() for p in model.parameters() if id(p) not in inside)


def trainable_parameters(model: nn.Module) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]
