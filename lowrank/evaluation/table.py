"""The end table: the quantized base, the tuned model and the base as delivered side by side, with 95 % intervals."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from lowrank.evaluation.answers import CLASSES

COLUMNS = {"base": "quantized base", "tuned": "tuned", "delivered": "base as delivered"}
ROWS = {
    "paraphrase": "held-out paraphrases",
    "trap": "traps, trained forms",
    "trap_unseen": "traps, unseen forms",
    "true_premise": "true premises confirmed",
    "abstention": "abstains: unknown names",
    "false_abstention": "abstains: known facts",
    "answered": "known facts answered",
    "hallucination": "hallucination rate",
    "general": "general questions",
    "exact": "exact match",
    "f1": "token F1",
    "perplexity": "general perplexity",
}
LOWER_IS_BETTER = frozenset({"false_abstention", "hallucination", "perplexity"})
NEUTRAL = frozenset({"answered"})


def columns_of(results: Mapping[str, Any]) -> list[str]:
    """The columns there are, in the order of COLUMNS, then any other model's."""
    known = [name for name in COLUMNS if isinstance(results.get(name), Mapping)]
    others = [
        name for name, value in results.items() if isinstance(value, Mapping) and "n" in value and name not in known
    ]
    return [*known, *others]


def rows_of(results: Mapping[str, Any], columns: Sequence[str]) -> list[str]:
    """The rows that at least one column has a figure for."""
    return [key for key in ROWS if any(results[column].get(key) is not None for column in columns)]


def figure(key: str, value: float | None) -> str:
    """A share as a percentage, F1 and perplexity as numbers, nothing as a dash."""
    if value is None:
        return "–"
    return f"{value:.2f}" if key in ("perplexity", "f1") else f"{100 * value:.1f} %"


def span(key: str, interval: Sequence[float] | None) -> str:
    if interval is None:
        return ""
    low, high = interval
    if key == "perplexity":
        return f"{low:.0f}–{high:.0f}" if low >= 10 else f"{low:.1f}–{high:.1f}"
    return f"{100 * low:.0f}–{100 * high:.0f}"


def better(key: str, value: float | None, base: float | None) -> bool | None:
    """Whether a figure is better than the base's; None where they are equal, or where neither is better by itself."""
    if value is None or base is None or value == base or key in NEUTRAL:
        return None
    return (value < base) == (key in LOWER_IS_BETTER)


def end_table(results: Mapping[str, Any]) -> Table:
    """One row a measure, one column a model; n is the number of questions (tokens for the perplexity); then the five
    shares of the judged answers.

    results["names"] replaces the columns' headings, for a table of two runs. It fits 80 characters.
    """
    columns = columns_of(results)
    headings = {**COLUMNS, **results.get("names", {})}
    title = "What the model knows, what it makes up, what it forgot"
    table = Table(title=title, header_style="bold", box=box.HORIZONTALS, show_edge=False, padding=(0, 1, 0, 0))
    table.title_justify = table.caption_justify = "left"
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(headings.get(column, column), justify="right", min_width=14)
    table.add_column("n", justify="right", style="dim", no_wrap=True)
    keys = rows_of(results, columns)
    for key in keys:
        cells = []
        for column in columns:
            result = results[column]
            value = result.get(key)
            verdict = better(key, value, results["base"].get(key)) if column == "tuned" and "base" in results else None
            style = {True: "bold green", False: "bold red", None: ""}[verdict]
            interval = span(key, (result.get("intervals") or {}).get(key))
            cells.append(Text.assemble((figure(key, value), style), (f" {interval}" if interval else "", "dim")))
        table.add_row(ROWS[key], *cells, _count(results, columns, key), end_section=key == keys[-1])
    for name in CLASSES:
        shares = [(results[column].get("classes") or {}).get(name) for column in columns]
        if any(share is not None for share in shares):
            table.add_row(
                f"class: {name.replace('_', ' ')}",
                *(figure(name, share) for share in shares),
                _count(results, columns, "hallucination"),
                style="dim",
            )
    if keys:
        table.caption = "95 % intervals behind the figures: Wilson's for shares, bootstrap for the rest"
    return table


def _count(results: Mapping[str, Any], columns: Sequence[str], key: str) -> str:
    counts = [results[column].get("n", {}).get(key) or 0 for column in columns]
    return f"{max(counts):,}" if any(counts) else ""
