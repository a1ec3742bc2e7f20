"""Prompt tuning (Lester et al., 2021), arXiv:2104.08691.

    [P; embed(ids)]        P: (P, D) trained vectors before the first token

They start as embeddings of tokens drawn at random from the vocabulary, as in the paper. Logits are for P + T positions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowrank.adapter import Adapter, register
from lowrank.methods.parts import Checked


@dataclass(frozen=True)
class PromptConfig(Checked):
    tokens: int = 10
    """P, virtual tokens."""

    start: str = "vocabulary"
    """"vocabulary": embeddings of random tokens; "normal": N(0, 1)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start not in ("vocabulary", "normal"):
            raise ValueError(f"start must be 'vocabulary' or 'normal', got {self.start!r}")


@register("prompt")
class Prompt(Adapter):
    Config = PromptConfig
    place = "embeddings"
    default_targets = "all"
    mergeable = False  # there is no weight that adds a token
    identity_at_init = False

    def __init__(self, config: PromptConfig, base: nn.Module) -> None:
        super().__init__(config, base)
        assert isinstance(base, nn.Embedding)
        self.tokens = config.tokens
        rows = torch.randint(base.num_embeddings, (config.tokens,))
        start = (
            base.weight.detach()[rows] if config.start == "vocabulary" else torch.randn(len(rows), base.embedding_dim)
        )
        self.prompt_embeddings = nn.Parameter(start.float().clone())  # (P, D)

    def prompt(self) -> Tensor:
        """(P, D)"""
        return self.prompt_embeddings

    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        """(B, T, D) -> (B, P + T, D)"""
        return torch.cat([self.prompt().to(y.dtype).expand(len(y), -1, -1), y], dim=1)
