"""An image classifier's numbers before and after temperature scaling, as text."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console, Group
from rich.text import Text

from detection.evaluation.classification import ClassificationEvaluation
from detection.report.tables import new_table, number

SHOWN = (
    *("accuracy", "precision", "recall", "f1", "nll", "brier", "ece", "ece_em", "ece_classwise", "mce"),
    *("ood_auroc_confidence", "ood_auroc_entropy"),
)


def print_classification(
    raw: ClassificationEvaluation, calibrated: ClassificationEvaluation, title: str, notes: Sequence[str] = ()
) -> None:
    """Prints both evaluations side by side, with the settings behind the numbers."""
    rows = new_table("", "raw", "calibrated")
    for name in SHOWN:
        if name in raw.metrics:
            rows.add_row(name, number(raw.metrics[name]), number(calibrated.metrics[name]))
    by_setting: dict[str, list[str]] = {}
    for name in SHOWN:
        if name in raw.settings:
            by_setting.setdefault(raw.settings[name], []).append(name)
    settings = [f"{', '.join(names)}: {text}" for text, names in by_setting.items()]
    parts = (Text(title, style="bold"), rows, Text("\n".join(notes)), Text("\n".join(settings), style="dim"))
    Console(highlight=False, soft_wrap=True).print(Group(*parts))
