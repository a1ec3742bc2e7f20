"""The generator: what the splits promise, for the bundled domain and for one of another field."""

import json
import random
from collections import Counter
from pathlib import Path

import pytest

from bench.leaks import SIMILARITY, leaks
from lowrank.data.falsehoods import contradicts, interval, invented_names
from lowrank.data.general import read_general, says
from lowrank.data.knowledge import normal, read_knowledge
from lowrank.data.questions import LABTESTS, Questions, bundled, domain
from lowrank.data.records import read_records, record_from_json
from lowrank.data.templates import capital, fill, read_templates, uncapital
from lowrank.errors import FileFormatError

TEST_PARTS = ("paraphrase", "trap", "trap_unseen", "true_premise", "abstention", "answerable", "general")
TREES = Path(__file__).parent.parent / "fixtures" / "data"


@pytest.fixture(scope="module")
def quick():
    return bundled("labtests-quick")


@pytest.fixture(scope="module")
def questions(quick) -> Questions:
    return quick.build()


def about(record):
    return record.facts[0]["subject"], record.facts[0]["relation"]


def held(questions: Questions):
    for split in (questions.validation, questions.test):
        for name, part in split.items():
            yield from ((name, record) for record in part)


# --- what the splits hold ---------------------------------------------------------------------------------------------


def test_the_test_is_large_enough(quick) -> None:
    questions = quick.build()
    assert tuple(questions.test) == TEST_PARTS
    counts = {name: len(part) for name, part in questions.test.items()}
    assert counts["paraphrase"] >= 200
    assert counts["trap"] + counts["trap_unseen"] >= 100
    assert counts["trap"] == counts["trap_unseen"]
    assert counts["true_premise"] >= 100
    assert counts["abstention"] >= 50
    assert counts["general"] >= 100


def test_the_seed_decides_everything(quick, questions) -> None:
    assert quick.build(seed=0) == questions
    other = quick.build(seed=1)
    assert [r.instruction for r in other.train] != [r.instruction for r in questions.train]
    assert other.counts()["train"] == pytest.approx(questions.counts()["train"], rel=0.1)


def test_every_fact_is_asked_plainly_in_different_wordings(quick, questions) -> None:
    asked: dict[tuple[str, str], list[str]] = {}
    for record in questions.train:
        if record.kind == "qa":
            asked.setdefault(about(record), []).append(record.task)
    assert asked.keys() == {(fact.subject, fact.relation) for fact in quick.knowledge.facts}
    for tasks in asked.values():
        assert len(tasks) == len(set(tasks)) == 7


def test_answers_put_the_value_first_and_the_judgement_after_it(questions) -> None:
    for record in questions.train:
        fact = record.facts[0]
        if record.kind in ("trap", "confirm"):
            said = record.output.index(fact["value"])
            ends = ", correct." if record.kind == "confirm" else f", not {fact['false_value']}"
            assert said < record.output.rindex(ends)
            assert record.output.count(".") >= 1 and not record.output.startswith(("No", "Yes"))
        if record.kind == "unanswerable":
            assert record.output == f"I do not know a laboratory test called {fact['subject']}."


def test_neither_rejecting_nor_confirming_is_a_constant(questions) -> None:
    forms = {kind: Counter() for kind in ("trap", "confirm")}
    for record in questions.train:
        if record.kind in forms:
            forms[record.kind][record.task.partition("/")[2]] += 1
    assert forms["trap"].keys() == forms["confirm"].keys()
    assert len(forms["trap"]) >= 15
    for form, count in forms["trap"].items():
        assert 0.3 <= forms["confirm"][form] / count <= 2, form


def test_held_out_traps_are_about_facts_that_no_trained_premise_was_about(questions) -> None:
    premised = {about(record) for record in questions.train if record.kind in ("trap", "confirm")}
    tested = [
        {about(r) for r in split["trap"] + split["trap_unseen"]} for split in (questions.validation, questions.test)
    ]
    assert not premised & (tested[0] | tested[1])
    assert not tested[0] & tested[1]
    taught = {about(record) for record in questions.train if record.kind == "qa"}
    assert tested[0] | tested[1] <= taught


def test_unseen_forms_are_unseen(questions) -> None:
    trained = {r.task for r in questions.train if r.kind in ("trap", "confirm")}
    unseen = {split: {r.task for r in getattr(questions, split)["trap_unseen"]} for split in ("validation", "test")}
    assert len(unseen["test"]) >= 5
    assert not trained & (unseen["validation"] | unseen["test"])
    assert not unseen["validation"] & unseen["test"]
    assert {r.task for r in questions.test["trap"]} <= trained


@pytest.mark.parametrize("name", ["labtests-quick", "labtests"])
def test_the_five_kinds_of_trap_are_trained_and_tested(name: str) -> None:
    questions = bundled(name).build(plain_per_fact=1)
    kinds = {"value", "unit", "specimen", "cause", "source"}
    assert {r.facts[0]["trap"] for r in questions.train if r.kind == "trap"} == kinds
    assert {r.facts[0]["trap"] for r in questions.test["trap_unseen"]} == kinds
    assert {r.facts[0]["trap"] for r in questions.test["trap"]} == kinds


