"""The toy training with an AdaFocal criterion. Run as a script: `toy_adaptation.py FOLDER`, one process a rank."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))

from toy_training import CLASSES, SIDE, ToyBatches, ToyModel, assign, collate, components, sample, toy_config

from detection import distributed
from detection.engine.adaptation import HeldOut, adaptation
from detection.engine.fit import Components, FitConfig, FitResult, fit
from detection.losses.adafocal import AdaFocalConfig
from detection.losses.criterion import Criterion, CriterionConfig
from detection.model.decode import DecodeConfig
from detection.types import Batch, Records

IMAGES = 10
CPU = torch.device("cpu")


def records() -> Records:
    """The annotations of the first toy images of epoch 9, which is never trained."""
    targets = [sample(9, i)[1] for i in range(IMAGES)]
    counts = [len(t.labels) for t in targets]
    boxes = torch.cat([t.boxes for t in targets]).double().numpy()
    return Records(
        class_names=CLASSES,
        category_ids=(1, 2, 7),
        paths=np.array([b""] * IMAGES),
        image_ids=np.arange(IMAGES) + 100,
        sizes=np.full((IMAGES, 2), SIDE),
        offsets=np.cumsum([0, *counts]),
        boxes=boxes,
        labels=torch.cat([t.labels for t in targets]).numpy(),
        crowd=np.zeros(len(boxes), bool),
        area=np.full(len(boxes), 16.0),
    )


def batches() -> Iterator[Batch]:
    """This rank's held-out images, one a batch."""
    for i in range(distributed.rank(), IMAGES, distributed.world_size()):
        yield collate([sample(9, i)])


def held_out() -> HeldOut:
    return HeldOut(records(), batches, DecodeConfig(score_threshold=0.2), 100, assign, CPU, "float32")


def loss_config(**options: Any) -> AdaFocalConfig:
    return AdaFocalConfig(**{"min_count": 1, "rate": 3.0, **options})


def criterion(config: AdaFocalConfig) -> Criterion:
    return CriterionConfig(classification=config).build(len(CLASSES), "reference")


def adaptive(config: AdaFocalConfig, fit_config: FitConfig, **changes: Any) -> Components:
    parts = components(fit_config, ToyBatches())
    return replace(parts, criterion=criterion(config), adapt=adaptation(config, held_out()), **changes)


def train(run: Path, config: AdaFocalConfig, resume: bool = False, **changes: Callable[..., Any]) -> FitResult:
    fit_config = toy_config()
    return fit(adaptive(config, fit_config, **changes), fit_config, run, CPU, resume)


def adapted(config: AdaFocalConfig) -> dict[str, Any]:
    """What one update of a fresh criterion by a fresh model gives on this rank."""
    own = criterion(config)
    if distributed.rank():  # a rank's own state does not matter
        own.classification.table.fill_(7.0)  # type: ignore[operator,union-attr]
    rows = adaptation(config, held_out())(ToyModel(), own)
    return {"rows": rows, "state": own.state_dict()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    distributed.initialise(CPU)
    folder = Path(sys.argv[1])
    found = {pairs: adapted(loss_config(pairs=pairs)) for pairs in ("detection", "anchor")}
    torch.save(found, folder / f"{distributed.world_size()}-{distributed.rank()}.pt")
    train(folder / "run", loss_config(pairs="anchor"))
    distributed.barrier()
    os._exit(0)
