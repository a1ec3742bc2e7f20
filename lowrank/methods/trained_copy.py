"""A whole layer, trained in a copy of its own: what `train_also` puts beside any method (PEFT's `modules_to_save`)."""

import torch
from torch import Tensor, nn

from lowrank.adapter import Adapter, stores_transposed
from lowrank.quant.linear import QuantizedLinear


class TrainedCopy(Adapter):
    """A trainable copy of a whole layer (a norm, a head, an embedding) in the layer's place (`train_also`)."""

    place = "own"
    needs_y = False

    def __init__(self, config: None, base: nn.Module) -> None:
        super().__init__(config, base)
        if isinstance(base, QuantizedLinear) or not isinstance(getattr(base, "weight", None), Tensor):
            raise ValueError(f"train_also needs a layer with its own dense weight, got {type(base).__name__}")
        self.weight = nn.Parameter(base.weight.detach().float().clone())  # type: ignore[union-attr, operator]
        bias = getattr(base, "bias", None)
        self.bias = nn.Parameter(bias.detach().float().clone()) if isinstance(bias, Tensor) else None
        self.transposed = stores_transposed(base)

    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        state = {"weight": self.weight} | ({} if self.bias is None else {"bias": self.bias})
        # the layer's own dtype: embeddings and norms keep the type that the layers behind them expect
        cast = {name: value.to(base.weight.dtype) for name, value in state.items()}  # type: ignore[union-attr, arg-type]
        return torch.func.functional_call(base, cast, (x,))

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        own = self.weight.T if self.transposed else self.weight
        return own.to(weight.dtype), None if self.bias is None else self.bias.to(weight.dtype)
