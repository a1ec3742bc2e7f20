"""(IA)³: Infused Adapter by Inhibiting and Amplifying Inner Activations (Liu et al., 2022), arXiv:2205.05638.

y = l ⊙ (W x + b)        keys and values:  l: (O,) = 1
y = W (l ⊙ x) + b        feed-forward:     l: (I,) = 1, on the input of the second MLP layer
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lowrank.adapter import Adapter, features, register


@dataclass(frozen=True)
class IA3Config:
    feedforward: tuple[str, ...] = ("down_proj", "fc2", "fc_out", "dense_4h_to_h", "c_proj")
    """Layers whose input is scaled instead of their output, each a whole dotted suffix."""

    on_input: bool = False
    """Scale the input of each layer (`feedforward` sets it for its own)."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "feedforward", tuple(self.feedforward))  # JSON and YAML give lists

    def at(self, path: str) -> "IA3Config":
        inside = any(path == name or path.endswith(f".{name}") for name in self.feedforward)
        return replace(self, on_input=self.on_input or inside)


@register("ia3")
class IA3(Adapter):
    Config = IA3Config
    default_targets = r".*\.(k_proj|v_proj|down_proj|query_key_value|qkv_proj|c_attn|fc2|dense_4h_to_h|key|value)"

    def __init__(self, config: IA3Config, base: nn.Module) -> None:
        super().__init__(config, base)
        if config.on_input and isinstance(base, nn.Embedding):
            raise ValueError("(IA)³ cannot scale the input of an embedding: ids are no numbers")
        self.on_input = config.on_input
        self.needs_y = not config.on_input
        self.ia3_l = nn.Parameter(torch.ones(features(base)[0 if config.on_input else 1]))  # (I,) or (O,)

    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        if self.on_input:
            return base((x * self.ia3_l).to(x.dtype))  # type: ignore[no-any-return]
        return (y * self.ia3_l).to(y.dtype)  # l is fp32 on a bf16 base

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.on_input:
            return weight * self.ia3_l, bias
        return weight * self.ia3_l[:, None], None if bias is None else bias * self.ia3_l