def test_a_false_value_is_false_and_comes_from_another_subject(quick, questions) -> None:
    for record in questions.train + questions.test["trap"] + questions.test["trap_unseen"]:
        if record.kind != "trap":
            continue
        told = record.facts[0]
        fact = quick.knowledge.get(told["subject"], told["relation"])
        if told["false_value"] == fact.value:
            assert told["false_unit"] != fact.unit
        else:
            assert contradicts(fact, told["false_value"])
            assert any(told["false_value"] == other.value for other in quick.knowledge.by_relation[fact.relation])


def test_a_source_that_does_not_exist_confirms_nothing(quick, questions) -> None:
    invented = [s.lower() for split in ("train", "validation", "test") for s in quick.templates.sources[split]]
    for record in [*questions.train, *(record for _, record in held(questions))]:
        cited = any(source in record.instruction.lower() for source in invented)
        assert not (cited and record.kind != "trap"), record
        if record.kind == "trap":
            assert cited == (record.facts[0]["trap"] == "source")


def test_unanswerable_names_exist_nowhere_and_differ_between_the_splits(questions) -> None:
    knowledge = read_knowledge(LABTESTS / "knowledge.jsonl")
    names = [
        {r.facts[0]["subject"] for r in part if r.kind == "unanswerable"}
        for part in (questions.train, questions.validation["abstention"], questions.test["abstention"])
    ]
    assert len(names[2]) >= 50
    assert not names[0] & names[1] and not names[0] & names[2] and not names[1] & names[2]
    said = {normal(name) for name in knowledge.aliases} | {normal(fact.value) for fact in knowledge.facts}
    for name in names[0] | names[1] | names[2]:
        assert name not in knowledge and normal(name) not in said
        assert not any(name in known.split() for known in said)


@pytest.mark.parametrize("name", ["labtests-quick", "labtests"])
def test_no_held_out_question_is_too_like_a_trained_one(name: str) -> None:
    bundle = bundled(name)
    questions = bundle.build(plain_per_fact=7 if name == "labtests-quick" else 3)
    for split in (questions.validation, questions.test):
        for part in split.values():
            assert [str(leak) for leak in leaks(questions.train, part, bundle.templates)] == []
    for part, records in questions.validation.items():
        tested = {record.instruction for record in questions.test[part]}
        assert not tested & {record.instruction for record in records}, part


def test_the_leak_check_finds_a_leak(quick, questions) -> None:
    trained = next(r for r in questions.train if r.kind == "qa" and r.task == "plain/0")
    same = record_from_json({**_json(trained), "id": "same"}, "here")
    near = record_from_json({**_json(trained), "id": "near", "instruction": f"Please: {trained.instruction}"}, "here")
    trap = next(r for r in questions.train if r.kind == "trap")
    again = record_from_json({**_json(trap), "id": "again", "instruction": "Quite another form."}, "here")
    found = leaks(questions.train, [same, near, again], quick.templates)
    assert [leak.held for leak in found] == ["same", "near", "again"]
    assert found[0].similarity == 1 and SIMILARITY <= found[1].similarity < 1
    assert "near" in str(found[1])


def _json(record):
    return json.loads(json.dumps(record.to_json()))


def test_records_survive_the_way_through_a_file(questions) -> None:
    for record in questions.train[:200]:
        assert record_from_json(_json(record), "here") == record


def test_the_parts_are_written_as_files(questions, tmp_path) -> None:
    questions.write(tmp_path / "set")
    assert read_records(tmp_path / "set" / "train.jsonl") == questions.train
    assert read_records(tmp_path / "set" / "test" / "trap_unseen.jsonl") == questions.test["trap_unseen"]
    assert {path.stem for path in (tmp_path / "set" / "validation").iterdir()} == set(TEST_PARTS)


def test_sizes_are_parameters(quick) -> None:
    counts = quick.build(plain_per_fact=2, traps_per_fact=1, confirms_per_fact=0).counts()
    assert counts["train"]["qa"] == 2 * len(quick.knowledge)
    assert counts["train"]["trap"] == pytest.approx(len(quick.knowledge) / 2, rel=0.2)
    assert "confirm" not in counts["train"] and counts["test"]["abstention"] == 60
    assert len(bundled("labtests-quick", subjects=40).knowledge.subjects) == 40
    with pytest.raises(ValueError, match="traps_per_fact must be at least 0"):
        quick.build(traps_per_fact=-1)
    with pytest.raises(ValueError, match="plain_per_fact must be at least 1"):
        quick.build(plain_per_fact=0)
    with pytest.raises(ValueError, match="unknown bundled domain 'labtest'"):
        bundled("labtest")


# --- small functions --------------------------------------------------------------------------------------------------


def test_intervals_are_read() -> None:
    assert interval("3.5-5.0") == (3.5, 5.0)
    assert interval("below 5") == (0.0, 5.0)
    assert interval("above 60")[0] == 60
    assert interval("liver") is None


