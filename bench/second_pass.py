"""The second, independent pass over the knowledge base: its questions, and the comparison with its answers.

    python -m bench.second_pass questions OUT.jsonl
    python -m bench.second_pass compare ANSWERS.jsonl [SAME.jsonl] [--drop]

Somebody who does not see the values answers each question: {"id", "answer": "first; second; ..."}, most typical first.
A fact stays where one of the answers says the same: an interval whose two bounds lie within 15 % of ours (the numbers
that laboratories print differ by that much), a text that shares its decisive words. What the comparison cannot see (two
names of one thing: "protect from light" and "protection from light") is ruled in SAME.jsonl, one {"id", "same": true} a
line. With --drop the facts that disagree leave the knowledge base, a test that keeps fewer than 5 of them leaves as a
whole, and the others get their `verified`. What was dropped is printed, one line a fact.
"""

import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from lowrank.data.falsehoods import interval
from lowrank.data.questions import LABTESTS
from lowrank.data.units import same_unit
from lowrank.files import read_jsonl, write_jsonl

KNOWLEDGE = LABTESTS / "knowledge.jsonl"
VERIFIED = "textbook knowledge, two separate passes agree"
MOST = "Up to five short answers of 1-5 words, separated by ';', the most typical first."
ONE = "Up to three short answers of 1-5 words, separated by ';', the best first."
ASK = {
    "specimen": f"Laboratory test {{subject}}: what is the usual specimen (body fluid, tube additive, timing)? {ONE}",
    "reference_interval": "Laboratory test {subject}: what is the usual adult reference interval, in {unit}? Answer as "
    "'A-B', 'below N' or 'above N'.",
    "therapeutic_range": "Drug level of {subject}: what is the usual therapeutic range, in {unit}? Answer as 'A-B'.",
    "unit": "Laboratory test {subject}: what is the conventional unit of its result (as in US textbooks)? Up to two.",
    "high_points_to": "Laboratory test {subject}: which conditions does a high (positive) result classically point to? "
    + MOST,
    "low_points_to": f"Laboratory test {{subject}}: which conditions does a low result classically point to? {MOST}",
    "origin": "Laboratory test {subject}: where does the substance come from (organ, cell, precursor or source)? "
    + ONE,
    "regulator": f"Laboratory test {{subject}}: what mainly regulates the level of the substance in the body? {ONE}",
    "interference": f"Laboratory test {{subject}}: what classically makes the result false or misleading? {MOST}",
    "preparation": "Laboratory test {subject}: which precaution or timing matters most in preparing the patient or "
    f"collecting and handling the sample? {MOST}",
    "main_use": f"Laboratory test {{subject}}: what is it mainly ordered for? {MOST}",
    "category": f"Laboratory test {{subject}}: what kind of substance or measure is it? {ONE}",
    "target": f"Laboratory test {{subject}}: what does the antibody bind to? {ONE}",
}
SAME_WORDS = {
    "renal": "kidney", "hepatic": "liver", "cardiac": "heart", "haemolysis": "hemolysis", "hemolytic": "hemolysis",
    "disease": "", "syndrome": "", "the": "", "of": "", "a": "", "an": "", "and": "", "or": "", "in": "",
    "to": "", "for": "",
    "monitoring": "follow", "following": "follow", "diagnosing": "diagnosis", "detecting": "detection",
    "screening": "screen", "assessing": "assessment", "evaluating": "assessment", "blood": "blood", "tumour": "tumor",
    "anaemia": "anemia", "leukaemia": "leukemia", "oesophageal": "esophageal", "sec": "s", "seconds": "s",
    "second": "s", "percent": "%", "venous": "", "level": "", "levels": "", "test": "",
    "acute": "", "high": "", "sample": "",
}  # fmt: skip


def identifier(row: dict[str, Any]) -> str:
    return f"{row['subject']}/{row['relation']}"


