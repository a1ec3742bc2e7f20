"""The leak check: is a held-out question too like a trained one, beyond the fact that it asks for?

Two questions are compared as sets of words, |A ∩ B| / |A ∪ B| (Jaccard), without the words of what they are about:
the subject and the values, and in a premise the claim itself. Asking for the same fact is the point; asking in the same
words is the leak. Plain questions are compared with plain ones, premises with premises. Two kinds of held-out question
use trained wordings on purpose and are held to another rule: a premise in a trained form must be about a fact that no
trained premise was about, and an unanswerable question about a name that no trained one had.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from lowrank.data.records import Record
from lowrank.data.templates import Templates

SIMILARITY = 0.6
"""At or above this share of common words a held-out question counts as leaked."""

PREMISES = ("trap", "confirm")


@dataclass(frozen=True)
class Leak:
    held: str
    trained: str
    similarity: float

    def __str__(self) -> str:
        return f"held-out {self.held} and trained {self.trained} share {self.similarity:.0%} of their words"


def leaks(
    trained: Iterable[Record], held: Iterable[Record], templates: Templates, similarity: float = SIMILARITY
) -> list[Leak]:
    """Every held-out question that is too like a trained one. General questions are compared by their whole text."""
    trained = tuple(trained)
    texts = {_plain(record): record.id for record in trained}
    forms = {record.task.partition("/")[2] for record in trained if record.kind in PREMISES}
    premised = {_about(record): record.id for record in trained if record.kind in PREMISES}
    invented = {_about(record)[0]: record.id for record in trained if record.kind == "unanswerable"}
    wordings: dict[bool, dict[frozenset[str], str]] = {True: {}, False: {}}
    for record in trained:
        if record.kind != "general":
            wordings[record.kind in PREMISES].setdefault(skeleton(record, templates), record.id)
    found = []
    for record in held:
        premise = record.kind in PREMISES
        if same := texts.get(_plain(record)):
            found.append(Leak(record.id, same, 1.0))
        elif premise and _about(record) in premised:
            found.append(Leak(record.id, premised[_about(record)], 1.0))
        elif record.kind == "unanswerable" and _about(record)[0] in invented:
            found.append(Leak(record.id, invented[_about(record)[0]], 1.0))
        elif record.kind == "qa" or (premise and record.task.partition("/")[2] not in forms):
            words, known = skeleton(record, templates), wordings[premise]
            near = max(known, key=lambda other: jaccard(words, other), default=None)
            if near is not None and jaccard(words, near) >= similarity:
                found.append(Leak(record.id, known[near], jaccard(words, near)))
    return found


def skeleton(record: Record, templates: Templates) -> frozenset[str]:
    """The words of a question without those of what it is about."""
    said: list[str] = []
    for fact in record.facts:
        said += [str(fact.get(key, "")) for key in ("subject", "value", "unit", "false_value", "false_unit")]
        if record.kind in PREMISES and fact.get("relation") in templates.relations:
            relation = templates.relations[fact["relation"]]
            said += [relation.noun, relation.statement]
    text = record.instruction.lower()
    if record.kind in PREMISES:
        said += [source for sources in templates.sources.values() for source in sources if source.lower() in text]
    return frozenset(_words(record.instruction)) - frozenset(_words(" ".join(said)))


def jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    return len(a & b) / len(a | b) if a or b else 1.0


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _plain(record: Record) -> str:
    return " ".join(_words(record.instruction))


def _about(record: Record) -> tuple[str, str]:
    fact = record.facts[0] if record.facts else {}
    return str(fact.get("subject", "")).lower(), str(fact.get("relation", ""))
