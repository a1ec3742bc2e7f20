"""lowrank: parameter-efficient fine-tuning that can be read, proved and measured."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowrank.active import activate as activate
    from lowrank.active import rows as rows
    from lowrank.evaluation.run import evaluate as evaluate
    from lowrank.merging import merge as merge
    from lowrank.merging import unmerge as unmerge
    from lowrank.mixing import combine as combine
    from lowrank.models.generate import generate as generate
    from lowrank.models.load import load as load
    from lowrank.store import load_adapter as load_adapter
    from lowrank.store import save_adapter as save_adapter
    from lowrank.targets import attach as attach
    from lowrank.targets import detach as detach
    from lowrank.training.run import train as train

_HOME = {
    "activate": "lowrank.active",
    "attach": "lowrank.targets",
    "combine": "lowrank.mixing",
    "detach": "lowrank.targets",
    "evaluate": "lowrank.evaluation.run",
    "generate": "lowrank.models.generate",
    "load": "lowrank.models.load",
    "load_adapter": "lowrank.store",
    "merge": "lowrank.merging",
    "rows": "lowrank.active",
    "save_adapter": "lowrank.store",
    "train": "lowrank.training.run",
    "unmerge": "lowrank.merging",
}
__all__ = sorted(_HOME)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lowrank' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
