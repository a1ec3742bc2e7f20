"""What report.html is made of: the run it is about, its settings, tables."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from lowrank.evaluation.table import COLUMNS, columns_of
from lowrank.files import read_json

COLOURS = ("var(--tuned)", "var(--base)", "var(--delivered)")
STYLE = Path(__file__).with_name("report.css")


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

    def having(self, key: str) -> list[str]:
        """The columns whose results have something under this key."""
        return [column for column in self.columns if self.results[column].get(key)]

    def heads(self, title: str, columns: Iterable[str]) -> list[tuple[str, str]]:
        """A table's headings: the title, then one column of numbers a model."""
        return [(title, ""), *((self.name(column), "n") for column in columns)]

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


def row(name: str, cells: Iterable[object]) -> str:
    """A line of a table: its name, then cells of numbers (HTML) at the right of their columns."""
    return f"<tr><td>{escape(name)}</td>{''.join(map(number, cells))}</tr>"


def number(cell: object) -> str:
    return f'<td class="n">{cell}</td>'


def html_table(heads: Iterable[tuple[str, str]], body: Sequence[str]) -> str:
    head = "".join(f'<th class="{style}">{escape(text)}</th>' for text, style in heads)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def p_value(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else "&lt; 0.001"
