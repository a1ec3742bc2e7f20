"""What a value is: spelling, phrases, numbers with units, intervals. Rules 1, 2, 4, 5 and 6 of docs/truth.md."""

import re
import unicodedata
from dataclasses import dataclass, replace
from functools import lru_cache

SUPERSCRIPT = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
NUMBER_NAMES = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
NUMBER_WORDS = {name: str(number) for number, name in enumerate(NUMBER_NAMES, start=2)}
SPELLING = [
    (r"[‐‑‒–—−]", "-"),
    (r"[’‘`´]", "'"),
    (r"[“”„«»]", '"'),
    (r"≤", "<="),
    (r"≥", ">="),
    (r"[×]|\bx(?= ?10\b)", "x"),
    (r"\bcan(?:no|')t\b", "can not"),
    (r"\bwon't\b", "will not"),
    (r"n't\b", " not"),
    (r"'m\b", " am"),
    (r"'re\b", " are"),
    (r"'ll\b", " will"),
    (r"'ve\b", " have"),
    (r"'d\b", " would"),
    (r"\b(it|that|there|what|he|she)'s\b", r"\1 is"),
    (r"\binternational units?\b", "iu"),
    (r"'s?\b", ""),  # Graves' and Addison's disease are also written without
    (r"aem", "em"),  # British: anaemia, haemoglobin, leukaemia
    (r"oed", "ed"),
    (r"rrhoe", "rrhe"),
    (r"oeso", "eso"),
    (r"oest", "est"),
    (r"\b(tum|col|lab|behavi|od)our", r"\1or"),
    (r"(lit|met)re(s?)\b", r"\1er\2"),
    (r"lys(e[ds]?|ing)\b", r"lyz\1"),
    (r"(?<=\d),(?=\d{3}\b)", ""),  # thousands
    (r"(?<=\d) ?(?:-|to) ?(?=\d)", "-"),
    (r"[ \t]+", " "),
]
SPELLING_COMPILED = [(re.compile(pattern), new) for pattern, new in SPELLING]
SPELLED_UNIT = re.compile(r"\b([a-z]+) per ([a-z]+)\b")
NUMBER_WORD = re.compile(rf"\b({'|'.join(NUMBER_WORDS)})\b")


@lru_cache(maxsize=65536)
def normalise(text: str) -> str:
    """One spelling for what means the same: lower case, plain dashes, American, digits, no thousands commas."""
    text = re.sub(r"10([⁰¹²³⁴⁵⁶⁷⁸⁹]+)", lambda m: "10^" + m[1].translate(SUPERSCRIPT), text)
    text = unicodedata.normalize("NFKC", text).lower().replace("μ", "u").strip()
    for pattern, new in SPELLING_COMPILED:
        text = pattern.sub(new, text)
    text = NUMBER_WORD.sub(lambda m: NUMBER_WORDS[m[1]], text)
    return SPELLED_UNIT.sub(lambda m: _short_unit(m[1], m[2]) or m[0], text)


def stem_of(word: str) -> str:
    """A word without its plural s."""
    return word[:-1] if len(word) > 3 and word.endswith("s") and word[-2] not in "sui" else word


def phrase_pattern(phrase: str) -> str:
    """A regex for a phrase in a normalised text: articles, hyphens and a plural s make no difference."""
    phrase = re.sub(r"\b(?:a|an|the|An?(?= )(?<!\w A)|The)\s+(?=\w)", "", phrase)  # not hepatitis A, lipoprotein(a)
    words = re.findall(r"[\w.%^/<>=+]+", normalise(phrase))
    parts = [re.escape(stem_of(word)) + ("(?:e?s)?" if word.isalpha() and len(word) > 2 else "") for word in words]
    joined = r"[\s,()-]+(?:(?:a|an|the)\s+)?".join(parts)
    return rf"(?<![\w]){joined}(?![\w])" if parts else r"(?!)"


# Units: a factor and a dimension. "mg/dL" is (0.01, "g/l"): 1 mg/dL = 0.01 g/L.

