"""Several adapters into a new one. Every method acts on the updates Dᵢ = mergeᵢ(W) - W, never on their factors.

    linear, cat   Σ wᵢ Dᵢ exactly; from LoRAs, of rank Σ rᵢ          svd        the same, cut to `rank`
    magnitude     Σ wᵢ keep(Dᵢ), the largest `density` of entries    dare       Σ wᵢ drop(Dᵢ) / density at random
    ties          keep, elect a sign for each entry, average wᵢ Dᵢ over those that agree

TIES (Yadav et al., 2023), arXiv:2306.01708; DARE (Yu et al., 2023), arXiv:2311.03099. The result is a LoRA whose
scaling is 1; its rank grows as far as it must, unless `rank` cuts it by SVD.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.adapter import AdaptedLinear, Adapter, adapted_layers, dense_weight, require_adapter, require_unmerged
from lowrank.errors import unknown
from lowrank.methods.lora import LoRA, LoRAConfig
from lowrank.methods.trained_copy import TrainedCopy
from lowrank.targets import Attachment, attachments, build, check_name, put, trainable_parameters

METHODS = ("linear", "cat", "svd", "ties", "dare", "magnitude")
OPTIONS = {"rank", "density", "majority", "seed"}
Factors = tuple[Tensor, Tensor]  # A (R, I) and B (O, R)


def combine(
    model: nn.Module, weights: Mapping[str, float], method: str = "linear", name: str = "mix", **options: Any
) -> str:
    """Make the adapter `name` out of others; it is the only active one then, and frozen. What trained goes on to.

    Options: `rank` (of the result; svd takes the largest input rank), `density` (share of entries kept, default 0.5),
    `majority` ("total" or "frequency", how TIES elects a sign), `seed` (of DARE). Returns the name.
    """
    if method not in METHODS:
        raise unknown("combination method", method, METHODS)
    for option in options:
        if option not in OPTIONS:
            raise unknown("option of combine", option, OPTIONS)
    if not isinstance(weights, Mapping) or not weights:
        raise ValueError(f"combine needs adapters with weights, such as {{'a': 0.7, 'b': 0.3}}, got {weights!r}")
    require_adapter(model, weights)
    require_unmerged(model, "combining adapters")
    check_name(model, name)
    mix = _mixer(method, options)
    rank = options.get("rank")
    if rank is not None and rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    factors: dict[str, Factors] = {}
    copies: dict[str, dict[str, Tensor]] = {}
    for path, layer in adapted_layers(model):
        acting = [(layer.adapters[n], float(w)) for n, w in weights.items() if n in layer.adapters]
        if not acting:
            continue
        if any(isinstance(adapter, TrainedCopy) for adapter, _ in acting):
            copies[path] = _mixed_copy(path, layer, acting, mix)
        else:
            factors[path] = _factors(path, layer, acting, method, mix, rank)
    sizes = {path: len(A) for path, (A, _) in factors.items()}
    largest = max(sizes.values(), default=1)
    other = {re.escape(path): size for path, size in sizes.items() if size != largest}
    config = LoRAConfig(
        rank=largest, alpha=largest, rank_pattern=other, alpha_pattern={key: float(r) for key, r in other.items()}
    )
    config, adapters = build(model, config, factors, copies)
    with torch.no_grad():
        for path, (A, B) in factors.items():
            adapters[path].get_parameter("lora_A").copy_(A)
            adapters[path].get_parameter("lora_B").copy_(B)
        for path, state in copies.items():
            adapters[path].load_state_dict(state)
    trained = trainable_parameters(model)
    train_also = tuple(dict.fromkeys(n for part in weights for n in attachments(model)[part].train_also))
    put(model, name, adapters, Attachment("lora", config, list(factors), train_also, tuple(adapters)))
    for adapter in adapters.values():
        adapter.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    return name


Mixer = Callable[[list[Tensor], list[float]], Tensor]


def _mixer(method: str, options: Mapping[str, Any]) -> Mixer:
    density, majority = float(options.get("density", 0.5)), options.get("majority", "total")
    if not 0 < density <= 1:
        raise ValueError(f"density must lie in (0, 1], got {density}")
    if majority not in ("total", "frequency"):
        raise ValueError(f"majority must be 'total' or 'frequency', got {majority!r}")
    if method == "ties":
        return lambda deltas, weights: ties(deltas, weights, density, majority)
    if method == "magnitude":
        return lambda deltas, weights: weighted_sum([keep_largest(d, density) for d in deltas], weights)
    if method == "dare":
        generator = torch.Generator().manual_seed(int(options.get("seed", 0)))
        return lambda deltas, weights: weighted_sum([drop(d, density, generator) for d in deltas], weights)
    return weighted_sum


def weighted_sum(deltas: list[Tensor], weights: list[float]) -> Tensor:
    return torch.stack([weight * delta for delta, weight in zip(deltas, weights)]).sum(0)


def keep_largest(delta: Tensor, density: float) -> Tensor:
    """The share `density` of entries that are largest in size; the others are 0."""
    kept = delta.abs().flatten().topk(int(density * delta.numel())).indices
    return torch.zeros_like(delta).flatten().index_copy(0, kept, delta.flatten()[kept]).view_as(delta)


def drop(delta: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Each entry survives with probability `density` and is divided by it: the expectation stays."""
    alive = torch.rand(delta.shape, generator=generator) < density
    return delta * alive.to(delta) / density


