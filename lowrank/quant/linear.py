"""A linear layer over a quantized weight: y = x Qᵀ + b, Q decoded in forward and AGAIN in backward.

No dense copy is kept between layers or between forward and backward (`product.py`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank.kernels.dispatch import use_triton
from lowrank.kernels.nf4_linear import nf4_linear
from lowrank.quant.formats import parse_format
from lowrank.quant.packed import (
    PACKED_ROWS,
    ordered_product,
    ordered_product_works,
    pack_product,
    packable,
    second_level,
)
from lowrank.quant.product import product, product_back
from lowrank.quant.tensor import QuantizedTensor


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, q: QuantizedTensor) -> Tensor:
        ctx.q = q
        return product(x, q, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        dx = product_back(dy, ctx.q) if ctx.needs_input_grad[0] else None
        dbias = dy.reshape(-1, dy.shape[-1]).sum(0) if ctx.needs_input_grad[1] else None
        return dx, dbias, None


def linear(x: Tensor, q: QuantizedTensor, bias: Tensor | None = None) -> Tensor:
    """y = x Qᵀ + b in the dtype of x, differentiable in x and b.  (..., I), (O, I) -> (..., O)"""
    if q.format == "nf4" and use_triton(x, q.codes):
        return nf4_linear(x, q.codes, q.scales, q.shape[0], q.block_size, bias, second_level(q))
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return _Linear.apply(x, bias, q)
    return product(x, q, bias)


class _Kept:
    """Weights in the form that is read fastest, from first use on while they fit into the budget.

    For bf16 on a CPU that is oneDNN's order, or packed int4 codes (`packed.py`); else quantized weights are decoded.
    """

    def __init__(self, budget_bytes: int) -> None:
        self.budget = self.left = budget_bytes
        self.plain = False  # dense weights keep their order, for compiled loops that read them (models/one_row.py)
        self.forms: dict[Any, tuple[Any, ...]] = {}  # layers and dtype -> (product or None, its sources, the layers)

    def product(self, layers: tuple[nn.Module, ...], x: Tensor) -> Tensor | None:
        """x [Q₁ᵀ Q₂ᵀ ...] + b, the outputs side by side; None where the layers have to work as they are."""
        form = self.form(layers, x)
        return None if form is None else form(x)

    def form(self, layers: tuple[nn.Module, ...], x: Tensor) -> Callable[[Tensor], Tensor] | None:
        int4 = layers[0].__dict__.get("_layout", " ")[0].startswith("int4")
        few = int4 and x.numel() < PACKED_ROWS * x.shape[-1] and not self.plain
        key = (*map(id, layers), x.dtype, few, self.plain)
        form, sources, _ = found = self.forms.get(key, (None, None, None))
        if sources is None or any(at[name] is not p or p._version != v for at, name, p, v in sources):
            sources = [
                (layer._parameters, name, p, p._version)
                for layer in layers
                for name, p in layer._parameters.items()
                if p is not None
            ]
            form = self._form(layers, x, few, paid=found[0] is not None)
            self.forms[key] = form, sources, layers  # which live as long, so that no other layer gets the same id
        return form

    def _form(self, layers: tuple[Any, ...], x: Tensor, few: bool, paid: bool) -> Callable[[Tensor], Tensor] | None:
        qs = [layer.quantized for layer in layers if isinstance(layer, QuantizedLinear)]
        biases = [layer.bias for layer in layers if layer.bias is not None]
        alike = len(qs) in (0, len(layers)) and len(biases) in (0, len(layers))
        if not alike or any(layer.__dict__.get("_kept") is not self for layer in layers):  # an adapter's layer, for one
            return None
        if any(q.format == "nf4" and use_triton(x, q.codes) for q in qs):  # reading 4 bits is faster than a dense copy
            return None
        packed = few and len({(q.format, q.block_size) for q in qs}) == 1 and all(packable(q, x) for q in qs)
        bf16 = x.dtype == torch.bfloat16 and x.device.type == "cpu"
        ordered = bf16 and not (packed or self.plain) and ordered_product_works()
        numel = sum(layer.out_features * layer.in_features for layer in layers)
        size = numel // 2 + 4 * sum(q.scales.numel() for q in qs) if packed else numel * x.dtype.itemsize
        if not (qs or (ordered and layers[0].weight.dtype == x.dtype)) or (not paid and size > self.left):
            return None
        self.left -= 0 if paid else size
        bias = torch.cat(biases).detach() if biases else None
        if packed:
            return pack_product(qs, bias)
        dense = [q.dequantize(x.dtype) for q in qs] or [layer.weight for layer in layers]
        weight = torch.cat(dense) if len(dense) > 1 else dense[0]
        return ordered_product(weight, bias) if ordered else partial(F.linear, weight=weight, bias=bias)

    def __deepcopy__(self, memo: Any) -> None:
        """A copy of a layer has no share in it."""


@contextmanager
def decoded(model: nn.Module, budget_bytes: int = 2**30) -> Iterator[None]:
    """Inside the block each linear layer keeps its weight in the form that is read fastest, `budget_bytes` in all.

    For generation, which reads every weight once a token. It acts only where no gradient is taken. A quantized layer
    decodes once; bf16 weights on a CPU get a copy in oneDNN's order; layers that share an input work as one
    (`adapter.project`). Layers that do not fit work as before; all copies are dropped at the end of the block. The
    values are the same as without, but for int4 and int4-affine in bf16 at fewer than 8 rows (see `packed.py`).
    """
    kept, changed = _Kept(budget_bytes), []
    for layer in model.modules():
        dense = type(layer) is nn.Linear and ordered_product_works() and layer.weight.dtype == torch.bfloat16
        if (dense or isinstance(layer, QuantizedLinear)) and layer.__dict__.get("_kept") is None:
            layer._kept = kept  # type: ignore[assignment]
            changed.append(layer)
        if dense and "forward" not in layer.__dict__:
            layer.forward = partial(_kept_forward, layer)  # type: ignore[method-assign, arg-type]
    try:
        yield
    finally:
        for layer in changed:
            del layer._kept
            if "forward" in layer.__dict__ and not own_forward(layer):
                del layer.forward


def own_forward(layer: nn.Module) -> bool:
    """Whether somebody replaced this one object's forward (`decoded` aside)."""
    forward = layer.__dict__.get("forward")
    return forward is not None and getattr(forward, "func", None) is not _kept_forward


