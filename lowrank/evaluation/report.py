"""report.html: a run on one self-contained page, light and dark, from the files in its folder alone.

It reads config.yaml, versions.json, metrics.jsonl, timing.jsonl, samples.jsonl and results.json; what is missing is
left out. With `against`, a second run stands beside the first.
"""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from lowrank.evaluation.answers import CLASSES, TYPES
from lowrank.evaluation.charts import Point, curves, overfits, radar, smooth, stacked, strip
from lowrank.evaluation.page import STYLE, Page, html_table, p_value, settings_of
from lowrank.evaluation.plots import series
from lowrank.evaluation.table import ROWS, better, figure, rows_of, span
from lowrank.files import read_json, read_jsonl, write_text

CLASS_COLOURS = {
    "correct": "var(--good)",
    "contradicted": "var(--bad)",
    "unsupported": "var(--warn)",
    "abstained": "var(--calm)",
    "no_claim": "var(--none)",
}
SETTINGS = frozenset(
    {
        *("model", "quantize", "adapter.method", "adapter.rank", "adapter.alpha", "adapter.targets"),
        *("data.path", "data.subjects", "data.general_share", "data.general_loss"),
        *("train.lr", "train.steps", "train.epochs", "train.batch_size", "train.seed"),
    }
)
"""Shown at once; the others are folded away."""

RISKS = ("high", "medium", "low", "")
WORST, LISTED = 6, 40  # shown at once, and in all; the others are in samples.jsonl


def write_report(
    run_folder: str | Path,
    results: Mapping[str, Any] | None = None,
    against: str | Path | None = None,
    notice: str = "",
) -> Path:
    """Write report.html (report-NAME.html against another run) and give its path. `results` None: the folder's own."""
    folder = Path(run_folder)
    other = Path(against) if against is not None else None
    suffix = f"-{other.name}" if other is not None else ""
    if results is None:
        results = read_json(folder / f"results{suffix}.json")
    samples: dict[str, list[dict[str, Any]]] = {}
    if (path := folder / f"samples{suffix}.jsonl").is_file():
        for _, row in read_jsonl(path):
            samples.setdefault(str(row.get("column", "")), []).append(row)
    page = Page(folder, results, samples, other, notice or str(results.get("notice", "")))
    path = folder / f"report{suffix}.html"
    write_text(path, render(page))
    return path


def render(page: Page) -> str:
    parts = [
        ("Before and after", _table),
        ("What kind of answers", _classes),
        ("What was trained on what", _trained),
        ("Curves", _curves),
        ("The worst answers, with the evidence", _worst),
        ("Forgetting", _forgetting),
        ("Cost", _cost),
    ]
    sections = "".join(
        f"<section><h2>{escape(title)}</h2>{body}</section>" for title, make in parts if (body := make(page))
    )
    title = page.folder.name if page.other is None else f"{page.folder.name} and {page.other.name}"
    notice = f"<p>{escape(page.notice)}</p>" if page.notice else ""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>"
        f'<h1>{escape(title)}</h1><p class="muted">{_headline(page)}</p>{_cards(page)}{sections}'
        f"<footer>{notice}<p>Shares with Wilson's 95 % intervals, other figures with a bootstrap over questions or"
        " stretches of text. How an answer is judged is written in docs/truth.md.</p></footer></main></body></html>\n"
    )


# --- the sections -----------------------------------------------------------------------------------------------------


def _headline(page: Page) -> str:
    main, before = page.main, page.before
    if not main:
        return "No evaluation yet."
    rate, base = page.results[main].get("hallucination"), page.results.get(before, {}).get("hallucination")
    if rate is None or base is None:
        return escape(page.name(main))
    verb = "Makes up less" if rate < base else "Makes up more" if rate > base else "Makes up as much"
    return escape(
        f"{verb}: {figure('hallucination', rate)} of the answers of {page.name(main)} state something that the"
        f" knowledge base contradicts or does not have, against {figure('hallucination', base)} of {page.name(before)}."
    )


