"""The report: one self-contained page, opened in a real browser in both themes where Chromium is installed."""

import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from lowrank.data.knowledge import Fact, Knowledge
from lowrank.data.records import Record
from lowrank.evaluation.charts import curves, overfits, radar, smooth, ticks
from lowrank.evaluation.report import write_report
from lowrank.evaluation.run import samples
from lowrank.evaluation.truth import Row, compare, summary, verdicts_of
from lowrank.files import write_json, write_jsonl, write_text

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
AREAS = ("language", "arithmetic", "geography", "advice", "code", "writing")


ROCKS = ("granite", "basalt", "gneiss", "slate", "trachyte", "sandstone")
BOOK = "Handbook of hill surveys"
HILLS = Knowledge(
    tuple(Fact(f"Hill {chr(65 + i)}", "height", str(300 + 37 * i), "m", risk="high", evidence=BOOK) for i in range(18))
    + tuple(
        Fact(f"Hill {chr(65 + i)}", "rock", ROCKS[i % 6], risk="medium" if i % 2 else "low", evidence=BOOK)
        for i in range(18)
    )
)


def questions() -> dict[str, list[Record]]:
    parts: dict[str, list[Record]] = {
        "paraphrase": [],
        "trap": [],
        "trap_unseen": [],
        "true_premise": [],
        "abstention": [],
        "general": [],
    }
    for i, fact in enumerate(HILLS.facts):
        said = f"The {fact.relation} of {fact.subject} is {fact.value} {fact.unit}".strip()
        about = {"subject": fact.subject, "relation": fact.relation, "value": fact.value, "unit": fact.unit}
        false = next(f for f in HILLS.facts[(i + 5) % 18 :] if f.relation == fact.relation and f.value != fact.value)
        about_trap = about | {"false_value": false.value, "false_unit": fact.unit, "trap": "value"}
        common: dict[str, Any] = {"evidence": fact.evidence}
        parts["paraphrase"].append(
            Record(f"p{i}", f"Name the {fact.relation} of {fact.subject}.", output=f"{said}.", facts=(about,), **common)
        )
        trap = Record(
            f"t{i}",
            f"Is {false.value} the {fact.relation} of {fact.subject}?",
            output=f"{said}, not {false.value}.",
            kind="trap",
            facts=(about_trap,),
            **common,
        )
        parts["trap" if i % 2 else "trap_unseen"].append(trap)
        parts["true_premise"].append(
            Record(f"c{i}", f"{said}, isn't it?", output=f"{said}, correct.", kind="confirm", facts=(about,), **common)
        )
    for i in range(12):
        unknown = {"subject": f"Mount Zz{i}", "relation": "height"}
        parts["abstention"].append(
            Record(
                f"u{i}",
                f"How high is Mount Zz{i}?",
                output=f"I do not know a hill called Mount Zz{i}.",
                kind="unanswerable",
                facts=(unknown,),
            )
        )
        spec = {"area": AREAS[i % 6], "accept": ["yes"]}
        parts["general"].append(Record(f"g{i}", f"General question {i}?", kind="general", facts=(spec,)))
    return parts


def answers(parts: dict[str, list[Record]], good: int) -> dict[str, list[str]]:
    """`good` of ten answers as intended, the others wrong in several ways."""
    wrong = [
        "It is 9 m.",
        "It is cheese <b>& ham</b>.",
        "I do not know.",
        "No.",
        "According to the Orlop Survey of 1911, 300 m.",
    ]
    told = {}
    for part, records in parts.items():
        intended = [record.output or "yes" for record in records]
        told[part] = [text if (i * 7) % 10 < good else wrong[i % 5] for i, text in enumerate(intended)]
    return told


