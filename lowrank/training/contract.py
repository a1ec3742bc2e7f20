"""How an adapter was asked to answer when it was trained and measured: kept in its adapter.json, beside template,
special tokens and hashes (store.py). What differs later is said: a figure holds for the settings it was measured with.
"""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lowrank.data.records import Record
from lowrank.files import read_json

GREEDY: dict[str, Any] = {
    "system": "", "temperature": 0.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0, "stop": [],
    "max_new_tokens": 64,
}  # fmt: skip


def contract_of(records: Iterable[Record], max_new_tokens: int) -> dict[str, Any]:
    """What training writes: greedy answers, and the system prompt of the records (None where they have several)."""
    return {**GREEDY, "system": system_of(records), "max_new_tokens": max_new_tokens}


def system_of(records: Iterable[Record]) -> str | None:
    """The one system prompt of all records ("" where they have none), None where there are several."""
    first = [record.conversation()[0] for record in records]
    found = {turn["content"] if turn["role"] == "system" else "" for turn in first}
    return found.pop() if len(found) == 1 else None


def contract(folder: str | Path) -> dict[str, Any]:
    """The generation settings in the adapter of a run's folder; {} where it has none."""
    path = Path(folder) / "adapter" / "adapter.json"
    description = read_json(path) if path.is_file() else {}
    found = description.get("generation") if isinstance(description, dict) else None
    return found if isinstance(found, dict) else {}


def as_served(generation: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's generation_config.json in our words: what servers take where a request says nothing."""
    if not generation.get("do_sample"):
        generation = {key: value for key, value in generation.items() if key == "repetition_penalty"}
    return {key: generation[key] for key in GREEDY if generation.get(key) is not None and key != "max_new_tokens"}


def differences(trained: dict[str, Any], used: dict[str, Any]) -> list[str]:
    """One line for each setting that is used otherwise than in training. More room for an answer is no difference."""
    lines = []
    for key in trained.keys() & used.keys():
        now, then = used[key], trained[key]
        if now is None or then is None or now == then or (key == "max_new_tokens" and now > then):
            continue
        lines.append(f"{key.replace('_', ' ')} is {now!r} here, and was {then!r} when the adapter was trained")
    return sorted(lines)


def warn_of_differences(folder: str | Path, **used: Any) -> None:
    """Say on stderr what is used otherwise than the run's adapter was trained with."""
    for line in differences(contract(folder), used):
        print(f"warning: {line}", file=sys.stderr)
