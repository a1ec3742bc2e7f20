"""How an answer is judged: the matching rules of docs/truth.md, whose numbers stand beside the code.

Every value that an answer mentions is found with its place, and is asserted, denied or neutral there; what is
asserted is compared with the knowledge base. Nothing here depends on a model, and nothing is changed to suit one.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

from lowrank.data.knowledge import Fact, Knowledge
from lowrank.data.records import Record
from lowrank.evaluation import wording
from lowrank.evaluation.values import (
    Quantity,
    compare,
    known_quantity,
    normalise,
    parse_unit,
    phrase_pattern,
    quantities,
    stem_of,
)

CLASSES = ("correct", "contradicted", "unsupported", "abstained", "no_claim")
WORST_FIRST = ("contradicted", "unsupported", "no_claim", "abstained", "correct")
TYPES = ("contradicted value", "invented entity", "invented source or date", "wrong unit or dose")


@dataclass(frozen=True)
class Verdict:
    answer_class: str
    """One of CLASSES."""
    right: bool
    """Right for the record's kind: a trap also needs the rejection, an unanswerable question the abstention."""
    rejected: bool = False
    """The answer rejects what the question takes for granted."""
    type: str = ""
    """What kind of bad answer it is, one of TYPES; "" unless hallucinated."""
    reason: str = ""

    @property
    def hallucinated(self) -> bool:
        return self.answer_class in ("contradicted", "unsupported")


# --- the knowledge base, indexed --------------------------------------------------------------------------------------


@lru_cache(maxsize=32768)
def _compiled(phrase: str) -> re.Pattern[str]:
    return re.compile(phrase_pattern(phrase))


@lru_cache(maxsize=32768)
def _longest(phrase: str) -> str:
    """The longest word, as every match has it: a quick way to rule a phrase out."""
    return stem_of(max(re.findall(r"[\w.%^]+", normalise(phrase)), key=len, default=""))


def _occurs(phrase: str, text: str) -> bool:
    return _longest(phrase) in text and _compiled(phrase).search(text) is not None


class Judge:
    """A knowledge base, ready to judge answers. `knowledge` None: only what the records themselves say is known."""

    def __init__(self, knowledge: Knowledge | None = None) -> None:
        self.facts = tuple(knowledge.facts) if knowledge is not None else ()
        self.names: dict[str, str] = {}  # every name and alias -> subject
        self.known: dict[tuple[str, str], Fact] = {}
        self.by_subject: dict[str, list[Fact]] = {}
        self.phrases: dict[str, list[str]] = {}  # relation -> the values that are phrases
        self.quantities: dict[tuple[str, str], Quantity] = {}
        for fact in self.facts:
            for name in (fact.subject, *fact.aliases):
                self.names[name] = fact.subject
            self.known[fact.subject, fact.relation] = fact
            self.by_subject.setdefault(fact.subject, []).append(fact)
            quantity = known_quantity(fact.value, fact.unit)
            if quantity is None:
                self.phrases.setdefault(fact.relation, []).append(fact.value)
            else:
                self.quantities[fact.subject, fact.relation] = quantity
        self.relations = frozenset(word for fact in self.facts for word in _words(fact.relation))
        self.units = frozenset(normalise(fact.unit) for fact in self.facts if fact.unit)
        self.statements: dict[str, set[str]] = {}  # relation -> how it is said, as regular expressions
        self.evidence = normalise(" ".join(sorted({fact.evidence for fact in self.facts})))

    def learn(self, records: Iterable[Record]) -> None:
        """How each relation is said, from the intended answers to plain questions: "the usual specimen for ... is"."""
        for record in records:
            fact = record.facts[0] if record.facts else {}
            if record.kind != "qa" or not record.output or "value" not in fact:
                continue
            said = normalise(record.output)
            names = [name for name, s in self.names.items() if s == fact["subject"]] or [str(fact["subject"])]
            name = next((n for n in sorted(names, key=len, reverse=True) if normalise(n) in said), None)
            before, _, _ = said.partition(normalise(str(fact["value"])))
            if name is None or normalise(name) not in before or before == said:
                continue
            first, _, last = before.partition(normalise(name))
            if len(first.split()) + len(last.split()) >= 2:
                pattern = rf"{re.escape(first.strip())}\s*\b.{{1,60}}?\b\s*{re.escape(last.strip())}(?!\w)"
                self.statements.setdefault(str(fact["relation"]), set()).add(pattern)

    def __call__(self, answer: str, record: Record) -> Verdict:
        """The verdict on one answer. Of several facts in a record each has to be answered; the worst verdict counts."""
        targets = [fact for fact in record.facts if "value" in fact] or [{}]
        verdicts = [_Reading(self, answer, record, target).verdict() for target in targets]
        worst = min(verdicts, key=lambda verdict: WORST_FIRST.index(verdict.answer_class))
        return replace(worst, right=all(verdict.right for verdict in verdicts))


