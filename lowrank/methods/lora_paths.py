"""Quicker ways to the sum of `lora.py`, which is their definition: what LoRA's `fused`, `projected` and `grouped` do.

    with gradients      one autograd function for layers that share an input (`kernels/lora_linear.py`)
    without             in place in y = base(x), which nobody else has yet
    an adapter a row    two batched products for all rows of the batch (`kernels/lora_grouped.py`)

A decoding step on a CPU is many small calls. There the update of a layer is one loop, compiled where `lowrank doctor
--compile` was run (`quant/compiled.py`): of one adapter on one thread, which need not wait for another; of an adapter a
row at the speed at which memory gives their factors.
"""

from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank.by_row import Sum
from lowrank.kernels.dispatch import mode
from lowrank.kernels.lora_grouped import lora_grouped, lora_grouped_ref
from lowrank.kernels.lora_linear import Weight, lora_linear
from lowrank.quant import compiled
from lowrank.quant.compiled import held, waves
from lowrank.quant.linear import QuantizedLinear, fresh
from lowrank.quant.linear import linear as quantized_linear
from lowrank.quant.product import product_back

HALF = (torch.bfloat16, torch.float16)
ALONE = 256  # tokens times rank that one thread works through before two would be worth their waiting for each other


def fused(adapter: Any, x: Tensor, base: nn.Module) -> Tensor | None:
    """Base and adapter, without a tensor of its own for the update.

    With 16-bit activations both products of many tokens run in 16 bits; rounding A, B and x Aᵀ changes the update by a
    few units of its last place.
    """
    if torch.is_grad_enabled():
        return None if (together := projected(type(adapter), [adapter], x, [base])) is None else together[0]
    if (adapter.training and adapter.dropout > 0) or not x.is_floating_point():
        return None
    A, B = adapter.lora_A, adapter.lora_B
    short = is_short(x)
    if not short and (x.dtype not in (A.dtype, *HALF) or torch.is_autocast_enabled(x.device.type)):
        return None
    y = fresh(base, x)
    if y.dtype != x.dtype:
        return y + (adapter.scaling * F.linear(F.linear(x.to(A.dtype), A), B)).to(y.dtype)
    if short:
        few = x.dim() == 3 and 0 < x.numel() * len(A) <= ALONE * x.shape[-1] and _plain(x, y)
        fp32 = A.dtype == torch.float32 == B.dtype and A.is_contiguous() and B.is_contiguous()
        if few and fp32 and (add := compiled.loop("lora_short")) is not None:
            add([y, x, A, B, compiled.number(adapter.scaling)])
            return y
        return y.add_(F.linear(F.linear(x.to(A.dtype), A), B), alpha=adapter.scaling)
    h = F.linear(x, A.to(x.dtype)).reshape(-1, len(A))  # (..., I) -> (N, R)
    return y.reshape(-1, y.shape[-1]).addmm_(h, B.to(x.dtype).T.contiguous(), alpha=adapter.scaling).view_as(y)


def is_short(x: Tensor) -> bool:
    """Whether fp32 is quicker than 16 bits: on a CPU, where any product in 16 bits takes 30 µs, up to 32 tokens."""
    return x.is_cpu and x.numel() <= 32 * x.shape[-1]


def projected(method: type[Any], adapters: list[Any], x: Tensor, bases: list[nn.Module]) -> tuple[Tensor, ...] | None:
    """One function with its own backward: x is kept once, the A's are one product, no sum has memory of its own."""
    dropping = any(a.training and a.dropout > 0 for a in adapters)
    if dropping or not torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type):
        return None
    weights = [frozen_weight(base, x.dtype) for base in bases]
    if None in weights:
        return None
    factors = [a.lora_A for a in adapters], [a.lora_B for a in adapters]
    return lora_linear(x, weights, [base.bias for base in bases], *factors, [a.scaling for a in adapters])  # type: ignore[arg-type, misc]


def frozen_weight(base: nn.Module, dtype: torch.dtype) -> Weight | None:
    """The (O, I) weight as `lora_linear` takes it; None where calling the base does more than multiply by it."""
    if base._forward_hooks or base._forward_pre_hooks or any(p.requires_grad for p in base.parameters()):
        return None
    if type(base) is QuantizedLinear and dtype.is_floating_point:
        return partial(quantized_linear, q=base.quantized), partial(product_back, q=base.quantized)
    return base.weight if type(base) is nn.Linear and base.weight.dtype == dtype else None