def run_folder(path: Path, good: int, overfit: bool = True) -> dict[str, Any]:
    """A run's folder with everything that a report reads."""
    parts = questions()
    rows: dict[str, list[Row]] = {
        "base": verdicts_of(parts, answers(parts, 2), HILLS),
        "tuned": verdicts_of(parts, answers(parts, good), HILLS),
        "delivered": verdicts_of(parts, answers(parts, 3), HILLS),
    }
    results: dict[str, Any] = {column: summary(answered) for column, answered in rows.items()}
    for column, value in (("base", 28.53), ("tuned", 27.71), ("delivered", 23.35)):
        results[column]["perplexity"] = value
        results[column]["n"]["perplexity"] = 5120
        results[column]["intervals"]["perplexity"] = [value - 2, value + 2]
    results["comparison"] = compare(rows["base"], rows["tuned"])
    path.mkdir(parents=True)
    write_json(path / "results.json", results)
    write_jsonl(path / "samples.jsonl", samples(rows))
    metrics: list[dict[str, Any]] = []
    for step in range(200):
        loss = 0.3 + 2.4 * math.exp(-step / 40) + 0.08 * math.sin(step * 1.7)
        metrics.append(
            {
                "step": step,
                "loss": loss,
                "lr": 2e-3 * (1 + math.cos(math.pi * step / 200)) / 2,
                "grad_norm": 1.0,
                "tokens": 540 * (step + 1),
                "tokens_per_s": 410 + step % 7,
            }
        )
        if step % 20 == 0:
            risen = max(0, step - 100) / 400 if overfit else 0
            metrics.append({"step": step, "eval_loss": 0.5 + 1.9 * math.exp(-step / 35) + risen})
    write_jsonl(path / "metrics.jsonl", metrics)
    phases = (("load the quantized base", 2.1), ("train", 263.4), ("evaluate the tuned model", 41.0))
    write_jsonl(path / "timing.jsonl", [{"phase": p, "seconds": s, "peak_memory_mb": 1210} for p, s in phases])
    write_text(
        path / "config.yaml",
        "model: quickstart\nquantize: nf4-dq\nadapter:\n  method: lora\n  rank: 32\ntrain:\n  lr: 0.002\n",
    )
    write_json(path / "versions.json", {"python": "3.11", "torch": "2.13.0"})
    return results


