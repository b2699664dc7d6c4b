"""The page's building blocks: tables, figures with their numbers, sections. Strings from outside are escaped here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from detection.report.style import STYLE

Cell = str | float | int

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""No scripts, no network: whatever a name in the data contains, the browser runs and fetches nothing."""

SHORT = 24
"""A row's name of at most so many characters stays on one line,"""
SENTENCE = 64
"""and so does another cell of at most so many: where the screen is narrow the table scrolls instead of growing tall."""


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under headings. The first cell of a row names it; NaN is shown as a dash."""

    headings: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    caption: str = ""
    settings: tuple[str, ...] = ()
    """What made the numbers, one sentence each, below the table."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A picture, what it shows in words, and its numbers."""

    title: str
    picture: str
    """SVG: trusted markup, made by `detection.report.svg`."""
    caption: str
    table: Table | None = None
    legend: tuple[tuple[str, str], ...] = ()
    """(style, name) of each series: a colour class, with "line" in front where it is a line."""


def page(title: str, body: Sequence[str]) -> str:
    """The whole document."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><main>\n{chr(10).join(body)}\n</main></body></html>\n"
    )


def section(identifier: str, title: str, content: Sequence[str], level: int = 2) -> str:
    """A titled part of the page."""
    key = escape(identifier, quote=True)
    head = f'<h{level} id="{key}-title">{escape(title)}</h{level}>'
    return f'<section id="{key}" aria-labelledby="{key}-title">{head}\n{chr(10).join(content)}</section>'


def paragraph(text: str, style: str = "") -> str:
    """A paragraph of plain text."""
    kind = f' class="{style}"' if style else ""
    return f"<p{kind}>{escape(text)}</p>"


def links(targets: Sequence[tuple[str, str]]) -> str:
    """(identifier, name) as a list of links within the page."""
    items = "".join(f'<li><a href="#{escape(key, quote=True)}">{escape(name)}</a></li>' for key, name in targets)
    return f'<nav aria-label="Contents"><ul>{items}</ul></nav>'


def code(text: str) -> str:
    """Text as it stands, in a box that scrolls by itself."""
    return f'<pre tabindex="0">{escape(text)}</pre>'


def fold(summary: str, content: Sequence[str], is_open: bool = False) -> str:
    """Content that opens on a click."""
    return f"<details{' open' if is_open else ''}><summary>{escape(summary)}</summary>{''.join(content)}</details>"


def table(data: Table) -> str:
    """The table in a box that scrolls by itself where the screen is narrow."""
    name = escape(data.caption or ", ".join(data.headings), quote=True)
    caption = f"<caption>{escape(data.caption)}</caption>" if data.caption else ""
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in data.headings)
    rows = "".join(_row(row) for row in data.rows)
    notes = "".join(f"<li>{escape(setting)}</li>" for setting in data.settings)
    below = f'<ul class="settings">{notes}</ul>' if notes else ""
    return (
        f'<div class="scroll" role="region" aria-label="{name}" tabindex="0"><table>{caption}'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>{below}"
    )


def figure(data: Figure) -> str:
    """The picture, its legend and caption, and its numbers to unfold."""
    keys = "".join(f"<li>{_key(style)}{escape(name)}</li>" for style, name in data.legend)
    legend = f'<ul class="legend">{keys}</ul>' if keys else ""
    numbers = "" if data.table is None else fold("The numbers", [table(data.table)])
    return (
        f'<figure><p class="title">{escape(data.title)}</p>{data.picture}{legend}'
        f"<figcaption>{escape(data.caption)}</figcaption>{numbers}</figure>"
    )


def gallery(figures: Sequence[str], paired: bool = False) -> str:
    """Figures side by side where there is room; `paired`: two in a row at most."""
    return f'<div class="gallery{" paired" if paired else ""}">{"".join(figures)}</div>'


def show(cell: Cell) -> str:
    """A cell as text: four decimals, whole numbers as they are, a dash for NaN."""
    if isinstance(cell, str):
        return cell
    if isinstance(cell, int):
        return f"{cell:,}"
    return "–" if math.isnan(cell) else f"{cell:.4f}"


def _key(style: str) -> str:
    if not style.startswith("line"):
        return f'<span class="key {style}"></span>'
    return f'<svg class="stroke" viewBox="0 0 26 8" aria-hidden="true"><path class="{style}" d="M0 4L26 4"/></svg>'


def _row(cells: tuple[Cell, ...]) -> str:
    name = show(cells[0])
    kind = ' class="short"' if len(name) <= SHORT else ""
    first = f'<th scope="row"{kind}>{escape(name)}</th>'
    return f"<tr>{first}{''.join(map(_cell, cells[1:]))}</tr>"


def _cell(cell: Cell) -> str:
    if not isinstance(cell, str) or _is_numeric(cell):
        kind = ' class="n"'
    else:
        kind = ' class="short"' if len(cell) <= SENTENCE else ' class="long"'
    return f"<td{kind}>{escape(show(cell))}</td>"


def _is_numeric(text: str) -> bool:
    return bool(text) and (text[0].isdigit() or (text[0] in "–±+-" and len(text) < 24))
