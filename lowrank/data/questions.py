"""Questions written from a knowledge base: what is trained, what tunes a recipe, what is tested. Deterministic by seed.

Half of the facts of each relation are *trapped* in training: asked with a false premise (and, beside it, with a true
one, in the same forms, so that neither "not" nor "correct" is a constant). The other half is taught by plain questions
only and carries the held-out traps: a third of it those of validation, two thirds those of the test. Every fact is
asked plainly in training; the held-out paraphrases ask it again in wordings that were never trained. Unanswerable
questions name tests that do not exist. A false value is the value of another subject in the same relation.
"""

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowrank.data.falsehoods import contradicts, invented_names
from lowrank.data.general import GeneralItem, read_general
from lowrank.data.knowledge import Fact, Knowledge, read_knowledge, with_unit
from lowrank.data.records import Record, records_to_json
from lowrank.data.templates import BUNDLED, SPLITS, Templates, fill, read_templates, uncapital
from lowrank.data.units import same_unit
from lowrank.errors import at_least, unknown
from lowrank.files import write_jsonl

LABTESTS = BUNDLED.parent
NOTICE = (
    "The bundled knowledge base is teaching material for fine-tuning experiments. It is no medical advice: never use "
    "it, or a model tuned on it, to diagnose, treat or interpret anybody's laboratory results."
)
TRAPPED = 0.5  # share of the facts that carry training traps
UNANSWERABLE = 0.2  # unanswerable training questions per plain one
ALIASED = 0.1  # share of the plain training questions that call the subject by an alias
HELD_UNANSWERABLE = 60  # unanswerable questions of the test; validation has half as many


@dataclass(frozen=True)
class Questions:
    """One pass of training records in the order of the seed, and the held-out ones by part."""

    train: list[Record]
    validation: dict[str, list[Record]]
    test: dict[str, list[Record]]

    def write(self, folder: str | Path) -> None:
        """train.jsonl, and one file for each part: validation/trap.jsonl, test/trap.jsonl, ..."""
        write_jsonl(Path(folder) / "train.jsonl", records_to_json(self.train))
        for split, parts in (("validation", self.validation), ("test", self.test)):
            for name, records in parts.items():
                write_jsonl(Path(folder) / split / f"{name}.jsonl", records_to_json(records))

    def counts(self) -> dict[str, dict[str, int]]:
        held = {"validation": self.validation, "test": self.test}
        return {
            "train": Counter(record.kind for record in self.train),
            **{split: {part: len(records) for part, records in parts.items()} for split, parts in held.items()},
        }


