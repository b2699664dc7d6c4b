"""A study's file, and the folders that settings name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from detection.config import ConfigError, load
from detection.experiment import Experiment
from detection.study.plan import identity, read_study

STUDY = """
base = "base.toml"
seeds = [0, 1]
[heads.focal]
[heads.bce]
set = ["criterion.classification.kind=bce"]
"""


def write(folder: Path, text: str, name: str = "study.toml") -> Path:
    (folder / "base.toml").write_text("[fit]\nepochs = 2\n")
    (folder / name).write_text(text)
    return folder / name


def test_cells_are_named_by_head_seed_and_settings(tmp_path: Path) -> None:
    study, cells = read_study(write(tmp_path, STUDY), [], tmp_path / "cells")
    assert study.measures.alpha == 0.05
    assert [(c.head, c.seed) for c in cells] == [("focal", 0), ("bce", 0), ("focal", 1), ("bce", 1)]
    assert cells[1].name == f"bce-s0-{cells[1].identity}"
    assert len({c.identity for c in cells}) == 4
    assert cells[3].resolved["seed"] == 1
    assert cells[3].resolved["criterion"]["classification"]["kind"] == "bce"
    assert cells[3].resolved["fit"]["epochs"] == 2


def test_identity_follows_settings_not_how_they_are_given() -> None:
    def of(*overrides: str) -> str:
        return identity(load(Experiment, None, overrides))

    assert of() == of("fit.epochs=12") == of("criterion.classification.kind=focal")
    different = {
        of(),
        of("fit.epochs=3"),
        of("seed=1"),
        of("criterion.classification.kind=bce"),
        of("criterion.classification.gamma=1"),
        of("criterion.auxiliary=[{kind='mdca'}]"),
        of("criterion.auxiliary=[{kind='dca'}]"),
        of("criterion.auxiliary=[{kind='dca', weight=3.0}]"),
    }
    assert len(different) == 8


def test_overrides_of_the_command_are_part_of_the_identity(tmp_path: Path) -> None:
    path = write(tmp_path, STUDY)
    _, cells = read_study(path, [], tmp_path)
    _, others = read_study(path, ["fit.epochs=3"], tmp_path)
    assert not {c.identity for c in cells} & {c.identity for c in others}


def test_studies_share_cells_whatever_their_names(tmp_path: Path) -> None:
    _, cells = read_study(write(tmp_path, STUDY), [], tmp_path / "cells")
    cells[0].folder.mkdir(parents=True)
    text = 'base = "base.toml"\nseeds = [0]\n[heads.retina]\nset = ["criterion.classification.gamma=2"]\n'
    _, others = read_study(write(tmp_path, text, "other.toml"), [], tmp_path / "cells")
    assert others[0].head == "retina"
    assert others[0].folder == cells[0].folder


def test_finished_runs_are_found_by_their_settings(tmp_path: Path) -> None:
    path = write(tmp_path, STUDY)
    _, cells = read_study(path, [], tmp_path / "cells")
    run = tmp_path / "cells" / "by-hand"
    run.mkdir(parents=True)
    known = {k: v for k, v in cells[2].resolved.items() if k != "ood"}
    (run / "config.json").write_text(json.dumps(known))
    assert read_study(path, [], tmp_path / "cells")[1][2].folder != run
    (run / "journal.jsonl").write_text('{"event": "end", "step": 3, "reason": "interrupted; resume it"}\n')
    assert read_study(path, [], tmp_path / "cells")[1][2].folder != run
    (run / "journal.jsonl").write_text('{"event": "end", "step": 3, "reason": "finished"}\n')
    assert read_study(path, [], tmp_path / "cells")[1][2].folder == run


def test_a_folder_made_with_other_defaults_is_not_taken_for_the_cell(tmp_path: Path) -> None:
    path = write(tmp_path, STUDY)
    _, cells = read_study(path, [], tmp_path / "cells")
    cells[0].folder.mkdir(parents=True)
    older = cells[0].resolved | {"implementation": "reference"}
    del older["ood"]
    (cells[0].folder / "config.json").write_text(json.dumps(older))
    with pytest.raises(ConfigError, match=r"made with other defaults.*\n  implementation: 'reference' -> 'auto'$"):
        read_study(path, [], tmp_path / "cells")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (STUDY.replace("[0, 1]", "[1, 1]"), "a seed is given twice"),
        (STUDY + "[heads.again]\n", "heads 'focal' and 'again' have the same settings"),
        (STUDY.replace("kind=bce", "kin=bce"), "head 'bce'.*no such option; did you mean 'kind'"),
        (STUDY.replace("base.toml", "none.toml"), "none.toml: no such file"),
        (STUDY.replace("heads.bce", 'heads."../up"'), "heads"),
        ('base = "base.toml"\n', "heads"),
    ],
)
def test_problems_of_a_study_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        read_study(write(tmp_path, text), [], tmp_path)
