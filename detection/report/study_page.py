"""A study as files: results.csv, a row a cell; table.csv, a row a head; table.md, a page with all that was found."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from detection.engine.checkpoint import write_atomically
from detection.report.study_numbers import CellResult, Summary
from detection.report.study_tables import StudyTable, incomplete, mark, summary_text

RESULTS, TABLE, PAGE = "results.csv", "table.csv", "table.md"
DESCRIBED = ("raw", "calibrated", "ood")


def write_results(folder: Path, results: Sequence[CellResult]) -> None:
    """results.csv: every number of every cell, empty where there is none."""
    names = sorted({name for result in results for name in result.values})
    rows = [["head", "seed", "status", "folder", "error", *names]]
    for r in results:
        numbers = [_exact(r.values.get(name, math.nan)) for name in names]
        rows.append([r.head, str(r.seed), r.status, r.folder.name, " ".join(r.error.split()), *numbers])
    _write_csv(folder / RESULTS, rows)


def write_table(folder: Path, tables: Sequence[StudyTable], results: Sequence[CellResult]) -> None:
    """table.csv: for each number its mean, deviation, seeds, p-value against the best, and mark."""
    columns = [c for table in tables for c in table.columns]
    header = [f"{c.name}{end}" for c in columns for end in ("", ".deviation", ".seeds", ".p", ".mark")]
    rows = [["head", "done", *header]]
    for head in dict.fromkeys(r.head for r in results):
        done = sum(r.head == head and r.status == "done" for r in results)
        cells = [text for table in tables for c in table.columns for text in _sheet(table.rows[head][c.name])]
        rows.append([head, str(done), *cells])
    _write_csv(folder / TABLE, rows)


def write_page(
    folder: Path,
    title: str,
    tables: Sequence[StudyTable],
    results: Sequence[CellResult],
    notes: Sequence[str],
    pictures: Mapping[str, str],
) -> None:
    """table.md: the tables, how to read them, the pictures (file -> caption), what failed, and each head's settings."""
    lines = [f"# {title}", ""]
    for table in tables:
        lines += [f"## {table.title}", "", *_markdown(table, results), ""]
    lines += ["## How to read this", "", *(f"- {_plain(note)}" for note in notes), ""]
    lines += [line for file, caption in pictures.items() for line in (f"![{caption}]({file})", "")]
    failures = [f"- {_plain(r.head)}, seed {r.seed}: {_plain(' '.join(r.error.split()))}" for r in results if r.error]
    if failures:
        lines += ["## What failed", "", *failures, ""]
    lines += ["## Settings", "", *_settings(results)]
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / PAGE, ("\n".join(lines).rstrip() + "\n").encode())


def measure_settings(results: Sequence[CellResult], tables: Sequence[StudyTable]) -> list[str]:
    """The settings behind the numbers of the tables, as the first measured cell has them: one line for each."""
    shared: dict[str, list[str]] = {}
    for table in tables:
        for column in table.columns:
            part, name = column.name.split(".", 1)
            for result in results:
                text = result.parts.get(part, {}).get("settings", {})
                if name in text:
                    names = shared.setdefault(text[name], [])
                    names += [] if column.label in names else [column.label]
                    break
    return [f"{', '.join(names)}: {text}" for text, names in shared.items()]


def _markdown(table: StudyTable, results: Sequence[CellResult]) -> list[str]:
    lines = [
        "| | " + " | ".join(c.label for c in table.columns) + " |",
        "|---|" + "---:|" * len(table.columns),
    ]
    for head, row in table.rows.items():
        cells = [_markdown_cell(row[c.name]) for c in table.columns]
        lines.append(f"| {_plain(head)}{incomplete(results, head)} | " + " | ".join(cells) + " |")
    return lines


def _markdown_cell(summary: Summary) -> str:
    text = summary_text(summary)
    return f"**{text}**" if summary.is_best else f"{text} {_plain(mark(summary))}".rstrip()


def _settings(results: Sequence[CellResult]) -> list[str]:
    lines = []
    for head in dict.fromkeys(r.head for r in results):
        own = next(r for r in results if r.head == head)
        text = ", ".join(f"`{o}`" for o in own.overrides if not o.startswith("seed=")) or "the base as it is"
        seeds = ", ".join(str(r.seed) for r in results if r.head == head)
        lines.append(f"- {_plain(head)}, seeds {seeds}: {text}")
    return lines


def _plain(text: str) -> str:
    """The same without what Markdown would read as its own."""
    for sign in "\\*_|<`":
        text = text.replace(sign, f"\\{sign}")
    return text


def _sheet(summary: Summary) -> list[str]:
    p = math.nan if summary.p_value is None else summary.p_value
    kind = "best" if summary.is_best else "alike" if summary.alike else "untested" if summary.untested else ""
    return [_exact(summary.mean), _exact(summary.deviation), str(len(summary.values)), _exact(p), kind]


def _exact(value: float) -> str:
    return "" if math.isnan(value) else repr(value)


def _write_csv(path: Path, rows: Sequence[Sequence[str]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.getvalue().encode())