PREFIX = {"k": 1e3, "": 1.0, "d": 1e-1, "c": 1e-2, "m": 1e-3, "u": 1e-6, "n": 1e-9, "p": 1e-12, "f": 1e-15}
PREFIX_WORDS = {
    "kilo": "k",
    "deci": "d",
    "centi": "c",
    "milli": "m",
    "micro": "u",
    "nano": "n",
    "pico": "p",
    "femto": "f",
    "mc": "u",
}
BASE_WORDS = {
    "g": "gram gm", "mol": "mole", "l": "liter", "u": "unit iu ku", "eq": "equivalent", "m": "meter", "osm": "osmole",
    "kat": "katal", "s": "second sec", "min": "minute", "h": "hour hr", "day": "d", "week": "wk", "month": "",
    "year": "yr", "%": "percent", "cell": "", "kg": "", "copy": "copies",
}  # fmt: skip
BASE = {name: base for base, words in BASE_WORDS.items() for name in (base, *words.split())}
TIME = {"s": 1.0, "min": 60.0, "h": 3600.0, "day": 86400.0, "week": 604800.0}
PREFIXED = ("g", "mol", "l", "u", "eq", "m", "osm", "kat", "s")
VOLUMES = {"mm3": "ul", "mm^3": "ul", "cc": "ml", "m2": "m", "m^2": "m"}  # "mL/min/1.73 m2" keeps its area as a length
Unit = tuple[float, str]


def _symbol(word: str) -> Unit | None:
    """("mg" -> (1e-3, "g")), or None where the word is no unit."""
    word = word.strip(". ")
    for candidate in (word, word.removesuffix("s")):
        for long, short in {**PREFIX_WORDS, **{p: p for p in PREFIX}}.items():
            if not candidate.startswith(long):
                continue
            base = BASE.get(candidate[len(long) :])
            if base is None or (long and base not in PREFIXED):
                continue
            if base in TIME and not short:
                return TIME[base], "s"
            return PREFIX[short], base
    return None


def _short_unit(top: str, bottom: str) -> str:
    """ "milligrams", "deciliter" -> "mg/dl"; "" where one of them is no unit."""
    short = []
    for word in (top, bottom):
        symbol = _symbol(word)
        if symbol is None:
            return ""
        factor, base = symbol
        prefix = next((p for p, size in PREFIX.items() if size == factor), "")
        short.append(word if base == "s" else prefix + ("iu" if word == "iu" else base))
    return "/".join(short)


@lru_cache(maxsize=4096)
def parse_unit(text: str, opaque: frozenset[str] = frozenset()) -> Unit | None:
    """(factor, dimension) of a unit, or None. `opaque`: units of the knowledge base, known as they stand."""
    text = normalise(text).strip(" .")
    if not text:
        return None
    own = next(((1.0, name) for name in (text, text.removesuffix("s")) if name in opaque), None)
    match = re.fullmatch(r"(?:x ?)?10 ?\^? ?(\d+) ?(.*)", text)
    factor = 10.0 ** int(match[1]) if match else 1.0
    numerator, *denominators = [part.strip() for part in re.split(r"/|\bper ", match[2] if match else text)]
    dimension = ""
    if numerator.startswith("million"):
        factor, numerator = factor * 1e6, numerator.removeprefix("million").strip()
    if numerator not in ("", "cells", "cell"):
        top = _symbol(numerator)
        if top is None:
            return own
        factor, dimension = factor * top[0], top[1]
    for part in denominators:
        count, word = re.findall(r"(\d*\.?\d*) ?(.*)", part)[0]
        bottom = _symbol(VOLUMES.get(word, word))
        if bottom is None:
            return own
        factor, dimension = factor / (bottom[0] * float(count or 1)), f"{dimension}/{bottom[1]}"
    return (factor, dimension) if dimension else own


# Numbers and intervals.


@dataclass(frozen=True)
class Quantity:
    """An interval low..high (None: open) or a lone number (low = high), its unit as written, its place in the text."""

    low: float | None
    high: float | None
    unit: str = ""
    lone: bool = False
    digits: int = 0
    start: int = 0
    end: int = 0


NUM = r"(?<![\w.^/])([-+]?(?:\d+\.?\d*|\.\d+)(?:e-?\d+)?)(?![\d])(?!-[a-z]|(?:st|nd|rd|th)\b)"
SECOND = NUM.replace(r"(?<![\w.^/])", "")
UNIT = r"( ?(?:(?:x ?)?10 ?\^ ?\d+ ?/ ?[a-z]+|(?:[a-z%]+)?(?: ?(?:/|per ) ?[\d.]* ?[a-z]+[\^\d]*)+|[a-z%]+))?"
UP = (
    r"(?:<=?|no (?:more|higher) than|not more than|(?:less|lower|fewer) than(?: or equal to)?"
    r"|below|under|up to|at most|a maximum of)"
)
DOWN = (
    r"(?:>=?|no (?:less|lower) than|not less than|(?:more|greater|higher) than(?: or equal to)?"
    r"|above|over|at least|a minimum of)"
)
FORMS = [
    ("range", re.compile(rf"(?:between )?{NUM}{UNIT} ?(?:-|to|and) ?{SECOND}{UNIT}")),
    ("up", re.compile(rf"{UP} ?{NUM}{UNIT}")),
    ("down", re.compile(rf"{DOWN} ?{NUM}{UNIT}")),
    ("up", re.compile(rf"{NUM}{UNIT} (?:or|and) (?:less|lower|below|under|fewer)")),
    ("down", re.compile(rf"{NUM}{UNIT} (?:or|and) (?:more|higher|above|over|greater)")),
    ("lone", re.compile(rf"{NUM}{UNIT}")),
]
CLAUSE_END = re.compile(r"\s*(?:$|[.,;:!?)\n]|and\b|or\b|but\b|is\b|are\b|in (?:adults|men|women)\b)")


