"""General questions: some are held out and checked by machine to measure forgetting, the rest train against it.

    {"id", "area", "question", "accept": ["paris"] or "regex", "split", "answer"}

`split` is train, validation or test; `answer` is the base model's greedy answer, written once by
`python -m bench.answer_general`.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lowrank.data.records import Record
from lowrank.errors import FileFormatError, check_fields
from lowrank.files import read_jsonl

AREAS = ("language", "arithmetic", "geography", "advice", "code", "writing", "open")
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class GeneralItem:
    id: str
    area: str
    question: str
    accept: tuple[str, ...] = ()
    """Any of these, as whole words and whatever the case, makes an answer right."""
    regex: str = ""
    """Or this pattern, found anywhere whatever the case."""
    split: str = "train"
    answer: str = ""

    @property
    def held_out(self) -> bool:
        return self.split != "train"

    def record(self) -> Record:
        spec: dict[str, Any] = {"area": self.area}
        spec |= {"accept": list(self.accept)} if self.accept else {"regex": self.regex} if self.regex else {}
        output = "" if self.held_out else self.answer
        return Record(
            id=self.id,
            instruction=self.question,
            output=output,
            kind="general",
            task=f"general/{self.area}",
            facts=(spec,),
        )


def says(answer: str, accept: Iterable[str], regex: str) -> bool:
    """Whether an answer is right: it has the pattern, or without one any of the accepted texts as whole words."""
    patterns = [regex] if regex else [rf"(?<!\w){re.escape(text)}(?!\w)" for text in accept]
    return any(re.search(pattern, answer, re.IGNORECASE | re.DOTALL) for pattern in patterns)


def read_general(path: str | Path, answered: bool = True) -> tuple[GeneralItem, ...]:
    """The items of a JSONL file; `answered` insists on an answer for each one that is trained."""
    items: list[GeneralItem] = []
    ids: set[str] = set()
    for number, row in read_jsonl(path):
        where = f"{path}, line {number}"
        check_fields(row, [field.name for field in fields(GeneralItem)], where)
        for name in ("id", "area", "question"):
            if not isinstance(row.get(name), str) or not row[name]:
                raise FileFormatError(f"{where}: missing field {name!r}")
        if row["area"] not in AREAS:
            raise FileFormatError(f"{where}: area must be one of {', '.join(AREAS)}, got {row['area']!r}")
        if row.get("split", "train") not in SPLITS:
            raise FileFormatError(f"{where}: split must be one of {', '.join(SPLITS)}, got {row['split']!r}")
        if row["id"] in ids:
            raise FileFormatError(f"{where}: the id {row['id']!r} is used twice")
        ids.add(row["id"])
        given: dict[str, Any] = {name: tuple(value) if name == "accept" else value for name, value in row.items()}
        item = GeneralItem(**given)
        if item.held_out and not (item.accept or item.regex):
            raise FileFormatError(f"{where}: a held-out question needs 'accept' or 'regex' to be checked by machine")
        if answered and not item.held_out and not item.answer:
            raise FileFormatError(f"{where}: no answer of the base model; `python -m bench.answer_general` writes them")
        items.append(item)
    return tuple(items)
