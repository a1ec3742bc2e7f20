"""A knowledge base: one fact a line, checked as a whole before anything is written from it.

    {"subject": "potassium", "aliases": ["K"], "relation": "reference_interval", "value": "3.5-5.0", "unit": "mmol/L",
     "risk": "high", "evidence": "the work that states it", "verified": "how it was checked"}

`subject`, `relation`, `value` and `evidence` are required. Three optional fields serve the generator: `avoid`, values
that must not stand as the false value of this fact because they are right too or open to argument; `si_unit` and
`molar_mass` (g/mol), from which the same fact in SI units is derived as relation `<relation>_si`.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from lowrank.data.units import convert_text
from lowrank.errors import FileFormatError, check_fields, did_you_mean
from lowrank.files import read_jsonl

RISKS = ("low", "medium", "high")
_TEXTS = ("subject", "relation", "value", "unit", "risk", "evidence", "verified", "si_unit")
_LISTS = ("aliases", "avoid")
_REQUIRED = ("subject", "relation", "value", "evidence")


@dataclass(frozen=True)
class Fact:
    subject: str
    relation: str
    value: str
    unit: str = ""
    aliases: tuple[str, ...] = ()
    risk: str = "low"
    evidence: str = ""
    verified: str = ""
    avoid: tuple[str, ...] = ()
    si_unit: str = ""
    molar_mass: float | None = None

    @property
    def text(self) -> str:
        """The value as it is said: "3.5-5.0 mmol/L", "4.0-5.6%"."""
        return with_unit(self.value, self.unit)

    def reference(self) -> dict[str, Any]:
        """The fact as a record carries it."""
        return {"subject": self.subject, "relation": self.relation, "value": self.value, "unit": self.unit}

    def in_si(self) -> "Fact":
        """The same fact in SI units, by code. ValueError where the unit cannot be converted."""
        value = convert_text(self.value, self.unit, self.si_unit, self.molar_mass)
        return replace(
            self, relation=f"{self.relation}_si", value=value, unit=self.si_unit, avoid=(), si_unit="", molar_mass=None
        )


def with_unit(value: str, unit: str) -> str:
    return f"{value}{unit}" if unit in ("%", "") else f"{value} {unit}"


@lru_cache(maxsize=65536)
def normal(name: str) -> str:
    """A name as it is compared: lower case, single spaces, hyphens as spaces."""
    return re.sub(r"[\s\-\u2010-\u2015]+", " ", name).strip().lower()


class Knowledge:
    """Facts in the file's order, and the ways to find one."""

    def __init__(self, facts: Iterable[Fact]) -> None:
        self.facts = tuple(facts)
        self.subjects = tuple(dict.fromkeys(fact.subject for fact in self.facts))
        self.aliases = {normal(name): fact.subject for fact in self.facts for name in (*fact.aliases, fact.subject)}
        self.by_relation: dict[str, list[Fact]] = {}
        for fact in self.facts:
            self.by_relation.setdefault(fact.relation, []).append(fact)
        self._found = {(normal(fact.subject), fact.relation): fact for fact in self.facts}

    def __len__(self) -> int:
        return len(self.facts)

    def __contains__(self, name: str) -> bool:
        """Whether a subject or an alias bears this name."""
        return normal(name) in self.aliases

    def get(self, subject: str, relation: str) -> Fact | None:
        """The fact of a subject, which may be named by an alias."""
        return self._found.get((normal(self.aliases.get(normal(subject), subject)), relation))

    def subset(
        self,
        subjects: int | Iterable[str] | None = None,
        relations: Iterable[str] | None = None,
        per_subject: int | None = None,
    ) -> "Knowledge":
        """The first `subjects` subjects (or those named), these relations, the first `per_subject` facts of each."""
        if subjects is None or isinstance(subjects, int):
            subjects = self.subjects[:subjects]
        wanted = {self.aliases.get(normal(name), name) for name in subjects}
        if missing := wanted - set(self.subjects):
            name = min(missing)
            raise ValueError(f"the knowledge base has no subject {name!r}{did_you_mean(name, self.subjects)}")
        allowed = set(relations) if relations is not None else set(self.by_relation)
        if missing := allowed - set(self.by_relation):
            name = min(missing)
            raise ValueError(f"the knowledge base has no relation {name!r}; it has {', '.join(self.by_relation)}")
        by_subject: dict[str, list[Fact]] = {}
        kept = [fact for fact in self.facts if fact.subject in wanted and fact.relation in allowed]
        for fact in kept:
            by_subject.setdefault(fact.subject, []).append(fact)
        first = {fact for facts in by_subject.values() for fact in facts[:per_subject]}
        return Knowledge(fact for fact in kept if fact in first)


def read_knowledge(path: str | Path) -> Knowledge:
    """Every fact of a JSONL file, and those derived in SI units. FileFormatError names file and line."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no knowledge base {path}")
    facts: list[Fact] = []
    lines: dict[tuple[str, str], tuple[int, Fact]] = {}
    names: dict[str, tuple[int, str]] = {}  # normalised name -> line, subject
    subjects: dict[str, tuple[int, str]] = {}
    for number, row in read_jsonl(path):
        where = f"{path}, line {number}"
        for fact in _facts_of(row, where):
            key = (normal(fact.subject), fact.relation)
            if key in lines:
                earlier, first = lines[key]
                told = (
                    f"{first.text!r} there and {fact.text!r} here"
                    if first.text != fact.text
                    else "the same value in both"
                )
                what = f"{fact.relation} of {fact.subject!r}"
                raise FileFormatError(f"{where}: two values for one fact, {what}: line {earlier} has it too, {told}")
            lines[key] = number, fact
            facts.append(fact)
            subjects.setdefault(normal(fact.subject), (number, fact.subject))
            for name in (fact.subject, *fact.aliases):
                earlier, owner = names.setdefault(normal(name), (number, fact.subject))
                if owner != fact.subject:
                    raise FileFormatError(
                        f"{where}: the name {name!r} stands for two subjects, {owner!r} (line {earlier}) and "
                        f"{fact.subject!r}"
                    )
    if not facts:
        raise FileFormatError(f"{path} holds no facts")
    return Knowledge(facts)


def _facts_of(row: dict[str, Any], where: str) -> list[Fact]:
    """The fact of a line, and the one derived from it."""
    check_fields(row, (*_TEXTS, *_LISTS, "molar_mass"), where)
    for name, value in row.items():
        if name in _TEXTS and not isinstance(value, str):
            raise FileFormatError(f"{where}: field {name!r} must be a string, got {type(value).__name__}")
        if name in _LISTS and not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
            raise FileFormatError(f"{where}: field {name!r} must be a list of strings, got {value!r}")
    for name in _REQUIRED:
        if not row.get(name, "").strip():
            raise FileFormatError(f"{where}: missing field {name!r}; a fact needs {', '.join(_REQUIRED)}")
    if row.get("risk", "low") not in RISKS:
        raise FileFormatError(f"{where}: risk must be one of {', '.join(RISKS)}, got {row['risk']!r}")
    mass = row.get("molar_mass")
    if mass is not None and (isinstance(mass, bool) or not isinstance(mass, int | float) or mass <= 0):
        raise FileFormatError(f"{where}: molar_mass must be a number of g/mol above 0, got {mass!r}")
    given: dict[str, Any] = {name: tuple(value) if name in _LISTS else value for name, value in row.items()}
    fact = Fact(**given)
    if not fact.si_unit:
        return [fact]
    try:
        return [fact, fact.in_si()]
    except ValueError as error:
        raise FileFormatError(f"{where}: {fact.relation} of {fact.subject!r}: {error}") from error
