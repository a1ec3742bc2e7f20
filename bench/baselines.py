"""Answers that need no model and must score badly: what shows that an evaluation cannot be gamed.

python -m bench.baselines        their table on the bundled domain
"""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lowrank.data.knowledge import Knowledge
from lowrank.data.records import Record
from lowrank.evaluation.truth import score

Answerer = Callable[[Record], str]


def baselines(knowledge: Knowledge, seed: int = 0) -> dict[str, Answerer]:
    """Always "No.", always "Yes.", always abstain, the question again, a random value of the relation (bare, and
    rejecting another one as a trained model would), and every value of the relation at once."""
    values: dict[str, list[str]] = {}
    for fact in knowledge.facts:
        values.setdefault(fact.relation, []).append(f"{fact.value} {fact.unit}".strip())

    def drawn(record: Record) -> list[str]:
        rng = random.Random(f"{seed}/{record.id}/{record.instruction}")
        about: dict[str, Any] = record.facts[0] if record.facts else {}
        known = values.get(str(about.get("relation", "")), ["unknown"])
        return [rng.choice(known), rng.choice(known)]

    return {
        'always "No."': lambda record: "No.",
        'always "Yes."': lambda record: "Yes.",
        "always abstain": lambda record: "I do not know.",
        "echo the question": lambda record: record.conversation()[0]["content"],
        "random value": lambda record: f"{drawn(record)[0]}.",
        "random value, rejecting another": lambda record: "{}, not {}.".format(*drawn(record)),
        "every value": lambda record: " or ".join(
            dict.fromkeys(values.get(str((record.facts or ({},))[0].get("relation", "")), []))
        ),
    }


def scores(test: Mapping[str, Sequence[Record]], knowledge: Knowledge, seed: int = 0) -> dict[str, dict[str, Any]]:
    """The result of each baseline on the questions of a domain."""
    parts = {part: records for part, records in test.items() if part not in ("answerable", "general")}
    return {
        name: score(parts, {part: [answer(record) for record in items] for part, items in parts.items()}, knowledge)
        for name, answer in baselines(knowledge, seed).items()
    }


if __name__ == "__main__":
    from lowrank.data.questions import bundled

    domain = bundled()
    print(
        "| baseline | paraphrase | trap | unseen trap | true premise | abstention | false abstention | hallucination |"
    )
    print("| --- " * 8 + "|")
    for name, result in scores(domain.build().test, domain.knowledge).items():
        keys = ("paraphrase", "trap", "trap_unseen", "true_premise", "abstention", "false_abstention", "hallucination")
        print(f"| {name} | " + " | ".join(f"{result[key]:.3f}" for key in keys) + " |")
