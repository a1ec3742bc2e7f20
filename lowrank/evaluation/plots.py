"""plots/loss.png of a run, where matplotlib is installed (the [eval] extra); the report draws its own curves."""

from pathlib import Path
from typing import Any

from lowrank.evaluation.charts import Point, overfits, smooth
from lowrank.files import read_jsonl


def series(folder: str | Path, key: str) -> list[Point]:
    """(step, value) for each row of metrics.jsonl that has the value; nothing where there is no such file."""
    path = Path(folder) / "metrics.jsonl"
    if not path.is_file():
        return []
    rows: list[dict[str, Any]] = [row for _, row in read_jsonl(path)]
    return [(float(row["step"]), float(row[key])) for row in rows if "step" in row and row.get(key) is not None]


def plot_loss(folder: str | Path) -> Path | None:
    """Draw training and validation loss; None where matplotlib is not installed or nothing was logged."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    loss, validation = series(folder, "loss"), series(folder, "eval_loss")
    if not loss:
        return None
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(*zip(*loss), color="#2a78d6", alpha=0.3, linewidth=1)
    axes.plot(*zip(*smooth(loss, 0.9)), color="#2a78d6", linewidth=2, label="training")
    if validation:
        axes.plot(*zip(*validation), color="#c4501c", linewidth=2, marker="o", label="validation")
        if (best := overfits(validation)) is not None:
            axes.axvspan(best[0], max(x for x, _ in loss), color="#d03b3b", alpha=0.1, label="over-fitting")
    axes.set(xlabel="step", ylabel="loss", ylim=(0, None))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    path = Path(folder) / "plots" / "loss.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path
