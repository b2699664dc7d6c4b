"""The detector's loss, level by level without concatenation. The only place that knows the normaliser."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from detection.config import Section
from detection.distributed import sum_across_ranks, world_size
from detection.losses.box import BoxLoss, SmoothL1Config
from detection.losses.focal import FocalConfig
from detection.losses.table import BoxConfig, ClassificationConfig
from detection.ops.focal import Implementation, choose
from detection.types import Losses, Matches, Predictions

Normaliser = Literal["batch", "image"]


class CriterionConfig(Section):
    classification: ClassificationConfig = FocalConfig()
    box: BoxConfig = SmoothL1Config()
    box_weight: float = Field(1.0, ge=0)
    """Factor of the box loss in the total."""
    normaliser: Normaliser = "batch"
    """"batch": losses are divided by the positives of the whole batch, averaged over ranks, at least 1. "image": each
    image's by its own positives, then averaged over the images, as torchvision does."""

    def build(
        self, num_classes: int, implementation: Implementation = "auto", device: torch.device | None = None
    ) -> Criterion:
        """The criterion for a model on `device` (CPU if None); "auto" takes that device's fused kernel."""
        chosen = choose(implementation, device or torch.device("cpu"))
        classification = self.classification.build(num_classes, chosen, device)
        return Criterion(classification, self.box.build(), self.box_weight, self.normaliser, chosen)


class Criterion(nn.Module):
    """Classification and box loss of one step, normalised."""

    def __init__(
        self,
        classification: nn.Module,
        box: BoxLoss,
        box_weight: float,
        normaliser: Normaliser,
        implementation: Implementation,
    ) -> None:
        super().__init__()
        self.classification = classification
        self.box = box
        self.box_weight = box_weight
        self.normaliser = normaliser
        self.implementation = implementation

    def forward(self, predictions: Predictions, matches: Matches) -> Losses:
        """The step's losses in float32, also under autocast. Nothing here waits for the device."""
        with torch.autocast(predictions.logits[0].device.type, enabled=False):
            if self.normaliser == "batch":
                scale = 1 / batch_normaliser(matches.num_positive)
                classification = self._classify(predictions, matches, scale)
                image_scale = scale.expand(len(predictions.logits[0]))
            else:
                image_scale = 1 / image_normalisers(matches, len(predictions.logits[0]))
                classification = self._classify_by_image(predictions, matches, image_scale)
            box = self._regress(predictions, matches, image_scale)
        total = classification + self.box_weight * box
        return Losses(classification, box, total, matches.num_positive)

    def _classify(self, predictions: Predictions, matches: Matches, scale: Tensor) -> Tensor:
        levels = zip(predictions.logits, matches.labels, strict=True)
        return torch.stack([self.classification(logits, labels, scale) for logits, labels in levels]).sum()

    def _classify_by_image(self, predictions: Predictions, matches: Matches, scale: Tensor) -> Tensor:
        levels = zip(predictions.logits, matches.labels, strict=True)
        losses = [
            self.classification(logits[n : n + 1], labels[n : n + 1], scale[n])
            for logits, labels in levels
            for n in range(len(logits))
        ]
        return torch.stack(losses).sum()

    def _regress(self, predictions: Predictions, matches: Matches, image_scale: Tensor) -> Tensor:
        """Only the positives' rows are read. A level without any is an empty gather, so its graph stays whole."""
        rows, anchors, weights = [], [], []
        for deltas, level, index in zip(predictions.deltas, predictions.anchors, matches.positives, strict=True):
            count = deltas.shape[1]
            rows.append(deltas.reshape(-1, 4)[index])
            anchors.append(level.boxes[index % count])
            weights.append(image_scale[index // count])
        boxes = torch.cat(matches.boxes)
        loss: Tensor = self.box(torch.cat(rows), torch.cat(anchors), boxes, torch.cat(weights))
        return loss


def batch_normaliser(num_positive: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """Positives averaged over ranks, at least 1. Source: Carion et al. 2020 (DETR), section A.2, as released."""
    return (sum_across_ranks(num_positive) / world_size()).clamp(min=1)


def image_normalisers(matches: Matches, num_images: int) -> Float[Tensor, "N"]:
    """Each image's positives, at least 1, times the number of images."""
    counts = torch.zeros(num_images, device=matches.num_positive.device)
    for labels, index in zip(matches.labels, matches.positives, strict=True):
        counts.index_add_(0, index // labels.shape[1], torch.ones_like(index, dtype=counts.dtype))
    return counts.clamp(min=1) * num_images
