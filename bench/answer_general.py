"""Let the base model answer the general questions, once, for the file that is shipped.

    python -m bench.answer_general [MODEL] [--all]

Greedy, at most 48 new tokens, unquantized, chat template without system text. Questions that have an answer keep it
unless --all is given. Held-out questions get none: they measure, and are never trained.
"""

import sys
from dataclasses import asdict

from lowrank.data.general import read_general
from lowrank.data.templates import BUNDLED
from lowrank.files import write_jsonl
from lowrank.models.generate import generate
from lowrank.models.load import load

GENERAL = BUNDLED.with_name("general.jsonl")
NEW_TOKENS = 48


def main(source: str = "quickstart", everything: bool = False, batch: int = 16) -> None:
    model, tokenizer = load(source, template="chatml")
    items = list(read_general(GENERAL, answered=False))
    open_ones = [i for i, item in enumerate(items) if not item.held_out and (everything or not item.answer)]
    answers: dict[int, str] = {}
    for start in range(0, len(open_ones), batch):
        part = open_ones[start : start + batch]
        prompts = [[{"role": "user", "content": items[i].question}] for i in part]
        answers |= dict(zip(part, generate(model, tokenizer, prompts, max_new_tokens=NEW_TOKENS)))
        print(f"{min(start + batch, len(open_ones))} of {len(open_ones)}", flush=True)
    rows = []
    for i, item in enumerate(items):
        row = {name: value for name, value in asdict(item).items() if value not in ("", ())}
        if i in answers:
            row["answer"] = answers[i].strip()
        rows.append(row)
    write_jsonl(GENERAL, rows)


if __name__ == "__main__":
    named = [argument for argument in sys.argv[1:] if not argument.startswith("--")]
    main(named[0] if named else "quickstart", "--all" in sys.argv)
