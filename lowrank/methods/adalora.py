"""AdaLoRA: Adaptive Budget Allocation for PEFT (Zhang et al., 2023), arXiv:2303.10512.

    y = W x + b + (α / r) B (E ⊙ (A x))        A: (R, I), B: (O, R) ~ N(0, 0.02²),  E: (R, 1) = 0
    penalty = w · mean over all A, B of |A Aᵀ - I|, |Bᵀ B - I|

A triplet (a row of A, its E, a column of B) has the score s(E) + mean s(A) + mean s(B), where s is the smoothed
|w ∂L/∂w| times its smoothed change (eq. 7-9). Between `start` and `end` (shares of training) the number of triplets
that live, over all layers, falls by a cubic from rank to target_rank a layer; the others get E = 0 (eq. 12).
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank.adapter import Adapter, features, linear, register
from lowrank.methods.lora import LoRAConfig
from lowrank.methods.parts import by_pattern


@dataclass(frozen=True)
class AdaLoRAConfig(LoRAConfig):
    rank: int = 12
    """R at the start."""

    target_rank: int = 8
    """Triplets a layer at the end, on average."""

    start: float = 0.1
    """Share of the steps before the budget begins to fall."""

    end: float = 0.7
    """Share of the steps after which it stays."""

    every: int = 1
    """Steps between allocations while it falls."""

    beta1: float = 0.85
    """Smoothing of the scores."""

    beta2: float = 0.85
    """Smoothing of their change."""

    orthogonality: float = 0.5
    """Weight of the penalty."""

    def at(self, path: str) -> "AdaLoRAConfig":
        rank = by_pattern(self.rank_pattern, path, self.rank)
        return replace(self, rank=rank, target_rank=min(self.target_rank, rank), rank_pattern={})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.target_rank <= self.rank:
            raise ValueError(f"target_rank must lie between 1 and rank {self.rank}, got {self.target_rank}")
        if not 0 <= self.start <= self.end <= 1:
            raise ValueError(f"start and end are shares with start <= end, got {self.start} and {self.end}")


@register("adalora")
class AdaLoRA(Adapter):
    Config = AdaLoRAConfig

    def __init__(self, config: AdaLoRAConfig, base: nn.Module) -> None:
        super().__init__(config, base)
        in_features, out_features = features(base)
        self.config, self.scaling, self.dropout = config, config.alpha / config.rank, config.dropout
        self.lora_A = nn.Parameter(0.02 * torch.randn(config.rank, in_features))  # (R, I)
        self.lora_B = nn.Parameter(0.02 * torch.randn(out_features, config.rank))  # (O, R)
        self.lora_E = nn.Parameter(torch.zeros(config.rank, 1))  # (R, 1)
        for name, p in list(self.named_parameters()):  # smoothed score and change; training needs them, a file does not
            self.register_buffer(f"{name}_score", torch.zeros_like(p), persistent=False)
            self.register_buffer(f"{name}_change", torch.zeros_like(p), persistent=False)

    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        h = linear(self.dropped(x), self.lora_A * self.lora_E)  # (..., R)
        return y + (self.scaling * F.linear(h, self.lora_B)).to(y.dtype)

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.scaling * self.lora_B @ (self.lora_A * self.lora_E), bias

    def penalty(self) -> Tensor | None:
        A, B = self.lora_A, self.lora_B
        one = torch.eye(len(A), dtype=A.dtype, device=A.device)
        off = (A @ A.T - one).norm() + (B.T @ B - one).norm()
        return self.config.orthogonality * off / (2 * max(len(self.peers), 1))

    @torch.no_grad()
    def after_step(self, step: int, total_steps: int) -> None:
        c = self.config
        if step + 1 > c.end * total_steps and step > 0:
            if self is self.peers[-1]:
                self.allocate(c.target_rank * len(self.peers))
            return
        for name, p in self.named_parameters():
            if p.grad is not None:
                score, change = getattr(self, f"{name}_score"), getattr(self, f"{name}_change")
                now = (p * p.grad).abs()
                change.lerp_((now - score.lerp_(now, 1 - c.beta1)).abs(), 1 - c.beta2)
        if self is self.peers[-1] and step + 1 > c.start * total_steps and (step + 1) % c.every == 0:
            left = 1 - (step + 1 - c.start * total_steps) / max((c.end - c.start) * total_steps, 1)
            self.allocate(round(len(self.peers) * (c.target_rank + (c.rank - c.target_rank) * max(left, 0) ** 3)))

    def scores(self) -> Tensor:
        """(R,)"""
        A, B, E = (getattr(self, f"{n}_score") * getattr(self, f"{n}_change") for n in ("lora_A", "lora_B", "lora_E"))
        return E.squeeze(1) + A.mean(dim=1) + B.mean(dim=0)

    def allocate(self, budget: int) -> None:
        """Keep the `budget` best triplets of all layers."""
        scores = torch.cat([peer.scores() for peer in self.peers])  # type: ignore[operator]
        dead = torch.ones_like(scores, dtype=torch.bool)
        dead[scores.topk(min(budget, len(scores))).indices] = False
        for peer, mask in zip(self.peers, dead.split([len(peer.lora_E) for peer in self.peers])):  # type: ignore[arg-type]
            peer.lora_E.masked_fill_(mask[:, None], 0.0)  # type: ignore[operator, union-attr]
