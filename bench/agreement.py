"""How far the matching rules agree with a person who labelled answers without seeing the verdicts.

    python -m bench.agreement LABELLED.jsonl KNOWLEDGE.jsonl

A line of the first file: {"record": {...}, "answer", "class": one of the five, "right": true|false}.
"""

import math
import sys
from collections import Counter
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

from lowrank.data.knowledge import Knowledge, read_knowledge
from lowrank.data.records import Record, record_from_json
from lowrank.errors import FileFormatError
from lowrank.evaluation.answers import CLASSES, Judge
from lowrank.files import read_jsonl


def read_labelled(path: str | Path) -> list[tuple[Record, str, str, bool]]:
    """(record, answer, class, right) for each line."""
    rows = []
    for number, row in read_jsonl(path):
        where = f"{path}, line {number}"
        if row.get("class") not in CLASSES or not isinstance(row.get("right"), bool) or "answer" not in row:
            raise FileFormatError(f"{where}: wanted answer, right (true or false) and class among {', '.join(CLASSES)}")
        rows.append((record_from_json(row["record"], where), str(row["answer"]), str(row["class"]), row["right"]))
    return rows


def kappa(first: Sequence[Hashable], second: Sequence[Hashable]) -> float:
    """Cohen's kappa (1960): agreement beyond chance, (p_o - p_e) / (1 - p_e). nan where both say one thing only."""
    if len(first) != len(second) or not first:
        raise ValueError(f"kappa needs two ratings of the same items, got {len(first)} and {len(second)}")
    n = len(first)
    observed = sum(a == b for a, b in zip(first, second)) / n
    left, right = Counter(first), Counter(second)
    expected = sum(left[label] * right[label] for label in left) / n**2
    return (observed - expected) / (1 - expected) if expected < 1 else math.nan


def agreement(labelled: Sequence[tuple[Record, str, str, bool]], knowledge: Knowledge | None) -> dict[str, Any]:
    """Cohen's kappa of the five classes and of right against wrong, and the answers on which the two differ."""
    judge = Judge(knowledge)
    judge.learn(record for record, *_ in labelled)
    verdicts = [judge(answer, record) for record, answer, _, _ in labelled]
    differ = [
        {"question": record.instruction, "answer": answer, "label": (name, right), "verdict": (v.answer_class, v.right)}
        for (record, answer, name, right), v in zip(labelled, verdicts)
        if (name, right) != (v.answer_class, v.right)
    ]
    return {
        "n": len(labelled),
        "class": kappa([name for _, _, name, _ in labelled], [v.answer_class for v in verdicts]),
        "right": kappa([right for _, _, _, right in labelled], [v.right for v in verdicts]),
        "differ": differ,
    }


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit((__doc__ or "").split("\n\n")[1].strip())
    found = agreement(read_labelled(sys.argv[1]), read_knowledge(sys.argv[2]))
    print(f"{found['n']} answers: kappa {found['class']:.3f} (five classes), {found['right']:.3f} (right or wrong)")
    for row in found["differ"]:
        print(f"  label {row['label']}, verdict {row['verdict']}: {row['question']} -> {row['answer'][:100]!r}")