def grouped(method: type[Any], rows: list[tuple[Any, float]], dtype: torch.dtype) -> Sum | None:
    """Two batched products for all rows; smaller ranks are filled up with zeros."""
    adapters = list(dict.fromkeys(a for a, _ in rows if a is not None))
    if not dtype.is_floating_point or any(a.training and a.dropout > 0 for a in adapters):
        return None
    rank = max(len(a.lora_A) for a in adapters)
    A = torch.stack([F.pad(a.lora_A, (0, 0, 0, rank - len(a.lora_A))) for a in adapters])  # (K, R, I)
    up = torch.stack([F.pad(a.lora_B.T, (0, 0, 0, rank - len(a.lora_A))) for a in adapters])  # (K, R, O)
    index = torch.tensor([0 if a is None else adapters.index(a) for a, _ in rows], device=A.device)  # (N,)
    scaling = A.new_tensor([0.0 if a is None else w * a.scaling for a, w in rows])  # (N,)
    product = lora_grouped if A.is_cuda or mode() == "triton" else lora_grouped_ref

    @cache
    def by_row(kind: torch.dtype) -> tuple[Tensor, Tensor]:
        return A[index].to(kind), (up[index] * scaling[:, None, None]).to(kind)  # (N, R, I), (N, R, O)

    @cache
    def factors(kind: torch.dtype) -> tuple[Any, ...]:
        if A.is_cuda:
            return A.to(kind), up.mT.to(kind), scaling, index
        return by_row(kind)[0], by_row(kind)[1].mT, None, None

    whole = (A.device.type, A.dtype, dtype) == ("cpu", torch.float32, torch.bfloat16)
    add = compiled.loop("lora_rows") if whole else None

    def act(x: Tensor, y: Tensor) -> Tensor:
        in_place = not torch.is_grad_enabled()
        if in_place and add is not None and x.numel() == len(rows) * x.shape[-1] and _plain(x, y):
            given = (y, x) if x.dim() == 3 else (y.view(len(rows), 1, -1), x.view(len(rows), 1, -1))
            add([*given, *by_row(dtype)])
            return y
        kind = A.dtype if is_short(x) or dtype.itemsize != 2 else dtype
        x = x if x.dim() == 3 else x.reshape(len(x), -1, x.shape[-1])  # (N, T, I)
        update = product(x, *factors(kind)).view_as(y)
        return y.add_(update) if in_place else y + update.to(y.dtype)

    return act


def _plain(x: Tensor, y: Tensor) -> bool:
    """Whether loops that read x and change y may do so: bf16 without gaps."""
    return x.dtype == y.dtype == torch.bfloat16 and x.is_contiguous() and y.is_contiguous() and compiled.usable(y)


def add_short(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scaling: Tensor) -> None:
    """y (N, T, O) += scaling x Aᵀ Bᵀ, in bf16 and rounded once; A (R, I) and B (O, R) in fp32, scaling ()."""
    h, up = held((x.float()[:, :, None] * A).sum(-1)), held(B.mT.contiguous())  # (N, T, R), (R, O)
    y.copy_((y.float() + scaling * (h[..., None] * up).sum(-2)).to(y.dtype))


def add_rows(y: Tensor, x: Tensor, A: Tensor, up: Tensor) -> None:
    """y (N, T, O) += x Aᵀ up, row by row, rounded once; A (N, R, I), up (N, R, O). All in bf16, sums in fp32."""
    h = held((x.float()[:, :, None] * A.float()[:, None]).sum(-1))  # (N, T, R)
    y.copy_((y.float() + (h[..., None] * up.float()[:, None]).sum(-2)).to(y.dtype))


def _rows_example() -> list[Tensor]:
    """Sizes all different: what is compiled takes any."""
    return [waves(5, 3, 96), waves(5, 3, 80), waves(5, 8, 80), waves(5, 8, 96)]


def _short_example() -> list[Tensor]:
    factors = waves(8, 80, dtype=torch.float32), waves(96, 8, dtype=torch.float32)
    return [waves(5, 3, 96), waves(5, 3, 80), *factors, torch.tensor(0.3)]


_N, _T, _R, _I, _O = ("rows:1", "tokens:1", "rank:1", "inputs:1", "outputs:1")
_TOKENS: list[dict[int, str] | None] = [{0: _N, 1: _T, 2: _O}, {0: _N, 1: _T, 2: _I}]
_ROWS: list[dict[int, str] | None] = [*_TOKENS, {0: _N, 1: _R, 2: _I}, {0: _N, 1: _R, 2: _O}]
_SHORT = [*_TOKENS, {0: _R, 1: _I}, {0: _O, 1: _R}, None]
_ONE_THREAD: dict[str, object] = {"cpp.threads": 1, "cpp.dynamic_threads": False}
compiled.SOURCES["lora_rows"] = compiled.Source(add_rows, _rows_example, _ROWS, alike=compiled.close)
compiled.SOURCES["lora_short"] = compiled.Source(add_short, _short_example, _SHORT, _ONE_THREAD, compiled.close)
