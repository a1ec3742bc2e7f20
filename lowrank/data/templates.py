"""The wordings from which questions are written: one YAML file, every placeholder checked when it is read.

    answers:    plain, trap, confirm, unanswerable     how an answer is put: the value first, the judgement after it
    premises:   train, validation, test: {id: form}    questions that take a claim for granted, right or wrong
    sources:    real, train, validation, test          works that exist; works that do not, for traps that lean on one
    invented:   first, last, except                    parts of names that belong to nothing, and products that do
    relations:  name: {statement, noun, trap, questions: {train, validation, test}}

A file of one's own needs `relations`; `answers`, `premises` and `sources` come from the bundled file where it has none.
"""

import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from lowrank.errors import FileFormatError, did_you_mean

BUNDLED = Path(__file__).parent / "labtests" / "templates.yaml"
SPLITS = ("train", "validation", "test")
TRAPS = ("value", "unit", "specimen", "cause", "source")  # the kinds of false premise; "source" comes from the form

_QUESTION = ("subject", "Subject")
_STATEMENT = (*_QUESTION, "value", "Value")
_FORM = (*_STATEMENT, "claim", "Claim", "noun", "Noun", "source")
_ANSWERS = {
    "plain": ("statement", "value", "Value", *_QUESTION),
    "trap": ("statement", "value", "Value", "false", *_QUESTION),
    "confirm": ("statement", "value", "Value", *_QUESTION),
    "unanswerable": _QUESTION,
}


@dataclass(frozen=True)
class Relation:
    name: str
    statement: str
    """A sentence without its full stop: "The usual specimen for {subject} is {value}"."""
    noun: str
    """The same as a noun phrase: "usual specimen for {subject}"."""
    trap: str
    """Which kind of trap a false value makes: value, unit, specimen or cause."""
    questions: dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class Templates:
    relations: dict[str, Relation]
    answers: dict[str, str]
    premises: dict[str, dict[str, str]]
    sources: dict[str, tuple[str, ...]]
    invented: dict[str, tuple[str, ...]] = field(default_factory=dict)


def capital(text: str) -> str:
    """The first letter large, except in names such as pH and hCG."""
    return text if _abbreviated(text) else text[:1].upper() + text[1:]


def uncapital(text: str) -> str:
    """The first letter small, except in abbreviations such as IgG."""
    return text if _abbreviated(text) else text[:1].lower() + text[1:]


def _abbreviated(text: str) -> bool:
    return any(letter.isupper() for letter in text.partition(" ")[0][1:])


def fill(form: str, **fields: str) -> str:
    """The form with its fields; {Subject} is {subject} at the head of a sentence, and so for every field."""
    fields |= {name[:1].upper() + name[1:]: capital(value) for name, value in fields.items()}
    return re.sub(r"\{(\w+)\}", lambda match: fields[match.group(1)], form)


class _Line(str):
    """A string of the file and the line on which it begins."""

    line = 0


class _Loader(yaml.SafeLoader):
    pass


