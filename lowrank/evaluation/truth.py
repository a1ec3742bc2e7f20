"""Ask a model the held-out questions and count: what a truth evaluation says about one model.

    answers = ask(model, tokenizer, records)               greedy answers, in the order of the records
    verdicts = verdicts_of(records, answers, knowledge)    one row for each answer: class, right, type, evidence
    result = score(records, answers, knowledge)            shares, intervals, bad answers by type and risk

`records` and `answers` are dictionaries of lists by part (paraphrase, trap, trap_unseen, true_premise, abstention,
answerable, general); `answerable` are the paraphrases again, and are asked and counted once. Records without facts
(plain questions and answers) are compared with their `output`: exact match and token F1.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import nn

from lowrank.data.general import says
from lowrank.data.knowledge import Knowledge
from lowrank.data.records import Record
from lowrank.data.render import Renderer
from lowrank.evaluation.answers import CLASSES, TYPES, Judge
from lowrank.evaluation.stats import bootstrap, mcnemar, wilson
from lowrank.evaluation.values import normalise
from lowrank.models.generate import generate_ids

PART_OF_KIND = {
    "qa": "paraphrase",
    "trap": "trap",
    "confirm": "true_premise",
    "unanswerable": "abstention",
    "general": "general",
}
PARTS = ("paraphrase", "trap", "trap_unseen", "true_premise", "abstention", "general")
STRATA = {"paraphrase": 60, "trap": 20, "trap_unseen": 20, "true_premise": 20, "abstention": 20}
ARTICLES = re.compile(r"\b(?:a|an|the)\b")

Records = Mapping[str, Sequence[Record]]
Answers = Mapping[str, Sequence[str]]


def subset(test: Records, questions: int = 140) -> dict[str, list[Record]]:
    """About `questions` of them in the proportions of STRATA; 0 takes all. Evenly spread over each part, so that every
    relation and form has its share; the same ones for every model."""
    if questions < 0:
        raise ValueError(f"wanted a number of questions, or 0 for all, got {questions}")
    chosen: dict[str, list[Record]] = {}
    for part, records in test.items():
        if part == "answerable":
            continue
        wanted = round(STRATA.get(part, 0) * questions / sum(STRATA.values())) if questions else len(records)
        if part in STRATA or not questions:
            chosen[part] = spread(records, wanted)
    if "answerable" in test:
        chosen["answerable"] = chosen.get("paraphrase", [])
    return chosen


def spread(records: Sequence[Record], count: int) -> list[Record]:
    """`count` records at even distances, all where there are no more."""
    if count >= len(records):
        return list(records)
    return [records[int((i + 0.5) * len(records) / count)] for i in range(count)]


def by_part(records: Records) -> dict[str, list[Record]]:
    """The parts without `answerable`, whose questions are the paraphrases."""
    return {part: list(items) for part, items in records.items() if part != "answerable"}


def ask(
    model: nn.Module,
    tokenizer: Any,
    records: Sequence[Record],
    max_new_tokens: int = 48,
    batch_size: int = 32,
    max_length: int = 512,
    on_progress: Callable[[int], None] | None = None,
) -> list[str]:
    """The greedy answer to each record, adapters as they are. Long questions share batches with long ones.

    `on_progress` gets the number of answers there are.
    """
    renderer = Renderer(tokenizer, max_length)
    prompts = [renderer.prompt_ids(record) for record in records]
    order = sorted(range(len(records)), key=lambda i: len(prompts[i]))
    answers = [""] * len(records)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        chosen, ends = [prompts[i] for i in batch], tokenizer.eos_ids
        told = partial(_further, on_progress, start)
        ids = generate_ids(model, chosen, max_new_tokens, ends, tokenizer.pad_id, on_progress=told)
        for i, answer in zip(batch, ids):
            answers[i] = tokenizer.decode(answer).strip()
    return answers


def _further(on_progress: Callable[[int], None] | None, before: int, finished: int) -> None:
    if on_progress is not None:
        on_progress(before + finished)


def ask_parts(model: nn.Module, tokenizer: Any, records: Records, **options: Any) -> dict[str, list[str]]:
    """`ask` for every part, in one go."""
    parts = by_part(records)
    answers = iter(ask(model, tokenizer, [record for items in parts.values() for record in items], **options))
    return {part: [next(answers) for _ in items] for part, items in parts.items()}


@dataclass(frozen=True)
class Row:
    """One question, its answer and the verdict: a line of samples.jsonl."""

    part: str
    id: str
    kind: str
    task: str
    question: str
    answer: str
    expected: str
    answer_class: str
    """One of CLASSES; "" for a general or plain question, which no knowledge base judges."""
    right: bool
    hallucinated: bool = False
    rejected: bool = False
    type: str = ""
    reason: str = ""
    risk: str = ""
    evidence: str = ""
    area: str = ""
    trap: str = ""
    """What is false in a trap: value, unit, specimen, cause, source, ..."""
    f1: float | None = None

    def to_json(self, column: str = "") -> dict[str, Any]:
        named = {"column": column} if column else {}
        return named | {key: value for key, value in vars(self).items() if value not in ("", None)}


def verdicts_of(records: Records, answers: Answers, knowledge: Knowledge | None = None) -> list[Row]:
    """A row for each question. ValueError where a part has not as many answers as questions."""
    parts = by_part(records)
    told = {part: answers.get(part, ()) for part in parts}
    for part, items in parts.items():
        if len(items) != len(told[part]):
            raise ValueError(f"part {part!r} has {len(items)} questions and {len(told[part])} answers")
    judge = Judge(knowledge)
    judge.learn(record for items in parts.values() for record in items)
    risks = {(f.subject, f.relation): f.risk for f in judge.facts}
    return [
        _row(part, record, answer, judge, risks)
        for part, items in parts.items()
        for record, answer in zip(items, told[part])
    ]


def _row(part: str, record: Record, answer: str, judge: Judge, risks: Mapping[tuple[str, str], str]) -> Row:
    last = record.conversation()[-1]
    expected = last["content"] if last["role"] == "assistant" else record.output
    about = record.facts[0] if record.facts else {}
    asked = part, record.id, record.kind, record.task, record.question
    row = Row(*asked, answer, expected, answer_class="", right=False, evidence=record.evidence)
    if record.kind == "general":
        right = says(answer, about.get("accept", ()), about.get("regex", ""))
        return replace(row, right=right, area=str(about.get("area", "")))
    if record.kind != "unanswerable" and not any("value" in fact for fact in record.facts):
        return replace(row, right=plain(answer) == plain(expected), f1=token_f1(answer, expected))
    verdict = judge(answer, record)
    fact = str(about.get("subject")), str(about.get("relation"))
    risk, trap = risks.get(fact, str(about.get("risk", ""))), str(about.get("trap", ""))
    return replace(row, **vars(verdict), hallucinated=verdict.hallucinated, risk=risk, trap=trap)


def score(records: Records, answers: Answers, knowledge: Knowledge | None = None) -> dict[str, Any]:
    """The figures of one model: see `summary`."""
    return summary(verdicts_of(records, answers, knowledge))


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Shares with their counts and 95 % intervals; everything is JSON.

    paraphrase, trap, trap_unseen, true_premise, abstention: the share answered rightly. false_abstention, answered: of
    the answerable questions, those abstained on, and those with a claim. hallucination: (contradicted + unsupported) /
    all questions that the knowledge base judges. general: held-out general questions. exact, f1: plain answers. None
    where nothing of that kind was asked. A part of another name counts by its records' kind.
    """
    judged = [row for row in rows if row.answer_class]
    groups: dict[str, list[bool]] = {part: [] for part in PARTS}
    for row in rows:
        if row.f1 is None:
            groups[_measure(row)].append(row.right)
    answerable = [row for row in judged if _measure(row) == "paraphrase"]
    groups["false_abstention"] = [row.answer_class == "abstained" for row in answerable]
    groups["answered"] = [row.answer_class not in ("abstained", "no_claim") for row in answerable]
    groups["hallucination"] = [row.hallucinated for row in judged]
    plainly = [row for row in rows if row.f1 is not None]
    groups["exact"] = [row.right for row in plainly]
    for name in CLASSES:
        groups[f"class/{name}"] = [row.answer_class == name for row in judged]
    result: dict[str, Any] = {key: _share(group) for key, group in groups.items() if not key.startswith("class/")}
    result["f1"] = sum(row.f1 or 0.0 for row in plainly) / len(plainly) if plainly else None
    result["classes"] = {name: _share(groups[f"class/{name}"]) for name in CLASSES}
    result["n"] = {key: len(group) for key, group in groups.items()} | {"f1": len(plainly)}
    result["intervals"] = {key: _interval(wilson(sum(group), len(group))) for key, group in groups.items()}
    result["intervals"]["f1"] = _interval(bootstrap([row.f1 or 0.0 for row in plainly]))
    bad = Counter(row.type for row in judged if row.hallucinated)
    result["bad_by_type"] = {name: bad[name] for name in TYPES}
    result["by_risk"] = _groups(judged, lambda row: row.risk, lambda row: row.hallucinated, "bad")
    result["by_trap"] = _groups(judged, lambda row: row.trap, lambda row: row.right, "right")
    result["by_area"] = _groups(rows, lambda row: row.area, lambda row: row.right, "right")
    return result


