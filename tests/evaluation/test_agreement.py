"""The matching rules against real answers that were labelled without seeing a verdict, 60 in each set."""

import math
import random
from collections import Counter
from pathlib import Path

import pytest

from bench.agreement import agreement, kappa, read_labelled
from lowrank.data.knowledge import read_knowledge
from lowrank.errors import FileFormatError

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


def test_kappa_against_scikit_learn() -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    rng = random.Random(3)
    first = [rng.choice("abc") for _ in range(80)]
    second = [a if rng.random() < 0.7 else rng.choice("abc") for a in first]
    assert kappa(first, second) == pytest.approx(sklearn.cohen_kappa_score(first, second), abs=1e-12)


def test_kappa_of_a_confusion_matrix() -> None:
    # [[18, 15], [11, 16]]
    first = [0] * 33 + [1] * 27
    second = [0] * 18 + [1] * 15 + [0] * 11 + [1] * 16
    assert kappa(first, second) == pytest.approx(0.1362126245847176, abs=1e-12)


def test_kappa_of_constant_raters_is_nan_and_of_nothing_an_error() -> None:
    assert math.isnan(kappa(["a", "a"], ["a", "a"]))
    with pytest.raises(ValueError, match="2 and 1"):
        kappa([1, 2], [1])
