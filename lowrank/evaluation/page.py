"""What report.html is made of: the page's style, the run it is about, tables and settings."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from lowrank.evaluation.table import COLUMNS, columns_of
from lowrank.files import read_json

COLOURS = ("var(--tuned)", "var(--base)", "var(--delivered)")
STYLE = """
:root { color-scheme: light dark; --page: #f6f6f3; --surface: #fdfdfc; --ink: #16161a; --muted: #5d5f66;
  --grid: #dcdcd7; --line: #e4e4df; --on-mark: #fff;
  --tuned: #2a78d6; --base: #8a8d94; --delivered: #1a9a6c; --validation: #c4501c;
  --good: #1f8a4c; --bad: #c93a3a; --warn: #b9651f; --calm: #4f7fb5; --none: #7d8087; }
@media (prefers-color-scheme: dark) { :root { --page: #101114; --surface: #191b1f; --ink: #f1f1ee; --muted: #a9abb2;
  --grid: #33363d; --line: #2c2f35;
  --tuned: #5a9df0; --base: #9a9da5; --delivered: #3bbd8c; --validation: #ee8a55;
  --good: #2f9e5f; --bad: #d95555; --warn: #c4722f; --calm: #5b8fcb; --none: #6d7078; } }
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif }
main { max-width: 1040px; margin: 0 auto; padding: 32px 20px 64px }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 4px }
h2 { font-size: 19px; margin: 0 0 12px }
h3 { font-size: 15px; margin: 12px 0 4px; font-weight: 600 }
p { margin: 8px 0 }
section, .card { background: var(--surface); border: 1px solid var(--line); border-radius: 12px }
section { padding: 20px; margin-top: 20px }
.muted, footer { color: var(--muted) }
svg { max-width: 100%; height: auto; display: block }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 14px; margin-top: 20px }
.card { padding: 16px }
.card b { display: block; font-size: 30px; line-height: 1.2 }
.card span { color: var(--muted); font-size: 14px }
.wide { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-size: 14.5px }
th, td { text-align: left; padding: 7px 10px; border-bottom: 1px solid var(--line); vertical-align: top }
th { color: var(--muted); font-weight: 600 }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums }
td.n { white-space: nowrap }
td small { color: var(--muted); display: block }
.up { color: var(--good); font-weight: 600 }
.down { color: var(--bad); font-weight: 600 }
.legend { display: flex; flex-wrap: wrap; gap: 6px 18px; font-size: 14px; color: var(--muted); margin-top: 10px }
.legend i { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 7px }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 24px }
.tag { display: inline-block; border: 1px solid var(--line); border-radius: 99px; padding: 0 9px; font-size: 13px;
  color: var(--muted) }
.worst { display: grid; gap: 12px; margin-top: 12px }
summary { cursor: pointer; color: var(--muted); margin-top: 14px }
.worst article { border: 1px solid var(--line); border-left: 4px solid var(--bad); border-radius: 8px;
  padding: 12px 14px }
.worst article.unsupported { border-left-color: var(--warn) }
.worst article.other { border-left-color: var(--none) }
.worst dl { display: grid; grid-template-columns: 130px 1fr; gap: 4px 12px; margin: 8px 0 0 }
.worst dt { color: var(--muted) }
.worst dd { margin: 0; overflow-wrap: anywhere }
footer { margin-top: 24px; font-size: 14px }
@media (max-width: 560px) { .worst dl { grid-template-columns: 1fr } }
@media print { body { background: none } section, .card { break-inside: avoid } }
"""


@dataclass(frozen=True)
class Page:
    """What a report is made of: one run's files, and the second run's where there is one."""

    folder: Path
    results: Mapping[str, Any]
    samples: Mapping[str, list[dict[str, Any]]]
    """Column -> its answers."""
    other: Path | None
    notice: str

    @property
    def folders(self) -> list[Path]:
        return [self.folder] if self.other is None else [self.folder, self.other]

    @property
    def columns(self) -> list[str]:
        return columns_of(self.results)

    @property
    def main(self) -> str:
        """The model that the report is about."""
        return "tuned" if "tuned" in self.columns else self.columns[0] if self.columns else ""

    @property
    def before(self) -> str:
        """What it is compared with: the base, or else the other run's model; "" where it stands alone."""
        return "base" if "base" in self.columns else next((c for c in self.columns if c != self.main), "")

    def name(self, column: str) -> str:
        return {**COLUMNS, **self.results.get("names", {})}.get(column, column)

    def colour(self, column: str) -> str:
        order = [self.main, self.before, *(c for c in self.columns if c not in (self.main, self.before))]
        return COLOURS[min(order.index(column), len(COLOURS) - 1)]


def settings_of(folder: Path) -> dict[str, str]:
    """config.yaml as "group.key" -> value, what is not set left out; then the versions."""
    found: dict[str, str] = {}
    if (path := folder / "config.yaml").is_file():
        _flatten(OmegaConf.to_container(OmegaConf.create(path.read_text(encoding="utf-8"))), "", found)
    if (path := folder / "versions.json").is_file():
        found["versions"] = ", ".join(f"{name} {version}" for name, version in read_json(path).items())
    return found


def _flatten(value: Any, key: str, into: dict[str, str]) -> None:
    if isinstance(value, dict):
        for name, item in value.items():
            _flatten(item, f"{key}.{name}" if key else str(name), into)
    elif value not in (None, [], ""):
        into[key] = ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def html_table(heads: Iterable[tuple[str, str]], body: Sequence[str]) -> str:
    head = "".join(f'<th class="{style}">{escape(text)}</th>' for text, style in heads)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def p_value(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else "&lt; 0.001"
