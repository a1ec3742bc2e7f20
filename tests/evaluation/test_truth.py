"""Counting: parts, classes, intervals, the subset, two models side by side, plain question-answer pairs."""

import json
from dataclasses import replace
from typing import Any

import pytest
from torch import nn

from bench.baselines import scores
from lowrank.data.knowledge import Fact, Knowledge
from lowrank.data.records import Record
from lowrank.evaluation import truth
from lowrank.evaluation.truth import ask, compare, score, subset, summary, token_f1, verdicts_of

HEIGHTS = {"Alder": "410", "Birk": "620", "Corrie": "830", "Dunmore": "915", "Eildon": "422"}
ROCKS = {"Alder": "granite", "Birk": "basalt", "Corrie": "gneiss", "Dunmore": "slate", "Eildon": "trachyte"}
HILLS = Knowledge(
    tuple(Fact(name, "height", value, "m", risk="high") for name, value in HEIGHTS.items())
    + tuple(Fact(name, "rock", value) for name, value in ROCKS.items())
)


def about(fact: Fact) -> dict[str, Any]:
    return {"subject": fact.subject, "relation": fact.relation, "value": fact.value, "unit": fact.unit}


def questions() -> dict[str, list[Record]]:
    paraphrase, traps, confirms = [], [], []
    for i, fact in enumerate(HILLS.facts):
        said = f"The {fact.relation} of {fact.subject} is {fact.value} {fact.unit}".strip()
        others = [f for f in HILLS.facts if f.relation == fact.relation and f.value != fact.value]
        false = others[i % len(others)]
        paraphrase.append(
            Record(f"p{i}", f"Tell me the {fact.relation} of {fact.subject}.", output=f"{said}.", facts=(about(fact),))
        )
        traps.append(
            Record(
                f"t{i}",
                f"Is {false.value} the {fact.relation} of {fact.subject}?",
                output=f"{said}, not {false.value}.",
                kind="trap",
                facts=(about(fact) | {"false_value": false.value, "false_unit": fact.unit},),
            )
        )
        confirms.append(
            Record(f"c{i}", f"{said}, isn't it?", output=f"{said}, correct.", kind="confirm", facts=(about(fact),))
        )
    unknown = [
        Record(f"u{i}", f"How high is {name}?", output=f"I do not know a hill called {name}.", kind="unanswerable",
               facts=({"subject": name, "relation": "height"},))
        for i, name in enumerate(("Birdun", "Aldon", "Cormore"))
    ]  # fmt: skip
    general = [
        Record("g0", "2 + 3?", kind="general", facts=({"area": "arithmetic", "accept": ["5", "five"]},)),
        Record("g1", "Capital of Peru?", kind="general", facts=({"area": "geography", "regex": r"\blima\b"},)),
    ]
    return {
        "paraphrase": paraphrase,
        "trap": traps[::2],
        "trap_unseen": traps[1::2],
        "true_premise": confirms,
        "abstention": unknown,
        "answerable": paraphrase,
        "general": general,
    }


def gold(parts: dict[str, list[Record]]) -> dict[str, list[str]]:
    told = {part: [record.output for record in records] for part, records in parts.items()}
    return told | {"general": ["It is 5.", "Cusco"]}


def test_the_intended_answers_score_perfectly() -> None:
    result = score(questions(), gold(questions()), HILLS)
    for part in ("paraphrase", "trap", "trap_unseen", "true_premise", "abstention"):
        assert result[part] == 1.0, part
    assert result["false_abstention"] == 0.0 == result["hallucination"]
    assert result["answered"] == 1.0
    assert result["general"] == 0.5
    assert result["n"]["paraphrase"] == 10 and result["n"]["hallucination"] == 10 + 10 + 10 + 3  # answerable once
    assert result["intervals"]["general"][0] < 0.5 < result["intervals"]["general"][1]
    assert result["by_area"]["arithmetic"]["right"] == 1 and result["by_area"]["geography"]["right"] == 0
    json.dumps(result)


def test_classes_share_out_every_judged_answer() -> None:
    told = gold(questions())
    told["paraphrase"] = ["It is 911 m.", "I do not know.", "", "Cheese.", *told["paraphrase"][4:]]
    result = score(questions(), told, HILLS)
    assert sum(result["classes"].values()) == pytest.approx(1)
    assert result["classes"]["contradicted"] == result["classes"]["unsupported"] == pytest.approx(1 / 33)
    assert result["hallucination"] == pytest.approx(2 / 33)
    assert result["paraphrase"] == 0.6 and result["false_abstention"] == 0.1 and result["answered"] == 0.8
    assert result["bad_by_type"]["contradicted value"] == 1 and result["bad_by_type"]["invented entity"] == 1
    assert result["by_risk"]["high"] == result["by_risk"]["high"] | {"bad": 2}  # heights: 911 m and cheese


def test_a_part_of_another_name_counts_by_kind() -> None:
    parts = {"qa": questions()["paraphrase"] + questions()["trap"]}
    result = score(parts, {"qa": [record.output for record in parts["qa"]]}, HILLS)
    assert result["paraphrase"] == result["trap"] == 1.0


