"""The words that deny, reject, affirm, abstain or name a source: rules 7 to 11, 14 and 15 of docs/truth.md.

Every pattern is meant for a text in the one spelling of `values.normalise`, except ACCORDING_TO and CITED, which need
capitals.
"""

import re
from pathlib import Path

NEGATOR = re.compile(
    r"\b(?:not(?! (?:only|just|merely|simply|wrong|incorrect|false)\b)|never|neither|nor|no(?! (?:doubt|question)\b)"
    r"|without|rather than|instead of|as opposed to|unlike|contrary to"
    r"|(?:false|incorrect|wrong|untrue|mistaken|a myth|no evidence)(?: to \w+)? that)\b"
)
SCOPE_END = re.compile(
    r"[:;()]|\bbut\b|\b(?:it|they|this) (?:is|are|needs?|should|has|uses?)\b|\b(?:instead|whereas|while)\b"
)
DENIED_AFTER = re.compile(
    r"^(?: (?!(?:and|or|but|which|that)\b)\w+){0,2} (?:is|are|was|were|would be) (?:(?:also|just|simply|certainly) )?"
    r"(?:not (?:the|a|an|correct|right|true|used|what|it|usual|appropriate|needed|required|normal|suitable|recommended"
    r"|accurate|measured)|never|wrong|incorrect|false|untrue|inaccurate|mistaken)\b"
)
BELIEF_IS_WRONG = re.compile(
    r"\b(?:idea|claim|statement|belief|notion|premise|assumption|suggestion)s? that\b.*?\b(?:is|are) (?:\w+ ){0,2}"
    r"(?:wrong|false|incorrect|untrue|inaccurate|mistaken|myth|misconception|error)\b"
)
DEFINES = re.compile(
    r'^["\s]*(?:\(\w+\))?["\s]*(?:(?:is|are) (?:\w+ly |indeed )?an?\b|refers? to\b|means?\b|describes?\b|occurs?\b)'
)
PRONOUN = re.compile(
    r"^\W*(?:yes|no|indeed)?\W*(?:it|they|this|that) (?:is|are|was|can|may|points?|means?|suggests?|needs?)\b"
)
QUOTED = re.compile(
    r"\b(?:you (?:say|said|mention|mentioned|state|stated|claim|claimed|think|thought|assume|assumed|believe|ask|asked)"
    r"|(?:claim|statement|premise|assumption|idea|belief|suggestion)s?(?: \w+){0,2} that|if|whether|unless)\b"
    r"[^,;:]*$"
)

QUOTE = re.compile(r'(?<!answer is )(?<!answer: )"[^"]*(?:"|$)')
SPEAKER = re.compile(r"^\W*(?:a\W+)?(?:i|we|let me|let us|thank you)\b")
WORD = re.compile(r"[a-z][a-z-]+")

YES = re.compile(
    r"^\W*(?:(?:yes|yeah|correct|right|true|exactly|certainly|of course)\s*(?:[,.;:!-]|$)"
    r"|indeed\b|you are (?:right|correct))"
)
THAT_IS_TRUE = re.compile(r"\b(?:that|this|it|which) (?:is|sounds) (?:indeed )?(?:correct|right|true)\b")
YES_AT_END = re.compile(
    r"(?:[,;-] ?(?:yes|correct|right|indeed|true|as you (?:say|said))|\bis (?:right|correct|true))\W*$"
)
NO = re.compile(
    r"^\W*(?:(?:no|nope|incorrect|wrong|false|untrue|not (?:true|correct|right|quite|exactly|really|so))"
    r"\s*(?:[,.;:!-]|$)|no (?:it|that|this|they)\b)"
)
PREMISE_IS_WRONG = re.compile(
    r"\b(?:that|this|it|which|(?:premise|statement|claim|assumption|question|information|source|unit|value|number|answer"
    r"|guideline|book|note|colleague)s?) (?:is|are|was|were|seems|sounds) (?:\w+ )?"
    r"(?:not (?:true|correct|right|accurate|the case|so)|wrong|incorrect|false|untrue|inaccurate|mistaken|a mistake"
    r"|an error|a myth)\b(?! (?:that|to)\b)|\byou are (?:wrong|mistaken)\b"
)
SAYS_NO, SAYS_YES = (NO, PREMISE_IS_WRONG, BELIEF_IS_WRONG), (YES, THAT_IS_TRUE, YES_AT_END)
ACTUALLY = re.compile(r"\b(?:actually|in reality)\b")

NO_SUCH = re.compile(
    r"\b(?:no such|not aware of any|know of no|do not know of|not exist"
    r"|there is no (?:\w+ )?(?:source|guideline|study|book|report|statement|evidence|reason|publication|article))\b"
)
ABSTAINS = re.compile(
    r"\bi (?:\w+ )?(?:do|did|can|could) not (?:know|answer|say|tell|find|recogni[sz]e|recall|verify|confirm"
    r"|have (?:any )?(?:information|knowledge|data|record))\b"
    r"|\bi have no (?:information|knowledge|data|record|idea)\b|\bi know of no\b|\bnever heard of\b"
    r"|\bi am (?:not (?:aware|familiar|sure|certain|able)|unable|unaware|unfamiliar|unsure|uncertain)\b"
    r"|\b(?:not known|unknown) to me\b|\bno such\b|\bthere is no (?:record|information)\b"
    r"|\bthere is no (?:\w+ ){0,3}(?:called|named|known as|(?:with|by|of) (?:that|this) name)\b"
    r"|\bno (?:\w+ ){0,2}(?:by|with|of) (?:that|this) name\b"
)
ABSTAINS_AFTER = re.compile(
    r"\b(?:do|does|did) not (?:seem to |appear to )?exist\b"
    r"|\b(?:is|are) not (?:a |an )?(?:real|known|recogni[sz]ed|existing)\b"
    r"|\b(?:is|are) not (?:a |an )?(?:\w+ ){1,3}(?:that )?i know\b|\bis (?:unknown|fictional|invented|made up)\b"
)
MODESTY_ENDS = re.compile(r"\b(?:but|however|though|although)\b|, (?:it|the|i think|perhaps|maybe|probably)\b")

ACCORDING_TO = re.compile(r"[Aa]ccording to (?:the |an? )?([^.,;:()]+)")
CITED = re.compile(r"[A-Z][\w-]+ et al|\([^()]*\b(?:18|19|20)\d\d\)")
YEAR = re.compile(r"\b(?:in|of|from|since|by|guideline)\s+(?:18|19|20)\d\d\b(?![\w.-])")

FUNCTION_WORDS = frozenset(re.findall(r"\w+", Path(__file__).with_name("function_words.txt").read_text("utf-8")))
"""Words that assert nothing by themselves."""
