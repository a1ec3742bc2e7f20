"""The reader of knowledge bases, and what the bundled one promises."""

import json
from pathlib import Path

import pytest

from bench.second_pass import VERIFIED, agrees, identifier, questions
from lowrank.data.knowledge import Knowledge, read_knowledge
from lowrank.data.questions import LABTESTS, bundled
from lowrank.errors import FileFormatError
from lowrank.files import read_jsonl

FACT = {"subject": "oak", "aliases": ["Quercus"], "relation": "leaf", "value": "lobed", "evidence": "a flora"}


def write(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_facts_are_found_by_subject_alias_and_relation(tmp_path) -> None:
    beech = {**FACT, "subject": "beech", "aliases": ["Fagus"], "value": "oval"}
    height = {**FACT, "relation": "height", "value": "20-40", "unit": "m"}
    knowledge = read_knowledge(write(tmp_path / "trees.jsonl", FACT, height, beech))
    assert knowledge.subjects == ("oak", "beech")
    assert knowledge.get("quercus", "leaf").value == "lobed"
    assert knowledge.get("oak", "height").text == "20-40 m"
    assert knowledge.get("elm", "leaf") is None
    assert [fact.subject for fact in knowledge.by_relation["leaf"]] == ["oak", "beech"]
    assert "FAGUS" in knowledge and "elm" not in knowledge


def test_a_fact_in_si_units_is_derived_by_code(tmp_path) -> None:
    row = {**FACT, "subject": "glucose", "aliases": [], "relation": "level", "value": "70-99", "unit": "mg/dL"}
    knowledge = read_knowledge(write(tmp_path / "k.jsonl", {**row, "si_unit": "mmol/L", "molar_mass": 180.16}))
    assert [(fact.relation, fact.text) for fact in knowledge.facts] == [
        ("level", "70-99 mg/dL"),
        ("level_si", "3.9-5.5 mmol/L"),
    ]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([FACT, {"subject": "elm", "relation": "leaf", "evidence": "a flora"}], "line 2: missing field 'value'"),
        ([{**FACT, "relation": " "}], "line 1: missing field 'relation'"),
        ([FACT, {**FACT, "value": "oval"}], r"line 2: two values for one fact, leaf of 'oak': line 1 has it too"),
        ([FACT, FACT], "line 2: two values for one fact.*the same value in both"),
        ([FACT, {**FACT, "subject": "beech"}], "line 2: the name 'Quercus' stands for two subjects, 'oak' .line 1."),
        ([FACT, {**FACT, "subject": "quercus", "aliases": []}], "line 2: the name 'quercus' stands for two subjects"),
        ([{**FACT, "aliases": "Quercus"}], "line 1: field 'aliases' must be a list of strings"),
        ([{**FACT, "vlaue": "x"}], r"line 1: unknown field 'vlaue' \(did you mean 'value'\?\)"),
        ([{**FACT, "risk": "deadly"}], "line 1: risk must be one of low, medium, high"),
        ([{**FACT, "value": "3", "unit": "ells", "si_unit": "m"}], "line 1: leaf of 'oak': unknown unit 'ells'"),
        ([{**FACT, "value": "3", "unit": "cm", "si_unit": "kg"}], "line 1: .* cannot be converted to kg"),
        ([{**FACT, "molar_mass": "heavy"}], "line 1: molar_mass must be a number"),
        ([], "holds no facts"),
    ],
)
def test_a_bad_line_is_an_error_with_file_and_line(tmp_path, rows, message) -> None:
    with pytest.raises(FileFormatError, match=message) as error:
        read_knowledge(write(tmp_path / "trees.jsonl", *rows))
    assert "trees.jsonl" in str(error.value)


