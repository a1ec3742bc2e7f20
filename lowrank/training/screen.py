"""What a person sees: the start screen, the progress line, and where to go on after Ctrl-C."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from lowrank.data.render import IGNORE, Example
from lowrank.targets import Coverage

console = Console(highlight=False, markup=False)
EVERY = 20  # steps


def start_screen(facts: dict[str, str], coverage: Coverage, sample: Example, decode: Any) -> Group:
    """One page: what is trained on what, which layers, how much, and the first sample with its mask."""
    left = Table.grid(padding=(0, 2))
    for key, value in facts.items():
        left.add_row(Text(key, style="bold"), value)
    table = Table(box=None, padding=(0, 2), header_style="bold")
    for heading, justify in (("target", "left"), ("layers", "right"), ("in -> out", "left"), ("path", "left")):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    for pattern, count, shapes, path in coverage.rows():
        table.add_row(pattern, str(count), shapes, path)
    share = 100 * coverage.trainable / max(coverage.total, 1)
    trained = f"{coverage.method}: {coverage.trainable:,} of {coverage.total:,} parameters train ({share:.2f} %)"
    panels: dict[str, RenderableType] = {
        "run": left,
        "adapter": Group(table, Text(trained)),
        "first sample (bold: what the model learns to write)": masked_text(sample, decode),
    }
    return Group(*(Panel(content, title=title, title_align="left") for title, content in panels.items()))


def masked_text(example: Example, decode: Any) -> Text:
    """The example's text, its target tokens in bold green; every token shown, special ones included."""
    text = Text()
    start = 0
    for learned, run in groupby(label != IGNORE or example.teacher is not None for label in example.labels):
        end = start + len(list(run))
        text.append(decode(example.input_ids[start:end], skip_special=False), style="bold green" if learned else "dim")
        start = end
    return text


@contextmanager
def progress_line(total: int) -> Iterator[Any]:
    """Gives a function that takes a step's row. A terminal gets one moving line, a file a line every EVERY steps."""

    def show(row: dict[str, Any]) -> None:
        if console.is_terminal:
            progress.update(task, completed=row["step"] + 1, description=step_text(row))
        elif row["step"] % EVERY == 0 or row["step"] + 1 == total or "eval_loss" in row:
            console.print(step_text(row))

    columns = BarColumn(bar_width=20), TextColumn("{task.description}", markup=False)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("the first step takes longest", total=total)
        yield show


def step_text(row: dict[str, Any]) -> str:
    parts = [
        f"step {row['step'] + 1}/{row['steps']}",
        f"loss {row['loss']:.3f}",
        f"lr {row['lr']:.2e}",
        f"norm {row['grad_norm']:.2f}",
        f"{row['tokens_per_s']:.0f} tok/s",
        f"{row['peak_memory_mb']:,.0f} MB",
        f"{clock(row['left_s'])} left",
    ]
    if "eval_loss" in row:
        parts.insert(2, f"validation {row['eval_loss']:.3f}")
    return " · ".join(parts)


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02d}"


@contextmanager
def counting(what: str, total: int) -> Iterator[Any]:
    """A short bar for evaluation; gives a function that takes how many are done. Silent where output is no terminal."""
    columns = TextColumn(what), BarColumn(bar_width=20), MofNCompleteColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done: progress.update(task, completed=done)
