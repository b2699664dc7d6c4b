from __future__ import annotations

from typing import Any

from detection.report.training import MOST_POINTS, training_figures


def test_losses_metrics_and_rate_are_drawn_from_the_journal() -> None:
    journal: list[dict[str, Any]] = [
        {"event": "train", "epoch": e / 10, "total": 2.0, "classification": 1.0, "box": 1.0, "lr": 0.1}
        for e in range(9)
    ]
    journal.append({"event": "evaluation", "epoch": 1, "metrics": {"ap": 0.5, "ap50": None, "d_ece": 0.1}})
    loss, selection, rate = training_figures(journal)
    assert [name for _, name in loss.legend] == ["total", "classification", "box"]
    assert [name for _, name in selection.legend] == ["ap", "d_ece"]
    assert rate.table is not None
    assert len(rate.table.rows) == 9


def test_long_runs_are_thinned_and_keep_their_last_value() -> None:
    journal = [{"event": "train", "epoch": float(e), "total": float(e)} for e in range(5000)]
    (loss,) = training_figures(journal)
    assert "to 4999" in loss.caption
    assert loss.picture.count("L") <= MOST_POINTS + 5


def test_malformed_events_are_passed_over() -> None:
    journal: list[Any] = [
        [],
        {"event": "train"},
        {"event": "train", "epoch": "1", "total": 3},
        {"event": "train", "epoch": 1, "total": None},
        {"event": "evaluation", "epoch": 1, "metrics": 3},
    ]
    assert training_figures([entry for entry in journal if isinstance(entry, dict)]) == []
