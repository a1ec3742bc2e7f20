"""Perplexity of a text: exp of the mean negative log-likelihood of its tokens.

The text is cut into windows; each token but the first is scored exactly once, in its window and with at least `context`
tokens before it (where the text has them). So the count does not depend on the window, and no token is scored without
anything before it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank.evaluation.stats import Interval, bootstrap

BLOCK = 128  # positions whose logits exist at a time: 128 x 49,152 fp32 values are 25 MB
Blocks = Sequence[tuple[float, int]]


@dataclass(frozen=True)
class Perplexity:
    blocks: Blocks
    """(summed negative log-likelihood, tokens) of each stretch of at most BLOCK tokens."""

    @property
    def value(self) -> float:
        return _value(self.blocks)

    @property
    def tokens(self) -> int:
        """Tokens scored: those of the text without the first."""
        return sum(n for _, n in self.blocks)

    def interval(self) -> Interval | None:
        """A 95 % bootstrap interval over the blocks."""
        return bootstrap(self.blocks, _value, resamples=1000)


def _value(blocks: Blocks) -> float:
    return math.exp(sum(nll for nll, _ in blocks) / sum(n for _, n in blocks))


@torch.no_grad()
def perplexity(model: nn.Module, ids: list[int], window: int = 1024, context: int = 128) -> Perplexity:
    """Perplexity of a text's tokens under the model, adapters as they are."""
    if not 1 <= context < window:
        raise ValueError(f"wanted a context of 1 to window - 1 tokens, got context {context} and window {window}")
    if len(ids) < 2:
        raise ValueError(f"perplexity needs at least 2 tokens, got {len(ids)}")
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    blocks: list[tuple[float, int]] = []
    try:
        done = 1  # tokens that are scored already, or never (the first)
        while done < len(ids):
            begin = max(0, done - context)
            end = min(len(ids), begin + window)
            blocks += _nll(model, torch.tensor(ids[begin:end], device=device), done - begin)
            done = end
    finally:
        model.train(training)
    return Perplexity(tuple(blocks))


def _nll(model: Any, ids: Tensor, first: int) -> list[tuple[float, int]]:
    """Summed negative log-likelihood of ids[first:] (T,), given what stands before each, block by block."""
    split = hasattr(model, "hidden")
    states = (model.hidden(ids[None]) if split else model(ids[None]))[0, first - 1 : -1]  # (T - first, D or V)
    blocks = []
    for rows, targets in zip(states.split(BLOCK), ids[first:].split(BLOCK)):
        logits = model.head(rows) if split else rows
        blocks.append((F.cross_entropy(logits.float(), targets, reduction="sum").item(), len(targets)))
    return blocks
