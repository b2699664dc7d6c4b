"""The analyses of a small detector of random weights, through the functions and through the tool."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import detection.analysis as analysis
from detection.analysis import Choice, analyse, curvature, element_margins, evenly_spread, measure_curvature, open_run
from detection.evaluation.curvature import TOLERANCE, hessian_product, random_direction
from tools.analyse import main

PIXELS = 64 * 64


@pytest.fixture(scope="module")
def measured(trained: Path) -> dict[str, float | int | bool]:
    return measure_curvature(trained, 2)


def test_curvature_has_the_numbers_that_a_study_tabulates(measured: dict[str, float | int | bool]) -> None:
    names = ("eigenvalue", "residual", "iterations", "converged", "trace", "trace_error", "images", "parameters")
    assert set(names) <= measured.keys()
    assert measured["images"] == 2
    assert measured["converged"]
    assert measured["eigenvalue"] > 0 > measured["smallest"]
    longest = max(measured["eigenvalue"], -measured["smallest"])
    assert 0 <= max(measured["residual"], measured["smallest_residual"]) <= TOLERANCE * longest
    assert measured["trace_error"] > 0
    assert all(type(value) in (float, int, bool) for value in measured.values())


def test_curvature_is_the_same_again_and_a_function_of_the_images(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("detection.evaluation.curvature.ITERATIONS", 3)
    subject = open_run(trained)
    first, again, other = (curvature(subject, images, probes=2) for images in (1, 1, 2))
    assert {k: v for k, v in first.items() if k != "seconds"} == {k: v for k, v in again.items() if k != "seconds"}
    assert other["eigenvalue"] != first["eigenvalue"]
    assert other["trace"] != first["trace"]


@pytest.mark.parametrize("normaliser", ["batch", "image"])
@pytest.mark.parametrize(("chunk", "kept"), [(PIXELS, 0), (2 * PIXELS, 99 * PIXELS)])
def test_chunks_add_up_to_the_training_loss_of_one_batch(
    trained: Path, monkeypatch: pytest.MonkeyPatch, normaliser: str, chunk: int, kept: int
) -> None:
    """Against the Hessian of what a training step computes for all images at once, in float64."""
    monkeypatch.setattr(analysis, "PIXELS_A_CHUNK", chunk)
    monkeypatch.setattr(analysis, "PIXELS_KEPT", kept)
    subject = open_run(trained, [f"criterion.normaliser={normaliser}"])
    subject.model.double()
    parameters = [p for p in subject.model.parameters() if p.requires_grad]
    vector = random_direction(sum(p.numel() for p in parameters), 0, parameters[0].detach())
    product, used = analysis.training_hessian(subject, 3, parameters)
    assert used == 3
    (batch,) = analysis._batches(subject, 3, 0)
    matches = analysis._predict(subject, batch)[1]
    whole = hessian_product(lambda: subject.criterion(subject.model(batch.images), matches).total, parameters)
    torch.testing.assert_close(product(vector), whole(vector), rtol=1e-6, atol=1e-6 * whole(vector).abs().max().item())


def test_images_are_evenly_spread_over_the_split(trained: Path) -> None:
    records = open_run(trained).records
    assert len(records) == 3
    assert np.array_equal(evenly_spread(records, 2).image_ids, records.image_ids[[0, 2]])
    assert np.array_equal(evenly_spread(records, 50).image_ids, records.image_ids)


def test_held_out_images_are_left_out(trained: Path) -> None:
    subject = open_run(trained, ["data.holdout=0.5"])
    assert 0 < len(subject.records) < 3


def test_margins_are_of_the_positive_anchors_and_of_all_else(trained: Path) -> None:
    subject = open_run(trained)
    (batch,) = analysis._batches(subject, 3, 0)
    predictions, matches = analysis._predict(subject, batch)
    positive, negative, used = element_margins(subject, 3)
    assert used == 3
    assert len(positive) == matches.num_positive.item() > 0
    elements = sum(int((y >= 0).sum()) * z.shape[-1] for z, y in zip(predictions.logits, matches.labels, strict=True))
    assert len(positive) + len(negative) == elements


def test_what_is_asked_for_is_written(run: Path) -> None:
    content = analyse(run, Choice(curvature=False, images=3))
    folder = run / "analysis"
    assert json.loads((folder / "analysis.json").read_text()) == content
    assert content.keys() == {"step", "loss_share", "minimisers"}
    share = content["loss_share"]
    assert share["hardest"][-1] == 0.5
    for side in ("positive", "negative"):
        assert 0.5 <= share[side]["0"][-1] <= share[side]["2"][-1] <= 1
    assert content["minimisers"]["own"]["focal"][19] == pytest.approx(0.4, abs=0.005)
    assert {p.name for p in folder.iterdir()} == {"analysis.json", "loss_share.png", "minimisers.png"}
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in folder.glob("*.png"))


def test_a_folder_that_cannot_be_written_is_named(run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(analysis.DataError, match="file/below: the analysis cannot be written"):
        analyse(run, Choice(curvature=False, loss_share=False), out=tmp_path / "file" / "below")


def test_the_tool_prints_tables(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("detection.evaluation.curvature.ITERATIONS", 3)
    monkeypatch.setattr(sys, "argv", ["analyse.py", str(run), "--images=1", "--probes=2", f"--out={tmp_path / 'out'}"])
    assert main() == 0
    shown = " ".join(capsys.readouterr().out.split())
    for word in ("largest eigenvalue", "3 iterations, NOT converged", "2 random probes", "this run: focal"):
        assert word in shown
    assert json.loads((tmp_path / "out/analysis.json").read_text())["curvature"]["probes"] == 2


def test_the_tool_says_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["analyse.py", str(tmp_path), "--minimisers"])
    assert main() == 1
    assert "no such file, nor a run folder" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["analyse.py", str(tmp_path), "--probes=1"])
    with pytest.raises(SystemExit):
        main()
    assert "--probes 2 or more" in capsys.readouterr().err
