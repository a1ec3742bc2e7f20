"""One suite for every adapter method, a user's own included: `lowrank adapters test ./mine.py:MyMethod`.

This file has the small models that the theorems of `theorems.py` are proved on, and what runs and shows them.
"""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.adapter import METHODS, Adapter, Slot, dense_weight, register
from lowrank.quant.linear import QuantizedLinear
from lowrank.quant.tensor import QuantizedTensor
from lowrank.targets import Attachment, build, put

SHAPES = ((24, 40), (40, 24), (32, 32))  # (I, O): wide, tall, square; all above the usual default rank
VOCABULARY, DIM, HEADS, HEAD_DIM = 24, 16, 2, 8


class NotOffered(Exception):
    """The method says that it does not go to such a layer; that is an answer, not a fault."""


@dataclass(frozen=True)
class Verdict:
    theorem: str
    holds: bool | None
    """None where the theorem does not apply."""
    detail: str = ""


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
        if isinstance(getattr(self.layer, "base", self.layer), Slot) and x.dim() == 3 and self.sublayer:
            return self.layer(x, torch.tanh(x.flip(-1)))  # type: ignore[no-any-return]
        return self.layer(x)  # type: ignore[no-any-return]

    @property
    def sublayer(self) -> bool:
        slot = getattr(self.layer, "base", self.layer)
        return isinstance(slot, Slot) and slot.place == "sublayer"


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


def theorems() -> dict[str, Callable[[type[Adapter]], None]]:
    """name -> proof, in the order in which they are shown."""
    import lowrank.theorems  # noqa: F401  (it fills THEOREMS, and needs what is above)

    return THEOREMS


def theorem(name: str) -> Callable[[Callable[[type[Adapter]], None]], Callable[[type[Adapter]], None]]:
    def add(prove: Callable[[type[Adapter]], None]) -> Callable[[type[Adapter]], None]:
        THEOREMS[name] = prove
        return prove

    return add


def only(applies: bool, why: str) -> None:
    if not applies:
        raise NotOffered(why)


def check(method: type[Adapter]) -> list[Verdict]:
    """Every theorem on one method. A method that is not registered yet is so for the time of the check."""
    verdicts = []
    with _registered(method):
        for name, prove in theorems().items():
            random_state = torch.get_rng_state()
            try:
                prove(method)
                verdicts.append(Verdict(name, True))
            except NotOffered as reason:
                verdicts.append(Verdict(name, None, str(reason)))
            except Exception as error:  # a method under test may raise anything
                kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
                verdicts.append(Verdict(name, False, f"{kind}{error}".strip()))
            finally:
                torch.set_rng_state(random_state)
    return verdicts


def failures(method: type[Adapter]) -> dict[str, str]:
    """The theorems that a method fails, each with the reason."""
    return {verdict.theorem: verdict.detail for verdict in check(method) if verdict.holds is False}


@contextmanager
def _registered(method: type[Adapter]) -> Iterator[None]:
    if METHODS.get(getattr(method, "method", "")) is method:
        yield
        return
    name = f"under test: {method.__name__}"
    register(name)(method)
    try:
        yield
    finally:
        del METHODS[name]


def load_method(where: str) -> type[Adapter]:
    """The class behind "lora" (a registered method) or "./mine.py:MyMethod" (a file of the user's own)."""
    path, _, name = where.rpartition(":")
    if not path:
        if where in METHODS:
            return METHODS[where]
        raise ValueError(
            f"no method {where!r}; registered: {', '.join(sorted(METHODS))}; a file is written ./mine.py:MyMethod"
        )
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"no file {path}")
    module_name = f"lowrank_user_{file.stem}"
    spec = importlib.util.spec_from_file_location(module_name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[module_name]
        raise ValueError(f"{path} does not import: {type(error).__name__}: {error}") from error
    method = getattr(module, name, None)
    if not (isinstance(method, type) and issubclass(method, Adapter)):
        own = [
            n for n, v in vars(module).items() if isinstance(v, type) and issubclass(v, Adapter) and v is not Adapter
        ]
        raise ValueError(f"{path} has no Adapter class {name!r}; it has {', '.join(own) or 'none'}")
    return method


def table(verdicts: list[Verdict]) -> str:
    """One line a theorem: proved, FAILS with the reason, or - where it does not apply."""
    marks = {True: "proved", False: "FAILS", None: "-"}
    return "\n".join(f"{marks[v.holds]:<7} {v.theorem}{f': {v.detail}' if v.detail else ''}" for v in verdicts)


def run(where: str) -> int:
    """`lowrank adapters test`: prove one method, show the table, and return 0 if every theorem holds."""
    verdicts = check(load_method(where))
    print(table(verdicts))
    broken = sum(v.holds is False for v in verdicts)
    print(f"{broken} of {len(verdicts)} theorems fail" if broken else "every theorem that applies is proved")
    return int(broken > 0)


def listing() -> str:
    """`lowrank adapters list`: name, place, what it states of itself, and the paper."""
    lines = []
    for name, method in sorted(METHODS.items()):
        states = [word for word in ("mergeable", "identity_at_init", "edits_base") if getattr(method, word)]
        paper = (sys.modules[method.__module__].__doc__ or "").strip().splitlines()[0]
        lines.append(f"{name:<10} {method.place:<16} {', '.join(states):<42} {paper}")
    return "\n".join(lines)