def quantities(text: str, opaque: frozenset[str] = frozenset()) -> list[Quantity]:
    """Every value of a normalised text that is a number: in an interval, with a unit, or at the end of its clause."""
    found: list[Quantity] = []
    at = 0
    while at < len(text):
        matches = [
            (m.start(), order, kind, m) for order, (kind, form) in enumerate(FORMS) if (m := form.search(text, at))
        ]
        matches = [hit for hit in matches if _is_range(hit)]
        if not matches:
            break
        _, _, kind, match = min(matches, key=lambda hit: hit[:2])
        numbers = [g for g in match.groups()[::2] if g is not None]
        written = [(g or "").strip() for g in match.groups()[1::2]]
        units = [w for w in written if w and parse_unit(w, opaque)]
        end = match.end() if not written[-1] or written[-1] in units else match.end(len(match.groups()) - 1)
        at = max(end, match.start() + 1)
        if kind == "lone" and not units and not CLAUSE_END.match(text, end):
            continue
        low, high = None if kind == "up" else float(numbers[0]), None if kind == "down" else float(numbers[-1])
        unit, digits = units[-1] if units else "", min(len(n.partition(".")[2]) for n in numbers)
        found.append(Quantity(low, high, unit, kind == "lone", digits, match.start(), end))
    return found


def _is_range(hit: tuple[int, int, str, re.Match[str]]) -> bool:
    """ "5 and 9" is an interval only behind "between"; two numbers have to rise."""
    _, _, kind, match = hit
    if kind != "range":
        return True
    joined = re.search(r" and [-+]?[\d.]+", match[0]) is not None
    return (not joined or match[0].startswith("between")) and float(match[1]) < float(match[3])


def known_quantity(value: str, unit: str) -> Quantity | None:
    """The quantity that a knowledge-base value is, or None where it is a phrase."""
    text = normalise(value)
    both = f"{text} {normalise(unit)}".strip()
    for candidate, given in ((text, unit), (both, unit)):
        found = quantities(candidate, frozenset({normalise(unit)}) if unit else frozenset())
        if len(found) == 1 and found[0].start == 0 and found[0].end >= len(candidate):
            q = found[0]
            return Quantity(q.low, q.high, q.unit or given, q.lone, _digits(text))
    return None


def _digits(text: str) -> int:
    numbers = re.findall(r"\d+\.?(\d*)", text)
    return max((len(decimals) for decimals in numbers), default=0)


def compare(said: Quantity, known: Quantity, opaque: frozenset[str] = frozenset()) -> str:
    """ "equal", "inside" (a lone number in the interval), "unit" (the unit or the power of ten is wrong) or "other"."""
    factor = 1.0
    same_unit = True
    if said.unit and normalise(said.unit) != normalise(known.unit):
        ours, theirs = parse_unit(said.unit, opaque), parse_unit(known.unit, opaque)
        if theirs is None or ours is None or ours[1] != theirs[1]:
            same_unit = False
        else:
            factor = ours[0] / theirs[0]
    low, high = (None if x is None else x * factor for x in (said.low, said.high))

    def matches(power: int, converted: bool) -> bool:
        ends = (None if x is None else x * 10.0**power for x in (low, high))
        return all(_same(x, own, known.digits, converted) for x, own in zip(ends, (known.low, known.high)))

    if known.lone == said.lone and matches(0, abs(factor - 1) > 1e-9):
        return "equal" if same_unit else "unit"
    if not same_unit or (factor != 1.0 and compare(replace(said, unit=""), known, opaque) == "equal"):
        return "unit"
    if said.lone and not known.lone and low is not None:
        above, below = known.low is None or low >= known.low, known.high is None or low <= known.high
        return "inside" if above and below else "other"
    return "unit" if any(matches(power, True) for power in (-6, -3, -2, -1, 1, 2, 3, 6)) else "other"


def _same(said: float | None, known: float | None, digits: int, converted: bool) -> bool:
    if said is None or known is None:
        return (said or 0.0) == (known or 0.0) and said in (None, 0.0) and known in (None, 0.0)  # "0-5" is "below 5"
    if converted:
        return abs(said - known) <= 0.02 * abs(known) + 1e-12
    return abs(said - known) < 0.5 * 10.0**-digits
