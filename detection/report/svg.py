"""Inline SVG by hand: scales, axes, marks. Colours are classes of the page's style, so pictures follow its theme.

Widths are chosen for a phone: one unit is about one CSS pixel there, and text keeps its size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 360.0, 260.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 10.0, 12.0, 40.0
SERIES = 6
"""Distinct series colours s1..s6, each with a dash pattern of its own."""

Number = float | int
Point = tuple[Number, Number]


@dataclass(frozen=True, slots=True)
class Scale:
    """Values low..high to positions start..end, linear or, where asked, logarithmic in 1 + value."""

    low: Number
    high: Number
    start: Number
    end: Number
    log: bool = False

    def __call__(self, value: Number) -> float:
        low, high, v = (math.log1p(max(x, 0)) if self.log else x for x in (self.low, self.high, value))
        share = (v - low) / (high - low) if high > low else 0.5
        return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)


def plot_scales(
    x: tuple[Number, Number], y: tuple[Number, Number], height: Number = HEIGHT, log_y: bool = False
) -> tuple[Scale, Scale]:
    """Scales of the plot area of a picture of the usual width."""
    return Scale(*x, LEFT, WIDTH - RIGHT), Scale(*y, height - BOTTOM, TOP, log_y)


def picture(content: Sequence[str], description: str, height: Number = HEIGHT, width: Number = WIDTH) -> str:
    """The SVG element; `description` is what a screen reader says."""
    label = escape(description, quote=True)
    box = f"0 0 {number(width)} {number(height)}"
    return f'<svg viewBox="{box}" role="img" aria-label="{label}">{"".join(content)}</svg>'


def axes(x: Scale, y: Scale, labels: tuple[str, str], x_ticks: Sequence[Number], y_ticks: Sequence[Number]) -> str:
    """Grid lines, tick labels and axis names."""
    parts = []
    for tick in y_ticks:
        at = y(tick)
        parts.append(line((x.start, at), (x.end, at), "grid"))
        parts.append(text(x.start - 5, at + 4, short(tick), "tick end"))
    for tick in x_ticks:
        at = x(tick)
        parts.append(line((at, y.start), (at, y.start + 4), "axis"))
        parts.append(text(at, y.start + 16, short(tick), "tick mid"))
    parts.append(line((x.start, y.start), (x.end, y.start), "axis"))
    middle = (y.start + y.end) / 2
    parts.append(text((x.start + x.end) / 2, y.start + 33, labels[0], "name mid"))
    parts.append(
        f'<text class="name mid" transform="translate(11 {number(middle)}) rotate(-90)">{escape(labels[1])}</text>'
    )
    return "".join(parts)


def line(a: Point, b: Point, style: str) -> str:
    """A straight line."""
    (x1, y1), (x2, y2) = a, b
    return f'<line class="{style}" x1="{number(x1)}" y1="{number(y1)}" x2="{number(x2)}" y2="{number(y2)}"/>'


def path(points: Sequence[Point], style: str) -> str:
    """A line through the points; a point that is not finite breaks it."""
    steps, pen = [], "M"
    for px, py in points:
        if not (math.isfinite(px) and math.isfinite(py)):
            pen = "M"
            continue
        steps.append(f"{pen}{number(px)} {number(py)}")
        pen = "L"
    return f'<path class="{style}" d="{"".join(steps)}"/>' if steps else ""


def bar(x: Number, y: Number, width: Number, height: Number, style: str, opacity: Number | None = None) -> str:
    """A filled rectangle; negative sizes are taken as 0."""
    shade = "" if opacity is None else f' fill-opacity="{number(opacity)}"'
    size = f'width="{number(max(width, 0))}" height="{number(max(height, 0))}"'
    return f'<rect class="{style}" x="{number(x)}" y="{number(y)}" {size}{shade}/>'


def whisker(x: Number, low: Number, high: Number, style: str = "whisker") -> str:
    """A vertical interval with caps; the ends are positions."""
    caps = (line((x - 3, end), (x + 3, end), style) for end in (low, high))
    return line((x, low), (x, high), style) + "".join(caps)


def dot(x: Number, y: Number, style: str, radius: Number = 3.2) -> str:
    """A small disc."""
    return f'<circle class="{style}" cx="{number(x)}" cy="{number(y)}" r="{number(radius)}"/>'


def text(x: Number, y: Number, content: str, style: str) -> str:
    """A line of text; `style` has its anchor: mid, end, or the start by default."""
    return f'<text class="{style}" x="{number(x)}" y="{number(y)}">{escape(content)}</text>'


def series(index: int) -> str:
    """The colour class of a series."""
    return f"s{index % SERIES + 1}"


def number(value: Number) -> str:
    """At most two decimals, without trailing zeros."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def short(value: Number) -> str:
    """A tick label: 5e-4, 0.05, 20, 15k, 2M."""
    size = abs(value)
    if 0 < size < 0.01:
        digits, power = f"{value:.1e}".split("e")
        return f"{digits.removesuffix('.0')}e{int(power)}"
    if size >= 1e6:
        return f"{value / 1e6:.3g}M"
    if size >= 1e4:
        return f"{value / 1e3:.3g}k"
    return f"{value:.4g}"


def ticks(low: Number, high: Number, count: int = 5) -> list[float]:
    """About `count` round values from low to high."""
    if not high > low:
        return [float(low)]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def log_ticks(high: Number) -> list[float]:
    """0 and the powers of ten up to `high`, without 1 where that would crowd 0."""
    last = math.floor(math.log10(max(high, 1)))
    return [0.0, *(10.0**i for i in range(1 if last >= 2 else 0, last + 1))]