def _string(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> str:
    text = _Line(node.value)
    text.line = node.start_mark.line + 1
    return text


_Loader.add_constructor("tag:yaml.org,2002:str", _string)


class _Reader:
    """Checks with the file and the line in every message."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def fail(self, at: object, message: str) -> FileFormatError:
        line = f", line {at.line}" if isinstance(at, _Line) else ""
        return FileFormatError(f"{self.path}{line}: {message}")

    def keys(
        self, value: Any, at: object, known: tuple[str, ...], what: str, required: tuple[str, ...] = ()
    ) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self.fail(at, f"{what} must be a mapping with {', '.join(known)}, got {value!r}")
        for key in value:
            if key not in known:
                raise self.fail(
                    key,
                    f"unknown field {str(key)!r} in {what}{did_you_mean(str(key), known)}; known: {', '.join(known)}",
                )
        for key in required:
            if not value.get(key):
                raise self.fail(at, f"{what}: missing field {key!r}")
        return value

    def form(self, value: Any, at: object, known: tuple[str, ...], what: str) -> str:
        if not isinstance(value, str) or not value.strip():
            raise self.fail(at, f"{what} must be a line of text, got {value!r}")
        for name in re.findall(r"\{([^{}]*)\}", value):
            if name not in known:
                raise self.fail(
                    value, f"unknown field {{{name}}} in {what}{did_you_mean(name, known)}; known: {', '.join(known)}"
                )
        return str(value)

    def forms(self, value: Any, at: object, known: tuple[str, ...], what: str) -> tuple[str, ...]:
        if not isinstance(value, list) or not value:
            raise self.fail(at, f"{what} must be a list of lines, got {value!r}")
        return tuple(self.form(item, at, known, what) for item in value)


def read_templates(path: str | Path) -> Templates:
    """The checked templates of a YAML file. FileFormatError names file and line."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no templates file {path}")
    read = _Reader(path)
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise FileFormatError(f"{path} is not valid YAML: {error}") from error
    known = ("answers", "premises", "sources", "invented", "relations")
    content = read.keys(content, None, known, "the file", required=("relations",))
    relations = {str(name): _relation(read, name, body) for name, body in content["relations"].items()}
    ours = _bundled() if path.resolve() != BUNDLED.resolve() else None
    parts: dict[str, Any] = {}
    for name, read_part in (("answers", _answers), ("premises", _premises), ("sources", _sources)):
        given = name in content or ours is None
        parts[name] = read_part(read, content.get(name)) if given else getattr(ours, name)
    invented = _invented(read, content["invented"]) if "invented" in content else {}
    return Templates(relations, **parts, invented=invented)


@cache
def _bundled() -> Templates:
    return read_templates(BUNDLED)


def _relation(read: _Reader, name: Any, body: Any) -> Relation:
    what = f"relation {str(name)!r}"
    needed = ("statement", "noun", "questions")
    body = read.keys(body, name, (*needed, "trap"), what, needed)
    if body.get("trap", "value") not in TRAPS[:-1]:
        raise read.fail(body["trap"], f"{what}: trap must be one of {', '.join(TRAPS[:-1])}, got {body['trap']!r}")
    questions = read.keys(body["questions"], name, SPLITS, f"questions of {what}", SPLITS)
    asked = {split: f"{split} questions of {what}" for split in SPLITS}
    wordings = {split: read.forms(questions[split], name, _QUESTION, asked[split]) for split in SPLITS}
    seen: dict[str, str] = {}
    for split in SPLITS:
        for form in questions[split]:
            if seen.setdefault(form.lower(), split) != split:
                raise read.fail(
                    form, f"{what}: one wording in {seen[form.lower()]} and {split}: a held-out wording must be new"
                )
            if not re.search(r"\{[Ss]ubject\}", form):
                raise read.fail(form, f"{what}: a question must name its {{subject}}")
    statement = read.form(body["statement"], name, _STATEMENT, f"statement of {what}")
    noun = read.form(body["noun"], name, _QUESTION, f"noun of {what}")
    return Relation(str(name), statement.rstrip("."), noun, str(body.get("trap", "value")), wordings)


def _answers(read: _Reader, body: Any) -> dict[str, str]:
    body = read.keys(body, None, tuple(_ANSWERS), "answers", tuple(_ANSWERS))
    return {key: read.form(body[key], None, known, f"answer {key!r}") for key, known in _ANSWERS.items()}


def _premises(read: _Reader, body: Any) -> dict[str, dict[str, str]]:
    body = read.keys(body, None, SPLITS, "premises", SPLITS)
    return {s: {str(k): read.form(v, k, _FORM, f"premise {str(k)!r}") for k, v in body[s].items()} for s in SPLITS}


def _sources(read: _Reader, body: Any) -> dict[str, tuple[str, ...]]:
    body = read.keys(body, None, ("real", *SPLITS), "sources", ("real", *SPLITS))
    return {key: read.forms(value, None, (), f"sources {key!r}") for key, value in body.items()}


def _invented(read: _Reader, body: Any) -> dict[str, tuple[str, ...]]:
    body = read.keys(body, None, ("first", "last", "except"), "invented")
    return {key: read.forms(value, None, (), f"invented {key!r}") for key, value in body.items()}
