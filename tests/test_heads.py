"""Every classification head trains a small detector on digits for 200 steps from the prior bias; most of them learn.

All separate objects from background on eight images but MAE: its slope p (1 - p) is so small at the prior that the many
background anchors win, and every score goes to 0.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from detection.config import load
from detection.engine.step import StepParts, optimisation_step
from detection.experiment import Experiment, build
from detection.losses.foreground import class_scores
from detection.losses.table import CLASSIFICATION
from detection.types import Batch

STEPS = 200
DO_NOT_LEARN = {"mae"}
SOFTMAX = ("model.head={depth=1, norm='group', background=true}", "model.decode.activation=softmax")
HELD_OUT = ("data.holdout=0.2",)
TINY = (
    "device=cpu",
    "data.batch_size=8",
    "data.loader.workers=0",
    "data.source={kind='digits', image_size=64, min_size=20, max_size=48, train=10, calibration=5, test=5, ood=5}",
    "data.transform={size=64, mode='longest', max_size=64, horizontal_flip=0.0}",
    "model.backbone.name=test_resnet.r160_in1k",
    "model.pyramid={width=16, levels=3}",
    "model.head={depth=1, norm='group'}",
    "model.anchors={size_factor=3.0, scales=[1.0], ratios=[1.0]}",
    "criterion.box.kind=giou",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the eight images are rendered, once for all heads."""
    return tmp_path_factory.mktemp("digits")


def own_and_background_scores(parts: StepParts, batch: Batch, activation: Any) -> tuple[float, float]:
    """Mean score of the positives' own classes, and of the background anchors' highest class."""
    predictions = parts.model(batch.images)
    matches = parts.assign(predictions.anchors, batch.targets, parts.num_classes)
    own, background = [], []
    for logits, labels in zip(predictions.logits, matches.labels, strict=True):
        scores = class_scores(logits, activation)
        positive = (labels >= 0) & (labels < parts.num_classes)
        own.append(scores[positive].gather(1, labels[positive].long()[:, None])[:, 0])
        background.append(scores[labels == parts.num_classes].amax(1))
    return torch.cat(own).mean().item(), torch.cat(background).mean().item()


@pytest.mark.slow
@pytest.mark.parametrize("kind", [c().kind for c in CLASSIFICATION])
def test_head_trains_from_the_prior_bias(kind: str, folder: Path) -> None:
    extra = SOFTMAX if kind.startswith("softmax") else HELD_OUT if kind == "adafocal" else ()
    overrides = (*TINY, *extra, f"data.source.folder={folder}", f"criterion.classification.kind={kind}")
    experiment = load(Experiment, None, overrides)
    made = build(experiment, torch.device("cpu"))
    batch = next(iter(made.batches.epoch(0, 0)))
    optimiser = torch.optim.AdamW(made.model.parameters(), lr=5e-3)
    parts = StepParts(
        made.model, made.assign, made.criterion, optimiser, len(made.class_names), torch.device("cpu"), "float32", 10.0
    )
    made.model.train()
    rows = torch.stack([optimisation_step(parts, [batch]) for _ in range(STEPS)])
    with torch.no_grad():
        own, background = own_and_background_scores(parts, batch, experiment.criterion.activation)
    assert rows.isfinite().all()
    assert all(p.isfinite().all() for p in made.model.parameters())
    if kind in DO_NOT_LEARN:
        assert own < 0.01
        assert background < 0.01
    else:
        assert own > background + 0.25
        # A soft target leaves its own entropy, and box quality moves while the boxes improve.
        assert rows[-1, 1] < (0.9 if experiment.criterion.classification.uses_quality else 0.5) * rows[0, 1]
