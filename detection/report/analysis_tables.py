"""An analysis of a trained detector's loss as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from detection.report.tables import new_table, number

SHOWN = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)


def print_analysis(content: Mapping[str, Any], title: str) -> None:
    """Prints what there is of curvature, loss shares and preferred scores, each with its settings."""
    console = Console(highlight=False, soft_wrap=True)
    console.print(Text(f"{title}, step {content['step']}", style="bold"))
    if "curvature" in content:
        console.print(*_curvature(content["curvature"]), sep="\n")
    if "loss_share" in content:
        console.print(*_loss_share(content["loss_share"]), sep="\n")
    if "minimisers" in content:
        console.print(*_minimisers(content["minimisers"]), sep="\n")


def _curvature(found: Mapping[str, float]) -> list[Table | Text]:
    table = new_table("curvature of the training loss", "value", "error")
    table.add_row("largest eigenvalue", f"{found['eigenvalue']:.5g}", f"{found['residual']:.2g}")
    table.add_row("smallest eigenvalue", f"{found['smallest']:.5g}", f"{found['smallest_residual']:.2g}")
    table.add_row("trace", f"{found['trace']:.5g}", f"{found['trace_error']:.2g}")
    state = "converged" if found["converged"] else "NOT converged"
    return [
        table,
        Text(
            f"one batch of {found['images']} training images; {found['parameters']:,} parameters; "
            f"{found['seconds']:.0f} s\n"
            f"eigenvalues: Lanczos, {found['iterations']} iterations, {state}; their error: the residual\n"
            f"trace: {found['probes']} random probes; its error: the standard error",
            style="dim",
        ),
    ]


def _loss_share(found: Mapping[str, Any]) -> list[Table | Text]:
    parts: list[Table | Text] = []
    for side in ("positive", "negative"):
        columns = [f"{100 * x:g} %" for x in found["hardest"]]
        table = new_table(f"loss held by the hardest {side}s", *columns)
        for gamma, held in found[side].items():
            table.add_row(f"gamma = {gamma}", *(number(v) for v in held))
        parts.append(table)
    counts = f"{found['positives']:,} positive and {found['negatives']:,} negative elements"
    return [*parts, Text(f"{counts} of {found['images']} training images", style="dim")]


def _minimisers(found: Mapping[str, Any]) -> list[Table | Text]:
    shown = [found["frequency"].index(q) for q in SHOWN]
    table = new_table("preferred score at true frequency", *(f"{q:g}" for q in SHOWN))
    losses = {f"this run: {name}": scores for name, scores in found["own"].items()}
    for name, scores in {**losses, **{n: s for panel in found["panels"].values() for n, s in panel.items()}}.items():
        table.add_row(name, *(f"{scores[i]:.2f}" for i in shown))
    note = "gamma N: focal loss with neither outcome weighted; the other losses with their defaults"
    return [table, Text(note, style="dim")]
