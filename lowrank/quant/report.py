"""What quantization does to a model's weights: measured errors beside the proven bound and the expected value.

report = measure(named_weights, ["nf4-dq", "int8"], perplexity=lambda format: ...)
print(report.text()); report.plot("errors.png")
"""

import importlib.util
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import fill
from typing import Any

import torch
from torch import Tensor

from lowrank.quant import bounds
from lowrank.quant.formats import NAMES, parse_format
from lowrank.quant.tensor import QuantizedTensor

OUTLIER_CHANCE = 1e-6
"""A block is an outlier where normal weights would give an absmax like its own with less than this chance."""


@dataclass(frozen=True)
class Row:
    """One weight in one format. Errors are of fp32 values, absolute."""

    name: str
    shape: tuple[int, ...]
    format: str
    bits: float
    rms_weight: float
    max_error: float
    max_bound: float
    """The largest value of the proven bound over the elements."""
    above_bound: int
    """Elements whose error exceeds their bound: 0, or something is broken."""
    mean_error: float
    rms_error: float
    expected_rms: float
    """For normal weights of this size, without double quantization."""
    outlier_blocks: int
    blocks: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass
class QuantReport:
    """All rows, the perplexities, and what is to be said about the source."""

    block_size: int
    formats: tuple[str, ...]
    rows: list[Row] = field(default_factory=list)
    perplexity: dict[str, float] = field(default_factory=dict)
    """By format; "as loaded" is the unquantized model."""
    four_bit_source: list[str] = field(default_factory=list)
    """Weights that hold at most 16 different values in every block of 32."""

    def of(self, format: str) -> list[Row]:
        return [row for row in self.rows if row.format == format]

    def total(self, format: str) -> Row:
        """One row for all weights: largest errors, means over all elements."""
        rows = self.of(format)
        n = sum(row.numel for row in rows)

        def mean(name: str, power: int = 1) -> float:
            return (sum(getattr(row, name) ** power * row.numel for row in rows) / n) ** (1 / power)  # type: ignore[no-any-return]

        values: dict[str, Any] = {name: mean(name) for name in ("bits", "mean_error")}
        values |= {name: mean(name, 2) for name in ("rms_weight", "rms_error", "expected_rms")}
        values |= {name: max(getattr(row, name) for row in rows) for name in ("max_error", "max_bound")}
        values |= {
            name: sum(getattr(row, name) for row in rows) for name in ("above_bound", "outlier_blocks", "blocks")
        }
        return Row(name="all", shape=(n,), format=format, **values)

    def text(self, layers: bool = True) -> str:
        """The tables as plain text: all formats in total, then each layer in the first one."""
        lines = [self._source(), "", f"{len(self.of(self.formats[0]))} weights, blocks of {self.block_size}", ""]
        lines += [_head("format"), *(_line(format, self.total(format)) for format in self.formats)]
        if layers:
            lines += ["", f"each weight in {self.formats[0]}", "", _head("weight")]
            lines += [_line(row.name, row) for row in self.of(self.formats[0])]
        if self.perplexity:
            plain = self.perplexity.get("as loaded")
            lines += ["", "perplexity"]
            for name, value in self.perplexity.items():
                change = "" if plain is None or name == "as loaded" else f"  {100 * (value / plain - 1):+6.1f} %"
                lines.append(f"  {name:12} {value:9.3f}{change}")
        lines += ["", *textbook()]
        return "\n".join(lines)

    def _source(self) -> str:
        if not self.four_bit_source:
            return "source: full precision"
        n = len(self.four_bit_source)
        return fill(
            f"source is already 4-bit: {n} of {len(self.of(self.formats[0]))} weights hold at most 16 values in every "
            "block of 32. Affine int4 at block 32 can store them as they are and every other format rounds a second "
            "time, so these figures say nothing about which format is better for full-precision weights.",
            width=110,
        )

    def plot(self, path: str | Path) -> bool:
        """Relative RMS error of each weight, measured and expected, as a picture. False without matplotlib."""
        if importlib.util.find_spec("matplotlib") is None:
            return False
        from matplotlib.figure import Figure

        panels = [group for eight in (False, True) if (group := [f for f in self.formats if (f == "int8") == eight])]
        figure = Figure(figsize=(10, 3 + 2 * len(panels)), layout="constrained")
        heights = [3 if len(group) > 1 else 2 for group in panels]
        grid = figure.subplots(len(panels), sharex=True, squeeze=False, height_ratios=heights)
        for axes, group in zip(grid[:, 0], panels):  # 8 bits have a scale of their own: the error is a fifteenth
            for format in group:
                rows, color = self.of(format), f"C{self.formats.index(format)}"
                wide = {"linewidth": 5, "alpha": 0.35} if format.endswith("-dq") else {"marker": ".", "linewidth": 1}
                axes.plot([100 * r.rms_error / (r.rms_weight or 1) for r in rows], color=color, label=format, **wide)
                axes.plot([100 * r.expected_rms / (r.rms_weight or 1) for r in rows], ":", color=color)
            axes.set_ylabel("RMS error, % of RMS weight")
            axes.grid(alpha=0.3)
        axes.set_xlabel("weight, in the model's order")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.plot([], [], ":", color="gray", label="expected for\nnormal weights")
        source = "; the source is already 4-bit" if self.four_bit_source else ""
        figure.suptitle(f"Rounding error of each weight, blocks of {self.block_size}{source}")
        figure.legend(loc="outside right upper")
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
        return True


