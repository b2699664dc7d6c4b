"""The picture of gammas that follow calibration error."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import cv2

from detection.report.adafocal_plots import bin_histories, draw_adaptation

EDGES = [0.05, 0.2, 0.5, 0.8]


def event(epoch: int, **changes: Any) -> dict[str, Any]:
    rows = {
        "edges": EDGES,
        "gap": [-0.05, 0.1, 0.2 / epoch, 0.0],
        "gamma": [2.0 / epoch, 2.0, 2.0 + epoch, 2.0],
        "count": [50.0, 10.0 * (epoch - 1), 40.0, 0.0],
    }
    return {"event": "adapt", "step": 10 * epoch, "epoch": float(epoch), **rows, **changes}


def test_low_middle_and_high_are_of_the_bins_that_held_scores() -> None:
    low, middle, high = bin_histories([{"event": "train"}, event(1), event(2)])
    assert [h.label for h in (low, middle, high)] == [
        "low: scores 0.05 to 0.20",
        "middle: scores 0.20 to 0.50",
        "high: scores 0.50 to 0.80",
    ]
    assert low.epochs == [1, 2]
    assert low.gamma == [2.0, 1.0]
    assert high.gap == [0.2, 0.1]
    assert math.isnan(middle.gap[0])
    assert middle.gap[1] == 0.1


def test_moving_bins_have_a_number_and_several_tables_show_the_first() -> None:
    moved = event(2, edges=[0.05, 0.3, 0.5, 0.7])
    assert bin_histories([event(1), moved])[0].label == "low: bin 1 of 4"
    tables = []
    for epoch in (1, 2):
        rows = event(epoch)
        tables.append({**rows, **{f"{name}_0": rows.pop(name) for name in ("gap", "gamma", "count")}})
    assert [h.gamma for h in bin_histories(tables)] == [h.gamma for h in bin_histories([event(1), event(2)])]


def test_runs_that_never_adapted_have_no_picture(tmp_path: Path) -> None:
    assert bin_histories([]) == []
    assert bin_histories([event(1, count=[0.0] * 4)]) == []
    assert not draw_adaptation([tmp_path], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_the_picture_holds_all_runs(tmp_path: Path) -> None:
    runs = [tmp_path / "a", tmp_path / "b"]
    for run in runs:
        run.mkdir()
        lines = [json.dumps(event(epoch)) for epoch in (1, 2, 3)]
        (run / "journal.jsonl").write_text("\n".join(lines) + "\n")
    assert draw_adaptation(runs, tmp_path / "both.png")
    assert draw_adaptation(runs[:1], tmp_path / "one.png")
    one, both = (cv2.imread(str(tmp_path / f"{name}.png")) for name in ("one", "both"))
    assert one is not None
    assert both is not None
    assert one.shape == both.shape == (660, 1560, 3)