def test_plain_questions_need_no_knowledge_base() -> None:
    records = [Record("1", "Who?", output="The Duke of Wey."), Record("2", "When?", output="on Monday morning")]
    result = score({"qa": records}, {"qa": ["the duke of Wey", "Monday"]})
    assert result["exact"] == 0.5 and result["f1"] == pytest.approx((1 + 2 / 4) / 2)
    assert result["hallucination"] is None and result["paraphrase"] is None
    assert token_f1("", "") == 1.0 and token_f1("x", "y") == token_f1("", "y") == 0.0


def test_answers_must_fit_the_questions() -> None:
    with pytest.raises(ValueError, match="part 'trap' has 5 questions and 0 answers"):
        score(questions(), {k: v for k, v in gold(questions()).items() if k != "trap"}, HILLS)
    with pytest.raises(ValueError, match="10 questions and 1 answers"):
        score({"paraphrase": questions()["paraphrase"]}, {"paraphrase": ["x"]}, HILLS)


def test_subset_is_stratified_spread_and_the_same_each_time() -> None:
    many = {
        part: [replace(r, id=f"{part}{i}") for i in range(300) for r in items[:1]]
        for part, items in questions().items()
    }
    chosen = subset(many)
    assert {part: len(items) for part, items in chosen.items()} == {
        "paraphrase": 60, "trap": 20, "trap_unseen": 20, "true_premise": 20, "abstention": 20, "answerable": 60,
    }  # fmt: skip
    assert chosen == subset(many)
    assert chosen["answerable"] is chosen["paraphrase"]
    positions = [int(r.id.removeprefix("trap")) for r in chosen["trap"]]
    assert positions == sorted(set(positions)) and positions[0] < 30 and positions[-1] > 270
    assert sum(len(items) for part, items in subset(many, 70).items() if part != "answerable") == 70
    everything = subset(many, 0)
    assert {len(items) for items in everything.values()} == {300} and set(everything) == set(many)
    assert len(subset(questions())["paraphrase"]) == 10  # fewer than wanted: all of them


def test_two_models_side_by_side() -> None:
    parts = questions()
    bad = gold(parts)
    bad["paraphrase"] = ["I do not know."] * 8 + ["It is 5 km high.", "Granite."]
    bad["general"] = ["5", "Lima"]
    before, after = verdicts_of(parts, bad, HILLS), verdicts_of(parts, gold(parts), HILLS)
    result = compare(before, after)
    assert result["paraphrase"]["only_after"] == 10 and result["paraphrase"]["only_before"] == 0
    assert result["paraphrase"]["difference"] == 1.0 and result["paraphrase"]["p"] == pytest.approx(2 / 2**10)
    assert result["hallucination"]["difference"] == pytest.approx(-2 / 33)
    assert result["trap"]["p"] == 1.0
    assert result["retention"] == {"all": 0.5, "arithmetic": 1.0, "geography": 0.0}
    json.dumps(result)
    with pytest.raises(ValueError, match="share no question"):
        compare(before, [replace(row, id="other") for row in after])


def test_rows_say_what_is_needed_to_judge_them() -> None:
    rows = verdicts_of(questions(), gold(questions()), HILLS)
    line = rows[10].to_json("tuned")
    assert line["column"] == "tuned" and line["part"] == "trap" and line["answer_class"] == "correct"
    assert {"id", "question", "answer", "expected", "right", "hallucinated", "reason", "risk"} <= set(line)
    assert summary(rows)["trap"] == 1.0


def test_ask_keeps_the_order_and_fills_batches_by_length(monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[list[int]] = []

    class Letters:
        eos_id, pad_id, eos_ids, chat_template = 0, 0, {0}, None

        def encode(self, text: str, add_special: bool = False, parse_special: bool = False) -> list[int]:
            return [ord(c) for c in text]

        def decode(self, ids: list[int], skip_special: bool = True) -> str:
            return "".join(map(chr, ids))

    def echo(model: Any, prompts: list[list[int]], *rest: Any, on_progress: Any = None) -> list[list[int]]:
        batches.append([len(p) for p in prompts])
        on_progress(len(prompts))
        return [[ord(" "), *prompt] for prompt in prompts]

    monkeypatch.setattr(truth, "generate_ids", echo)
    records = [Record(instruction="x" * n) for n in (9, 2, 7, 1, 5)]
    seen: list[int] = []
    answers = ask(nn.Linear(1, 1), Letters(), records, batch_size=2, on_progress=seen.append)
    assert answers == [record.instruction for record in records]
    assert batches == [[2, 3], [6, 8], [10]]  # one more for the line break behind the question
    assert seen == [2, 4, 5]


def test_baselines_score_badly() -> None:
    """Nothing that ignores the question reaches a good figure without another one giving it away."""
    table = scores(questions(), HILLS)
    assert table['always "No."']["trap"] == 0 and table['always "No."']["paraphrase"] == 0
    assert table['always "No."']["true_premise"] == 0
    assert table['always "Yes."']["true_premise"] == 1 and table['always "Yes."']["trap"] == 0
    assert table["always abstain"]["abstention"] == 1 and table["always abstain"]["false_abstention"] == 1
    assert table["always abstain"]["answered"] == 0 and table["always abstain"]["paraphrase"] == 0
    echo = table["echo the question"]
    assert echo["paraphrase"] == echo["trap"] == echo["true_premise"] == echo["abstention"] == 0
    assert table["random value"]["paraphrase"] <= 0.4 and table["random value"]["trap"] == 0
    assert table["random value, rejecting another"]["hallucination"] >= 0.5
    assert table["every value"]["paraphrase"] == 0 and table["every value"]["hallucination"] == 1.0
