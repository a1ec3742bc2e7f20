"""Records: one question and answer (or conversation), with what is needed to judge an answer. One JSON object a line.

    {"id", "instruction", "input", "output", "system", "messages", "evidence",
     "kind": "qa|trap|confirm|unanswerable|general", "task",
     "facts": [{"subject", "relation", "value", "unit"}]}

Either `messages` (a list of {"role", "content"}, the last from the assistant) or `instruction` + `output` is required.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from lowrank.errors import FileFormatError, check_fields, unknown
from lowrank.files import read_jsonl

KINDS = ("qa", "trap", "confirm", "unanswerable", "general")
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Record:
    id: str = ""
    instruction: str = ""
    input: str = ""
    output: str = ""
    system: str = ""
    messages: tuple[dict[str, str], ...] = ()
    evidence: str = ""
    kind: str = "qa"
    task: str = ""
    facts: tuple[dict[str, Any], ...] = field(default=())

    def conversation(self) -> list[dict[str, str]]:
        """The record as chat messages; the assistant's answer, where there is one, comes last."""
        if self.messages:
            return [dict(message) for message in self.messages]
        question = f"{self.instruction}\n\n{self.input}" if self.input else self.instruction
        turns = [{"role": "system", "content": self.system}] if self.system else []
        turns.append({"role": "user", "content": question})
        return [*turns, {"role": "assistant", "content": self.output}] if self.output else turns

    @property
    def question(self) -> str:
        """What the user said last."""
        return next((turn["content"] for turn in reversed(self.conversation()) if turn["role"] == "user"), "")

    def to_json(self) -> dict[str, Any]:
        """Only the fields that say something."""
        return {name: value for name, value in asdict(self).items() if value not in ("", (), [])}


def record_from_json(row: dict[str, Any], where: str) -> Record:
    """A checked Record. FileFormatError says `where` (file and line), what was wanted and what came."""
    check_fields(row, [f.name for f in fields(Record)], where)
    for name, value in row.items():
        wanted = list if name in ("messages", "facts") else str
        if not isinstance(value, wanted):
            raise FileFormatError(f"{where}: field {name!r} must be a {wanted.__name__}, got {type(value).__name__}")
    for part in ("messages", "facts"):
        if not all(isinstance(item, dict) for item in row.get(part, ())):
            raise FileFormatError(f"{where}: each item of {part!r} must be an object")
    for message in row.get("messages", ()):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES or not isinstance(content, str):
            raise FileFormatError(
                f"{where}: a message needs a role among {', '.join(ROLES)} and a content string, got {message}"
            )
    if row.get("kind", "qa") not in KINDS:
        raise FileFormatError(f"{where}: {unknown('kind', row['kind'], KINDS)}")
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in row.items()}
    record = Record(**values)
    if not (record.messages or record.instruction):
        raise FileFormatError(f"{where}: a record needs 'instruction' or 'messages'")
    return record


def read_records(path: str | Path) -> list[Record]:
    """Every record of a JSONL file, in order. A bad line is an error with its number: nothing is skipped in silence."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no data file {path}")
    records = [record_from_json(row, f"{path}, line {number}") for number, row in read_jsonl(path)]
    if not records:
        raise FileFormatError(f"{path} holds no records")
    return records


def records_to_json(records: Iterable[Record]) -> list[dict[str, Any]]:
    return [record.to_json() for record in records]
