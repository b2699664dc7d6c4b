"""What the user sees while a run trains: a live bar and tables in a terminal, plain lines elsewhere. Rank 0 prints."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table

from detection.distributed import rank

HEADLINE = ("accuracy", "ap", "ap50", "ap75", "d_ece", "ece", "brier", "nll")
"""Metrics that an evaluation line shows, accuracy and calibration side by side."""

SHOWN_WITHOUT_HEADLINE = 6


class Display:
    """Shows progress of a run of `total_steps` that starts at `step`."""

    def __init__(self, step: int, total_steps: int, epochs: int) -> None:
        self._console = Console(quiet=rank() != 0, highlight=False, soft_wrap=True)
        self._total, self._epochs = total_steps, epochs
        self._first, self._started = step, time.monotonic()
        self._progress: Progress | None = None
        self._task = TaskID(0)
        if self._console.is_terminal and rank() == 0:
            columns = (BarColumn(bar_width=24), TextColumn("{task.description}"))
            self._progress = Progress(*columns, console=self._console, transient=True)
            self._task = self._progress.add_task("starting", total=total_steps, completed=step)

    def __enter__(self) -> Display:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def line(self, text: str) -> None:
        """Prints a line of its own."""
        self._console.print(text, markup=False)

    def advance(self, step: int) -> None:
        """Moves the bar; looks at nothing on the device."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    def train(self, step: int, epoch: float, values: Mapping[str, float]) -> None:
        """Shows a log window: in the bar of a terminal, else as a line."""
        text = train_line(step, self._total, epoch, self._epochs, values, self._remaining(step))
        if self._progress is not None:
            self._progress.update(self._task, completed=step, description=text)
        else:
            self.line(text)

    def evaluation(self, step: int, epoch: float, metrics: Mapping[str, float], is_best: bool) -> None:
        """Shows an evaluation: a small table in a terminal, else a line."""
        shown = headline(metrics)
        if self._progress is None:
            numbers = "  ".join(f"{name} {value:.4f}" for name, value in shown.items())
            self.line(f"evaluation  epoch {epoch:g}  step {step}  {numbers}{'  (best so far)' if is_best else ''}")
            return
        table = Table("epoch", *shown, title=None)
        table.add_row(f"{epoch:g}", *(f"{value:.4f}" for value in shown.values()), style="bold" if is_best else None)
        self._console.print(table)

    def _remaining(self, step: int) -> float:
        done = step - self._first
        return (time.monotonic() - self._started) / done * (self._total - step) if done else 0.0


def train_line(step: int, total: int, epoch: float, epochs: int, values: Mapping[str, float], remaining: float) -> str:
    """One log window as a line: where, how fast, how long still, losses, learning rate, share of time spent waiting."""
    return (
        f"epoch {epoch:.2f}/{epochs}  step {step}/{total}"
        f"  loss {values['total']:.4f} (class {values['classification']:.4f}, box {values['box']:.4f})"
        f"  lr {values['lr']:.2e}  {values['images_per_second']:.1f} images/s"
        f"  data wait {values['data_wait']:.0%}  left {timedelta(seconds=round(remaining))}"
    )


def headline(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics that fit on a line."""
    shown = {name: metrics[name] for name in HEADLINE if name in metrics}
    return shown or dict(list(metrics.items())[:SHOWN_WITHOUT_HEADLINE])