def _cards(page: Page) -> str:
    cards = []
    for key in ("hallucination", "trap_unseen", "paraphrase", "exact", "perplexity"):
        value = page.results.get(page.main, {}).get(key)
        if value is None:
            continue
        base = page.results.get(page.before, {}).get(key)
        was = f"{page.name(page.before)}: {figure(key, base)}" if base is not None else ""
        told = f"<span>{escape(ROWS[key])}</span><b>{figure(key, value)}</b><span>{escape(was)}</span>"
        cards.append(f'<div class="card">{told}</div>')
    return f'<div class="cards">{"".join(cards)}</div>' if cards else ""


def _table(page: Page) -> str:
    columns = page.columns
    keys = rows_of(page.results, columns)
    if not keys:
        return ""
    comparison = page.results.get("comparison", {})
    heads = [("", "")] + [(page.name(c), "n") for c in columns] + [("n", "n"), ("0 to 100 %", ""), ("p", "n")]
    body = []
    for key in keys:
        cells = [f"<td>{escape(ROWS[key])}</td>"]
        for column in columns:
            result = page.results[column]
            value = result.get(key)
            verdict = better(key, value, page.results.get(page.before, {}).get(key)) if column == page.main else None
            style = {True: "up", False: "down", None: ""}[verdict]
            interval = span(key, result.get("intervals", {}).get(key))
            cells.append(
                f'<td class="n"><span class="{style}">{figure(key, value)}</span><small>{interval}</small></td>'
            )
        counts = [page.results[c].get("n", {}).get(key, 0) for c in columns]
        cells.append(f'<td class="n">{max(counts):,}</td>')
        shown = [
            (page.name(c), page.results[c][key], page.results[c].get("intervals", {}).get(key), page.colour(c))
            for c in columns
            if key != "perplexity" and page.results[c].get(key) is not None
        ]
        cells.append(f"<td>{strip(shown) if shown else ''}</td>")
        p = comparison.get(key, {}).get("p")
        cells.append(f'<td class="n">{p_value(p) if p is not None else ""}</td>')
        body.append(f"<tr>{''.join(cells)}</tr>")
    keys_of = "".join(
        f'<span><i style="background:{page.colour(c)}"></i>{escape(page.name(c))}</span>' for c in columns
    )
    told = (
        f'<p class="legend">{keys_of}</p><p class="muted">The small figures are 95 % intervals; p is McNemar\'s exact'
        f" test of {escape(page.name(page.main))} against {escape(page.name(page.before))} on the same questions.</p>"
    )
    return html_table(heads, body) + told


def _classes(page: Page) -> str:
    rows = {page.name(c): page.results[c].get("classes") or {} for c in page.columns}
    rows = {
        name: {key: share for key in CLASSES if (share := shares.get(key))}
        for name, shares in rows.items()
        if any(shares.values())
    }
    if not rows:
        return ""
    chart = stacked(rows, {key: CLASS_COLOURS[key] for key in CLASSES})
    return (
        chart.replace("no_claim", "no claim")
        + f'<div class="two"><div>{_by_type(page)}</div><div>{_by_risk(page)}{_by_trap(page)}</div></div>'
    )


def _by_type(page: Page) -> str:
    columns = [c for c in page.columns if page.results[c].get("bad_by_type")]
    heads = [("bad answers by type", "")] + [(page.name(c), "n") for c in columns]
    body = [
        f"<tr><td>{escape(kind)}</td>"
        + "".join(f'<td class="n">{page.results[c]["bad_by_type"].get(kind, 0)}</td>' for c in columns)
        + "</tr>"
        for kind in TYPES
    ]
    return html_table(heads, body) if columns else ""


def _by_risk(page: Page) -> str:
    return _grouped(page, "by_risk", "hallucinated, by the fact's risk", "bad", RISKS)


def _by_trap(page: Page) -> str:
    return _grouped(page, "by_trap", "traps passed, by what is false", "right")


def _grouped(page: Page, key: str, title: str, count: str, order: Sequence[str] = ()) -> str:
    """Counts by group, "3 of 40" a column."""
    columns = [c for c in page.columns if page.results[c].get(key)]
    groups = order or sorted({group for c in columns for group in page.results[c][key]})
    body = []
    for group in groups:
        found = [page.results[c][key].get(group) for c in columns]
        if any(found):
            cells = "".join(f'<td class="n">{g[count]} of {g["n"]}</td>' if g else "<td></td>" for g in found)
            body.append(f"<tr><td>{escape(group)}</td>{cells}</tr>")
    return html_table([(title, "")] + [(page.name(c), "n") for c in columns], body) if body else ""


