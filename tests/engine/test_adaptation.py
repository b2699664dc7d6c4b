"""After every epoch AdaFocal sees held-out images: the right pairs, on every rank the same, and all of it resumable."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from test_fit import assert_same
from toy_adaptation import adapted, batches, criterion, held_out, loss_config, records, train
from toy_training import ToyModel, at_call, run_ranks

from detection.engine.adaptation import anchor_pairs, detection_pairs, matched_pairs
from detection.engine.checkpoint import load
from detection.engine.journal import read_journal
from detection.types import Detections

CPU = torch.device("cpu")
SCRIPT = str(Path(__file__).with_name("toy_adaptation.py"))


def test_anchor_pairs_are_all_elements_from_the_least_score_on() -> None:
    model = ToyModel().train()
    found = anchor_pairs(model, held_out(), loss_config(score_min=0.45))
    assert model.training
    assert found is not None
    assert found.levels is not None
    model.eval()
    expected = []
    for batch in batches():
        scores = model(batch.images).logits[0].sigmoid()[0]
        for anchor, row in enumerate(scores.tolist()):
            for label, score in enumerate(row):
                labels = batch.targets[0].labels.tolist()
                hit = anchor < len(labels) and labels[anchor] == label
                if score >= 0.45:
                    expected.append((round(score, 5), float(hit), 0))
    columns = (found.scores.tolist(), found.targets.tolist(), found.levels.tolist())
    assert [(round(s, 5), t, level) for s, t, level in zip(*columns, strict=True)] == expected
    assert 50 < len(expected) < 480


def test_detection_pairs_are_matched_one_to_one_and_ignored_ones_dropped() -> None:
    one = records()
    image, first = 101, one[1]
    boxes = torch.tensor([[0.0, 0, 4, 4], [0, 0, 4, 4], [0, 0, 4, 3], [8, 8, 12, 12]])
    label = int(first.labels[0])
    found = Detections(image, boxes, torch.tensor([0.9, 0.8, 0.7, 0.6]), torch.full((4,), label))
    pairs = matched_pairs([found], one, 100, loss_config())
    assert [round(s, 4) for s in pairs.scores.tolist()] == [0.9, 0.8, 0.7, 0.6]
    assert pairs.targets.tolist() == [1, 0, 0, 0]
    found = Detections(image, boxes[2:], torch.tensor([0.7, 0.6]), torch.full((2,), label))
    assert matched_pairs([found], one, 100, loss_config(target="iou")).targets.tolist() == [0.75, 0]
    one.crowd[:] = True
    assert matched_pairs([found], one, 100, loss_config()).scores.tolist() == pytest.approx([0.6])


def test_detections_count_from_the_losss_least_score_on_whatever_is_displayed() -> None:
    low, high = (detection_pairs(ToyModel(), held_out(), loss_config(score_min=s)) for s in (0.1, 0.45))
    assert low is not None
    assert high is not None
    assert low.scores.min() < 0.45 < high.scores.min()
    assert len(low.scores) > len(high.scores) > 20


@pytest.mark.parametrize("mode", ["detection", "anchor"])
def test_two_ranks_hold_what_one_computes(mode: str, two_ranks: Path) -> None:
    first, second = (torch.load(two_ranks / f"2-{rank}.pt", weights_only=True)[mode] for rank in (0, 1))
    assert first["rows"] == second["rows"]
    assert first["state"].keys() == second["state"].keys()
    assert all(torch.equal(value, second["state"][name]) for name, value in first["state"].items())
    alone = adapted(loss_config(pairs=mode))
    assert first["rows"]["count"] == alone["rows"]["count"]
    assert first["rows"]["gamma"] == pytest.approx(alone["rows"]["gamma"], rel=1e-12)
    assert alone["rows"]["gamma"] != criterion(loss_config()).classification.gamma[0].tolist()  # type: ignore[index,union-attr]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    assert run_ranks(2, str(folder), script=SCRIPT) == [0, 0]
    return folder


def test_training_on_two_ranks_journals_every_epoch(two_ranks: Path) -> None:
    events = [e for e in read_journal(two_ranks / "run") if e["event"] == "adapt"]
    assert [e["epoch"] for e in events] == [1.0, 2.0]
    assert all(len(e[name]) == 15 for e in events for name in ("edges", "gap", "gamma", "count"))
    stored = load(two_ranks / "run/last.pt").criterion["classification.gamma"]
    assert stored[0].tolist() == events[-1]["gamma"]
    assert events[0]["gamma"] != events[1]["gamma"]


def test_an_interrupted_run_resumes_with_its_table(tmp_path: Path) -> None:
    config = loss_config(pairs="anchor", edges="moving")
    train(tmp_path / "whole", config)
    stop = at_call(12, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert train(tmp_path / "part", config, assign=stop).interrupted
    assert not train(tmp_path / "part", config, resume=True).interrupted
    assert_same(load(tmp_path / "whole/last.pt"), load(tmp_path / "part/last.pt"))
    histories = [[e for e in read_journal(tmp_path / name) if e["event"] == "adapt"] for name in ("whole", "part")]
    assert histories[0] == histories[1]
    assert len(histories[0]) == 2