def measure(
    weights: Iterable[tuple[str, Tensor]],
    formats: Sequence[str] = ("nf4-dq", "nf4", "fp4", "int4", "int4-affine", "int8"),
    block_size: int = 64,
    perplexity: Callable[[str | None], float] | None = None,
    on_progress: Callable[[str], None] | None = None,
) -> QuantReport:
    """Quantize each named weight to each format and compare; `weights` may stream, one is held at a time.

    `perplexity(format)` loads and evaluates the model in a format, None as it is; it is called once for each.
    """
    if not formats:
        raise ValueError(f"a report needs at least one format; known: {', '.join(NAMES)}")
    for format in formats:
        parse_format(format)
    report = QuantReport(block_size, tuple(formats))
    for name, w in weights:
        if on_progress is not None:
            on_progress(name)
        if not w.numel():
            continue
        w = w.detach()
        if is_four_bit(w):
            report.four_bit_source.append(name)
        report.rows += [measure_one(name, w, format, block_size) for format in formats]
    if not report.rows:
        raise ValueError("there is no weight to report on")
    if perplexity is not None:
        report.perplexity["as loaded"] = perplexity(None)
        for format in formats:
            report.perplexity[format] = perplexity(format)
    return report


def measure_one(name: str, w: Tensor, format: str, block_size: int = 64) -> Row:
    """Errors of one weight in one format, computed in fp32 as the bound allows for."""
    base, double = parse_format(format)
    q = QuantizedTensor.quantize(w, base, block_size, double, name=name)
    bound = bounds.elementwise(q)
    error = (q.dequantize(torch.float32) - w.float()).abs()
    rms = w.double().square().mean().sqrt().item()
    blocks = w.reshape(-1)[: w.numel() // block_size * block_size].view(-1, block_size).float().abs().amax(dim=1)
    return Row(
        name=name,
        shape=tuple(w.shape),
        format=format,
        bits=q.bits_per_weight,
        rms_weight=rms,
        max_error=error.max().item(),
        max_bound=bound.max().item(),
        above_bound=int((error > bound).sum()),
        mean_error=error.double().mean().item(),
        rms_error=error.double().square().mean().sqrt().item(),
        expected_rms=rms * math.sqrt(bounds.expected_mse(base, block_size)),
        outlier_blocks=int((blocks > rms * bounds.unlikely_absmax(block_size, OUTLIER_CHANCE)).sum()),
        blocks=-(-w.numel() // block_size),
    )


def is_four_bit(w: Tensor, sample: int = 4096) -> bool:
    """Whether every block of 32 values, of up to `sample` looked at, holds at most 16 different ones."""
    blocks = w.numel() // 32
    if not blocks:
        return False
    rows = w.reshape(-1)[: blocks * 32].view(-1, 32)[:: max(1, blocks // sample)].float().sort(dim=1).values
    return bool(((rows.diff(dim=1) != 0).sum(dim=1) < 16).all() and (rows[:, 0] != rows[:, -1]).any())


def textbook() -> list[str]:
    """The usual exercise, answered: mean squared error of 16 values on N(0, 1), in theory and measured."""
    w = torch.randn(2**20, generator=torch.Generator().manual_seed(0))
    lines = ["16 values for N(0, 1): mean squared error  theory  measured   NF4 is better by"]
    nf4 = bounds.expected_mse("nf4", 64)
    cells = (torch.arange(16) + 0.5) * 6 / 16 - 3
    ends = torch.linspace(-3, 3, 16)
    entries: list[tuple[str, float, Tensor]] = [
        (f"{format}, block 64", bounds.expected_mse(format, 64), QuantizedTensor.quantize(w, format).dequantize())
        for format in ("nf4", "int4", "int4-affine")
    ]
    for name, values in (("16 cells over +-3 sigma, midpoints", cells), ("16 cells over +-3 sigma, end points", ends)):
        nearest = values[torch.bucketize(w, (values[:-1] + values[1:]) / 2)]
        entries.append((name, bounds.codebook_mse(values), nearest))
    for name, theory, got in entries:
        better = "" if name.startswith("nf4") else f"{100 * (1 - nf4 / theory):8.0f} %"
        lines.append(f"  {name:40} {theory:7.4f}   {(got - w).double().square().mean():7.4f}  {better}")
    return lines


def _head(first: str) -> str:
    names = ("RMS error", "expected", "mean", "max", "bound")
    return f"{first:44} {'bits':>6} {' '.join(f'{name:>10}' for name in names)} {'above':>6} {'outlier blocks':>16}"


def _line(name: str, row: Row) -> str:
    name = name if len(name) <= 44 else "…" + name[-43:]
    errors = (row.rms_error, row.expected_rms, row.mean_error, row.max_error, row.max_bound)
    outliers = f"{row.outlier_blocks} of {row.blocks}"
    return f"{name:44} {row.bits:6.3f} {' '.join(f'{e:10.3e}' for e in errors)} {row.above_bound:6} {outliers:>16}"
