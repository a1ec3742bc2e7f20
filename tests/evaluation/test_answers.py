"""The matching rules against answers labelled by hand from docs/truth.md, before any model's output was seen."""

import json
from collections import Counter
from pathlib import Path

import pytest

from lowrank.data.knowledge import Fact, Knowledge
from lowrank.data.records import Record, read_records
from lowrank.evaluation.answers import CLASSES, TYPES, Judge, Verdict

FIXTURES = Path(__file__).parents[1] / "fixtures" / "evaluation"


def lines(name: str) -> list[dict]:
    return [json.loads(line) for line in (FIXTURES / name).read_text(encoding="utf-8").splitlines()]


BASE = Knowledge(tuple(Fact(**row | {"aliases": tuple(row["aliases"])}) for row in lines("knowledge.jsonl")))
JUDGE = Judge(BASE)
RECORDS = {record.id: record for record in read_records(FIXTURES / "records.jsonl")}
ANSWERS = lines("answers.jsonl")


def judge(answer: str, record: Record, base: Knowledge | None = None) -> Verdict:
    return (JUDGE if base is BASE else Judge(base))(answer, record)


@pytest.mark.parametrize("row", ANSWERS, ids=lambda row: f"{row['record']}: {row['answer']}"[:70])
def test_hand_made_answer(row: dict) -> None:
    verdict = judge(row["answer"], RECORDS[row["record"]], BASE)
    assert (verdict.answer_class, verdict.right) == (row["class"], row["right"]), verdict.reason
    if "type" in row:
        assert verdict.type == row["type"], verdict.reason


def test_the_hand_made_answers_cover_every_rule_and_class() -> None:
    assert len(ANSWERS) >= 120
    assert {row["rule"] for row in ANSWERS} == set(range(1, 17))
    assert {row["class"] for row in ANSWERS} == set(CLASSES)
    assert {row["type"] for row in ANSWERS if "type" in row} == set(TYPES)
    right = Counter(row["right"] for row in ANSWERS)
    assert min(right.values()) > len(ANSWERS) // 3


def test_hallucinated_is_contradicted_or_unsupported_and_has_a_type() -> None:
    for row in ANSWERS:
        verdict = judge(row["answer"], RECORDS[row["record"]], BASE)
        assert verdict.hallucinated == (verdict.answer_class in ("contradicted", "unsupported")) == bool(verdict.type)


def test_a_trap_answered_without_a_rejection_is_wrong() -> None:
    trap = RECORDS["trap sodium specimen"]
    assert not judge("The usual specimen for sodium is serum.", trap, BASE).right
    assert judge("The usual specimen for sodium is serum, not urine.", trap, BASE).right


def test_without_a_knowledge_base_the_record_alone_decides() -> None:
    record = Record(
        instruction="What is the capital of Peru?", facts=({"subject": "Peru", "relation": "capital", "value": "Lima"},)
    )
    assert judge("Lima.", record).right
    assert judge("Cusco.", record).answer_class == "unsupported"
    assert judge("Not Lima.", record).answer_class == "contradicted"
    assert judge("I do not know.", record).answer_class == "abstained"


def test_another_field_of_knowledge() -> None:
    base = Knowledge(
        (
            Fact("Bridge of Tarn", "length", "340", "m", ("Tarn bridge",), evidence="the county survey"),
            Fact("Bridge of Wey", "length", "1.2", "km", evidence="the county survey"),
            Fact("Bridge of Tarn", "material", "granite", evidence="the county survey"),
            Fact("Bridge of Wey", "material", "steel", evidence="the county survey"),
            Fact("Bridge of Wey", "toll", "4", "thalers", evidence="the county survey"),
        )
    )

    def ask(relation: str, subject: str = "Bridge of Wey", **about: str) -> Record:
        fact = next(f for f in base.facts if (f.subject, f.relation) == (subject, relation))
        facts = ({"subject": subject, "relation": relation, "value": fact.value, "unit": fact.unit, **about},)
        return Record(
            instruction=f"Tell me the {relation} of the {subject}.", facts=facts, kind="trap" if about else "qa"
        )

    assert judge("It is 1200 m long.", ask("length"), base).right
    assert judge("1.2 km", ask("length"), base).right
    assert judge("1.2 m", ask("length"), base).type == "wrong unit or dose"
    assert judge("340 m", ask("length"), base).answer_class == "contradicted"
    assert judge("4 thalers", ask("toll"), base).right
    assert judge("5 thalers", ask("toll"), base).answer_class == "contradicted"
    assert judge("The Bridge of Wey is made of steel, not granite.", ask("material", false_value="granite"), base).right
    assert not judge("The Bridge of Wey is made of steel.", ask("material", false_value="granite"), base).right
    assert judge("Wood.", ask("material"), base).answer_class == "unsupported"


def test_a_value_open_to_argument_neither_answers_nor_contradicts() -> None:
    base = Knowledge((Fact("ESR", "high", "inflammation", avoid=("anemia",)), Fact("iron", "high", "anemia")))
    record = Record(
        instruction="What does a high ESR mean?",
        facts=({"subject": "ESR", "relation": "high", "value": "inflammation"},),
    )
    assert judge("Anemia.", record, base).answer_class == "no_claim"
    assert judge("Inflammation or anemia.", record, base).right


def test_several_facts_in_one_record_must_all_be_answered() -> None:
    facts = tuple(
        {"subject": "sodium", "relation": f.relation, "value": f.value, "unit": f.unit} for f in BASE.facts[:2]
    )
    record = Record(instruction="Specimen and reference interval of sodium?", facts=facts)
    assert judge("Serum; 135-145 mmol/L.", record, BASE).right
    assert not judge("Serum.", record, BASE).right
    assert judge("Serum; 130-140 mmol/L.", record, BASE).answer_class == "contradicted"


def test_the_judge_is_deterministic() -> None:
    first, second = Judge(BASE), Judge(BASE)
    for row in ANSWERS[::7]:
        assert first(row["answer"], RECORDS[row["record"]]) == second(row["answer"], RECORDS[row["record"]])
