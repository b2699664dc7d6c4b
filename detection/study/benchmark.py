"""A study from its file to its table: the cells are run, then everything on disk is reported."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from detection.report.study_figures import CURVATURE, ERROR, draw_study
from detection.report.study_numbers import CellResult, rank_correlation
from detection.report.study_page import measure_settings, write_page, write_results, write_table
from detection.report.study_tables import ALIKE, BEST, UNTESTED, StudyTable, print_study, study_tables
from detection.study.grid import Progress, Work, run_grid
from detection.study.plan import Cell, Study, read_study
from detection.study.ray_cluster import Resources, run_on_ray
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
    """Address of a Ray cluster that runs the cells; "local" starts one here."""
    resources: Resources = field(default_factory=Resources)
    """Of a cell on the cluster."""


def benchmark(study_file: Path, options: Options, say: Callable[[str], None]) -> bool:
    """Runs a study and prints its tables; false where a signal stopped it. Errors: one of `USER_ERRORS`."""
    study, cells = read_study(study_file, options.overrides, options.cells)
    title = study.title or study_file.stem
    say(f"{title}: {len(study.heads)} heads x {len(study.seeds)} seeds, cells in {options.cells}")
    if not options.report_only:
        ended = run_cells(cells, options, say)
        if not ended:
            say("stopped; the same command goes on from here")
            return False
    write_study(study, cells, title, options.out or Path("runs/studies") / study_file.stem)
    return True


def run_cells(cells: Sequence[Cell], options: Options, say: Callable[[str], None]) -> bool:
    """Runs the cells here or on a Ray cluster; false where a signal stopped it."""

    def report(progress: Progress) -> None:
        say(progress_line(progress))

    if options.ray is None:
        return run_grid(cells, options.work, report)
    return run_on_ray(cells, options.work, options.ray, options.resources, report, say)


def write_study(study: Study, cells: Sequence[Cell], title: str, out: Path) -> None:
    """Prints the tables of what is on disk, and writes them with the pictures to `out`."""
    results = [cell_result(cell) for cell in cells]
    tables = study_tables(results, study.task, study.measures.alpha)
    notes = _notes(study, results, tables)
    write_results(out, results)
    write_table(out, tables, results)
    pictures = draw_study(results, study.task, out, title)
    write_page(out, title, tables, results, notes, pictures)
    print_study(title, tables, results, [*notes, f"tables and pictures in {out}"])


def _notes(study: Study, results: Sequence[CellResult], tables: Sequence[StudyTable]) -> list[str]:
    seeds = len(study.seeds)
    alpha = f"{study.measures.alpha:g}"
    notes = [
        f"Mean ± deviation (n - 1) over seeds {', '.join(map(str, study.seeds))}; - where nothing can be measured."
    ]
    if seeds > 1:
        notes += [
            f"{BEST} (bold) the best mean of the heads with all seeds; {ALIKE} not distinguishable from it: two-sided "
            f"paired t-test over {seeds} seeds, p >= {alpha}, not corrected for the number of comparisons; {UNTESTED} "
            "not tested, as a seed is missing.",
            f"{seeds} seeds leave it {seeds - 1} degrees of freedom: {ALIKE} means not shown to differ, not equal.",
        ]
    else:
        notes.append(f"{BEST} (bold) the best; one seed, so nothing can be said about chance.")
    if study.task == "classification":
        notes.append("Calibrated: the temperature that the base configuration sets, fitted on the selection split.")
    else:
        notes += [
            "D-ECE, ECE_EM, LaECE_0, NLL and Brier are means over a head's own detections, whose number differs: many "
            "easy ones with low scores make them small, so none is marked. Brier skill = 1 - Brier / (that of the best "
            "constant score for the same detections).",
        ]
        if study.measures.curvature_images:
            notes.append("The Hessian is that of the classification loss, without the box loss.")
        if study.measures.calibration:
            notes.append(f"Calibrated: {', '.join(study.measures.calibration)}; fitted on the selection split.")
    notes.append("Seconds a step: in a cell's fastest log window; cells may have run side by side.")
    name, label = ERROR[study.task]
    for value, text in CURVATURE.items():
        correlation, cells = rank_correlation(results, value, name)
        if not math.isnan(correlation):
            notes.append(
                f"Rank correlation (Spearman) of {label}, with the {text}: {correlation:+.2f} ({cells} cells)."
            )
    failed = [f"{r.head} seed {r.seed}" for r in results if r.error]
    if failed:
        notes.append(f"Failed, at least in part: {', '.join(failed)}.")
    return [*notes, *measure_settings(results, tables)]


def progress_line(progress: Progress) -> str:
    """One line for a cell that has ended."""
    left = "" if progress.left is None else f", about {timedelta(seconds=round(progress.left))} left"
    cell = progress.cell
    took = timedelta(seconds=round(progress.seconds))
    return f"[{progress.finished}/{progress.total}] {cell.head} seed {cell.seed}: {progress.outcome} in {took}{left}"
