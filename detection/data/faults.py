"""What is wrong with a file that a user gave, collected so that all of it is told at once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from detection.types import DataError

EXAMPLES = 5
MAX_EXAMPLE = 300
"""Longest example that is shown, in characters: a hostile value must not fill the screen."""


@dataclass(slots=True)
class Faults:
    """Faults of one file, grouped by kind, with a count and the first examples of each kind."""

    where: str
    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, example: object = None) -> None:
        self.counts[kind] = self.counts.get(kind, 0) + 1
        shown = self.examples.setdefault(kind, [])
        if example is not None and len(shown) < EXAMPLES:
            text = str(example)
            shown.append(text if len(text) <= MAX_EXAMPLE else text[: MAX_EXAMPLE - 3] + "...")

    def add_all(self, kind: str, examples: Iterable[object]) -> None:
        for example in examples:
            self.add(kind, example)

    def lines(self) -> list[str]:
        """One line for each kind of fault: what it is, how often, the first examples."""
        return [_line(kind, count, self.examples[kind]) for kind, count in self.counts.items()]

    def stop_if_any(self) -> None:
        """Errors: DataError that names the file and lists every kind of fault."""
        if self.counts:
            kinds = "1 kind of problem" if len(self.counts) == 1 else f"{len(self.counts)} kinds of problems"
            raise DataError("\n".join([f"{self.where}: {kinds}", *(f"  {line}" for line in self.lines())]))


def _line(kind: str, count: int, examples: list[str]) -> str:
    if not examples:
        return kind if count == 1 else f"{kind}: {count}"
    if count == 1:
        return f"{kind}: {examples[0]}"
    more = f", and {count - len(examples)} more" if count > len(examples) else ""
    return f"{kind}: {count} ({', '.join(examples)}{more})"
