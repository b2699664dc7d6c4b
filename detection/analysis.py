"""What a trained detector's loss looks like: its curvature, which elements hold it, which scores it prefers."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from detection.config import override
from detection.data.dataset import DetectionDataset, Sample
from detection.data.holdout import hold_out
from detection.data.loader import collate
from detection.engine.checkpoint import Checkpoint, find_checkpoint, load_weights, write_atomically
from detection.engine.checkpoint import load as load_checkpoint
from detection.engine.parallel import choose_device
from detection.evaluation.curvature import PROBES, Product, curvature_numbers, hessian_product, weighted_sum
from detection.evaluation.loss_share import focal_share_curves, margins, thin_out
from detection.experiment import Experiment, check_classes, load_model, read_split
from detection.losses.criterion import Criterion
from detection.losses.focal import FocalConfig
from detection.losses.minimisers import preferred_scores
from detection.losses.table import CLASSIFICATION, ClassificationConfig
from detection.report.analysis_plots import draw_loss_share, draw_minimisers
from detection.types import Batch, DataError, Matches, Predictions, Records

ANALYSIS, FOLDER = "analysis.json", "analysis"
LOSS_SHARE_PNG, MINIMISERS_PNG = "loss_share.png", "minimisers.png"

CURVATURE_IMAGES = 32
SHARE_IMAGES = 256

PIXELS_A_CHUNK = 16 * 128 * 128
"""Images are differentiated twice in chunks of at most so many pixels; a ResNet-18 needs about 1.5 GB for one."""
PIXELS_KEPT = 2 * PIXELS_A_CHUNK
"""Of at most so many pixels in all the graphs stay in memory; of more they are made anew for every product."""
MOST_NEGATIVES = 2_000_000
READ_AT_ONCE = 16

GAMMAS = (0.0, 0.5, 1.0, 2.0, 5.0)
"""Of the loss shares and the preferred scores."""
HARDEST = (0.001, 0.01, 0.05, 0.1, 0.2, 0.5)
FREQUENCIES = tuple(i / 40 for i in range(1, 40))


@dataclass(frozen=True, slots=True, eq=False)
class Subject:
    """A trained detector in evaluation mode, its criterion as it was trained with, and the images that it saw."""

    experiment: Experiment
    checkpoint: Checkpoint
    model: nn.Module
    criterion: Criterion
    """Its reference implementation, which can be differentiated twice."""
    records: Records
    device: torch.device


@dataclass(frozen=True, slots=True)
class Choice:
    """What to analyse, and on how much."""

    curvature: bool = True
    loss_share: bool = True
    minimisers: bool = True
    images: int | None = None
    """By default 32 for the curvature and 256 for the loss shares."""
    probes: int = PROBES
    """Of the trace."""


def measure_curvature(
    place: Path, images: int = CURVATURE_IMAGES, overrides: Sequence[str] = ()
) -> dict[str, float | int | bool]:
    """The curvature of a run's training loss at its best checkpoint; `place` is a run folder or a checkpoint.

    The loss is that of one batch of `images` training images, evenly spread over the split and not augmented, as a
    function of all parameters that train, in float32, with the model in evaluation mode. See `curvature_numbers`.
    Errors: one of `USER_ERRORS`.
    """
    return curvature(open_run(place, overrides), images)


def analyse(place: Path, choice: Choice, overrides: Sequence[str] = (), out: Path | None = None) -> dict[str, Any]:
    """What `choice` asks for about a run's best checkpoint; written to `out` as analysis.json and pictures.

    `out`: by default the folder "analysis" of the run. Errors: one of `USER_ERRORS`.
    """
    subject = open_run(place, overrides)
    folder = out or find_checkpoint(place).parent / FOLDER
    content: dict[str, Any] = {"step": subject.checkpoint.step}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if choice.curvature:
            content["curvature"] = curvature(subject, choice.images or CURVATURE_IMAGES, choice.probes)
        if choice.loss_share:
            content["loss_share"] = _loss_share(subject, choice.images or SHARE_IMAGES, folder / LOSS_SHARE_PNG)
        if choice.minimisers:
            content["minimisers"] = _minimisers(subject, folder / MINIMISERS_PNG)
    except OSError as error:
        raise DataError(f"{folder}: the analysis cannot be written ({error.strerror})") from None
    write_atomically(folder / ANALYSIS, (json.dumps(content, indent=1) + "\n").encode())
    return content


def open_run(place: Path, overrides: Sequence[str] = ()) -> Subject:
    """The detector of a run folder's best checkpoint, or of a checkpoint."""
    path = find_checkpoint(place)
    checkpoint = load_checkpoint(path)
    experiment = override(Experiment, checkpoint.config, overrides, str(path))
    device = choose_device(experiment.device)
    records = read_split(experiment, experiment.data.train)
    check_classes(checkpoint, path, records, experiment.data.train)
    if experiment.data.holdout > 0:
        records, _ = hold_out(records, experiment.data.holdout, experiment.seed)
    criterion = experiment.criterion.build(records.num_classes, "reference", device)
    load_weights(criterion, checkpoint.criterion, path)
    model = load_model(checkpoint, path, experiment)
    return Subject(experiment, checkpoint, model.to(device).eval(), criterion.to(device), records, device)


def evenly_spread(records: Records, count: int) -> Records:
    """`count` of the records at equal distances, the first and the last among them; all where there are no more."""
    chosen = np.linspace(0, len(records) - 1, min(count, len(records))).round().astype(np.int64)
    return records.select(chosen)


