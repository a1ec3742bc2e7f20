"""A small model with every kind of layer that an adapter meets: embedding, linear with and without bias, norm, head."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lowrank.quant.linear import quantize_model


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.q_proj = nn.Linear(32, 32, bias=False)
        self.up_proj = nn.Linear(32, 48)
        self.down_proj = nn.Linear(48, 32)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.down_proj(torch.tanh(self.up_proj(h) + self.q_proj(h).repeat(1, 1, 2)[..., :48]))


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(40, 32)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.lm_head = nn.Linear(32, 40, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


def randomise(model: nn.Module, std: float = 0.2, seed: int = 1) -> None:
    """Other values for whatever trains: the initial ones are a no-op and would prove nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(std * torch.randn(parameter.shape, generator=generator))


@pytest.fixture
def make() -> Callable[..., Tiny]:
    def build(quantize: str | None = None, dtype: torch.dtype = torch.float32) -> Tiny:
        torch.manual_seed(0)
        model = Tiny().to(dtype)
        if quantize:
            quantize_model(model, quantize)
        return model.eval()

    return build


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(40, (4, 6), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def fill_randomly() -> Callable[..., None]:
    return randomise