# --- one answer -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mention:
    start: int
    end: int
    kind: str
    """true, premise (the false value of a trap), other (a value the knowledge base has elsewhere), beside (a value of
    another relation of the subject), aside (harmless), name, other name; for numbers also unit (the unit is wrong)."""
    text: str


WRONG = ("other", "unit", "premise unit", "premise", "wrong of another")


class _Reading:
    """One answer read for one fact: mentions, polarity, class."""

    def __init__(self, judge: Judge, answer: str, record: Record, target: dict[str, Any]) -> None:
        self.judge, self.record, self.target = judge, record, target
        about = target or (record.facts[0] if record.facts else {})
        subject = str(about.get("subject", ""))
        self.subject = judge.names.get(subject, subject)
        self.relation = str(about.get("relation", ""))
        self.exists = bool(target)
        value, unit = str(target.get("value", "")), str(target.get("unit", ""))
        self.known = known_quantity(value, unit) if target else None  # None where a phrase is asked for
        self.false = known_quantity(str(target.get("false_value", "")), str(target.get("false_unit", "")) or unit)
        self.original = answer.replace(record.question, " ") if record.question else answer
        self.question = normalise(record.question)
        text = normalise(answer)
        if len(self.question.split()) > 3:  # rule 8: the question repeated says nothing
            text = text.replace(self.question, " ")
        self.text = text
        ends = [m.end() for m in re.finditer(r"[!?;\n]+|\.(?!\d)(?<!al\.)(?<!e\.g\.)(?<!i\.e\.)", text)] + [len(text)]
        self.sentences = [(a, b) for a, b in zip([0, *ends], ends) if text[a:b].strip()]
        self.modest = self.abstentions()
        self.quoted = [m.span() for m in wording.QUOTE.finditer(text) if len(m[0].split()) > 3]
        self.quantities = quantities(text, judge.units)
        self.stated = self.statements()
        self.mentions = self.find_phrases()
        self.mentions += self.find_quantities()
        self.mentions.sort(key=lambda mention: mention.start)

    # What is mentioned (rules 2 to 6)

    def find_phrases(self) -> list[Mention]:
        """Every known name and value, the longest first, none inside another."""
        vocabulary: dict[str, str] = {}
        self.beside: dict[str, set[str]] = {}  # values of the subject's other relations -> the words that name those
        # rule 16: of a subject that does not exist, any value of any relation is a claim
        asked = [self.relation, *(relation for _, _, relation in self.stated)]
        for relation in asked if self.exists else self.judge.phrases:
            vocabulary |= dict.fromkeys(self.judge.phrases.get(relation, ()), "other")
        for fact in self.judge.by_subject.get(self.subject, ()):
            if (fact.subject, fact.relation) in self.judge.quantities:
                continue
            if fact.relation != self.relation:
                vocabulary.setdefault(fact.value, "beside")
                self.beside.setdefault(fact.value, set()).update(_words(fact.relation) - _words(self.relation))
            else:
                vocabulary |= dict.fromkeys(fact.avoid, "aside")
        if self.exists:
            value, false = str(self.target["value"]), str(self.target.get("false_value", ""))
            if false and known_quantity(false, "") is None:
                vocabulary[false] = "premise"
            if self.known is None:
                vocabulary |= dict.fromkeys([value, *re.split(r"\s+or\s+", value)], "true")
        own = [name for name, subject in self.judge.names.items() if subject == self.subject] or [self.subject]
        vocabulary = {  # rule 3: "high ammonia" is no value where ammonia is asked about
            phrase: kind
            for phrase, kind in vocabulary.items()
            if kind in ("true", "premise") or not any(name and _occurs(name, normalise(phrase)) for name in own)
        }
        names = {**dict.fromkeys(self.judge.names, "other name"), **dict.fromkeys(filter(None, own), "name")}
        vocabulary = {**names, **vocabulary}
        taken: list[Mention] = []
        for phrase in sorted(vocabulary, key=len, reverse=True):
            for match in _compiled(phrase).finditer(self.text) if _longest(phrase) in self.text else ():
                unit = any(q.start < match.start() and match.end() <= q.end for q in self.quantities)
                if not unit and _clear(match, taken):
                    taken.append(Mention(match.start(), match.end(), vocabulary[phrase], phrase))
        return taken

    def find_quantities(self) -> list[Mention]:
        found = [q for q in self.quantities if all(q.end <= m.start or q.start >= m.end for m in self.mentions)]
        mentions = [Mention(q.start, q.end, self.kind_of(q, found), self.text[q.start : q.end]) for q in found]
        unit = self.false.unit if self.false else ""
        if self.known and unit and normalise(unit) != normalise(self.known.unit):
            for match in _compiled(unit).finditer(self.text):  # "not g/L" denies the premise's unit
                if _clear(match, mentions):
                    mentions.append(Mention(match.start(), match.end(), "premise", unit))
        return mentions

    def kind_of(self, q: Quantity, found: list[Quantity]) -> str:
        known, units, all_known = self.known, self.judge.units, self.judge.quantities
        if not self.exists:
            return "other" if q.unit or not q.lone else "aside"
        siblings = [s for (name, r), s in all_known.items() if name == self.subject and r != self.relation]
        beside = [s for s in siblings if compare(q, s, units) == "equal" and (q.unit or not s.unit)]
        if known is None:  # rule 12: an interval in the unit of another fact has to be that fact's
            wrong = not q.lone and not beside and any(_same_dimension(q, s, units) for s in siblings)
            return "other" if wrong else "aside"
        relation = compare(q, known, units)
        if relation == "equal":
            return "true"
        if beside:  # the same interval in SI units answers as well
            return "true" if all_known.get((self.subject, f"{self.relation}_si")) in beside else "aside"
        if self.false and compare(q, self.false, units) == "equal":
            return "premise unit" if relation == "unit" else "premise"
        if relation == "inside":
            return "aside"
        if (
            q.unit
            and not _same_dimension(q, known, units)
            and any(other is not q and (not other.unit or _same_dimension(other, known, units)) for other in found)
        ):
            return "aside"  # "in adults over 18 years"
        return relation

    # Whether it is asserted there (rules 3, 7, 8)

    def abstentions(self) -> list[tuple[int, int]]:
        """The stretches that say "I do not know", up to a "but" (rule 11)."""
        spans = []
        for a, b in self.sentences:
            sentence = self.text[a:b]
            match = wording.ABSTAINS.search(sentence)
            after = wording.ABSTAINS_AFTER.search(sentence)
            if match or after:
                begin = 0 if after else match.start() if match else 0
                stop = wording.MODESTY_ENDS.search(sentence, max(m.end() for m in (match, after) if m))
                spans.append((a + begin, a + stop.start() if stop else b))
        return spans

    def statements(self) -> list[tuple[int, int, str]]:
        """The stretches that say another relation than the asked one, in the words that the intended answers have."""
        own = self.judge.statements.get(self.relation, ())
        found = []
        for relation, patterns in self.judge.statements.items():
            for pattern in patterns if relation != self.relation else ():
                for match in re.finditer(pattern, self.text):
                    if not any(re.search(p, self.text[match.start() :][: len(match[0])]) for p in own):
                        found.append((match.start(), match.end(), relation))
        return found

    def sentence(self, at: int) -> tuple[int, int]:
        return next(((a, b) for a, b in self.sentences if a <= at < b), (0, len(self.text)))

    def polarity(self, start: int, end: int) -> str:
        """asserted, denied or neutral."""
        a, b = self.sentence(start)
        before, after = self.text[a:start], self.text[end:b]
        if any(x <= start < y for x, y in (*self.modest, *self.quoted)):
            return "neutral"
        for match in reversed(list(wording.NEGATOR.finditer(before))):
            gap = before[match.end() :]
            if wording.SCOPE_END.search(gap) or ("," in gap and not re.search(r"\bbut\b", after)):
                break
            return "denied"
        belief = wording.BELIEF_IS_WRONG.search(self.text[a:b])
        if wording.DENIED_AFTER.search(after) or (belief and a + belief.start() <= start < a + belief.end()):
            return "denied"
        if after.rstrip().endswith("?") or self.text[a:b].rstrip().endswith("?") or wording.QUOTED.search(before):
            return "neutral"
        return "asserted"

    def is_topic(self, mention: Mention) -> bool:
        """Rule 17: whether the sentence speaks of the value and not of the subject: "Anemia is a disease that ..."."""
        a, b = self.sentence(mention.start)
        if any(m.kind == "name" and a <= m.start < b for m in self.mentions) or wording.PRONOUN.search(self.text[a:b]):
            return False
        if wording.DEFINES.search(self.text[mention.end : b]) and self.content(mention.end, b):
            return True
        return mention.kind != "true" and bool(self.content(a, mention.start))

    def said_relation(self, mention: Mention) -> str:
        """The relation that the mention's sentence states: the asked one unless its words are another's."""
        a, _ = self.sentence(mention.start)
        return next((r for x, y, r in self.stated if a <= x and y <= mention.start), self.relation)

    def about_another(self, mention: Mention) -> str | None:
        """The other known subject that a value is asserted of in this sentence (rule 3)."""
        a, b = self.sentence(mention.start)
        names = [m for m in self.mentions if m.kind in ("name", "other name") and a <= m.start < b]
        if not names or any(m.kind == "name" for m in names) or names[0].start > mention.start:
            return None
        if _compiled(names[0].text).search(self.question):
            return None
        return self.judge.names[names[0].text]

    # The verdict

    def verdict(self) -> Verdict:
        kind, trap = self.record.kind, self.record.kind == "trap"
        phrase = self.exists and self.known is None
        stated = {m.kind for m in self.mentions if self.polarity(m.start, m.end) == "asserted"}
        claims: list[tuple[str, str, Mention]] = []  # (kind, polarity, mention)
        for mention in self.mentions:
            if mention.kind in ("name", "other name", "aside"):
                continue
            what, how = mention.kind, self.polarity(mention.start, mention.end)
            if how == "asserted" and self.exists and mention.text[:1].isalpha() and self.is_topic(mention):
                how = "neutral"
            if how == "asserted" and self.exists:
                other, relation = self.about_another(mention) or self.subject, self.said_relation(mention)
                if (other, relation) != (self.subject, self.relation):
                    what = self.claim_about(other, relation, mention)
            if what == "beside":  # rule 12: accepted beside the true value, or where its own relation is named
                a, b = self.sentence(mention.start)
                named = self.beside[mention.text] & set(re.findall(r"[a-z]+", self.text[a:b]))
                in_place = phrase and not self.content(a, b)  # the sentence says nothing else
                what = "other" if in_place and not named and "true" not in stated else "aside"
            claims.append((what, how, mention))
        asserted = {what: mention for what, how, mention in claims if how == "asserted" and what != "aside"}
        denied = {what for what, how, _ in claims if how == "denied"}
        if trap and any(
            m.kind in ("premise", "premise unit") and any(x <= m.start < y for x, y in self.modest)
            for m in self.mentions
        ):
            denied.add("premise")  # "there is no such thing as <the premise>"

        sentences = [self.text[a:b] for a, b in self.sentences]
        said_no = any(pattern.search(s) for s in sentences for pattern in wording.SAYS_NO)
        said_yes = any(pattern.search(s) for s in sentences for pattern in wording.SAYS_YES)
        rejected = said_no or bool(denied & {"premise", "premise unit"}) or (kind == "confirm" and "true" in denied)
        if trap:
            rejected = rejected or bool(wording.NO_SUCH.search(self.text))
            rejected = rejected or ("true" in asserted and bool(wording.ACTUALLY.search(self.text)))
        if kind in ("trap", "confirm") and not asserted and "true" not in denied:  # rule 10: a bare yes or no
            if said_yes and not rejected:
                asserted["true" if kind == "confirm" else "premise"] = Mention(0, 0, "yes", "yes")
            elif kind == "confirm" and said_no:
                denied.add("true")

        answer_class, why, type_ = self.classify(asserted, denied)
        right = {
            "trap": answer_class == "correct" and rejected,
            "confirm": answer_class == "correct" and not rejected,
            "unanswerable": answer_class == "abstained",
        }.get(kind, answer_class == "correct")
        if answer_class == "correct" and not right:
            why += "; the premise is not rejected" if trap else "; the true premise is rejected"
        return Verdict(answer_class, right, rejected, type_, why)

    def classify(self, asserted: dict[str, Mention], denied: set[str]) -> tuple[str, str, str]:
        """(class, reason, type of bad answer), in the order of docs/truth.md."""
        if not self.exists:
            if asserted:
                said = next(iter(asserted.values())).text
                return "unsupported", f"asserts {said!r} of a subject that does not exist", "invented entity"
        elif bad := next((kind for kind in WRONG if kind in asserted), ""):
            type_ = "wrong unit or dose" if bad in ("unit", "premise unit") else "contradicted value"
            return "contradicted", f"asserts {asserted[bad].text!r}, known is {self.wanted()!r}", type_
        elif "true" in denied:
            return "contradicted", f"denies {self.wanted()!r}", "contradicted value"
        if "unknown fact" in asserted:
            return "unsupported", f"asserts {asserted['unknown fact'].text!r} where nothing is known", "invented entity"
        if source := self.invented_source():
            return "unsupported", f"names an unknown source: {source!r}", "invented source or date"
        if "true" in asserted:
            extra = self.joined_to(asserted["true"])
            if extra:
                return "unsupported", f"adds what is not known: {extra!r}", "invented entity"
            return "correct", f"asserts {self.wanted()!r}", ""
        if self.modest:
            return "abstained", "says that it does not know", ""
        rest = self.left_over()
        if rest:
            return "unsupported", f"says what is not known: {' '.join(rest[:6])!r}", "invented entity"
        return "no_claim", "asserts no value", ""

    def wanted(self) -> str:
        return f"{self.target.get('value', '')} {self.target.get('unit', '')}".strip()

    def claim_about(self, other: str, relation: str, mention: Mention) -> str:
        """A value asserted of another known subject or in another relation: aside where that is a known fact."""
        fact = self.judge.known.get((other, relation))
        if fact is None:
            return "unknown fact"
        own = self.judge.quantities.get((other, relation))
        if own is None:
            same = _compiled(fact.value).fullmatch(self.text[mention.start : mention.end])
            return "aside" if same else "wrong of another"
        said = quantities(self.text[mention.start : mention.end], self.judge.units)
        return "aside" if said and compare(said[0], own, self.judge.units) == "equal" else "wrong of another"

    def invented_source(self) -> str:
        """Rule 14: a source with a capital letter, or a year, that the evidence does not have."""
        taken = [m for m in self.mentions if m.end > m.start and not m.text.isdigit()]  # a bare number may be a year
        for match in wording.ACCORDING_TO.finditer(self.original):
            words = [w for w in re.findall(r"\b[A-Z][\w-]*", match[1]) if normalise(w) not in self.judge.evidence]
            words = [w for w in words if not any(_compiled(w).search(normalise(m.text)) for m in taken)]
            if words:
                return match[1].strip()
        if (cited := wording.CITED.search(self.original)) and normalise(cited[0]) not in self.judge.evidence:
            return cited[0]
        for match in wording.YEAR.finditer(self.text):
            if _clear(match, taken) and match[0][-4:] not in self.judge.evidence and match[0][-4:] not in self.question:
                return match[0]
        return ""

    def is_content(self, word: str) -> bool:
        """Whether a word says something that neither the question nor the language says by itself."""
        stem = word.removesuffix("s")
        return not {word, stem} & wording.FUNCTION_WORDS and not _compiled(stem).search(self.question)

    def joined_to(self, mention: Mention) -> str:
        """Rule 13: the unknown phrase that an "and" or "or" joins to the true value, or ""."""
        a, b = self.sentence(mention.start)
        if mention.kind != "true" or known_quantity(mention.text, "") is not None:
            return ""
        after = re.match(r",? (?:and|or) ((?:[a-z-]+ ?){1,3})(?=[.,;:!?)]|$)", self.text[mention.end : b])
        before = re.search(r"([a-z-]+) (?:and|or) (?:an? |the )?$", self.text[a : mention.start])
        for match, offset in ((after, mention.end), (before, a)):
            if match is None:
                continue
            inside = [
                m
                for m in self.mentions
                if m is not mention and m.start < offset + match.end(1) and m.end > offset + match.start(1)
            ]
            words = match[1].split()
            if not inside and all(self.is_content(word) for word in words) and not self.judge.relations & set(words):
                return match[1].strip()
        return ""

    def left_over(self) -> list[str]:
        """Rule 15: the asserted words that nothing explains."""
        words = self.content(0, len(self.text))
        words = [m for m in words if not wording.SPEAKER.search(self.text[slice(*self.sentence(m.start()))])]
        return [m[0] for m in words if self.polarity(m.start(), m.end()) == "asserted"]

    def content(self, start: int, end: int) -> list[re.Match[str]]:
        """The words of a stretch that are no mention, no abstention, and say something by themselves."""
        return [match for match in self.saying if start <= match.start() < end]

    @cached_property
    def saying(self) -> list[re.Match[str]]:
        spans = [(m.start, m.end) for m in self.mentions] + self.modest + [(x, y) for x, y, _ in self.stated]
        known = self.judge.relations | _words(self.relation)
        words = (match for match in wording.WORD.finditer(self.text) if match[0] not in known)
        words = (match for match in words if self.is_content(match[0]))
        return [match for match in words if not any(x <= match.start() < y for x, y in spans)]


def _clear(match: re.Match[str], mentions: Iterable[Mention]) -> bool:
    """Whether a match overlaps no mention."""
    return all(match.end() <= m.start or match.start() >= m.end for m in mentions)


def _words(relation: str) -> set[str]:
    return set(re.findall(r"[a-z]+", relation.lower()))


def _same_dimension(a: Quantity, b: Quantity, opaque: frozenset[str]) -> bool:
    left, right = parse_unit(a.unit, opaque), parse_unit(b.unit, opaque)
    return left is not None and right is not None and left[1] == right[1]
