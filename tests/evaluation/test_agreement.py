"""The matching rules against real answers that were labelled without seeing a verdict, 60 in each set."""

from collections import Counter
from pathlib import Path

import pytest

from lowrank.data.knowledge import read_knowledge
from lowrank.errors import FileFormatError
from lowrank.evaluation.agreement import agreement, read_labelled

FIXTURES = Path(__file__).parents[1] / "fixtures" / "evaluation"


@pytest.mark.parametrize("file", ["blind_6.jsonl", "blind_7.jsonl"])  # docs/truth.md has the sets before them
def test_blind_labels_and_verdicts_agree(file: str) -> None:
    labelled = read_labelled(FIXTURES / file)
    found = agreement(labelled, read_knowledge(FIXTURES / "blind_knowledge.jsonl"))
    assert found["n"] == 60
    assert found["class"] >= 0.9 and found["right"] >= 0.9, found["differ"]
    # a kappa of one class only would say nothing: the set has bad answers in number
    assert Counter(name for _, _, name, _ in labelled)["unsupported"] >= 15
    assert sum(not right for *_, right in labelled) >= 20


def test_agreement_names_what_differs() -> None:
    labelled = read_labelled(FIXTURES / "blind_6.jsonl")[-4:]
    record, answer, name, right = labelled[-1]
    found = agreement([*labelled[:-1], (record, answer, "contradicted", not right)], None)
    assert found["differ"][-1]["label"] == ("contradicted", not right)
    assert found["differ"][-1]["verdict"] == (name, right)


def test_bad_labels_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "labels.jsonl"
    file.write_text(
        '{"record": {"instruction": "x"}, "answer": "y", "class": "wrong", "right": true}\n', encoding="utf-8"
    )
    with pytest.raises(FileFormatError, match=r"labels\.jsonl, line 1: .*class among correct, contradicted"):
        read_labelled(file)