def test_a_missing_file_and_a_line_that_is_no_json(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl"):
        read_knowledge(tmp_path / "nowhere.jsonl")
    (tmp_path / "k.jsonl").write_text(json.dumps(FACT) + "\n{oak}\n", encoding="utf-8")
    with pytest.raises(FileFormatError, match="line 2: not valid JSON"):
        read_knowledge(tmp_path / "k.jsonl")


def test_a_subset_by_number_name_and_relation() -> None:
    knowledge = bundled("labtests").knowledge
    assert len(knowledge.subset(3).subjects) == 3
    assert knowledge.subset(["K", "sodium"]).subjects == ("sodium", "potassium")
    assert set(knowledge.subset(relations=["specimen"]).by_relation) == {"specimen"}
    assert len(knowledge.subset(3, per_subject=2)) == 6
    with pytest.raises(ValueError, match=r"no subject 'potasium'.*did you mean 'potassium'"):
        knowledge.subset(["potasium"])
    with pytest.raises(ValueError, match="no relation 'colour'"):
        knowledge.subset(relations=["colour"])


# --- the bundled knowledge base ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def labtests() -> Knowledge:
    return read_knowledge(LABTESTS / "knowledge.jsonl")


def test_the_bundled_domain_is_large_enough(labtests) -> None:
    facts = [fact for fact in labtests.facts if not fact.relation.endswith("_si")]
    relations: dict[str, set[str]] = {}
    for fact in facts:
        relations.setdefault(fact.subject, set()).add(fact.relation)
    assert len(relations) >= 100
    assert min(map(len, relations.values())) >= 5
    assert sum(fact.relation.endswith("_si") for fact in labtests.facts) >= 15


def test_the_bundled_values_are_short_and_no_relation_is_a_constant(labtests) -> None:
    for fact in labtests.facts:
        assert len(fact.value.split()) <= 8, fact
        assert fact.evidence and not any(character.isdigit() for character in fact.evidence), fact
    for relation, facts in labtests.by_relation.items():
        values = [fact.value for fact in facts]
        assert max(map(values.count, values)) <= 0.4 * len(values), relation


def test_the_notice_says_that_this_is_no_medical_advice() -> None:
    assert "no medical advice" in bundled("labtests").notice
    assert "no medical advice" in (LABTESTS / "NOTICE.md").read_text(encoding="utf-8").lower()


def test_every_bundled_fact_passed_the_second_pass() -> None:
    folder = Path(__file__).parent.parent / "fixtures" / "labtests"
    answers = {row["id"]: row["answer"] for _, row in read_jsonl(folder / "second_pass_answers.jsonl")}
    ruled = {row["id"] for _, row in read_jsonl(folder / "second_pass_rulings.jsonl") if row["same"]}
    dropped = {row["id"] for _, row in read_jsonl(folder / "second_pass_dropped.jsonl")}
    for _, row in read_jsonl(LABTESTS / "knowledge.jsonl"):
        name = identifier(row)
        assert row["verified"] == VERIFIED and name not in dropped
        assert agrees(row, answers[name]) or name in ruled, name


def test_the_comparison_sees_agreement_and_disagreement() -> None:
    interval = {"relation": "reference_interval", "value": "135-145", "unit": "mmol/L"}
    assert agrees(interval, "136 - 146 mmol/L") and not agrees(interval, "98-107")
    below = {"relation": "reference_interval", "value": "below 200", "unit": "mg/dL"}
    assert agrees(below, "<200") and agrees(below, "less than 190") and not agrees(below, "above 200")
    text = {"relation": "origin", "value": "kidneys", "unit": ""}
    assert agrees(text, "liver; kidney (cortex)") and not agrees(text, "liver; spleen")
    unit = {"relation": "unit", "value": "ng/mL", "unit": ""}
    assert agrees(unit, "µg/L") and not agrees(unit, "mg/L")


def test_the_questions_of_the_second_pass_do_not_give_the_values_away() -> None:
    rows = {identifier(row): row for _, row in read_jsonl(LABTESTS / "knowledge.jsonl")}
    asked = questions()
    assert [item["id"] for item in asked] == list(rows)
    for item in asked:
        row = rows[item["id"]]
        assert row["value"] in row["subject"] or f" {row['value']} " not in item["question"].replace(row["subject"], "")
