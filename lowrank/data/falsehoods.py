"""What is wrong and what does not exist: which value contradicts a fact, and names that nothing bears."""

import random
import re
from functools import lru_cache

from lowrank.data.knowledge import Fact, Knowledge, normal
from lowrank.data.templates import Templates


def contradicts(fact: Fact, value: str) -> bool:
    """Whether `value` would be wrong for the fact: another one, neither part of the right one nor right as well, and of
    intervals one that shares less than half of the narrower of the two."""
    right, other = normal(fact.value), normal(value)
    if other in {normal(name) for name in fact.avoid}:
        return False
    bounds, others = interval(fact.value), interval(value)
    if bounds and others:
        shared = min(bounds[1], others[1]) - max(bounds[0], others[0])
        return shared < 0.5 * min(bounds[1] - bounds[0], others[1] - others[0])
    words, other_words = set(right.split()), set(other.split())
    return not (words <= other_words or other_words <= words)


@lru_cache(maxsize=4096)
def interval(value: str) -> tuple[float, float] | None:
    """(low, high) of "3.5-5.0", "below 5" or "above 60"; None for anything else."""
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)\s*[-\u2013]\s*(\d+(?:\.\d+)?)", value.strip()):
        return float(match[1]), float(match[2])
    if match := re.fullmatch(r"(below|under|up to|<)\s*(\d+(?:\.\d+)?)", value.strip()):
        return 0.0, float(match[2])
    if match := re.fullmatch(r"(above|over|>)\s*(\d+(?:\.\d+)?)", value.strip()):
        return float(match[2]), 10 * float(match[2])
    return None


def invented_names(knowledge: Knowledge, templates: Templates, rng: random.Random) -> list[str]:
    """Names made of parts of real ones, none of which is a subject or an alias, in the order of `rng`."""
    if templates.invented:
        real = {normal(name) for name in templates.invented.get("except", ())}
        pairs = [(a, b) for a in templates.invented["first"] for b in templates.invented["last"]]
        names = [f"{a}{b}" for a, b in pairs]
    else:
        real = set()
        halves = [_halves(subject) for subject in knowledge.subjects]
        names = [f"{a}{b}" for i, (a, _) in enumerate(halves) for j, (_, b) in enumerate(halves) if i != j]
    taken = set(knowledge.aliases)
    fresh = sorted({name for name in names if normal(name) not in taken | real})
    rng.shuffle(fresh)
    return fresh[:2000]


def _halves(name: str) -> tuple[str, str]:
    """The first word and the rest, or the two halves of a single word."""
    first, space, rest = name.partition(" ")
    middle = (len(name) + 1) // 2
    return (f"{first} ", rest) if space else (name[:middle], name[middle:])