def _measure(row: Row) -> str:
    return row.part if row.part in PARTS else PART_OF_KIND[row.kind]


def _share(flags: Sequence[bool]) -> float | None:
    return sum(flags) / len(flags) if flags else None


def _interval(interval: tuple[float, float] | None) -> list[float] | None:
    return list(interval) if interval is not None else None


def _groups(rows: Iterable[Row], key: Callable[[Row], str], flag: Callable[[Row], bool], name: str) -> dict[str, Any]:
    """{group: {"n", name (a count), "share", "interval"}} for the rows that belong to a group."""
    flags: dict[str, list[bool]] = {}
    for row in rows:
        if key(row):
            flags.setdefault(key(row), []).append(flag(row))
    return {
        group: {"n": len(f), name: sum(f), "share": _share(f), "interval": _interval(wilson(sum(f), len(f)))}
        for group, f in sorted(flags.items())
    }


def compare(before: Sequence[Row], after: Sequence[Row]) -> dict[str, Any]:
    """Two models on the same questions: for each part (and "hallucination"), on how many only one of them did well, the
    difference of the shares with its bootstrap interval over questions, and McNemar's exact p-value."""
    after_by_id = {(row.part, row.id or row.question): row for row in after}
    pairs = [(row, after_by_id[key]) for row in before if (key := (row.part, row.id or row.question)) in after_by_id]
    if not pairs:
        raise ValueError("the two evaluations share no question, so there is nothing to compare")
    result: dict[str, Any] = {}
    for part in dict.fromkeys([*(a.part for a, _ in pairs), "hallucination"]):
        if part == "hallucination":
            flags = [(not a.hallucinated, not b.hallucinated) for a, b in pairs if a.answer_class]
        else:
            flags = [(a.right, b.right) for a, b in pairs if a.part == part]
        if not flags:
            continue
        lost, won = sum(a and not b for a, b in flags), sum(b and not a for a, b in flags)
        differences = [float(b) - float(a) for a, b in flags]
        sign = -1.0 if part == "hallucination" else 1.0  # of the rate itself, not of what is free of it
        interval = bootstrap([sign * d for d in differences])
        result[part] = {
            "n": len(flags),
            "only_before": lost,
            "only_after": won,
            "difference": sign * sum(differences) / len(flags),
            "interval": _interval(interval),
            "p": mcnemar(lost, won),
        }
    areas: dict[str, list[tuple[bool, bool]]] = {}
    for a, b in pairs:
        for area in (a.area, "all") if a.area else ():
            areas.setdefault(area, []).append((a.right, b.right))
    if areas:
        result["retention"] = {
            area: (sum(b for _, b in flags) / known if (known := sum(a for a, _ in flags)) else None)
            for area, flags in sorted(areas.items())
        }
    return result


def plain(text: str) -> str:
    """For plain answers: lower case, without punctuation and articles, single spaces."""
    return " ".join(ARTICLES.sub(" ", re.sub(r"[^\w\s]", " ", normalise(text))).split())


def token_f1(answer: str, expected: str) -> float:
    """The harmonic mean of precision and recall over the words of two plain answers; 1 where both are empty."""
    ours, theirs = plain(answer).split(), plain(expected).split()
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs))
