"""The bundled domain and the matching rules agree: what the generator intends is right, and no echo is."""

import pytest

from bench.baselines import scores
from lowrank.data.questions import Domain, bundled
from lowrank.data.records import Record
from lowrank.evaluation.answers import Judge

STEP = 5  # every fifth record; a full sweep takes 15 s on one core


@pytest.fixture(scope="module")
def domain() -> Domain:
    return bundled("labtests")


@pytest.fixture(scope="module")
def records(domain: Domain) -> list[Record]:
    questions = domain.build()
    parts = {name: part for name, part in questions.test.items() if name not in ("answerable", "general")}
    trained = [record for record in questions.train if record.kind != "general"]
    return trained[:: 6 * STEP] + [record for part in parts.values() for record in part[::STEP]]


def test_every_intended_answer_is_right(domain: Domain, records: list[Record]) -> None:
    judge = Judge(domain.knowledge)
    wrong = [
        (record.instruction, record.output, verdict.reason)
        for record in records
        if not (verdict := judge(record.output, record)).right or verdict.hallucinated
    ]
    assert not wrong, wrong[:5]


def test_no_echo_is_right_or_a_claim(domain: Domain, records: list[Record]) -> None:
    judge = Judge(domain.knowledge)
    wrong = [r.instruction for r in records if (v := judge(r.instruction, r)).right or v.hallucinated]
    assert not wrong, wrong[:5]


def test_the_statement_without_its_judgement_is_wrong_for_a_trap(domain: Domain, records: list[Record]) -> None:
    judge = Judge(domain.knowledge)
    traps = [record for record in records if record.kind == "trap"]
    assert len(traps) > 40
    for record in traps:
        verdict = judge(record.output.partition(", not ")[0] + ".", record)
        assert verdict.answer_class == "correct" and not verdict.right, (record.output, verdict)


def test_baselines_fail_on_the_bundled_domain() -> None:
    quick = bundled("labtests-quick", subjects=20)
    table = scores(quick.build().test, quick.knowledge)
    for name, result in table.items():
        good = [result[part] >= 0.5 for part in ("paraphrase", "trap", "trap_unseen", "true_premise", "abstention")]
        assert sum(good) <= 1, name  # a single part at most, and another figure gives it away
        assert result["trap"] <= 0.1 and result["trap_unseen"] <= 0.1, name
    assert table["always abstain"]["false_abstention"] == 1.0
    assert table["random value"]["hallucination"] > 0.7