@dataclass
class _Writer:
    knowledge: Knowledge
    templates: Templates
    seed: int
    plain_per_fact: int
    traps_per_fact: int
    confirms_per_fact: int
    _serial: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        at_least(self, 1, "plain_per_fact")  # a fact that is never asked is never taught
        at_least(self, 0, "traps_per_fact", "confirms_per_fact")
        for relation, facts in self.knowledge.by_relation.items():
            if relation not in self.templates.relations:
                raise ValueError(
                    f"no template for relation {relation!r} (of {facts[0].subject!r}); "
                    f"there are templates for {', '.join(self.templates.relations)}"
                )

    def rng(self, purpose: str) -> random.Random:
        """Its own stream for each purpose, so that a change of one size leaves the other records as they are."""
        return random.Random(f"{self.seed}/{purpose}")

    def build(self, general: Sequence[GeneralItem]) -> Questions:
        trapped, validation_facts, test_facts = self.split_facts()
        names = invented_names(self.knowledge, self.templates, self.rng("names"))
        n_test = min(HELD_UNANSWERABLE, len(names) // 3)
        n_validation = min(HELD_UNANSWERABLE // 2, len(names) // 6)
        test_names, names = names[:n_test], names[n_test:]
        validation_names, train_names = names[:n_validation], names[n_validation:]

        train = self.plain()
        train += self.premises("train", trapped, "trap", "train", self.traps_per_fact)
        train += self.premises("train", trapped, "confirm", "train", self.confirms_per_fact)
        train += self.unanswerable(
            "train", train_names, round(len(self.knowledge) * self.plain_per_fact * UNANSWERABLE)
        )
        by_split = {split: [item.record() for item in general if item.split == split] for split in SPLITS}
        train += by_split["train"]
        self.rng("order").shuffle(train)
        return Questions(
            train,
            self.held_out("validation", validation_facts, validation_names, by_split["validation"]),
            self.held_out("test", test_facts, test_names, by_split["test"]),
        )

    def split_facts(self) -> tuple[list[Fact], list[Fact], list[Fact]]:
        """Trapped in training, held out for validation's traps, held out for the test's: shares of each relation."""
        trapped: list[Fact] = []
        validation: list[Fact] = []
        test: list[Fact] = []
        for relation, facts in self.knowledge.by_relation.items():
            facts = facts.copy()
            self.rng(f"split/{relation}").shuffle(facts)
            n = round(len(facts) * TRAPPED)
            held = facts[n:]
            trapped += facts[:n]
            validation += held[: len(held) // 3]
            test += held[len(held) // 3 :]
        return trapped, validation, test

    def plain(self) -> list[Record]:
        """Each fact in `plain_per_fact` wordings; where the template has fewer, they come again in another order."""
        records = []
        decks: dict[str, _Deck] = {}
        for fact in self.knowledge.facts:
            rng = self.rng(f"plain/{fact.subject}/{fact.relation}")
            wordings = self.templates.relations[fact.relation].questions["train"]
            if fact.relation not in decks:
                decks[fact.relation] = _Deck(range(len(wordings)), self.rng(f"plain/{fact.relation}"))
            for index in decks[fact.relation].deal(self.plain_per_fact):
                alias = fact.aliases and rng.random() < ALIASED
                name = rng.choice(fact.aliases) if alias else fact.subject
                records.append(self.question("train", fact, wordings[index], f"plain/{index}", name))
        return records

    def question(self, split: str, fact: Fact, wording: str, task: str, name: str = "") -> Record:
        question, answer = fill(wording, subject=name or fact.subject), self.answer("plain", fact)
        return self.record(split, "qa", task, question, answer, fact, fact.reference())

    def answer(self, kind: str, fact: Fact, false: str = "") -> str:
        statement = fill(self.templates.relations[fact.relation].statement, subject=fact.subject, value=fact.text)
        fields = {"statement": statement, "subject": fact.subject, "value": fact.text}
        return fill(self.templates.answers[kind], **fields | ({"false": false} if kind == "trap" else {}))

    def premises(self, split: str, facts: Iterable[Fact], kind: str, origin: str, each: int = 1) -> list[Record]:
        """`each` questions a fact, in the forms of `origin`, that take a value for granted: a wrong one (trap) or the
        right one (confirm)."""
        forms = self.templates.premises[origin]
        records = []
        purpose = f"{kind}/{split}/{origin}"
        deck = _Deck(forms, self.rng(purpose))
        for fact in facts:
            rng = self.rng(f"{purpose}/{fact.subject}/{fact.relation}")
            claimed = self.false_values(fact, rng) if kind == "trap" else [(fact.value, fact.unit, "")]
            if not claimed:
                continue  # a relation with one value has no other to be mistaken for
            for i, name in enumerate(deck.deal(each)):
                value, unit, trap = claimed[i % len(claimed)]
                source = ""
                if "{source}" in forms[name]:
                    # a work that exists may stand on either side; one that does not never confirms anything
                    invented = kind == "trap" and rng.random() < 0.75
                    source = rng.choice(self.templates.sources[split if invented else "real"])
                    trap = "source" if invented else trap
                about, text = fact.reference(), with_unit(value, unit)
                if kind == "trap":
                    about |= {"false_value": value, "false_unit": unit, "trap": trap}
                question = self.claim(fact, forms[name], text, source)
                answer = self.answer(kind, fact, text)
                records.append(self.record(split, kind, f"{kind}/{name}", question, answer, fact, about))
        return records

    def claim(self, fact: Fact, form: str, value: str, source: str) -> str:
        """A question in `form` that takes for granted that the fact's value is `value`."""
        relation = self.templates.relations[fact.relation]
        claim = uncapital(fill(relation.statement, subject=fact.subject, value=value))
        noun = fill(relation.noun, subject=fact.subject)
        question = fill(form, claim=claim, noun=noun, value=value, subject=fact.subject, source=source)
        return question[:1].upper() + question[1:] if form.startswith("{source}") else question

    def false_values(self, fact: Fact, rng: random.Random) -> list[tuple[str, str, str]]:
        """(value, unit, kind of trap), shuffled: values of other subjects; for a number with a unit, every other one is
        the right number with a wrong unit."""
        relation = self.templates.relations[fact.relation]
        others = [other for other in self.knowledge.by_relation[fact.relation] if other.subject != fact.subject]
        found = dict.fromkeys(o.value for o in others if o.unit == fact.unit and contradicts(fact, o.value))
        if len(found) < 2 and fact.unit:  # the numbers of another unit, in this one
            found |= dict.fromkeys(o.value for o in others if contradicts(fact, o.value))
        values = list(found)
        rng.shuffle(values)
        wrong = [(value, fact.unit, relation.trap) for value in values]
        if not fact.unit:
            return wrong
        units = list(dict.fromkeys(o.unit for o in others if o.unit and not same_unit(o.unit, fact.unit)))
        rng.shuffle(units)
        swapped = [(fact.value, unit, "unit") for unit in units[: max(1, len(wrong))]]
        pairs = zip(wrong, swapped) if rng.random() < 0.5 else zip(swapped, wrong)
        mixed = [item for pair in pairs for item in pair]
        return mixed + wrong[len(swapped) :] + swapped[len(wrong) :]

    def unanswerable(self, split: str, names: Sequence[str], count: int) -> list[Record]:
        """Plain questions about invented names: the trained wordings, and in the held-out splits their own as well."""
        rng = self.rng(f"unanswerable/{split}")
        relations = [self.templates.relations[name] for name in self.knowledge.by_relation]
        records = []
        for i in range(count if names else 0):
            name = names[i % len(names)]
            relation = rng.choice(relations)
            origin = split if i % 2 else "train"
            index = rng.randrange(len(relation.questions[origin]))
            question = fill(relation.questions[origin][index], subject=name)
            answer = fill(self.templates.answers["unanswerable"], subject=name)
            about, task = {"subject": name, "relation": relation.name}, f"unanswerable/{relation.name}"
            records.append(self.record(split, "unanswerable", task, question, answer, None, about))
        return records

    def held_out(
        self, split: str, facts: list[Fact], names: list[str], general: list[Record]
    ) -> dict[str, list[Record]]:
        """The parts of validation or test. Answerable questions are the paraphrases again, asked of the abstention."""
        paraphrase = []
        for fact in self.knowledge.facts:
            wordings = self.templates.relations[fact.relation].questions[split]
            index = self.rng(f"paraphrase/{split}/{fact.subject}/{fact.relation}").randrange(len(wordings))
            paraphrase.append(self.question(split, fact, wordings[index], f"paraphrase/{index}"))
        return {
            "paraphrase": paraphrase,
            "trap": self.premises(split, facts, "trap", "train"),
            "trap_unseen": self.premises(split, facts, "trap", split),
            "true_premise": [r for form in ("train", split) for r in self.premises(split, facts, "confirm", form)],
            "abstention": self.unanswerable(split, names, len(names)),
            "answerable": paraphrase,
            "general": general,
        }

    def record(
        self, split: str, kind: str, task: str, question: str, answer: str, fact: Fact | None, about: dict[str, Any]
    ) -> Record:
        stem = f"{split}/{kind}"
        self._serial[stem] = self._serial.get(stem, 0) + 1
        return Record(
            id=f"{stem}/{self._serial[stem]:05d}",
            instruction=question,
            output=answer,
            evidence=fact.evidence if fact else "",
            kind=kind,
            task=task,
            facts=(about,),
        )


class _Deck:
    """Deals wordings evenly: each round is all of them in a new order, and no hand has one twice while it need not."""

    def __init__(self, cards: Iterable[Any], rng: random.Random) -> None:
        self.cards, self.rng, self.pile = list(cards), rng, list[Any]()

    def deal(self, count: int) -> list[Any]:
        hand: list[Any] = []
        while len(hand) < count:
            fresh = next((card for card in self.pile if hand.count(card) <= len(hand) // len(self.cards)), None)
            if fresh is None:
                self.pile += self.rng.sample(self.cards, len(self.cards))
            else:
                hand.append(fresh)
                self.pile.remove(fresh)
        return hand


@dataclass(frozen=True)
class Domain:
    """A knowledge base with everything that goes through training and evaluation beside it."""

    name: str
    knowledge: Knowledge
    templates: Templates
    general: tuple[GeneralItem, ...]
    prose: str
    """Plain general text for perplexity."""
    notice: str

    def build(
        self, seed: int = 0, plain_per_fact: int = 7, traps_per_fact: int = 4, confirms_per_fact: int = 3
    ) -> Questions:
        """Every record. Plain questions are of each fact, traps and confirmations of those that carry traps: with one
        pass and no epochs, this is the length of a training run."""
        writer = _Writer(self.knowledge, self.templates, seed, plain_per_fact, traps_per_fact, confirms_per_fact)
        return writer.build(self.general)


QUICK_RELATIONS = (
    "reference_interval",
    "high_points_to",
    "low_points_to",
    "origin",
    "specimen",
    "interference",
    "regulator",
    "preparation",
    "main_use",
)


def bundled(name: str = "labtests", subjects: int | Iterable[str] | None = None) -> Domain:
    """The bundled domain: "labtests", or "labtests-quick", its first 60 tests with 4 relations each. `subjects`: how
    many of them, or which."""
    if name not in ("labtests", "labtests-quick"):
        raise unknown("bundled domain", name, ("labtests", "labtests-quick"))
    knowledge = read_knowledge(LABTESTS / "knowledge.jsonl")
    if name == "labtests-quick":
        knowledge = knowledge.subset(60 if subjects is None else subjects, QUICK_RELATIONS, per_subject=4)
    elif subjects is not None:
        knowledge = knowledge.subset(subjects)
    return domain(name, knowledge, read_templates(LABTESTS / "templates.yaml"), notice=NOTICE)


def domain(name: str, knowledge: Knowledge, templates: Templates, notice: str = "") -> Domain:
    """A domain of one's own beside the bundled general questions and prose."""
    general = LABTESTS / "general.jsonl"
    prose = LABTESTS / "prose.txt"
    return Domain(
        name,
        knowledge,
        templates,
        read_general(general) if general.is_file() else (),
        prose.read_text(encoding="utf-8") if prose.is_file() else "",
        notice,
    )
