"""A study from its file to its table: the cells are run, then everything on disk is reported."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from detection.report.study_files import write_results
from detection.study.grid import Progress, Work, run_grid
from detection.study.plan import read_study
from detection.study.results import cell_result


@dataclass(frozen=True, slots=True)
class Options:
    """Where a study lives, and how it is run."""

    cells: Path = Path("runs/cells")
    """The folder of the run folders; studies may share it."""
    out: Path | None = None
    """The folder of the tables and pictures; by default runs/studies/ and the study's name."""
    overrides: tuple[str, ...] = ()
    """Of the base, in every cell."""
    work: Work = field(default_factory=Work)
    report_only: bool = False
    """Run nothing."""
    ray: str | None = None
    """Address of a Ray cluster that runs the cells; "auto" or "local"."""


def benchmark(study_file: Path, options: Options, say: Callable[[str], None]) -> Path:
    """The folder of the study's results. Errors: one of `detection.experiment.USER_ERRORS`."""
    study, cells = read_study(study_file, options.overrides, options.cells)
    out = options.out or Path("runs/studies") / study_file.stem
    grid = f"{len(study.heads)} heads x {len(study.seeds)} seeds"
    say(f"{study.title or study_file.stem}: {grid}, cells in {options.cells}")
    if not options.report_only:
        run_grid(cells, options.work, lambda progress: say(progress_line(progress)))
    results = [cell_result(cell) for cell in cells]
    write_results(out, results)
    say(f"results in {out}")
    return out


def progress_line(progress: Progress) -> str:
    """One line for a cell that has ended."""
    left = "" if progress.left is None else f", about {timedelta(seconds=round(progress.left))} left"
    cell = progress.cell
    took = timedelta(seconds=round(progress.seconds))
    return f"[{progress.finished}/{progress.total}] {cell.head} seed {cell.seed}: {progress.outcome} in {took}{left}"
