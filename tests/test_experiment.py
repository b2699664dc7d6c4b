"""The main job through the tools, as a user runs it, on a few small images of the embedded data set."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from detection.classification_task import ClassificationExperiment
from detection.config import load
from detection.experiment import Experiment, build, evaluate_run, train

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.toml"))


def tiny(folder: Path) -> list[str]:
    """Overrides of the quickstart that make an epoch take a second."""
    return [
        f"data.source.folder={json.dumps(str(folder))}",
        *("data.source.train=10", "data.source.calibration=4", "data.source.test=4", "data.source.ood=1"),
        *("data.source.image_size=64", "data.source.max_size=40", "data.transform.size=64"),
        *("data.batch_size=4", "data.loader.workers=0", "model.backbone.name=test_resnet", "model.pyramid.width=16"),
        *("fit.epochs=2", "fit.evaluate_every=1", "fit.log_every=2", "fit.tensorboard=false", "device=cpu"),
    ]


def run_tool(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *(str(a) for a in arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("digits")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    outcome = train(ROOT / "configs/quickstart.toml", tiny(digits), folder, resume=False)
    assert outcome.test is not None
    assert outcome.fit.step == 6
    return folder


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_configs_are_valid_and_open_with_their_command(path: Path) -> None:
    load(ClassificationExperiment if path.stem == "crops" else Experiment, path)
    head = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    for word in ("command:", "hardware:", "time:", "expected:"):
        assert any(word in line for line in head), f"{path.name}: no {word}"


def test_a_run_leaves_what_the_readme_says(run: Path) -> None:
    names = {p.relative_to(run).as_posix() for p in run.rglob("*") if p.is_file()}
    expected = {"config.json", "journal.jsonl", "best.pt", "last.pt"}
    assert expected | {"evaluation/test/metrics.json", "evaluation/test/detections.json"} <= names
    events = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
    assert [e["event"] for e in events if e["event"] == "evaluation"] == ["evaluation"] * 2


def test_evaluating_again_gives_the_same_numbers(run: Path, tmp_path: Path) -> None:
    evaluate_run(run, None, [], tmp_path / "again")
    for name in ("metrics.json", "detections.json"):
        assert json.loads((tmp_path / "again" / name).read_text()) == json.loads(
            (run / "evaluation/test" / name).read_text()
        )


def test_the_same_configuration_gives_the_same_weights(run: Path, digits: Path, tmp_path: Path) -> None:
    train(ROOT / "configs/quickstart.toml", tiny(digits), tmp_path / "twin", resume=False)
    first, second = (torch.load(p / "last.pt", weights_only=True)["model"] for p in (run, tmp_path / "twin"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_loss_that_follows_its_calibration_measures_it_on_images_kept_out_of_training(
    digits: Path, tmp_path: Path
) -> None:
    overrides = [*tiny(digits), "criterion.classification={kind='adafocal', score_min=0.009, min_count=1}"]
    outcome = train(ROOT / "configs/quickstart.toml", [*overrides, "data.holdout=0.3"], tmp_path / "run", resume=False)
    events = [json.loads(line) for line in (tmp_path / "run/journal.jsonl").read_text().splitlines()]
    adapted = [e for e in events if e["event"] == "adapt"]
    trained = next(note for note in events[0]["notes"] if note.startswith("train: "))
    held = next(note for note in events[0]["notes"] if note.startswith("held out of training: "))
    assert sum(int(note.split(": ")[1].split()[0]) for note in (trained, held)) == 10
    assert [e["epoch"] for e in adapted] == [1, 2]
    assert sum(adapted[0]["count"]) > 0
    assert adapted[0]["gamma"] != [2.0] * 15
    stored = torch.load(outcome.fit.last, weights_only=True)["criterion"]["classification.gamma"]
    assert stored[0].tolist() == adapted[-1]["gamma"]


def test_fine_tuning_starts_from_a_checkpoint_and_keeps_equal_classes(run: Path, digits: Path, tmp_path: Path) -> None:
    overrides = [*tiny(digits), "data.source.unseen=[6, 7, 9]", f"initial_weights={json.dumps(str(run / 'best.pt'))}"]
    experiment = load(Experiment, ROOT / "configs/quickstart.toml", overrides)
    components = build(experiment, torch.device("cpu"))
    trained = torch.load(run / "best.pt", weights_only=True)["model"]
    own = components.model.state_dict()
    assert components.class_names == ("zero", "one", "two", "three", "four", "five", "eight")
    assert torch.equal(own["pyramid.lateral.0.weight"], trained["pyramid.lateral.0.weight"])
    assert any("classes initialised anew: eight" in note for note in components.notes)
    rows = own["head.classes.output.bias"].view(-1, 7), trained["head.classes.output.bias"].view(-1, 8)
    assert torch.equal(rows[0][:, :6], rows[1][:, :6])


def test_tools_print_tables(run: Path, tmp_path: Path) -> None:
    done = run_tool("tools/eval.py", run, "--split", "calibration", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    for word in ("ap50", "d_ece", "score bin", "10 bins", "calibration 4 images"):
        assert word in done.stdout
    assert json.loads((tmp_path / "metrics.json").read_text())["split"] == "calibration"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tools/train.py", "configs/none.toml"), "configs/none.toml: no such file"),
        (("tools/train.py", "configs/quickstart.toml", "--set", "fit.epoch=3"), "did you mean 'epochs'"),
        (("tools/train.py", "configs/quickstart.toml", "--set", "data.train=trian"), "known: train, calibration"),
        (
            ("tools/train.py", "configs/quickstart.toml", "--set", "criterion.classification.kind=adafocal"),
            "set data.holdout = 0.1",
        ),
        (("tools/eval.py", "nowhere"), "nowhere: no such file"),
    ],
)
def test_mistakes_get_a_sentence_and_no_traceback(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    extra = ("--run", tmp_path / "run") if "train" in arguments[0] else ()
    done = run_tool(*arguments, *extra)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_taken_run_folder_is_left_alone(run: Path, digits: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    sets = [word for text in tiny(digits) for word in ("--set", text)]
    done = run_tool("tools/train.py", "configs/quickstart.toml", *sets, "--run", run)
    assert done.returncode == 1
    assert "already taken" in done.stderr
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*")} == before


def test_describe_prints_every_section() -> None:
    done = run_tool("tools/describe.py", "gamma")
    assert done.returncode == 0, done.stderr
    assert "criterion.classification[focal].gamma = 2.0" in done.stdout
    crops = run_tool("tools/describe.py", "gamma", "--crops")
    assert "loss.classification[inverse_focal].gamma = 2.0" in crops.stdout
