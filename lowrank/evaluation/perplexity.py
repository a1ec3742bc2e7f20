"""Perplexity of a text: exp of the mean negative log-likelihood of its tokens.

The text is cut into windows; each token but the first is scored exactly once, in its window and with at least `context`
tokens before it (where the text has them). So the count does not depend on the window, and no token is scored without
anything before it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank.evaluation.stats import Interval, bootstrap

BLOCK = 128  # positions whose logits exist at a time: 128 x 49,152 fp32 values are 25 MB


@dataclass(frozen=True)
class Perplexity:
    value: float
    tokens: int
    """Tokens scored: those of the text without the first."""
    blocks: tuple[tuple[float, int], ...]
    """(summed negative log-likelihood, tokens) of each stretch of at most BLOCK tokens."""

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood of a token, in nats."""
        return sum(nll for nll, _ in self.blocks) / self.tokens

    def interval(self, confidence: float = 0.95, seed: int = 0) -> Interval | None:
        """A bootstrap interval over the blocks."""
        indices = [float(i) for i in range(len(self.blocks))]

        def value(draw: Any) -> float:
            chosen = [self.blocks[int(i)] for i in draw]
            return math.exp(sum(nll for nll, _ in chosen) / sum(n for _, n in chosen))

        return bootstrap(indices, value, confidence, resamples=1000, seed=seed)


@torch.no_grad()
def perplexity(
    model: nn.Module,
    tokenizer: Any,
    text: str,
    window: int = 1024,
    context: int = 128,
    max_tokens: int | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Perplexity:
    """Perplexity of `text` under the model, adapters as they are. `on_progress` gets the number of tokens scored."""
    ids = tokenizer.encode(text, add_special=True)[:max_tokens]
    return perplexity_of_ids(model, ids, window, context, on_progress)


@torch.no_grad()
def perplexity_of_ids(
    model: nn.Module,
    ids: list[int],
    window: int = 1024,
    context: int = 128,
    on_progress: Callable[[int], None] | None = None,
) -> Perplexity:
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
            tokens = torch.tensor(ids[begin:end], device=device)
            blocks += _nll(model, tokens, done - begin)
            done = end
            if on_progress is not None:
                on_progress(done - 1)
    finally:
        model.train(training)
    scored = sum(n for _, n in blocks)
    return Perplexity(math.exp(sum(nll for nll, _ in blocks) / scored), scored, tuple(blocks))


def _nll(model: Any, ids: Tensor, first: int) -> list[tuple[float, int]]:
    """Summed negative log-likelihood of ids[first:] (T,), given what stands before each, block by block."""
    split = hasattr(model, "hidden")
    states = (model.hidden(ids[None]) if split else model(ids[None]))[0, first - 1 : -1]  # (T - first, D or V)
    blocks = []
    for rows, targets in zip(states.split(BLOCK), ids[first:].split(BLOCK)):
        logits = model.head(rows) if split else rows
        blocks.append((F.cross_entropy(logits.float(), targets, reduction="sum").item(), len(targets)))
    return blocks