def curvature(subject: Subject, images: int, probes: int = PROBES) -> dict[str, float | int | bool]:
    """See `measure_curvature`."""
    started = time.perf_counter()
    parameters = [p for p in subject.model.parameters() if p.requires_grad]
    # Convolutions in TF32 would leave three digits.
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        product, used = training_hessian(subject, images, parameters)
        found = curvature_numbers(product, parameters, probes)
    return {**found, "images": used, "seconds": time.perf_counter() - started}


def training_hessian(subject: Subject, images: int, parameters: Sequence[Tensor]) -> tuple[Product, int]:
    """Products with the Hessian of the loss of one batch of training images, and how many these are.

    The batch is taken apart into chunks with the normaliser of the whole, so that the sum of their losses is its own.
    Calibration terms of the positive anchors do not add up over chunks: with any of them there is one chunk.
    """
    limit = 0 if subject.criterion.auxiliary else PIXELS_A_CHUNK
    chunks = [(batch, _predict(subject, batch)[1]) for batch in _batches(subject, images, limit)]
    used = sum(len(batch.targets) for batch, _ in chunks)
    pixels = sum(batch.images[:, 0].numel() for batch, _ in chunks)
    total = torch.stack([matches.num_positive for _, matches in chunks]).sum()
    by_image = subject.criterion.normaliser == "image"
    products = [
        hessian_product(_loss_of(subject, batch, matches, total), parameters, pixels <= PIXELS_KEPT)
        for batch, matches in chunks
    ]
    return weighted_sum(products, [len(batch.targets) / used if by_image else 1.0 for batch, _ in chunks]), used


def _loss_of(subject: Subject, batch: Batch, matches: Matches, total: Tensor) -> Callable[[], Tensor]:
    """The training loss of a chunk, divided by the positives of all of them."""
    matches = replace(matches, num_positive=total)

    def loss() -> Tensor:
        total: Tensor = subject.criterion(subject.model(batch.images), matches).total
        return total

    return loss


def _batches(subject: Subject, images: int, most_pixels: int) -> Iterator[Batch]:
    """Training images, not augmented, in batches of at most `most_pixels` (but one image); 0: in one batch."""
    data = subject.experiment.data
    records = evenly_spread(subject.records, images)
    dataset = DetectionDataset(records, data.transform.build(train=False), subject.experiment.seed, data.images)
    waiting: list[Sample] = []
    for start in range(0, len(dataset), READ_AT_ONCE):
        keys = [(0, i) for i in range(start, min(start + READ_AT_ONCE, len(dataset)))]
        for sample in dataset.read(keys)[0]:
            if waiting and 0 < most_pixels < sum(s.image[0].numel() for s in [*waiting, sample]):
                yield collate(waiting).to(subject.device)
                waiting = []
            waiting.append(sample)
    yield collate(waiting).to(subject.device)


@torch.no_grad()
def _predict(subject: Subject, batch: Batch) -> tuple[Predictions, Matches]:
    predictions: Predictions = subject.model(batch.images)
    anchors = [level.on_host or level for level in predictions.anchors]
    assign = subject.experiment.assignment.build()
    return predictions, assign(anchors, batch.targets, subject.records.num_classes).to(subject.device)


def element_margins(subject: Subject, images: int) -> tuple[Tensor, Tensor, int]:
    """The margins of the positive elements and of a sample of the negative ones, and the number of images."""
    quota = MOST_NEGATIVES // min(images, len(subject.records)) + 1
    activation = subject.experiment.criterion.activation
    positives, negatives, used = [], [], 0
    for batch in _batches(subject, images, PIXELS_A_CHUNK):
        predictions, matches = _predict(subject, batch)
        sides = [margins(z.float(), y, activation) for z, y in zip(predictions.logits, matches.labels, strict=True)]
        positives.append(torch.cat([positive for positive, _ in sides]).cpu())
        count = len(batch.targets)
        negatives.append(thin_out(torch.cat([negative for _, negative in sides]).cpu(), quota * count, used))
        used += count
    return torch.cat(positives), torch.cat(negatives), used


def _loss_share(subject: Subject, images: int, picture: Path) -> dict[str, Any]:
    positives, negatives, used = element_margins(subject, images)
    positive, negative = (focal_share_curves(values, GAMMAS) for values in (positives, negatives))
    draw_loss_share(positive, negative, picture)
    held = [
        {f"{gamma:g}": [curve.held_by_hardest(x) for x in HARDEST] for gamma, curve in curves.items()}
        for curves in (positive, negative)
    ]
    return {
        "images": used,
        "positives": len(positives),
        "negatives": len(negatives),
        "hardest": list(HARDEST),
        "positive": held[0],
        "negative": held[1],
    }


def _minimisers(subject: Subject, picture: Path) -> dict[str, Any]:
    trained = subject.experiment.criterion.classification
    family = [FocalConfig(alpha=-1, gamma=gamma) for gamma in GAMMAS]
    defaults: list[ClassificationConfig] = [config() for config in CLASSIFICATION]
    own = _preferred(trained, subject.criterion.classification)
    panels: dict[str, dict[str, Sequence[float]]] = {
        "focal loss, neither outcome weighted": {f"gamma {c.gamma:g}": _preferred(c) for c in family},
        "every loss with its defaults": {c.kind: _preferred(c) for c in defaults},
    }
    draw_minimisers(FREQUENCIES, panels, (f"this run: {trained.kind}", own), picture)
    return {"frequency": list(FREQUENCIES), "own": {trained.kind: own}, "panels": panels}


def _preferred(config: ClassificationConfig, trained: nn.Module | None = None) -> list[float]:
    """The preferred scores of a loss, with the state of a trained one where there is one."""
    loss = config.build(1, "reference")
    if trained is not None:
        loss.load_state_dict(trained.state_dict())
    found: list[float] = preferred_scores(loss, FREQUENCIES, config.activation, config.uses_quality).tolist()
    return found
