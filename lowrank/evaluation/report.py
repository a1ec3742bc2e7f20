"""report.html: a run on one self-contained page, light and dark, from the files in its folder alone.

It reads config.yaml, versions.json, metrics.jsonl, timing.jsonl, samples.jsonl and results.json; what is missing is
left out. With `against`, a second run stands beside the first.
"""

from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from lowrank.evaluation.answers import CLASSES, TYPES, WORST_FIRST
from lowrank.evaluation.charts import Line, curves, legend, overfits, radar, smooth, stacked, strip
from lowrank.evaluation.page import STYLE, Page, html_table, number, p_value, row, settings_of
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
        f"<title>{escape(title)}</title><style>{STYLE.read_text(encoding='utf-8')}</style></head><body><main>"
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
    columns, comparison = page.columns, page.results.get("comparison", {})
    keys = rows_of(page.results, columns)
    if not keys:
        return ""
    body = []
    for key in keys:
        cells, shown = [], []
        for column in columns:
            result = page.results[column]
            value, interval = result.get(key), result.get("intervals", {}).get(key)
            verdict = better(key, value, page.results.get(page.before, {}).get(key)) if column == page.main else None
            style = {True: "up", False: "down", None: ""}[verdict]
            cells.append(f'<span class="{style}">{figure(key, value)}</span><small>{span(key, interval)}</small>')
            if key != "perplexity" and value is not None:
                shown.append((page.name(column), value, interval, page.colour(column)))
        n = max(page.results[column].get("n", {}).get(key, 0) for column in columns)
        line = row(ROWS[key], [*cells, f"{n:,}"]).removesuffix("</tr>")
        p = comparison.get(key, {}).get("p")
        body.append(f"{line}<td>{strip(shown) if shown else ''}</td>{number('' if p is None else p_value(p))}</tr>")
    told = (
        f'<p class="muted">The small figures are 95 % intervals; p is McNemar\'s exact'
        f" test of {escape(page.name(page.main))} against {escape(page.name(page.before))} on the same questions.</p>"
    )
    heads = [*page.heads("", columns), ("n", "n"), ("0 to 100 %", ""), ("p", "n")]
    return html_table(heads, body) + legend({page.name(c): page.colour(c) for c in columns}) + told


def _classes(page: Page) -> str:
    shares = {page.name(c): page.results[c]["classes"] for c in page.having("classes")}
    rows = {name: {key: found[key] for key in CLASSES if found.get(key)} for name, found in shares.items()}
    rows = {name: found for name, found in rows.items() if found}
    if not rows:
        return ""
    chart = stacked(rows, CLASS_COLOURS).replace("no_claim", "no claim")
    by_type = _grouped(page, "bad_by_type", "bad answers by type", str, TYPES)
    by_risk = _grouped(page, "by_risk", "hallucinated, by the fact's risk", _share_of("bad"), RISKS)
    by_trap = _grouped(page, "by_trap", "traps passed, by what is false", _share_of("right"))
    return f'{chart}<div class="two"><div>{by_type}</div><div>{by_risk}{by_trap}</div></div>'


def _share_of(count: str) -> Callable[[Any], str]:
    return lambda group: f"{group[count]} of {group['n']}"


def _grouped(page: Page, key: str, title: str, told: Callable[[Any], str], order: Sequence[str] = ()) -> str:
    """A line a group, a column a model; groups that no model has are left out."""
    found = {column: page.results[column][key] for column in page.having(key)}
    groups = order or sorted({group for by_group in found.values() for group in by_group})
    there = [group for group in groups if any(group in by_group for by_group in found.values())]
    body = [row(g, (told(by_group[g]) if g in by_group else "" for by_group in found.values())) for g in there]
    return html_table(page.heads(title, found), body) if body else ""


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
    lines: dict[str, Line] = {}
    faint: dict[str, Line] = {}
    rates: dict[str, Line] = {}
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
    parts = f"<h3>Loss</h3>{loss_chart}{told}"
    if any(len(rate) > 1 for rate, _ in rates.values()):
        parts += f"<h3>Learning rate</h3>{curves(rates, 'learning rate over steps', height=200)}"
    return parts