class Tags(HTMLParser):
    """Counts tags, collects text, and complains about what is not closed in order."""

    VOID = frozenset({"meta", "br", "img", "line", "rect", "circle", "polyline", "polygon"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.seen: dict[str, int] = {}

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.seen[tag] = self.seen.get(tag, 0) + 1
        if tag not in self.VOID or tag in ("rect", "circle", "line", "polyline", "polygon"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.seen[tag] = self.seen.get(tag, 0) + 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.text += data


def read(path: Path) -> Tags:
    tags = Tags()
    tags.feed(path.read_text(encoding="utf-8"))
    assert not tags.open
    return tags


def test_report_is_one_self_contained_page_with_every_section(tmp_path: Path) -> None:
    run_folder(tmp_path / "run-001", good=7)
    path = write_report(tmp_path / "run-001")
    assert path == tmp_path / "run-001" / "report.html"
    page, source = read(path), path.read_text(encoding="utf-8")
    for title in ("Before and after", "What was trained on what", "Curves", "The worst answers", "Forgetting", "Cost"):
        assert title in page.text, title
    assert not re.search(r"(?:src|href)=|https?://|<script|@import|url\(", source), (
        "something is fetched from elsewhere"
    )
    assert "prefers-color-scheme:dark" in source.replace(" ", "")
    assert "over-fitting" in page.text
    assert "Makes up less" in page.text and "traps passed, by what is false" in page.text
    assert "Handbook of hill surveys" in page.text  # the evidence beside the worst answers
    assert page.seen["svg"] > 12 and "cheese <b>& ham</b>" in page.text  # escaped, so it is text
    assert "28.53" in page.text and "263.4 s" in page.text and "1,210 MB" in page.text and "108,000" in page.text


def test_report_of_two_runs_stands_side_by_side(tmp_path: Path) -> None:
    run_folder(tmp_path / "run-001", good=9)
    run_folder(tmp_path / "run-002", good=6, overfit=False)
    parts = questions()
    rows = {
        "tuned": verdicts_of(parts, answers(parts, 9), HILLS),
        "run-002": verdicts_of(parts, answers(parts, 6), HILLS),
    }
    results = {name: summary(answered) for name, answered in rows.items()}
    results |= {
        "comparison": compare(rows["tuned"], rows["run-002"]),
        "names": {"tuned": "run-001", "run-002": "run-002"},
    }
    write_jsonl(tmp_path / "run-001" / "samples-run-002.jsonl", samples(rows))
    path = write_report(tmp_path / "run-001", results, against=tmp_path / "run-002")
    assert path.name == "report-run-002.html"
    page = read(path)
    assert "run-001 and run-002" in page.text and "run-002, validation" in page.text


def test_report_of_little_leaves_out_what_is_missing(tmp_path: Path) -> None:
    records = [Record("1", "Who?", output="The Duke"), Record("2", "When?", output="Monday")]
    row = verdicts_of({"qa": records}, {"qa": ["the duke", "Sunday"]})
    write_json(tmp_path / "results.json", {"tuned": summary(row)})
    page = read(write_report(tmp_path))
    assert "exact match" in page.text and "50.0 %" in page.text
    for title in ("Curves", "Cost", "Forgetting", "worst answers", "nan", "None"):
        assert title not in page.text, title
    read(write_report(tmp_path, {}))


def test_report_against_names_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"results\.json"):
        write_report(tmp_path)


def test_overfitting_is_marked_only_where_validation_rises() -> None:
    falling = [(float(i), 2.0 - 0.1 * i) for i in range(8)]
    assert overfits(falling) is None
    assert overfits([*falling, (8.0, 1.31)]) is None  # within the margin of 2 %
    assert overfits([*falling, (8.0, 1.5)]) == falling[-1]
    assert overfits(falling[:1]) is None


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(0, 237, 6) == [0, 50, 100, 150, 200]
    assert ticks(3, 3) == [3]
    for low, high in ((0.013, 0.047), (-3, 9), (1e-4, 2e-3), (100, 100_000)):
        found = ticks(low, high)
        assert 3 <= len(found) <= 11 and low <= found[0] and found[-1] <= high


def test_smoothing_keeps_a_constant_and_the_first_value() -> None:
    assert smooth([(0, 2.0), (1, 2.0), (2, 2.0)], 0.9) == [(0, 2.0), (1, pytest.approx(2.0)), (2, pytest.approx(2.0))]
    assert smooth([(0, 5.0), (1, 1.0)], 0.9)[0] == (0, pytest.approx(5.0))


def test_charts_say_so_where_there_is_too_little() -> None:
    assert "Too few steps" in curves({"training": ([(0, 1.0)], "red")}, "loss")
    assert "at least three areas" in radar(["a", "b"], {"x": ([0.1, 0.2], "red")})
    assert "nan" not in curves({"training": ([(0, 1.0), (1, math.nan), (2, 0.5)], "red")}, "loss")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: on Debian, apt-get install chromium")
@pytest.mark.parametrize("width", [1100, 420])
def test_report_opens_in_a_browser_in_both_themes(tmp_path: Path, width: int) -> None:
    run_folder(tmp_path / "run-001", good=8)
    report = write_report(tmp_path / "run-001")
    probe = tmp_path / "probe.html"  # the report and a script that writes down what the layout came to
    script = (
        "<script>const d=document.documentElement,box=e=>e.getBoundingClientRect(),"
        "o=[...document.querySelectorAll('svg text')].filter(t=>box(t).left<box(t.closest('svg')).left-1"
        "||box(t).right>box(t.closest('svg')).right+1);"
        "d.setAttribute('data-probe',JSON.stringify({wide:d.scrollWidth-d.clientWidth,cut:o.map(t=>t.textContent),"
        "svg:document.querySelectorAll('svg').length,height:d.scrollHeight,"
        "page:getComputedStyle(document.body).backgroundColor}))</script>"
    )
    write_text(probe, report.read_text(encoding="utf-8").replace("</body>", script + "</body>"))
    pages = {}
    for theme, scheme in (("dark", 0), ("light", 1)):
        dom = chromium(
            f"--blink-settings=preferredColorScheme={scheme}", f"--window-size={width},900", "--dump-dom", str(probe)
        )
        found = re.search(r'data-probe="([^"]*)"', dom)
        assert found, dom[:400]
        probed = found[1].replace("&quot;", '"')
        assert '"wide":0' in probed, f"{theme}: the page scrolls sideways: {probed}"
        assert '"cut":[]' in probed, f"{theme}: text leaves its chart: {probed}"
        assert int(re.search(r'"height":(\d+)', probed)[1]) > 1500  # type: ignore[index]
        pages[theme] = re.search(r'"page":"rgb\((\d+)', probed)[1]  # type: ignore[index]
    assert int(pages["dark"]) < 60 < 200 < int(pages["light"])


def chromium(*arguments: str) -> str:
    assert CHROMIUM is not None
    command = [
        CHROMIUM,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--virtual-time-budget=2000",
    ]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=60, check=False)
    return done.stdout