def _trained(page: Page) -> str:
    configs = [settings_of(folder) for folder in page.folders]
    if not any(configs):
        return ""
    keys = list(dict.fromkeys(key for config in configs for key in config))
    heads = [("setting", "")] + [(folder.name, "") for folder in page.folders]
    rows: dict[bool, list[str]] = {True: [], False: []}
    for key in keys:
        values = [config.get(key, "") for config in configs]
        differ = len(set(values)) > 1
        style = ' class="up"' if differ else ""
        cells = "".join(f"<td><span{style}>{escape(value)}</span></td>" for value in values)
        rows[differ or key in SETTINGS].append(f"<tr><td>{escape(key)}</td>{cells}</tr>")
    told = html_table(heads, rows[True]) if rows[True] else ""
    rest = f"<details><summary>all settings</summary>{html_table(heads, rows[False])}</details>" if rows[False] else ""
    return told + rest


def _curves(page: Page) -> str:
    two = page.other is not None
    lines: dict[str, tuple[Sequence[Point], str]] = {}
    faint: dict[str, tuple[Sequence[Point], str]] = {}
    rates: dict[str, tuple[Sequence[Point], str]] = {}
    mark, note, remarks = None, "", []
    for folder, colour, colour2 in zip(
        page.folders, ("var(--tuned)", "var(--base)"), ("var(--validation)", "var(--delivered)")
    ):
        loss, validation = series(folder, "loss"), series(folder, "eval_loss")
        who = f"{folder.name}, " if two else ""
        if len(loss) > 1:
            faint[folder.name] = (loss, colour)
            lines[f"{who}training (smoothed)"] = (smooth(loss, 0.9), colour)
            rates[folder.name] = (series(folder, "lr"), colour)
        if validation:
            lines[f"{who}validation"] = (validation, colour2)
            best = min(validation, key=lambda point: point[1])
            remarks.append(f"{who}best validation loss {best[1]:.4g} at step {best[0]:g}, last {validation[-1][1]:.4g}")
            if (risen := overfits(validation)) is not None:
                mark, note = risen, "validation rises: over-fitting"
    if not lines:
        return ""
    told = f'<p class="muted">{escape("; ".join(remarks))}.</p>' if remarks else ""
    loss_chart = curves(lines, "loss over steps", mark, note, faint)
    rate_chart = (
        curves(rates, "learning rate over steps", height=200) if any(len(r) > 1 for r, _ in rates.values()) else ""
    )
    return f"<h3>Loss</h3>{loss_chart}{told}" + (f"<h3>Learning rate</h3>{rate_chart}" if rate_chart else "")


def _worst(page: Page) -> str:
    """The answers that would do most harm first: high risk, contradicted, then unsupported, then merely wrong."""
    before = {(row.get("part"), row.get("id") or row["question"]): row for row in page.samples.get(page.before, ())}
    columns = [page.main] if page.other is None else [page.main, page.before]
    rows = [
        (column, row)
        for column in columns
        for row in page.samples.get(column, ())
        if row.get("answer_class") and not row["right"]
    ]
    if not any(page.samples.get(column) for column in columns):
        return ""
    if not rows:
        return "<p>Every judged answer is right.</p>"

    def harm(item: tuple[str, dict[str, Any]]) -> tuple[int, int]:
        row = item[1]
        order = ("contradicted", "unsupported", "no_claim", "abstained", "correct")
        return order.index(row["answer_class"]), RISKS.index(row.get("risk", "")) if row.get("risk", "") in RISKS else 3

    rows.sort(key=harm)
    articles = []
    for column, row in rows[:LISTED]:
        kind = row["answer_class"]
        style = {"contradicted": "", "unsupported": "unsupported"}.get(kind, "other")
        tags = [page.name(column)] if page.other is not None else []
        tags += [row.get("type") or kind.replace("_", " "), row.get("part", "").replace("_", " ")]
        tags += [f"{row['risk']} risk"] if row.get("risk") else []
        entries = [
            ("question", row["question"]),
            ("answer", row.get("answer") or "(nothing)"),
            ("expected", row.get("expected", "")),
        ]
        entries += [("evidence", row.get("evidence", "")), ("why", row.get("reason", ""))]
        first = before.get((row.get("part"), row.get("id") or row["question"])) if page.other is None else None
        if first is not None:
            entries.append((page.name(page.before), first.get("answer") or "(nothing)"))
        told = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in entries if text)
        labels = " ".join(f'<span class="tag">{escape(tag)}</span>' for tag in tags)
        articles.append(f'<article class="{style}">{labels}<dl>{told}</dl></article>')
    shown, rest = (f'<div class="worst">{"".join(part)}</div>' for part in (articles[:WORST], articles[WORST:]))
    told = f'<p class="muted">{len(rows)} answers are not right; those that would do most harm come first.</p>'
    more = f"<details><summary>{len(articles) - WORST} more</summary>{rest}</details>" if articles[WORST:] else ""
    return told + shown + more


