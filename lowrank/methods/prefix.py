"""Prefix-Tuning (Li & Liang, 2021), arXiv:2101.00190.

    attention(q, [Pₖ; k], [Pᵥ; v])        Pₖ, Pᵥ: P trained keys and values a layer, seen by every token

`hidden` > 0 trains them through a two-layer MLP (§4.3), P = U tanh(V E), one for each layer here; a file in PEFT's
format holds the result. Virtual tokens take positions 0..P-1, so real ones start at P.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank.adapter import Adapter, Slot, register
from lowrank.methods.parts import Checked


@dataclass(frozen=True)
class PrefixConfig(Checked):
    tokens: int = 10
    """P, virtual tokens a layer."""

    hidden: int = 0
    """Width of the MLP that they are trained through; 0 trains them directly."""


@register("prefix")
class Prefix(Adapter):
    Config = PrefixConfig
    place = "attention prefix"
    default_targets = "all"
    mergeable = False  # it changes what is attended to, not a weight
    identity_at_init = False

    def __init__(self, config: PrefixConfig, base: nn.Module) -> None:
        super().__init__(config, base)
        assert isinstance(base, Slot)
        self.tokens, self.shape = config.tokens, (2, *base.shape)  # (2, Hkv, K)
        size = 2 * base.shape[0] * base.shape[1]
        if config.hidden:
            self.embedding = nn.Parameter(torch.randn(config.tokens, config.hidden))
            self.inner = nn.Parameter(torch.randn(config.hidden, config.hidden) / config.hidden**0.5)
            self.outer = nn.Parameter(torch.randn(size, config.hidden) / config.hidden**0.5)
        else:
            self.prompt_embeddings = nn.Parameter(torch.randn(config.tokens, size))  # (P, 2 Hkv K)

    def prefix(self) -> Tensor:
        """(P, 2, Hkv, K)"""
        if hasattr(self, "prompt_embeddings"):
            return self.prompt_embeddings.unflatten(1, self.shape)
        return F.linear(torch.tanh(F.linear(self.embedding, self.inner)), self.outer).unflatten(1, self.shape)

    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        """(B, 0, 2, Hkv, K) -> (B, P, 2, Hkv, K)"""
        return self.prefix().to(y.dtype).expand(len(y), -1, -1, -1, -1)
