"""A whole study in processes of its own: a run that is stopped goes on, what is finished stays."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from detection.config import ConfigError
from detection.study.benchmark import Options, benchmark, progress_line
from detection.study.grid import Clock, Progress, Work, run_grid
from detection.study.plan import read_study
from tests.conftest import SMALL

ROOT = Path(__file__).resolve().parents[2]


def write_study(folder: Path, *overrides: str, heads: tuple[str, ...] = ("focal", "bce")) -> Path:
    own = [*SMALL, f"data.source.folder={folder / 'digits'}", "fit.tensorboard=false", *overrides]
    lines = ['base = "base.toml"', "seeds = [0]", f"set = {json.dumps(own)}"]
    for head in heads:
        lines += [f"[heads.{head}]", f'set = ["criterion.classification.kind={head}"]']
    (folder / "base.toml").write_text("")
    (folder / "study.toml").write_text("\n".join(lines))
    return folder / "study.toml"


def wait_for(path: Path, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} never came"
        time.sleep(0.05)


@pytest.mark.slow
def test_a_stopped_study_goes_on_where_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = write_study(tmp_path, "fit.epochs=40", "fit.evaluate_every=0")
    cells = tmp_path / "cells"
    command = [sys.executable, "tools/benchmark_heads.py", str(study), "--cells", str(cells), "--out", str(tmp_path)]
    first, second = read_study(study, [], cells)[1]
    driver = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    wait_for(first.folder / "last.pt")
    driver.send_signal(signal.SIGTERM)
    printed, _ = driver.communicate(timeout=300)
    assert driver.returncode == 1
    assert "focal seed 0: interrupted" in printed
    assert "stopped; the same command goes on from here" in printed
    assert not (first.folder / "cell.json").exists()
    assert not second.folder.exists()

    seen: list[Progress] = []
    assert run_grid([first], Work(), seen.append)
    assert [p.outcome for p in seen] == ["done"]
    assert "resumed at step" in (cells / f"{first.name}.log").read_text()
    record = (first.folder / "cell.json").read_text()

    assert benchmark(study, Options(cells, tmp_path, work=Work(jobs=2)), print)
    assert (first.folder / "cell.json").read_text() == record
    assert (second.folder / "cell.json").exists()
    printed = capsys.readouterr().out
    assert "[2/2] bce seed 0: done" in printed
    assert "focal" in printed.split("Accuracy, raw scores")[1]
    assert {p.name for p in tmp_path.iterdir()} >= {"results.csv", "table.csv", "table.md", "curves.png"}


def test_time_left_is_what_cells_took_shared_among_the_jobs(tmp_path: Path) -> None:
    cell = read_study(write_study(tmp_path), [], tmp_path)[1][0]
    clock = Clock(total=6, finished=1, jobs=2)
    first = clock.note(cell, "done", 100.0)
    assert (first.finished, first.total, first.left) == (2, 6, 200.0)
    assert progress_line(first) == "[2/6] focal seed 0: done in 0:01:40, about 0:03:20 left"
    second = clock.note(cell, "interrupted", 5.0)
    assert (second.finished, second.left) == (2, 150.0)


def test_no_jobs_are_refused() -> None:
    with pytest.raises(ConfigError, match="--jobs 0: at least 1"):
        run_grid([], Work(jobs=0), print)