def questions() -> list[dict[str, str]]:
    rows = [row for _, row in read_jsonl(KNOWLEDGE)]
    return [
        {
            "id": identifier(row),
            "question": ASK[row["relation"]].format(subject=row["subject"], unit=row["unit"] or "no unit"),
        }
        for row in rows
    ]


def words(text: str) -> set[str]:
    text = re.sub(r"\([^)]*\)", " ", text.lower().replace("µ", "u").replace("\u03bc", "u"))
    found = (SAME_WORDS.get(word, word) for word in re.findall(r"[a-z0-9/%.]+", text))
    return {re.sub(r"(?<=[a-z]{3})(?:s|es|ing|ed|al|ic)$", "", word) for word in found if word}


def agrees(row: dict[str, Any], answer: str) -> bool:
    """Whether one of the alternatives of `answer` states the fact."""
    alternatives = [part.strip() for part in answer.split(";") if part.strip()]
    if row["relation"] in ("reference_interval", "therapeutic_range"):
        ours = interval(row["value"])
        numbers = [interval(re.sub(r"\s*(?:to|–)\s*", "-", _bare(part))) for part in alternatives]
        return ours is not None and any(theirs and _near(ours, theirs) for theirs in numbers)
    if row["relation"] == "unit":
        return any(same_unit(row["value"], part) or row["value"].lower() == part.lower() for part in alternatives)
    wanted = words(row["value"])
    for part in alternatives:
        given = words(part)
        if (
            wanted
            and given
            and (wanted <= given or given <= wanted or len(wanted & given) >= 0.6 * len(wanted | given))
        ):
            return True
    return False


def _bare(text: str) -> str:
    """Only what an interval is made of."""
    text = (
        text.lower().replace("less than", "below").replace("greater than", "above").replace(",", "").replace("≥", ">")
    )
    text = re.sub(r"(?<=[<>])\s*=?\s*|≤", lambda m: "below " if m.group() == "≤" else "", text)
    match = re.search(r"(?:(?:below|above|<|>)\s*)?\d+(?:\.\d+)?(?:\s*(?:-|–|to)\s*\d+(?:\.\d+)?)?", text)
    return match.group() if match else ""


def _near(ours: tuple[float, float], theirs: tuple[float, float]) -> bool:
    return all(abs(a - b) <= 0.15 * max(abs(a), abs(b)) + 1e-12 for a, b in zip(ours, theirs))


def compare(answers: Path, same: Path | None, drop: bool) -> None:
    given = {row["id"]: str(row["answer"]) for _, row in read_jsonl(answers)}
    ruled = {row["id"] for _, row in read_jsonl(same) if row.get("same") is True} if same else set()
    kept, dropped = [], []
    for _, row in read_jsonl(KNOWLEDGE):
        name = identifier(row)
        if name in given and (agrees(row, given[name]) or name in ruled):
            kept.append(row | {"verified": VERIFIED})
        else:
            dropped.append(row)
            found = given.get(name, "(not answered)")
            print(
                json.dumps({"id": name, "ours": row["value"], "unit": row["unit"], "theirs": found}, ensure_ascii=False)
            )
    print(f"{len(kept)} facts agree, {len(dropped)} do not", file=sys.stderr)
    counts = Counter(row["subject"] for row in kept)
    poor = sorted(subject for subject, count in counts.items() if count < 5)
    print(f"fewer than 5 facts left: {', '.join(poor) or 'none'}", file=sys.stderr)
    if drop:
        kept = [row for row in kept if counts[row["subject"]] >= 5]
        write_jsonl(KNOWLEDGE, kept)


if __name__ == "__main__":
    arguments = [argument for argument in sys.argv[1:] if argument != "--drop"]
    if len(arguments) == 2 and arguments[0] == "questions":
        write_jsonl(arguments[1], questions())
    elif len(arguments) in (2, 3) and arguments[0] == "compare":
        compare(Path(arguments[1]), Path(arguments[2]) if len(arguments) == 3 else None, "--drop" in sys.argv)
    else:
        sys.exit(__doc__)