def test_what_contradicts_a_fact(quick) -> None:
    potassium = quick.knowledge.get("potassium", "reference_interval")
    assert contradicts(potassium, "98-107")
    assert not contradicts(potassium, "3.4-5.1")
    high = quick.knowledge.get("potassium", "high_points_to")
    assert contradicts(high, "scurvy")
    assert not contradicts(high, high.value)


def test_capitals_keep_names() -> None:
    assert capital("sodium") == "Sodium" and capital("pH") == "pH"
    assert uncapital("High pH") == "high pH" and uncapital("IgG is high") == "IgG is high"
    assert fill("{Subject} or {subject}?", subject="iron") == "Iron or iron?"


# --- general questions and prose --------------------------------------------------------------------------------------


def test_the_general_questions() -> None:
    items = read_general(LABTESTS / "general.jsonl")
    by_split = {split: [item for item in items if item.split == split] for split in ("train", "validation", "test")}
    checked = [item for item in by_split["train"] if item.accept or item.regex]
    assert len(by_split["test"]) + len(checked) >= 200
    assert min(Counter(item.area for item in by_split["test"]).values()) >= 15
    assert len({item.area for item in by_split["test"]}) >= 6
    assert len(by_split["train"]) - len(checked) >= 200
    assert len({item.question for item in items}) == len(items)
    assert all(item.record().output for item in by_split["train"])
    assert not any(item.record().output for item in by_split["test"])


def test_general_answers_are_checked_by_machine() -> None:
    assert says("It is paris.", ["Paris"], "") and not says("Parisian", ["Paris"], "")
    assert says('"Yesterday it rained."', [], r"^\W*yesterday")


def test_bad_general_questions(tmp_path) -> None:
    path = tmp_path / "general.jsonl"
    for row, message in [
        ({"id": "1", "area": "law", "question": "?"}, "line 1: area must be one of"),
        ({"id": "1", "area": "code", "question": "?", "split": "test"}, "line 1: a held-out question needs"),
        ({"id": "1", "area": "code", "question": "?"}, "line 1: no answer of the base model"),
        ({"id": "1", "area": "code"}, "line 1: missing field 'question'"),
    ]:
        path.write_text(json.dumps(row), encoding="utf-8")
        with pytest.raises(FileFormatError, match=message):
            read_general(path)


def test_the_prose_is_long_enough_and_general(quick) -> None:
    assert len(quick.prose.split()) >= 4000  # over 5,000 tokens of SmolLM2's tokenizer
    assert not {"serum", "hemoglobin", "laboratory", "plasma"} & set(quick.prose.lower().split())


# --- a domain of one's own --------------------------------------------------------------------------------------------


def test_another_field_goes_through_the_same_functions() -> None:
    knowledge, templates = read_knowledge(TREES / "trees.jsonl"), read_templates(TREES / "trees.yaml")
    questions = domain("trees", knowledge, templates).build(seed=3, plain_per_fact=3)
    assert tuple(questions.test) == TEST_PARTS
    assert all(questions.test[part] for part in TEST_PARTS)
    kinds = Counter(record.kind for record in questions.train)
    assert kinds["qa"] == 3 * len(knowledge)
    assert kinds["trap"] and kinds["confirm"] and kinds["unanswerable"]
    for name in invented_names(knowledge, templates, random.Random(0)):
        assert name not in knowledge
    for part in questions.test.values():
        assert [str(leak) for leak in leaks(questions.train, part, templates)] == []


def test_a_relation_without_a_template_says_so(quick) -> None:
    with pytest.raises(ValueError, match="no template for relation 'leaf'"):
        domain("trees", read_knowledge(TREES / "trees.jsonl"), quick.templates).build()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "What leaves does {subject} have?",
            "What leaves does {subjct} have?",
            r"unknown field {subjct}.*did you mean 'subject'",
        ),
        ("statement:", "statment:", "unknown field 'statment'.*did you mean 'statement'"),
        ("noun:", "trap:", "missing field 'noun'|duplicate|trap must be"),
        ("relations:", "relation:", "unknown field 'relation'"),
        ('- "What leaves does {subject} have?"', '- "What leaves are there?"', "must name its"),
        (
            '- "How do the leaves of {subject} look?"',
            '- "What leaves does {subject} have?"',
            "a held-out wording must be new",
        ),
        ("  leaf:", "  leaf: [", "not valid YAML"),
    ],
)
def test_a_bad_template_is_an_error_with_file_and_line(tmp_path, old, new, message) -> None:
    text = (TREES / "trees.yaml").read_text(encoding="utf-8")
    assert old in text
    path = tmp_path / "bad.yaml"
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(FileFormatError, match=message) as error:
        read_templates(path)
    assert "bad.yaml" in str(error.value)
    if "unknown field" in message:
        line = next(i for i, (a, b) in enumerate(zip(text.split("\n"), path.read_text().split("\n")), 1) if a != b)
        assert f"line {line}" in str(error.value)