def _worst(page: Page) -> str:
    """The answers that would do most harm first: contradicted, then unsupported, then merely wrong; high risk first."""
    columns = [page.main] if page.other is None else [page.main, page.before]
    if not any(page.samples.get(column) for column in columns):
        return ""
    wrong = [
        (column, sample)
        for column in columns
        for sample in page.samples.get(column, ())
        if sample.get("answer_class") and not sample["right"]
    ]
    if not wrong:
        return "<p>Every judged answer is right.</p>"
    by_risk = {risk: place for place, risk in enumerate(RISKS)}
    wrong.sort(key=lambda w: (WORST_FIRST.index(w[1]["answer_class"]), by_risk.get(w[1].get("risk", ""), by_risk[""])))
    before = {_asked(sample): sample for sample in page.samples.get(page.before, ())} if page.other is None else {}
    articles = []
    for column, sample in wrong[:LISTED]:
        kind = sample["answer_class"]
        style = {"contradicted": "", "unsupported": "unsupported"}.get(kind, "other")
        tags = [page.name(column)] if page.other is not None else []
        tags += [sample.get("type") or kind.replace("_", " "), sample.get("part", "").replace("_", " ")]
        tags += [f"{sample['risk']} risk"] if sample.get("risk") else []
        entries = {"question": sample["question"], "answer": sample.get("answer") or "(nothing)"}
        entries |= {"expected": sample.get("expected"), "evidence": sample.get("evidence"), "why": sample.get("reason")}
        if first := before.get(_asked(sample)):
            entries[page.name(page.before)] = first.get("answer") or "(nothing)"
        told = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in entries.items() if text)
        labels = " ".join(f'<span class="tag">{escape(tag)}</span>' for tag in tags)
        articles.append(f'<article class="{style}">{labels}<dl>{told}</dl></article>')
    shown, rest = (f'<div class="worst">{"".join(part)}</div>' for part in (articles[:WORST], articles[WORST:]))
    told = f'<p class="muted">{len(wrong)} answers are not right; those that would do most harm come first.</p>'
    more = f"<details><summary>{len(articles) - WORST} more</summary>{rest}</details>" if articles[WORST:] else ""
    return told + shown + more


def _asked(sample: Mapping[str, Any]) -> tuple[Any, Any]:
    return sample.get("part"), sample.get("id") or sample["question"]


def _forgetting(page: Page) -> str:
    by_area = {column: page.results[column]["by_area"] for column in page.having("by_area")}
    if not by_area:
        return ""
    areas = list(dict.fromkeys(area for found in by_area.values() for area in found))
    shares = {c: [found.get(area, {}).get("share") or 0.0 for area in areas] for c, found in by_area.items()}
    drawn = sorted(by_area, key=lambda c: c == page.main)  # the model that the report is about on top
    chart = radar(areas, {page.name(c): (shares[c], page.colour(c)) for c in drawn})
    retention = page.results.get("comparison", {}).get("retention", {})
    kept = {area: f"{share:.2f}" for area, share in retention.items() if share is not None}
    body = []
    for i, area in enumerate(areas):
        n = max(found.get(area, {}).get("n", 0) for found in by_area.values())
        body.append(row(area, [*(f"{100 * shares[c][i]:.0f} %" for c in by_area), n, kept.get(area, "–")]))
    total = max(page.results[c].get("n", {}).get("general", 0) for c in by_area)
    whole = (figure("general", page.results[c].get("general")) for c in by_area)
    body.append(row("all", [*whole, total, kept.get("all", "–")]))
    main, before = escape(page.name(page.main)), escape(page.name(page.before))
    told = f'<p class="muted">kept: right answers of {main} for each right answer of {before}.</p>'
    table = html_table([*page.heads("general questions", by_area), ("n", "n"), ("kept", "n")], body)
    return f'<div class="two"><div>{chart}</div><div>{table}{told}</div></div>'


def _cost(page: Page) -> str:
    heads = [("phase", "")] + [(folder.name, "n") for folder in page.folders]
    phases: dict[str, dict[Path, float]] = {}
    memory: dict[Path, float] = {}
    for folder in page.folders:
        path = folder / "timing.jsonl"
        for _, timed in read_jsonl(path) if path.is_file() else ():
            phase = phases.setdefault(str(timed["phase"]), {})
            phase[folder] = phase.get(folder, 0.0) + float(timed["seconds"])
            memory[folder] = max(memory.get(folder, 0.0), float(timed.get("peak_memory_mb") or 0.0))
    if not phases:
        return ""
    tokens = {f: max((n for _, n in series(f, "tokens")), default=0.0) for f in page.folders}  # a running total
    speed = {f: sorted(n for _, n in series(f, "tokens_per_s")) for f in page.folders}
    told = {name: {f: f"{s:,.1f} s" for f, s in seconds.items()} for name, seconds in phases.items()}
    told["all phases"] = {f: f"{sum(s.get(f, 0.0) for s in phases.values()):,.1f} s" for f in page.folders}
    told["peak memory"] = {f: f"{mb:,.0f} MB" for f, mb in memory.items()}
    told["training tokens"] = {f: f"{n:,.0f}" for f, n in tokens.items() if n}
    told["median speed"] = {f: f"{n[len(n) // 2]:,.0f} tokens/s" for f, n in speed.items() if n}
    body = [row(name, (values.get(f, "") for f in page.folders)) for name, values in told.items() if values]
    return html_table(heads, body)
