"""Who owns a run folder, and one consistent history in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from detection.config import ConfigError
from detection.engine.journal import Journal, check_run_folder, open_run_folder, read_journal
from detection.types import DataError


def test_new_and_empty_folders_are_taken(tmp_path: Path) -> None:
    open_run_folder(tmp_path / "a/b", {"seed": 1}, resume=False)
    assert json.loads((tmp_path / "a/b/config.json").read_text()) == {"seed": 1}
    (tmp_path / "empty").mkdir()
    open_run_folder(tmp_path / "empty", {}, resume=True)


def test_taken_folders_are_refused(tmp_path: Path) -> None:
    run, other, file = tmp_path / "run", tmp_path / "other", tmp_path / "file"
    open_run_folder(run, {"seed": 1}, resume=False)
    with pytest.raises(ConfigError, match=r"already taken, it holds a run \(config.json\); resume it"):
        open_run_folder(run, {"seed": 2}, resume=False)
    check_run_folder(run, resume=True)
    other.mkdir()
    (other / "thesis.tex").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds other files \(thesis.tex\); choose another folder"):
        open_run_folder(other, {}, resume=False)
    with pytest.raises(ConfigError, match=r"holds no run to resume \(thesis.tex\)"):
        check_run_folder(other, resume=True)
    file.write_text("")
    with pytest.raises(ConfigError, match="expected a folder"):
        open_run_folder(file, {}, resume=False)
    with pytest.raises(ConfigError, match=r"Not a directory|File exists"):
        open_run_folder(file / "below", {}, resume=False)
    assert json.loads((run / "config.json").read_text()) == {"seed": 1}


def test_history_is_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    journal = Journal(tmp_path, 0, evaluation_pending=False, tensorboard=False)
    for event, step in (("start", 0), ("train", 4), ("evaluation", 4), ("train", 8), ("evaluation", 8), ("end", 8)):
        journal.write(event, step, {})
    with open(tmp_path / "journal.jsonl", "a") as file:
        file.write('{"event": "train", "st')
    for step, pending, kept in ((8, False, 5), (8, True, 4), (4, False, 3), (4, True, 2), (0, False, 1)):
        Journal(tmp_path, step, pending, tensorboard=False).close()
        assert len(read_journal(tmp_path)) == kept


def test_numbers_that_json_does_not_know_become_null(tmp_path: Path) -> None:
    journal = Journal(tmp_path, 0, evaluation_pending=False, tensorboard=False)
    journal.write("evaluation", 3, {"metrics": {"ap": float("nan"), "d_ece": 0.5}, "seconds": float("inf")})
    text = (tmp_path / "journal.jsonl").read_text()
    assert json.loads(text) == {
        "event": "evaluation",
        "step": 3,
        "metrics": {"ap": None, "d_ece": 0.5},
        "seconds": None,
    }


def test_a_line_that_is_no_event_is_named(tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").write_text("5\n")
    with pytest.raises(DataError, match=r"journal\.jsonl: '5' is not an event"):
        read_journal(tmp_path)
