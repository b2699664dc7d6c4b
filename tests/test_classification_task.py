"""The crops task from configuration to metrics.json: what is written, resume, roles of the splits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from detection.classification_task import (
    ClassificationExperiment,
    build_classifier,
    read_crops,
    select_crops,
    train_classifier,
    unfamiliar_crops,
)
from detection.config import ConfigError, load
from detection.engine.checkpoint import CheckpointError
from detection.engine.checkpoint import load as load_checkpoint
from detection.engine.journal import read_journal

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "crops.toml"


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("digits"))


def small(digits: str, *more: str) -> list[str]:
    return [
        "device=cpu",
        f"data.source={{kind='digits', folder='{digits}', image_size=64, max_size=40, train=24, calibration=16, "
        "test=12, ood=6}",
        "data.batch_size=16",
        "crops.size=16",
        "model={width=8, stages=2}",
        "fit.epochs=3",
        *more,
    ]


def metrics_of(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "evaluation" / "test" / "metrics.json").read_text())
    return content


@pytest.fixture(scope="module")
def adafocal(tmp_path_factory: pytest.TempPathFactory, digits: str) -> Path:
    run = tmp_path_factory.mktemp("runs") / "adafocal"
    overrides = small(digits, "loss.classification.kind=adafocal", "loss.auxiliary=[{kind='mdca'}]")
    train_classifier(CONFIG, [*overrides, "train_metrics=true"], run, resume=False)
    return run


def test_a_run_leaves_its_numbers(adafocal: Path) -> None:
    content = metrics_of(adafocal)
    assert content["checkpoint"] == "last.pt"
    assert content["calibrator"]["kind"] == "softmax_temperature"
    raw, calibrated = content["raw"]["metrics"], content["calibrated"]["metrics"]
    assert raw.keys() == calibrated.keys() == content["raw"]["settings"].keys()
    assert raw["accuracy"] == calibrated["accuracy"]
    assert {"f1", "ece", "ece_em", "ece_classwise", "nll", "brier", "ood_auroc_entropy"} <= raw.keys()
    assert 0 <= raw["ood_auroc_confidence"] <= 1
    with np.load(adafocal / "evaluation" / "test" / "logits.npz") as arrays:
        assert arrays["logits"].shape == (len(arrays["labels"]), 8)
        assert (arrays["logits"].argmax(1) == arrays["labels"]).mean() == pytest.approx(raw["accuracy"])
        assert arrays["ood_logits"].shape[1] == 8


def test_the_journal_has_every_epoch(adafocal: Path) -> None:
    events = read_journal(adafocal)
    rows: dict[str, list[dict[str, Any]]] = {}
    for event in events:
        rows.setdefault(event["event"], []).append(event)
    assert [len(rows[name]) for name in ("train", "evaluation", "adapt")] == [3, 3, 3]
    assert {"loss", "accuracy", "f1", "ece_em", "train_loss", "train_accuracy"} <= rows["evaluation"][0][
        "metrics"
    ].keys()
    assert len(rows["adapt"][0]["gamma"]) == 15


def test_the_gammas_are_in_the_checkpoint(adafocal: Path) -> None:
    adapted = [e for e in read_journal(adafocal) if e["event"] == "adapt"][-1]["gamma"]
    state = load_checkpoint(adafocal / "last.pt").criterion
    np.testing.assert_allclose(state["classification.gamma"].numpy(), adapted)
    assert len(set(adapted)) > 1


def test_resuming_gives_the_same_run(adafocal: Path, tmp_path: Path, digits: str, monkeypatch: Any) -> None:
    overrides = small(digits, "loss.classification.kind=adafocal", "loss.auxiliary=[{kind='mdca'}]")
    overrides.append("train_metrics=true")
    run = tmp_path / "run"
    stop_after(monkeypatch, adaptations=1)
    with pytest.raises(KeyboardInterrupt):
        train_classifier(CONFIG, overrides, run, resume=False)
    monkeypatch.undo()
    outcome = train_classifier(CONFIG, overrides, run, resume=True)
    assert outcome.fit.step == load_checkpoint(adafocal / "last.pt").step
    for name, value in load_checkpoint(adafocal / "last.pt").model.items():
        torch.testing.assert_close(load_checkpoint(run / "last.pt").model[name], value, rtol=0, atol=0)
    assert metrics_of(run) == metrics_of(adafocal)
    with pytest.raises(CheckpointError, match="seed: 0 -> 1"):
        train_classifier(CONFIG, [*overrides, "seed=1"], run, resume=True)


def stop_after(monkeypatch: Any, adaptations: int) -> None:
    """Interrupts the process at the second epoch's adaptation: the first epoch's checkpoint is on the disk."""
    from detection.losses.adafocal_rows import AdaFocalRows

    original, calls = AdaFocalRows.adapt, []

    def adapt(self: AdaFocalRows, confidence: torch.Tensor, correct: torch.Tensor) -> Any:
        calls.append(1)
        if len(calls) > adaptations:
            raise KeyboardInterrupt
        return original(self, confidence, correct)

    monkeypatch.setattr(AdaFocalRows, "adapt", adapt)


def test_a_finished_run_is_reported_again(adafocal: Path, digits: str) -> None:
    before = metrics_of(adafocal)
    overrides = small(digits, "loss.classification.kind=adafocal", "loss.auxiliary=[{kind='mdca'}]")
    outcome = train_classifier(CONFIG, [*overrides, "train_metrics=true"], adafocal, resume=True)
    assert outcome.test is not None
    assert outcome.test.raw.metrics["nll"] == before["raw"]["metrics"]["nll"]
    assert metrics_of(adafocal) == before


def test_splits_keep_their_roles(digits: str) -> None:
    experiment = load(ClassificationExperiment, CONFIG, small(digits))
    holdout, select = select_crops(experiment)
    assert not set(holdout.image_ids) & set(select.image_ids)
    assert abs(len(set(holdout.image_ids)) - len(set(select.image_ids))) <= 1
    assert read_crops(experiment, "train").class_names[-1] == "seven"
    assert [set(c.class_names) for c in unfamiliar_crops(experiment)] == [{"eight", "nine"}]


def test_classes_left_out_become_unfamiliar(digits: str) -> None:
    experiment = load(ClassificationExperiment, CONFIG, small(digits, "data.unseen=['zero', 'three']"))
    train = read_crops(experiment, "train")
    assert train.class_names == ("one", "two", "four", "five", "six", "seven")
    assert train.category_ids == (2, 3, 5, 6, 7, 8)
    assert set(train.labels) <= set(range(6))
    assert len(unfamiliar_crops(experiment)) == 2
    with pytest.raises(ConfigError, match=r"data\.unseen: \['ten'\] are not classes"):
        read_crops(load(ClassificationExperiment, CONFIG, small(digits, "data.unseen=['ten']")), "train")


def test_a_long_tail_is_for_training_alone(digits: str) -> None:
    experiment = load(ClassificationExperiment, CONFIG, small(digits, "crops.imbalance=4.0"))
    components = build_classifier(experiment, torch.device("cpu"))
    labels = components.batches.crops.labels  # type: ignore[attr-defined]
    counts = np.bincount(labels, minlength=8)
    assert counts[0] == max(counts)
    assert (np.diff(counts) <= 0).all()
    assert len(select_crops(experiment)[1]) == len(
        select_crops(load(ClassificationExperiment, CONFIG, small(digits)))[1]
    )


def test_adafocal_needs_a_holdout(digits: str) -> None:
    overrides = small(digits, "loss.classification.kind=adafocal", "data.holdout=0")
    with pytest.raises(ConfigError, match=r"needs data\.holdout above 0"):
        build_classifier(load(ClassificationExperiment, CONFIG, overrides), torch.device("cpu"))
