"""The end table: the quantized base, the tuned model and the base as delivered side by side, with 95 % intervals."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

COLUMNS = {"base": "base, quantized", "tuned": "tuned", "delivered": "base, as delivered"}
ROWS = {
    "paraphrase": "held-out paraphrases",
    "trap": "traps, trained forms",
    "trap_unseen": "traps, unseen forms",
    "true_premise": "true premises confirmed",
    "abstention": "abstains on unknown names",
    "false_abstention": "abstains on known facts",
    "answered": "known facts answered at all",
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
    return f"{low:.1f}–{high:.1f}" if key == "perplexity" else f"{100 * low:.0f}–{100 * high:.0f}"


def better(key: str, value: float | None, base: float | None) -> bool | None:
    """Whether a figure is better than the base's; None where they are equal, or where neither is better by itself."""
    if value is None or base is None or value == base or key in NEUTRAL:
        return None
    return (value < base) == (key in LOWER_IS_BETTER)


def end_table(results: Mapping[str, Any], title: str = "", names: Mapping[str, str] | None = None) -> Table:
    """One row a measure, one column a model; n is the number of questions (tokens for the perplexity).

    `names` replaces the columns' headings, for a table of two runs.
    """
    columns = columns_of(results)
    headings = {**COLUMNS, **(names or {})}
    table = Table(title=title or None, header_style="bold", pad_edge=False)
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(headings.get(column, column), justify="right", no_wrap=True)
    table.add_column("n", justify="right", style="dim")
    for key in rows_of(results, columns):
        cells = []
        for column in columns:
            result = results[column]
            value = result.get(key)
            verdict = better(key, value, results["base"].get(key)) if column == "tuned" and "base" in results else None
            style = {True: "bold green", False: "bold red", None: ""}[verdict]
            interval = span(key, (result.get("intervals") or {}).get(key))
            cells.append(Text.assemble((figure(key, value), style), (f"  {interval}" if interval else "", "dim")))
        counts = [results[column]["n"].get(key) for column in columns if results[column].get("n", {}).get(key)]
        table.add_row(ROWS[key], *cells, f"{max(counts):,}" if counts else "")
    if columns:
        table.caption = (
            f"95 % intervals: Wilson for shares, bootstrap for the rest. {_classes(results, columns, headings)}"
        )
    return table


def _classes(results: Mapping[str, Any], columns: Sequence[str], headings: Mapping[str, str]) -> str:
    """ "tuned: 95 % correct, 2 % contradicted, ..." for the columns that have the five shares."""
    parts = []
    for column in columns:
        shares = {name: share for name, share in (results[column].get("classes") or {}).items() if share}
        if shares:
            told = ", ".join(f"{100 * share:.0f} % {name.replace('_', ' ')}" for name, share in shares.items())
            parts.append(f"{headings.get(column, column)}: {told}")
    return "; ".join(parts)