def _forgetting(page: Page) -> str:
    columns = [c for c in page.columns if page.results[c].get("by_area")]
    if not columns:
        return ""
    areas = list(dict.fromkeys(area for c in columns for area in page.results[c]["by_area"]))
    shares = {c: [page.results[c]["by_area"].get(area, {}).get("share") or 0.0 for area in areas] for c in columns}
    drawn = sorted(columns, key=lambda c: c == page.main)  # the model that the report is about on top
    chart = radar(areas, {page.name(c): (shares[c], page.colour(c)) for c in drawn})
    retention = page.results.get("comparison", {}).get("retention", {})
    heads = [("general questions", "")] + [(page.name(c), "n") for c in columns] + [("n", "n"), ("kept", "n")]
    body = []
    for i, area in enumerate(areas):
        cells = "".join(f'<td class="n">{100 * shares[c][i]:.0f} %</td>' for c in columns)
        n = max(page.results[c]["by_area"].get(area, {}).get("n", 0) for c in columns)
        body.append(f'<tr><td>{escape(area)}</td>{cells}<td class="n">{n}</td>{_kept(retention.get(area))}</tr>')
    cells = "".join(f'<td class="n">{figure("general", page.results[c].get("general"))}</td>' for c in columns)
    total = max(page.results[c].get("n", {}).get("general", 0) for c in columns)
    body.append(f'<tr><td>all</td>{cells}<td class="n">{total}</td>{_kept(retention.get("all"))}</tr>')
    main, before = escape(page.name(page.main)), escape(page.name(page.before))
    told = f'<p class="muted">kept: right answers of {main} for each right answer of {before}.</p>'
    return f'<div class="two"><div>{chart}</div><div>{html_table(heads, body)}{told}</div></div>'


def _kept(share: float | None) -> str:
    return f'<td class="n">{share:.2f}</td>' if share is not None else '<td class="n">–</td>'


def _cost(page: Page) -> str:
    heads = [("phase", "")] + [(folder.name, "n") for folder in page.folders]
    phases: dict[str, dict[Path, float]] = {}
    memory: dict[Path, float] = {}
    for folder in page.folders:
        if (path := folder / "timing.jsonl").is_file():
            for _, row in read_jsonl(path):
                phase = phases.setdefault(str(row["phase"]), {})
                phase[folder] = phase.get(folder, 0.0) + float(row["seconds"])
                memory[folder] = max(memory.get(folder, 0.0), float(row.get("peak_memory_mb") or 0.0))
    if not phases:
        return ""

    tokens = {f: max((n for _, n in series(f, "tokens")), default=0.0) for f in page.folders}  # a running total
    speed = {f: sorted(n for _, n in series(f, "tokens_per_s")) for f in page.folders}
    told = {name: {f: f"{s:,.1f} s" for f, s in seconds.items()} for name, seconds in phases.items()}
    told["all phases"] = {f: f"{sum(s.get(f, 0.0) for s in phases.values()):,.1f} s" for f in page.folders}
    told["peak memory"] = {f: f"{mb:,.0f} MB" for f, mb in memory.items()}
    told["training tokens"] = {f: f"{n:,.0f}" for f, n in tokens.items() if n}
    told["median speed"] = {f: f"{n[len(n) // 2]:,.0f} tokens/s" for f, n in speed.items() if n}
    body = []
    for name, values in told.items():
        if values:
            cells = "".join(f'<td class="n">{values.get(f, "")}</td>' for f in page.folders)
            body.append(f"<tr><td>{escape(name)}</td>{cells}</tr>")
    return html_table(heads, body)
