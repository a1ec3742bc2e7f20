"""Perplexity counts each token but the first exactly once, whatever the window."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from lowrank.evaluation.perplexity import perplexity


class Bigram(nn.Module):
    """Logits that depend on the last token only, so that no window can change them."""

    def __init__(self, vocabulary: int = 11) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(vocabulary, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids)


class Split(Bigram):
    """The same with the hidden states and the head apart, as our models offer them."""

    def hidden(self, ids: Tensor) -> Tensor:
        return self.table(ids)

    def head(self, hidden: Tensor) -> Tensor:
        return hidden


IDS = torch.randint(0, 11, (301,), generator=torch.Generator().manual_seed(1)).tolist()


def expected(model: Bigram, ids: list[int]) -> float:
    log_p = model.table.weight.detach().double().log_softmax(dim=-1)
    return math.exp(-sum(log_p[a, b].item() for a, b in pairwise(ids)) / (len(ids) - 1))


@pytest.mark.parametrize("model", [Bigram(), Split()], ids=["logits", "hidden and head"])
@pytest.mark.parametrize(("window", "context"), [(512, 128), (64, 16), (10, 1), (7, 6), (301, 1)])
def test_every_token_is_scored_once(model: Bigram, window: int, context: int) -> None:
    result = perplexity(model, IDS, window, context)
    assert result.tokens == len(IDS) - 1 == sum(n for _, n in result.blocks)
    assert result.value == pytest.approx(expected(model, IDS), rel=1e-5)  # fp32 sums of 300 terms


def test_interval_contains_the_value_and_the_mode_is_restored() -> None:
    model = Bigram().train()
    result = perplexity(model, IDS, 20, 5)
    low, high = result.interval() or (0, 0)
    assert low < result.value < high
    assert model.training


def test_too_short_or_impossible_windows_are_errors() -> None:
    with pytest.raises(ValueError, match="at least 2 tokens, got 1"):
        perplexity(Bigram(), [3])
    with pytest.raises(ValueError, match="context 8 and window 8"):
        perplexity(Bigram(), IDS, window=8, context=8)
