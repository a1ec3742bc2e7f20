"""The report's charts as inline SVG: no script, no other file, colours from the page's CSS variables.

Every mark has a <title>, which a browser shows as a tooltip and a screen reader reads out.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

Point = tuple[float, float]
Line = tuple[Sequence[Point], str]
GRID, MUTED, INK = "stroke:var(--grid)", "fill:var(--muted)", "fill:var(--ink)"


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


def overfits(validation: Sequence[Point]) -> Point | None:
    """The minimum of the validation loss where its last value lies more than 2 % above it, else None."""
    if len(validation) < 2:
        return None
    best = min(validation, key=lambda point: point[1])
    return best if validation[-1][1] > best[1] * 1.02 else None


def mark(kind: str, text: str = "", title: str = "", **attributes: object) -> str:
    """One SVG element: its `title` is the tooltip, a fraction among its attributes has one digit."""
    told = {name.replace("_", "-"): f"{v:.1f}" if isinstance(v, float) else v for name, v in attributes.items()}
    written = "".join(f' {name}="{value}"' for name, value in told.items())
    tooltip = f"<title>{escape(title)}</title>" if title else ""
    return f"<{kind}{written}>{tooltip}{escape(text)}</{kind}>"


def picture(parts: Sequence[str], label: str, width: int, height: int, left: int = 0, fixed: bool = False) -> str:
    """The whole SVG, as wide as there is room unless its size is `fixed`; x counts from `left`."""
    size = f'width="{width}" height="{height}" ' if fixed else ""
    box = f'viewBox="{left} 0 {width} {height}"'
    return f'<svg {box} {size}role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'


def legend(colours: Mapping[str, str]) -> str:
    """Names with a swatch; nothing where there is only one."""
    if len(colours) < 2:
        return ""
    keys = (f'<span><i style="background:{colour}"></i>{escape(name)}</span>' for name, colour in colours.items())
    return f'<p class="legend">{"".join(keys)}</p>'


def curves(
    lines: Mapping[str, Line],
    label: str,
    mark_from: Point | None = None,
    note: str = "",
    faint: Mapping[str, Line] | None = None,
    height: int = 300,
) -> str:
    """Lines over training steps. `lines` and `faint`: name -> (points, CSS colour). `mark_from` shades what lies behind
    that point, with `note` at its top."""
    shown = {name: line for name, line in lines.items() if line[0]}
    drawn = [p for points, _ in [*shown.values(), *(faint or {}).values()] for p in points if math.isfinite(p[1])]
    if len(drawn) < 2:
        return '<p class="muted">Too few steps were logged for a curve.</p>'
    width, left, right, top, bottom = 960, 52, 946, 14, height - 34
    x0, x1 = min(x for x, _ in drawn), max(x for x, _ in drawn)
    y0, y1 = min(y for _, y in drawn), max(y for _, y in drawn)
    y0 = 0.0 if 0 < y0 < 0.6 * y1 else y0
    y1 = y1 if y1 > y0 else y0 + 1
    x1 = x1 if x1 > x0 else x0 + 1

    def at(x: float, y: float) -> Point:
        return left + (x - x0) / (x1 - x0) * (right - left), bottom - (y - y0) / (y1 - y0) * (bottom - top)

    def line(points: Sequence[Point], colour: str, thick: int, opacity: float) -> str:
        path = " ".join("{:.1f},{:.1f}".format(*at(x, y)) for x, y in points if math.isfinite(y))
        style = f"stroke:{colour};opacity:{opacity}"
        return mark("polyline", points=path, fill="none", stroke_width=thick, stroke_linejoin="round", style=style)

    parts = []
    for y in ticks(y0, y1):
        _, py = at(x0, y)
        parts.append(mark("line", x1=left, x2=right, y1=py, y2=py, style=GRID))
        parts.append(mark("text", short(y), x=left - 8, y=py + 4, text_anchor="end", font_size=12, style=MUTED))
    for x in ticks(x0, x1, 6):
        px, _ = at(x, y0)
        parts.append(mark("text", short(x), x=px, y=bottom + 18, text_anchor="middle", font_size=12, style=MUTED))
    parts.append(mark("text", "step", x=right, y=height - 2, text_anchor="end", font_size=12, style=MUTED))
    if mark_from is not None:
        px, _ = at(*mark_from)
        shade: dict[str, Any] = {"x": px, "y": top, "width": right - px, "height": bottom - top}
        parts.append(mark("rect", title=note, **shade, style="fill:var(--bad);opacity:.10"))
        side, x = ("end", px - 6) if px > width / 2 else ("start", px + 6)
        parts.append(mark("text", note, x=x, y=top + 14, text_anchor=side, font_size=12, style=INK))
    parts += [line(points, colour, 1, 0.3) for points, colour in (faint or {}).values()]
    for name, (points, colour) in shown.items():
        parts.append(line(points, colour, 2, 1.0))
        for x, y in points if len(points) <= 60 else ():
            if math.isfinite(y):
                (px, py), told = at(x, y), f"{name}: {y:.4g} at step {x:g}"
                parts.append(mark("circle", title=told, cx=px, cy=py, r=4, style=_dot(colour)))
    return picture(parts, label, width, height) + legend({name: colour for name, (_, colour) in shown.items()})


def _dot(colour: str) -> str:
    return f"fill:{colour};stroke:var(--surface)"


def strip(figures: Sequence[tuple[str, float, Sequence[float] | None, str]]) -> str:
    """Shares with their intervals on one line from 0 to 100 %: (name, share, interval, CSS colour)."""
    width, height = 220, 12 * len(figures) + 6

    def at(share: float) -> float:
        return 6.0 + share * (width - 12)

    parts = [mark("line", x1=at(share), x2=at(share), y1=0, y2=height, style=GRID) for share in (0.0, 0.5, 1.0)]
    for row, (name, share, interval, colour) in enumerate(figures):
        y, told = 9 + 12 * row, f"{name}: {100 * share:.1f} %"
        if interval is not None:
            low, high = interval
            told += f" (95 %: {100 * low:.1f} to {100 * high:.1f})"
            ends: dict[str, Any] = {"x1": at(low), "x2": at(high), "y1": y, "y2": y, "stroke_width": 2}
            parts.append(mark("line", title=told, **ends, style=f"stroke:{colour};opacity:.55"))
        parts.append(mark("circle", title=told, cx=at(share), cy=y, r=4.5, style=_dot(colour)))
    return picture(parts, "intervals", width, height, fixed=True)


def stacked(rows: Mapping[str, Mapping[str, float]], colours: Mapping[str, str]) -> str:
    """Shares that add up to 1, one bar a row; a share of at least 6 % carries its number."""
    width, bar, gap, left = 960, 28, 14, 170
    parts = []
    for i, (name, shares) in enumerate(rows.items()):
        y, x = i * (bar + gap) + gap / 2, float(left)
        parts.append(mark("text", name, x=left - 10, y=y + bar / 2 + 4, text_anchor="end", font_size=13, style=INK))
        for kind, share in shares.items():
            size, told = share * (width - left), f"{name}: {100 * share:.1f} % {kind}"
            place: dict[str, Any] = {"x": x, "y": y, "width": max(size - 2, 1.0), "height": bar, "rx": 3}
            parts.append(mark("rect", title=told, **place, style=f"fill:{colours[kind]}"))
            if share >= 0.06:
                middle: dict[str, Any] = {
                    "x": x + size / 2 - 1,
                    "y": y + bar / 2 + 4.5,
                    "text_anchor": "middle",
                    "font_size": 12,
                }
                parts.append(mark("text", f"{100 * share:.0f} %", **middle, style="fill:var(--on-mark)"))
            x += size
    return picture(parts, "shares of the answer classes", width, len(rows) * (bar + gap)) + legend(colours)


def radar(axes: Sequence[str], series: Mapping[str, tuple[Sequence[float], str]]) -> str:
    """One polygon a model over at least three areas, 0 in the middle and 100 % at the rim."""
    if len(axes) < 3:
        return '<p class="muted">A radar needs at least three areas; the table has the figures.</p>'
    size, middle, radius, margin = 380, 190.0, 146.0, 70

    def at(i: int, share: float) -> Point:
        angle = 2 * math.pi * i / len(axes) - math.pi / 2
        return middle + share * radius * math.cos(angle), middle + share * radius * math.sin(angle)

    def ring(shares: Sequence[float]) -> str:
        return " ".join("{:.1f},{:.1f}".format(*at(i, share)) for i, share in enumerate(shares))

    parts = []
    for share in (0.25, 0.5, 0.75, 1.0):
        parts.append(mark("polygon", points=ring([share] * len(axes)), fill="none", style=GRID))
        x, y = middle + 4, middle - share * radius + 12
        parts.append(mark("text", f"{100 * share:.0f}", x=x, y=y, font_size=12, style=MUTED))
    for i, axis in enumerate(axes):
        x, y = at(i, 1.0)
        parts.append(mark("line", x1=middle, y1=middle, x2=x, y2=y, style=GRID))
        x, y = at(i, 1.09)
        side = "middle" if abs(x - middle) < 8 else "start" if x > middle else "end"
        parts.append(mark("text", axis, x=x, y=y + 4, text_anchor=side, font_size=13, style=INK))
    for name, (shares, colour) in series.items():
        style = f"fill:{colour};fill-opacity:.10;stroke:{colour}"
        outline: dict[str, Any] = {"points": ring(shares), "stroke_width": 2, "stroke_linejoin": "round"}
        parts.append(mark("polygon", title=name, **outline, style=style))
        for i, share in enumerate(shares):
            (x, y), told = at(i, share), f"{name}, {axes[i]}: {100 * share:.0f} %"
            parts.append(mark("circle", title=told, cx=x, cy=y, r=4, style=_dot(colour)))
    drawn = picture(parts, "accuracy by area", size + 2 * margin, size, -margin)
    return drawn + legend({name: colour for name, (_, colour) in series.items()})
