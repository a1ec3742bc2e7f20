"""One suite for every adapter method, a user's own included: `lowrank adapters test ./mine.py:MyMethod`.

The theorems are in `theorems.py`, the small models that they are proved on in `hosts.py`; this file runs and shows it.
"""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from lowrank import theorems as theorems  # fills THEOREMS
from lowrank.adapter import METHODS, Adapter, register
from lowrank.hosts import THEOREMS, NotOffered


@dataclass(frozen=True)
class Verdict:
    theorem: str
    holds: bool | None
    """None where the theorem does not apply."""
    detail: str = ""


def check(method: type[Adapter]) -> list[Verdict]:
    """Every theorem on one method. A method that is not registered yet is so for the time of the check."""
    verdicts = []
    with _registered(method):
        for name, prove in THEOREMS.items():
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