def ties(deltas: list[Tensor], weights: list[float], density: float, majority: str = "total") -> Tensor:
    kept = torch.stack([keep_largest(delta, density) for delta in deltas])  # (N, O, I)
    votes = kept if majority == "total" else kept.sign()
    elected = torch.where(votes.sum(0) >= 0, 1.0, -1.0)  # (O, I)
    agree = (kept.sign() == elected).to(kept)
    weighted = kept * kept.new_tensor(weights).view(-1, *[1] * (kept.dim() - 1))
    return (weighted * agree).sum(0) / agree.sum(0).clamp(min=1)


@torch.no_grad()
def _factors(
    path: str,
    layer: AdaptedLinear,
    acting: list[tuple[Any, float]],
    method: str,
    mix: Mixer,
    rank: int | None,
) -> Factors:
    adapters, weights = [a for a, _ in acting], [w for _, w in acting]
    plain = all(type(a) is LoRA for a in adapters)
    if method in ("linear", "cat") and plain:
        A = torch.cat([a.lora_A for a in adapters]).float()
        B = torch.cat([w * a.scaling * a.lora_B for a, w in acting], dim=1).float()
        return (A, B) if rank is None or rank >= len(A) else cut(B @ A, rank)
    if method == "svd" and rank is None:
        if not all(hasattr(a, "lora_A") for a in adapters):
            raise ValueError(f"{path}: svd needs rank= here, for not every adapter has one")
        rank = max(len(a.lora_A) for a in adapters)
    return cut(mix([delta(path, layer, a) for a in adapters], weights), rank)


@torch.no_grad()
def delta(path: str, layer: AdaptedLinear, adapter: Adapter) -> Tensor:
    """D = merge(W) - W.  (O, I)"""
    if not adapter.mergeable or adapter.place != "linear":
        raise ValueError(f"{path}: method {adapter.method!r} has no update of a weight that could be combined")
    if type(adapter) is LoRA:
        return adapter.scaling * adapter.lora_B.float() @ adapter.lora_A.float()
    weight, bias = dense_weight(layer.base).float(), getattr(layer.base, "bias", None)
    merged, new_bias = adapter.merge(weight, None if bias is None else bias.detach().float())
    if new_bias is not None and (bias is None or not torch.equal(new_bias, bias.float())):
        raise ValueError(f"{path}: method {adapter.method!r} also changes the bias, which a LoRA cannot hold")
    return merged - weight


def cut(update: Tensor, rank: int | None) -> Factors:
    """B A = the best approximation of rank `rank`; None keeps every singular value above fp32 rounding."""
    U, S, Vt = torch.linalg.svd(update, full_matrices=False)
    if rank is None:
        rank = max(int((S / S[0].clamp(min=1e-30) > max(update.shape) * torch.finfo(torch.float32).eps).sum()), 1)
    R = min(rank, len(S))
    A, B = update.new_zeros(rank, update.shape[1]), update.new_zeros(update.shape[0], rank)
    A[:R], B[:, :R] = Vt[:R], U[:, :R] * S[:R]
    return A, B


@torch.no_grad()
def _mixed_copy(path: str, layer: AdaptedLinear, acting: list[tuple[Any, float]], mix: Mixer) -> dict[str, Tensor]:
    """W + the mix of what each copy adds to it; the same for the bias."""
    if not all(isinstance(adapter, TrainedCopy) for adapter, _ in acting):
        raise ValueError(f"{path}: one adapter holds a copy of the layer and another an update: combine neither")
    weights = [w for _, w in acting]
    base = dict(layer.base.named_parameters())
    return {
        key: base[key].float() + mix([adapter.get_parameter(key) - base[key].float() for adapter, _ in acting], weights)
        for key in acting[0][0].state_dict()
    }
