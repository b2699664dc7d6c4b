"""One cell without a real training: what is kept, recorded, resumed, done again."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from detection.engine.step import NonFiniteError
from detection.study import cell as module
from detection.study.cell import is_complete, part_key, read_cell, run_cell
from detection.study.detector_cell import detector_parts
from detection.study.plan import Cell, read_study
from detection.study.results import cell_result
from detection.types import DataError


class Fake:
    """Stands for training and measuring; counts what is asked of it."""

    def __init__(self) -> None:
        self.trained: list[bool] = []
        self.measured: list[str] = []
        self.ends = True
        self.error: Exception | None = None
        self.broken: set[str] = set()
        self.settings: dict[str, Any] = {"raw": [], "ood": "ood"}

    def train(self, cell: Cell, resume: bool) -> bool:
        self.trained.append(resume)
        (cell.folder / "config.json").write_text(json.dumps(cell.resolved))
        if self.error is not None:
            raise self.error
        return self.ends

    def parts(self, cell: Cell) -> dict[str, Any]:
        return {name: (settings, lambda name=name: self._make(name)) for name, settings in self.settings.items()}

    def _make(self, name: str) -> dict[str, Any]:
        if name in self.broken:
            raise DataError("no detections")
        self.measured.append(name)
        return {"metrics": {"ap": 0.25, "ap_large": float("nan")}}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    made = Fake()
    monkeypatch.setattr(module, "train_detector_cell", made.train)
    monkeypatch.setattr(module, "detector_parts", made.parts)
    return made


@pytest.fixture
def cell(tmp_path: Path) -> Cell:
    (tmp_path / "base.toml").write_text("")
    (tmp_path / "study.toml").write_text('base = "base.toml"\nseeds = [3]\n[heads.focal]\n')
    return read_study(tmp_path / "study.toml", [], tmp_path / "cells")[1][0]


def test_a_finished_cell_is_kept(fake: Fake, cell: Cell) -> None:
    assert run_cell(cell) == "done"
    assert run_cell(cell) == "kept"
    assert fake.trained == [False]
    assert fake.measured == ["raw", "ood"]
    record = read_cell(cell.folder)
    assert record is not None
    assert record.parts[part_key("raw", [])]["metrics"] == {"ap": 0.25, "ap_large": None}
    result = cell_result(cell)
    assert (result.status, result.seed, result.values["raw.ap"]) == ("done", 3, 0.25)
    assert math.isnan(result.values["raw.ap_large"])


def test_a_measure_that_is_new_or_measured_otherwise_is_made_without_training(fake: Fake, cell: Cell) -> None:
    run_cell(cell)
    fake.settings |= {"curvature": 32, "ood": "other"}
    assert not is_complete(cell, read_cell(cell.folder))
    assert run_cell(cell, measure_only=True) == "done"
    assert len(fake.trained) == 1
    assert fake.measured == ["raw", "ood", "ood", "curvature"]
    fake.settings["ood"] = "ood"
    assert run_cell(cell) == "kept"


def test_an_interrupted_cell_is_resumed(fake: Fake, cell: Cell) -> None:
    fake.ends = False
    assert run_cell(cell) == "interrupted"
    assert read_cell(cell.folder) is None
    fake.ends = True
    assert run_cell(cell) == "done"
    assert fake.trained == [False, True]


def test_measure_only_trains_nothing(fake: Fake, cell: Cell) -> None:
    assert run_cell(cell, measure_only=True) == "interrupted"
    cell.folder.mkdir(parents=True)
    (cell.folder / "journal.jsonl").write_text('{"event": "end", "step": 3, "reason": "finished"}\n')
    assert run_cell(cell, measure_only=True) == "done"
    assert fake.trained == []
    assert fake.measured == ["raw", "ood"]


def test_a_failure_is_recorded_and_repeated_only_on_request(fake: Fake, cell: Cell) -> None:
    fake.error = NonFiniteError("steps 1 to 8: the loss is not finite")
    assert run_cell(cell) == "failed"
    assert cell_result(cell).status == "failed"
    assert cell_result(cell).error == "NonFiniteError: steps 1 to 8: the loss is not finite"
    fake.error = None
    assert run_cell(cell) == "kept"
    assert run_cell(cell, retry_failed=True) == "done"
    assert fake.trained == [False, False]


def test_what_the_machine_did_is_no_failure_of_the_cell(fake: Fake, cell: Cell) -> None:
    fake.error = OSError(28, "No space left on device")
    with pytest.raises(OSError, match="No space"):
        run_cell(cell)
    assert read_cell(cell.folder) is None


def test_a_measure_that_fails_leaves_the_others(fake: Fake, cell: Cell) -> None:
    fake.broken = {"raw"}
    assert run_cell(cell) == "done"
    assert cell_result(cell).error == "raw: DataError: no detections"
    assert cell_result(cell).values["ood.ap"] == 0.25
    assert run_cell(cell) == "kept"
    fake.broken = set()
    assert run_cell(cell, retry_failed=True) == "done"
    assert cell_result(cell).error == ""
    assert fake.measured == ["ood", "raw"]


def test_a_damaged_record_is_named(cell: Cell) -> None:
    cell.folder.mkdir(parents=True)
    (cell.folder / "cell.json").write_text('{"status": "perhaps"}')
    with pytest.raises(DataError, match=r"cell\.json: status"):
        read_cell(cell.folder)


def test_curves_and_speed_come_from_the_journal(cell: Cell) -> None:
    cell.folder.mkdir(parents=True)
    windows = [(0.5, 4.0, 1.0), (1.0, 2.0, 8.0), (1.5, 1.0, 16.0), (2.0, None, 16.0)]
    events: list[dict[str, Any]] = [
        {"event": "train", "step": i, "epoch": e, "total": loss, "images_per_second": rate}
        for i, (e, loss, rate) in enumerate(windows)
    ]
    events.append({"event": "evaluation", "step": 9, "epoch": 2.0, "metrics": {"ap": 0.5, "nll": None}})
    (cell.folder / "journal.jsonl").write_text("".join(f"{json.dumps(e)}\n" for e in events))
    result = cell_result(cell)
    assert result.status == "missing"
    assert result.curves == {"select.ap": ([2.0], [0.5]), "train.total": ([1.0, 2.0], [3.0, 1.0])}
    assert result.values == {"training.seconds_a_step": 1.0}


def test_a_detector_is_measured_as_the_study_asks(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text("")
    asked = {
        "": ["raw", "calibrated", "ood"],
        'ood = ""\ncalibration = []\ncurvature_images = 2\n': ["raw", "curvature"],
    }
    for text, names in asked.items():
        (tmp_path / "study.toml").write_text(f'base = "base.toml"\n[heads.focal]\n[measures]\n{text}')
        assert list(detector_parts(read_study(tmp_path / "study.toml", [], tmp_path)[1][0])) == names


def test_a_failed_cell_is_not_removed_where_nothing_may_train(cell: Cell, fake: Fake) -> None:
    fake.error = DataError("no objects")
    assert run_cell(cell) == "failed"
    assert run_cell(cell, retry_failed=True, measure_only=True) == "kept"
    assert (cell.folder / "cell.json").is_file()


def test_skill_and_number_of_detections_come_from_the_measures(cell: Cell, fake: Fake, monkeypatch: Any) -> None:
    bins = {"count": [30, 10], "mean_score": [0.2, 0.8], "precision": [0.1, 0.9]}
    made = {"metrics": {"brier": 0.05, "brier_uncertainty": 0.2}, "reliability": bins}
    monkeypatch.setattr(fake, "_make", lambda name: made)
    run_cell(cell)
    values = cell_result(cell).values
    assert values["raw.judged"] == 0.4
    assert values["raw.brier_skill"] == pytest.approx(0.75)


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_a_damaged_configuration_is_named(cell: Cell, text: str) -> None:
    cell.folder.mkdir(parents=True)
    (cell.folder / "config.json").write_text(text)
    with pytest.raises(DataError, match=r"config\.json"):
        read_study(cell.config.parent / "study.toml", [], cell.folder.parent)
