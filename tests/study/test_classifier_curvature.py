"""A trained classifier's curvature against its dense Hessian."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from detection.classification_task import ClassificationExperiment, load_classifier, train_classifier, training_crops
from detection.config import load
from detection.engine.checkpoint import load as load_checkpoint
from detection.study.classifier_curvature import measure_classifier_curvature

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "crops.toml"
IMAGES = 5


def test_it_is_that_of_the_dense_hessian(tmp_path: Path) -> None:
    overrides = [
        "device=cpu",
        f"data.source={{kind='digits', folder='{tmp_path / 'digits'}', image_size=64, max_size=40, train=24, "
        "calibration=8, test=4, ood=4}",
        "data.batch_size=16",
        "crops={size=8, imbalance=2.0}",
        "model={width=8, stages=1}",
        "loss.classification={kind='focal', gamma=2.0}",
        "loss.auxiliary=[{kind='mdca'}]",
        "fit.epochs=2",
    ]
    train_classifier(CONFIG, overrides, tmp_path / "run", resume=False)
    path = tmp_path / "run" / "last.pt"
    found = measure_classifier_curvature(path, IMAGES)

    experiment = load(ClassificationExperiment, CONFIG, overrides)
    crops = training_crops(experiment)
    rows = torch.linspace(0, len(crops) - 1, IMAGES, dtype=torch.float64).round().long().unique()
    pixels = torch.from_numpy(crops.plain()[rows.numpy()].copy()).permute(0, 3, 1, 2)
    model = load_classifier(load_checkpoint(path), path, experiment).eval()
    criterion = experiment.loss.build(len(crops.class_names))
    parameters = dict(model.named_parameters())
    sizes = [p.numel() for p in parameters.values()]
    flat = torch.cat([p.detach().flatten() for p in parameters.values()])

    def loss(vector: Tensor) -> Tensor:
        pieces = zip(parameters.items(), vector.split(sizes), strict=True)
        moved = {name: piece.view_as(p) for (name, p), piece in pieces}
        logits = torch.func.functional_call(model, moved, (pixels,)).logits[0][:, 0]
        total: Tensor = criterion.batch_loss(logits, torch.from_numpy(crops.labels)[rows])
        return total

    hessian = torch.autograd.functional.hessian(loss, flat)
    eigenvalues = torch.linalg.eigvalsh(hessian.double())
    assert found["images"] == len(rows)
    assert found["parameters"] == len(flat)
    assert found["converged"]
    assert found["eigenvalue"] == pytest.approx(eigenvalues[-1].item(), rel=1e-3)
    assert found["trace"] == pytest.approx(hessian.trace().item(), abs=4 * found["trace_error"] + 1e-3)
