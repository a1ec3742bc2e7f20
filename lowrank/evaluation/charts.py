"""The report's charts as inline SVG: no script, no other file, colours from the page's CSS variables.

Every mark has a <title>, which a browser shows as a tooltip and a screen reader reads out.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape

Point = tuple[float, float]
TEXT = 'font-size="12" style="fill:var(--muted)"'


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers (1, 2, 2.5 or 5 times a power of ten) that lie within low..high."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 10) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def short(value: float) -> str:
    """1500 -> 1.5k, 0.000123 -> 1.2e-4, 0.50 -> 0.5"""
    if value != 0 and abs(value) < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{value:g}"


def smooth(points: Sequence[Point], weight: float) -> list[Point]:
    """An exponential moving average with the start corrected, so that the first value stands as it is."""
    out: list[Point] = []
    mean = total = 0.0
    for x, y in points:
        mean, total = weight * mean + (1 - weight) * y, weight * total + (1 - weight)
        out.append((x, mean / total))
    return out


def overfits(validation: Sequence[Point], margin: float = 0.02) -> Point | None:
    """The minimum of the validation loss where its last value lies more than `margin` above it, else None."""
    if len(validation) < 2:
        return None
    best = min(validation, key=lambda point: point[1])
    return best if validation[-1][1] > best[1] * (1 + margin) else None


def curves(
    lines: Mapping[str, tuple[Sequence[Point], str]],
    label: str,
    mark_from: Point | None = None,
    note: str = "",
    faint: Mapping[str, tuple[Sequence[Point], str]] | None = None,
    width: int = 960,
    height: int = 300,
) -> str:
    """Lines over training steps. `lines` and `faint`: name -> (points, CSS colour). `mark_from` shades what lies behind
    that point, with `note` at its top."""
    shown = {name: line for name, line in lines.items() if line[0]}
    drawn = [p for points, _ in [*shown.values(), *(faint or {}).values()] for p in points if math.isfinite(p[1])]
    if len(drawn) < 2:
        return '<p class="muted">Too few steps were logged for a curve.</p>'
    left, right, top, bottom = 52, 14, 14, 34
    x0, x1 = min(x for x, _ in drawn), max(x for x, _ in drawn)
    y0, y1 = min(y for _, y in drawn), max(y for _, y in drawn)
    y0 = 0.0 if 0 < y0 < 0.6 * y1 else y0
    y1 = y1 if y1 > y0 else y0 + 1
    x1 = x1 if x1 > x0 else x0 + 1

    def at(x: float, y: float) -> Point:
        return (
            left + (x - x0) / (x1 - x0) * (width - left - right),
            height - bottom - (y - y0) / (y1 - y0) * (height - top - bottom),
        )

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">']
    for y in ticks(y0, y1):
        _, py = at(x0, y)
        parts.append(f'<line x1="{left}" x2="{width - right}" y1="{py:.1f}" y2="{py:.1f}" style="stroke:var(--grid)"/>')
        parts.append(f'<text x="{left - 8}" y="{py + 4:.1f}" text-anchor="end" {TEXT}>{short(y)}</text>')
    for x in ticks(x0, x1, 6):
        px, _ = at(x, y0)
        parts.append(f'<text x="{px:.1f}" y="{height - bottom + 18}" text-anchor="middle" {TEXT}>{short(x)}</text>')
    parts.append(f'<text x="{width - right}" y="{height - 2}" text-anchor="end" {TEXT}>step</text>')
    if mark_from is not None:
        px, py = at(*mark_from)
        parts.append(
            f'<rect x="{px:.1f}" y="{top}" width="{width - right - px:.1f}" height="{height - top - bottom}"'
            f' style="fill:var(--bad);opacity:.10"><title>{escape(note)}</title></rect>'
        )
        side = "end" if px > width / 2 else "start"
        parts.append(
            f'<text x="{px + (-6 if side == "end" else 6):.1f}" y="{top + 14}" text-anchor="{side}" font-size="12"'
            f' style="fill:var(--ink)">{escape(note)}</text>'
        )
    for points, colour in (faint or {}).values():
        parts.append(_line([at(*p) for p in points], colour, 1, 0.3))
    for name, (points, colour) in shown.items():
        parts.append(_line([at(*p) for p in points], colour, 2))
        for x, y in points if len(points) <= 60 else ():
            if not math.isfinite(y):
                continue
            px, py = at(x, y)
            parts.append(
                f'<circle cx="{px:.1f}" cy="{py:.1f}" r="4" style="fill:{colour};stroke:var(--surface)">'
                f"<title>{escape(name)}: {y:.4g} at step {x:g}</title></circle>"
            )
    return "".join(parts) + "</svg>" + legend({name: colour for name, (_, colour) in shown.items()})


def _line(points: Sequence[Point], colour: str, width: float, opacity: float = 1.0) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points if math.isfinite(y))
    return (
        f'<polyline points="{path}" fill="none" stroke-width="{width}" stroke-linejoin="round"'
        f' style="stroke:{colour};opacity:{opacity}"/>'
    )


def legend(colours: Mapping[str, str]) -> str:
    """Names with a swatch; nothing where there is only one."""
    if len(colours) < 2:
        return ""
    keys = "".join(
        f'<span><i style="background:{colour}"></i>{escape(name)}</span>' for name, colour in colours.items()
    )
    return f'<p class="legend">{keys}</p>'


def strip(figures: Sequence[tuple[str, float, Sequence[float] | None, str]], width: int = 220) -> str:
    """Shares with their intervals on one line from 0 to 100 %: (name, share, interval, CSS colour)."""
    height = 12 * len(figures) + 6

    def at(share: float) -> float:
        return 6 + share * (width - 12)

    parts = [
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" aria-label="intervals">'
    ]
    for share in (0.0, 0.5, 1.0):
        parts.append(
            f'<line x1="{at(share):.1f}" x2="{at(share):.1f}" y1="0" y2="{height}" style="stroke:var(--grid)"/>'
        )
    for row, (name, share, interval, colour) in enumerate(figures):
        y = 9 + 12 * row
        told = f"{name}: {100 * share:.1f} %"
        if interval is not None:
            low, high = interval
            told += f" (95 %: {100 * low:.1f} to {100 * high:.1f})"
            parts.append(
                f'<line x1="{at(low):.1f}" x2="{at(high):.1f}" y1="{y}" y2="{y}" stroke-width="2"'
                f' style="stroke:{colour};opacity:.55">'
                f"<title>{escape(told)}</title></line>"
            )
        parts.append(
            f'<circle cx="{at(share):.1f}" cy="{y}" r="4.5" style="fill:{colour};stroke:var(--surface)">'
            f"<title>{escape(told)}</title></circle>"
        )
    return "".join(parts) + "</svg>"


def stacked(rows: Mapping[str, Mapping[str, float]], colours: Mapping[str, str]) -> str:
    """Shares that add up to 1, one bar a row; a share of at least 6 % carries its number."""
    width, bar, gap, left = 960, 28, 14, 170
    height = len(rows) * (bar + gap)
    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="shares of the answer classes">']
    for i, (name, shares) in enumerate(rows.items()):
        y, x = i * (bar + gap) + gap / 2, float(left)
        parts.append(
            f'<text x="{left - 10}" y="{y + bar / 2 + 4:.1f}" text-anchor="end" font-size="13" style="fill:var(--ink)">'
            f"{escape(name)}</text>"
        )
        for kind, share in shares.items():
            size = share * (width - left)
            if size <= 0:
                continue
            parts.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(size - 2, 1):.1f}" height="{bar}" rx="3"'
                f' style="fill:{colours[kind]}"><title>{escape(f"{name}: {100 * share:.1f} % {kind}")}</title></rect>'
            )
            if share >= 0.06:
                parts.append(
                    f'<text x="{x + size / 2 - 1:.1f}" y="{y + bar / 2 + 4.5:.1f}" text-anchor="middle" font-size="12"'
                    f' style="fill:var(--on-mark)">{100 * share:.0f} %</text>'
                )
            x += size
    return "".join(parts) + "</svg>" + legend(colours)


def radar(axes: Sequence[str], series: Mapping[str, tuple[Sequence[float], str]], size: int = 380) -> str:
    """One polygon a model over at least three areas, 0 in the middle and 100 % at the rim."""
    if len(axes) < 3:
        return '<p class="muted">A radar needs at least three areas; the table has the figures.</p>'
    middle, radius, margin = size / 2, size / 2 - 44, 70

    def at(i: int, share: float) -> Point:
        angle = 2 * math.pi * i / len(axes) - math.pi / 2
        return middle + share * radius * math.cos(angle), middle + share * radius * math.sin(angle)

    def ring(shares: Sequence[float]) -> str:
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(i, share) for i, share in enumerate(shares)))

    parts = [f'<svg viewBox="{-margin} 0 {size + 2 * margin} {size}" role="img" aria-label="accuracy by area">']
    for share in (0.25, 0.5, 0.75, 1.0):
        parts.append(f'<polygon points="{ring([share] * len(axes))}" fill="none" style="stroke:var(--grid)"/>')
        parts.append(f'<text x="{middle + 4}" y="{middle - share * radius + 12:.1f}" {TEXT}>{100 * share:.0f}</text>')
    for i, axis in enumerate(axes):
        x, y = at(i, 1.0)
        parts.append(f'<line x1="{middle}" y1="{middle}" x2="{x:.1f}" y2="{y:.1f}" style="stroke:var(--grid)"/>')
        x, y = at(i, 1.09)
        side = "middle" if abs(x - middle) < 8 else "start" if x > middle else "end"
        parts.append(
            f'<text x="{x:.1f}" y="{y + 4:.1f}" text-anchor="{side}" font-size="13" style="fill:var(--ink)">'
            f"{escape(axis)}</text>"
        )
    for name, (shares, colour) in series.items():
        parts.append(
            f'<polygon points="{ring(shares)}" stroke-width="2" stroke-linejoin="round"'
            f' style="fill:{colour};fill-opacity:.10;stroke:{colour}"><title>{escape(name)}</title></polygon>'
        )
        for i, share in enumerate(shares):
            x, y = at(i, share)
            parts.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" style="fill:{colour};stroke:var(--surface)">'
                f"<title>{escape(name)}, {escape(axes[i])}: {100 * share:.0f} %</title></circle>"
            )
    return "".join(parts) + "</svg>" + legend({name: colour for name, (_, colour) in series.items()})
