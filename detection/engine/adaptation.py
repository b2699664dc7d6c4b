"""What AdaFocal is shown after every epoch: scores of held-out images, and what they should have been."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from detection.distributed import broadcast_object, gather_objects
from detection.engine.parallel import Precision, autocast, broadcast_buffers
from detection.engine.predict import evaluation_mode, predict
from detection.engine.step import Assign
from detection.evaluation.matching import Case, match, outcome
from detection.losses.adafocal import AdaFocal, AdaFocalConfig
from detection.losses.criterion import Criterion
from detection.model.decode import DecodeConfig, decode
from detection.types import Batch, Detections, Matches, Predictions, Records

Adapt = Callable[[nn.Module, nn.Module], dict[str, list[float]]]

MATCHING = Case(0.5)
"""COCO's one-to-one matching, the rule of D-ECE."""


@dataclass(frozen=True, slots=True)
class HeldOut:
    """The images that a loss measures its calibration on, and how the model is applied to them."""

    records: Records
    batches: Callable[[], Iterable[Batch]]
    """This rank's share of the images, once and not augmented."""
    decode: DecodeConfig
    max_detections: int
    """Of an image and class, as evaluation counts them."""
    assign: Assign
    device: torch.device
    precision: Precision


@dataclass(frozen=True, slots=True, eq=False)
class Pairs:
    """Scores with their targets."""

    scores: Float[Tensor, "M"]
    targets: Float[Tensor, "M"]
    levels: Int[Tensor, "M"] | None
    """Pyramid level, where it is known."""


def adaptation(config: AdaFocalConfig, held_out: HeldOut) -> Adapt:
    """The update of an AdaFocal criterion by a model: measured on all ranks, computed on rank 0, broadcast to all."""

    def adapt(model: nn.Module, criterion: nn.Module) -> dict[str, list[float]]:
        assert isinstance(criterion, Criterion)
        loss = criterion.classification
        assert isinstance(loss, AdaFocal)
        measured = detection_pairs if config.pairs == "detection" else anchor_pairs
        pairs = measured(model, held_out, config)
        rows = {} if pairs is None else loss.adapt(pairs.scores, pairs.targets, pairs.levels)
        broadcast_buffers(loss)
        return broadcast_object(rows)

    return adapt


def detection_pairs(model: nn.Module, held_out: HeldOut, config: AdaFocalConfig) -> Pairs | None:
    """The held-out images' detections after NMS that score `score_min` or more; None on ranks other than 0.

    The target is 1 (or the IoU) for a true positive and 0 for a false one; ignored detections are left out.
    """
    options = held_out.decode.model_copy(update={"score_threshold": config.score_min})
    found = predict(
        model, held_out.batches(), lambda p, frames: decode(p, frames, options), held_out.device, held_out.precision
    )
    if found is None:
        return None
    return matched_pairs(found, held_out.records, held_out.max_detections, config)


def matched_pairs(found: Sequence[Detections], records: Records, max_detections: int, config: AdaFocalConfig) -> Pairs:
    """Detections' scores, and whether (or how well) each found an object of its own."""
    matching = match(found, records, (MATCHING,), max_detections)
    result = outcome(matching, MATCHING)
    counted = ~result.ignored
    target = result.correct * (result.iou if config.target == "iou" else 1.0)
    scores = matching.detections.scores[counted]
    return Pairs(torch.from_numpy(scores), torch.from_numpy(target[counted]), None)


def anchor_pairs(model: nn.Module, held_out: HeldOut, config: AdaFocalConfig) -> Pairs | None:
    """All (anchor, class) scores from `score_min` on in the held-out images, with the anchors' assigned outcomes.

    None on ranks other than 0. Ignored anchors are left out.
    """
    columns: list[Tensor] = [torch.zeros(0, 3)]
    with evaluation_mode(model), torch.no_grad():
        for batch in held_out.batches():
            with autocast(held_out.device, held_out.precision):
                predictions: Predictions = model(batch.to(held_out.device).images)
            anchors = [level.on_host or level for level in predictions.anchors]
            matches = held_out.assign(anchors, batch.targets, predictions.logits[0].shape[-1])
            columns.append(_active_elements(predictions, matches, config.score_min))
    shares = gather_objects(torch.cat(columns))
    if shares is None:
        return None
    scores, targets, levels = torch.cat(shares).unbind(1)
    return Pairs(scores, targets, levels.long())


def _active_elements(predictions: Predictions, matches: Matches, score_min: float) -> Float[Tensor, "m 3"]:
    """(score, outcome, level) rows of the elements that take part, on the CPU."""
    rows = []
    for level, (logits, labels) in enumerate(zip(predictions.logits, matches.labels, strict=True)):
        labels = labels.to(logits.device)
        scores = logits.float().sigmoid()
        active = (scores >= score_min) & (labels >= 0)[..., None]
        own = labels[..., None] == torch.arange(scores.shape[-1], device=scores.device)
        values = scores[active]
        rows.append(torch.stack([values, own[active].float(), torch.full_like(values, level)], dim=1))
    return torch.cat(rows).cpu()