def fresh(layer: nn.Module, x: Tensor, *context: Any) -> Tensor:
    """layer(x), which may be written to: a copy where a hook, an edit or a class of somebody's may have kept it."""
    kind, every = type(layer), torch.nn.modules.module
    hooked = layer._forward_hooks or every._global_forward_hooks
    asked = hooked or layer._forward_pre_hooks or every._global_forward_pre_hooks or context
    if not asked and kind is nn.Linear and nn.Linear.forward is _FORWARD and "forward" not in layer.__dict__:
        return F.linear(x, layer.weight, layer.bias)  # type: ignore[arg-type]  # calling it, in fewer steps
    y: Tensor = layer(x, *context)
    return y if kind in (nn.Linear, QuantizedLinear) and not (hooked or own_forward(layer)) else y.clone()


_FORWARD = nn.Linear.forward


def _kept_forward(layer: nn.Linear, x: Tensor) -> Tensor:
    kept: Any = layer._kept
    y = None if kept is None or torch.is_grad_enabled() else kept.product((layer,), x)
    return F.linear(x, layer.weight, layer.bias) if y is None else y


class QuantizedLinear(nn.Module):
    """nn.Linear over a quantized (O, I) weight. Its parts are frozen Parameters, named as in QuantizedTensor."""

    bias: nn.Parameter | None
    _kept: _Kept | None = None  # see `decoded`

    def __init__(self, q: QuantizedTensor, bias: Tensor | None = None) -> None:
        super().__init__()
        if len(q.shape) != 2:
            raise ValueError(f"QuantizedLinear needs a weight of two dimensions (O, I), got {q.shape}")
        self.out_features, self.in_features = q.shape
        for name, part in q.parts().items():
            self.register_parameter(name, nn.Parameter(part, requires_grad=False))
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias, requires_grad=False)
        self.register_parameter("bias", bias)
        self._layout = (q.format, q.shape, q.dtype, q.block_size)
        self._part_names = tuple(q.parts())
        self._made: QuantizedTensor | None = None
        self._made_from: list[nn.Parameter | None] = []

    @property
    def quantized(self) -> QuantizedTensor:
        """The weight as one value over this layer's own parameters; made again when they were replaced."""
        parts = [self._parameters[name] for name in self._part_names]
        if self._made is None or any(a is not b for a, b in zip(parts, self._made_from)):
            fields: dict[str, Any] = {name: p.detach() for name, p in zip(self._part_names, parts) if p is not None}
            self._made, self._made_from = QuantizedTensor(*self._layout, **fields), parts
        return self._made

    def forward(self, x: Tensor) -> Tensor:
        if self._kept is not None and not torch.is_grad_enabled() and (y := self._kept.product((self,), x)) is not None:
            return y
        return linear(x, self.quantized, self._parameters["bias"])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedLinear":
        """Move to a device, never to another dtype: .to(torch.bfloat16) would round the scales and so every weight."""
        for name in self._part_names:
            part = self._parameters[name]
            assert part is not None
            moved = fn(part.detach().reshape(-1).view(torch.uint8))  # as bytes, which a change of dtype passes by
            self._parameters[name] = nn.Parameter(moved.view(part.dtype).view(part.shape), requires_grad=False)
        bias = self._parameters["bias"]
        if bias is not None:
            self._parameters["bias"] = nn.Parameter(fn(bias.detach()), requires_grad=bias.requires_grad)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """The keys of QuantizedTensor.state_dict under `weight`, so that a saved model reads like bitsandbytes'."""
        destination.update(self.quantized.state_dict(f"{prefix}weight"))
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias if keep_vars else self.bias.detach()

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        bias = state_dict.get(f"{prefix}bias")
        if self.bias is not None and bias is None:
            missing_keys.append(f"{prefix}bias")
        own = self.quantized
        try:
            q = QuantizedTensor.from_state_dict(state_dict, f"{prefix}weight")
            if self._key(q) != self._key(own):
                raise ValueError(f"{prefix}weight holds {self._key(q)}, this layer {self._key(own)}")
            if self.bias is not None and bias is not None:
                if bias.shape != self.bias.shape:
                    raise ValueError(f"{prefix}bias must be ({self.out_features},), got {tuple(bias.shape)}")
                self.bias.data.copy_(bias)
        except ValueError as error:
            error_msgs.append(str(error))
            return
        for name, part in q.parts().items():
            getattr(own, name).copy_(part)

    @staticmethod
    def _key(q: QuantizedTensor) -> tuple[str, tuple[int, ...], int, bool]:
        return q.format, q.shape, q.block_size, q.double_quant

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_made": None, "_made_from": [], "_kept": None}  # a copy makes its own

    def extra_repr(self) -> str:
        format, _, dtype, block_size = self._layout
        double = "-dq" if "nested_absmax" in self._part_names else ""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, {format}{double}, block_size={block_size}, {dtype}"


def quantize_model(
    model: nn.Module, format: str = "nf4-dq", block_size: int = 64, exclude: Sequence[str] = ("lm_head",)
) -> list[str]:
    """Replace each nn.Linear by a QuantizedLinear, in place and one at a time; the names of the replaced layers.

    `exclude` names layers by a whole dotted suffix: "lm_head", "self_attn.q_proj".
    """
    base, double_quant = parse_format(format)
    found = [
        (name, module)
        for name, module in model.named_modules()
        if type(module) is nn.Linear and not any(f".{name}".endswith(f".{suffix}") for suffix in exclude)
    ]
    for name, module in found:
        q = QuantizedTensor.quantize(module.weight, base, block_size, double_quant, name=f"{name}.weight")
        parent = model.get_submodule(name.rpartition(".")[0])
        new = QuantizedLinear(q, module.bias)
        new.train(module.training)
        setattr(parent, name.rpartition(".")[2], new)
    return [name for name, _ in found]
