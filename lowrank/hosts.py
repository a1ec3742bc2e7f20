"""The small models that the conformance suite proves its theorems on, and what every proof needs."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.adapter import Adapter, Slot, dense_weight
from lowrank.quant.linear import QuantizedLinear
from lowrank.quant.tensor import QuantizedTensor
from lowrank.targets import Attachment, build, put

SHAPES = ((24, 40), (40, 24), (32, 32))  # (I, O): wide, tall, square; all above the usual default rank
VOCABULARY, DIM, HEADS, HEAD_DIM = 24, 16, 2, 8


class NotOffered(Exception):
    """The method says that it does not go to such a layer; that is an answer, not a fault."""


class Conv1D(nn.Module):
    """GPT-2's layer: a linear one whose weight is stored as (I, O)."""

    def __init__(self, like: nn.Module) -> None:
        super().__init__()
        self.weight = nn.Parameter(dense_weight(like).T.contiguous())
        self.bias = nn.Parameter(like.get_parameter("bias").detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Host(nn.Module):
    """The smallest model that offers the place: path "layer"."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        slot = getattr(self.layer, "base", self.layer)
        if isinstance(slot, Slot) and slot.place == "sublayer":
            return self.layer(x, torch.tanh(x.flip(-1)))  # type: ignore[no-any-return]
        return self.layer(x)  # type: ignore[no-any-return]


def host(
    method: type[Adapter], shape: tuple[int, int] = SHAPES[0], bias: bool = True, kind: str = "dense"
) -> tuple[Host, Tensor]:
    """A model with the place that the method goes to, and an input for it."""
    generator = torch.Generator().manual_seed(7)
    if method.place == "linear":
        layer: nn.Module = nn.Linear(*shape, bias=bias)
        with torch.no_grad():
            for p in layer.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) / p.shape[-1] ** 0.5)
        if kind == "conv1d":
            layer = Conv1D(layer)
        elif kind == "embedding":
            layer = nn.Embedding(*shape, _weight=torch.randn(shape, generator=generator))
            return Host(layer), torch.randint(shape[0], (2, 3), generator=generator)
        if kind == "nf4":
            layer = QuantizedLinear(QuantizedTensor.quantize(layer.weight.detach(), "nf4"), layer.bias)  # type: ignore[arg-type, operator]
        return Host(layer), torch.randn(2, 3, shape[0], generator=generator)
    if method.place == "embeddings":
        layer = nn.Embedding(VOCABULARY, DIM, _weight=torch.randn(VOCABULARY, DIM, generator=generator))
        return Host(layer), torch.randint(VOCABULARY, (2, 3), generator=generator)
    layer = Slot("sublayer", DIM) if method.place == "sublayer" else Slot(method.place, HEADS, HEAD_DIM)
    return Host(layer), torch.randn(2, 3, DIM, generator=generator)


def give(
    model: nn.Module, method: type[Adapter], name: str = "a", seed: int | None = 0, random: bool = True
) -> Adapter:
    """Put an adapter on the host; its parameters are random unless the initial values are the subject."""
    if seed is not None:
        torch.manual_seed(seed)
    try:
        config, adapters = build(model, settings(method), ["layer"])
    except ValueError as error:
        raise NotOffered(str(error)) from error
    adapter = adapters["layer"]
    if random:
        randomise(adapter, 100 + (seed or 0))
    put(model, name, adapters, Attachment(method.method, config, ["layer"], (), ("layer",)))
    model.eval()
    return adapter


def given(
    method: type[Adapter],
    kinds: tuple[str, ...] = ("dense",),
    shapes: tuple[tuple[int, int], ...] = SHAPES[:1],
    bias: bool = True,
    random: bool = True,
) -> Iterator[tuple[str, Host, Tensor, Tensor]]:
    """(what it is, the model with the adapter, an input, its output before) of each host that the method goes to."""
    none = True
    for kind in kinds:
        for shape in shapes:
            model, x = host(method, shape, bias, kind)
            y = model(x)
            try:
                give(model, method, random=random)
            except NotOffered as answer:
                reason = answer
                continue
            none = False
            yield f"{shape[0]} -> {shape[1]}, {kind}", model, x, y
    if none:
        raise reason


def randomise(adapter: Adapter, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.5 * torch.randn(p.shape, generator=generator, dtype=p.dtype))


def settings(method: type[Adapter]) -> Any:
    try:
        return method.Config()
    except TypeError as error:
        raise AssertionError(f"{method.Config.__name__} needs a default for each field: {error}") from error


def close(got: Tensor, wanted: Tensor, what: str, tolerance: float = 1e-8) -> None:
    assert got.shape == wanted.shape, f"{what}: shape {tuple(got.shape)}, wanted {tuple(wanted.shape)}"
    if got.numel():
        scale = max(float(wanted.detach().abs().max()), 1.0)
        error = float((got.detach() - wanted.detach()).abs().max())
        assert error <= tolerance * scale, f"{what}: off by {error:.2e} where values reach {scale:.1e}"


THEOREMS: dict[str, Callable[[type[Adapter]], None]] = {}


def theorem(name: str) -> Callable[[Callable[[type[Adapter]], None]], Callable[[type[Adapter]], None]]:
    def add(prove: Callable[[type[Adapter]], None]) -> Callable[[type[Adapter]], None]:
        THEOREMS[name] = prove
        return prove

    return add


def only(applies: bool, why: str) -> None:
    if not applies:
        raise NotOffered(why)
