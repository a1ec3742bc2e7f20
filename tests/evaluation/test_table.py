"""The end table says what was measured, how surely, and leaves nothing unmeasured standing as zero."""

from typing import Any

from rich.console import Console

from lowrank.evaluation.table import better, columns_of, end_table, figure, rows_of


def column(**figures: Any) -> dict[str, Any]:
    return {
        **figures,
        "n": dict.fromkeys(figures, 20) | {"perplexity": 5210},
        "intervals": {key: [0.5, 0.75] for key in figures} | {"perplexity": [20.1, 30.2]},
        "classes": {"correct": 0.9, "contradicted": 0.1, "unsupported": 0.0},
    }


RESULTS = {
    "tuned": column(paraphrase=0.95, hallucination=0.04, perplexity=27.5, trap=None),
    "base": column(paraphrase=0.05, hallucination=0.80, perplexity=28.53, trap=0.1),
    "metrics": {"steps": 3},
}


def text(table: Any, width: int = 160) -> str:
    console = Console(width=width, force_terminal=False)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_columns_and_rows_are_those_that_were_measured() -> None:
    assert columns_of(RESULTS) == ["base", "tuned"]
    assert rows_of(RESULTS, ["base", "tuned"]) == ["paraphrase", "trap", "hallucination", "perplexity"]


def test_the_table_shows_figures_intervals_and_counts() -> None:
    shown = text(end_table(RESULTS))
    assert "quantized base" in shown and "tuned" in shown and "as delivered" not in shown
    assert "95.0 % 50–75" in shown and "27.50 20–30" in shown and "5,210" in shown
    assert "–" in next(line for line in shown.splitlines() if "traps, trained" in line)
    assert "95 % intervals" in shown
    assert "90.0 %" in next(line for line in shown.splitlines() if "class: correct" in line)


def test_three_columns_fit_a_terminal_of_80() -> None:
    results = RESULTS | {"delivered": RESULTS["base"]}
    lines = text(end_table(results), width=80).splitlines()
    assert all(len(line) <= 80 for line in lines)
    row = next(line for line in lines if "general perplexity" in line)
    assert row.split()[-1] == "5,210" and "…" not in "".join(lines)


def test_better_knows_the_direction() -> None:
    assert better("paraphrase", 0.9, 0.1) is True
    assert better("hallucination", 0.9, 0.1) is False
    assert better("perplexity", 27.0, 28.0) is True
    assert better("answered", 0.9, 0.1) is None
    assert better("trap", None, 0.1) is None
    assert figure("trap", None) == "–" and figure("trap", 0.975) == "97.5 %"


def test_columns_of_other_runs_keep_their_names() -> None:
    results = {"tuned": RESULTS["tuned"], "run-002": column(paraphrase=0.9)}
    shown = text(end_table(results | {"names": {"tuned": "run-001"}}))
    assert "run-001" in shown and "run-002" in shown
