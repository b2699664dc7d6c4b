"""The loss of an image classifier: one row of K softmax logits an image, no background, the mean over the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Literal

import torch
from jaxtyping import Float, Integer
from pydantic import Field
from torch import Tensor, nn

from detection.config import Section
from detection.losses.adafocal_rows import AdaFocalRowsConfig
from detection.losses.foreground import Foreground
from detection.losses.mbls import MblsConfig
from detection.losses.mdca import DcaConfig, MdcaConfig
from detection.losses.mmce import MmceConfig, WeightedMmceConfig
from detection.losses.rows import (
    brier_rows,
    ce_rows,
    flsd53_rows,
    focal_rows,
    inverse_focal_rows,
    label_smoothing_rows,
    mae_rows,
)
from detection.types import Losses, Matches, Predictions


class CeRowsConfig(Section):
    """Cross entropy."""

    kind: Literal["ce"] = "ce"

    def build(self) -> RowLoss:
        return RowLoss(ce_rows)


class FocalRowsConfig(Section):
    """Softmax focal loss."""

    kind: Literal["focal"] = "focal"
    gamma: float = Field(2.0, ge=0, le=20)
    """Exponent of 1 - p of the true class; 0 is cross entropy."""

    def build(self) -> RowLoss:
        return RowLoss(partial(focal_rows, gamma=self.gamma))


class InverseFocalRowsConfig(Section):
    """The focal loss with 1 + p in the place of 1 - p."""

    kind: Literal["inverse_focal"] = "inverse_focal"
    gamma: float = Field(2.0, ge=0, le=3.5)
    """Exponent of 1 + p of the true class; above 3.59 the loss would reward wrong answers."""

    def build(self) -> RowLoss:
        return RowLoss(partial(inverse_focal_rows, gamma=self.gamma))


class Flsd53RowsConfig(Section):
    """The focal loss with gamma 5 where the true class's score is below 0.2, else 3."""

    kind: Literal["flsd53"] = "flsd53"

    def build(self) -> RowLoss:
        return RowLoss(flsd53_rows)


class BrierRowsConfig(Section):
    """Squared distance of the scores from the truth, summed over classes."""

    kind: Literal["brier"] = "brier"

    def build(self) -> RowLoss:
        return RowLoss(brier_rows)


class LabelSmoothingRowsConfig(Section):
    """Cross entropy against a truth that leaves a share to all classes."""

    kind: Literal["label_smoothing"] = "label_smoothing"
    smoothing: float = Field(0.05, ge=0, lt=1)
    """That share."""
    off_class: bool = False
    """Spread it over the other classes alone, not over all of them."""

    def build(self) -> RowLoss:
        return RowLoss(partial(label_smoothing_rows, smoothing=self.smoothing, off_class=self.off_class))


class MaeRowsConfig(Section):
    """Absolute distance of the scores from the truth (L1), summed over classes. Known for not learning."""

    kind: Literal["mae"] = "mae"

    def build(self) -> RowLoss:
        return RowLoss(mae_rows)


class RowLoss(nn.Module):
    """A loss without state: a function of logits and labels, one value a row."""

    def __init__(self, rows: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, logits: Float[Tensor, "N K"], labels: Integer[Tensor, "N"]) -> Float[Tensor, "N"]:
        return self.rows(logits, labels)


ROWS = (
    CeRowsConfig,
    FocalRowsConfig,
    InverseFocalRowsConfig,
    Flsd53RowsConfig,
    AdaFocalRowsConfig,
    BrierRowsConfig,
    LabelSmoothingRowsConfig,
    MaeRowsConfig,
)
TERMS = (MmceConfig, WeightedMmceConfig, MdcaConfig, DcaConfig, MblsConfig)

RowsConfig = Annotated[
    CeRowsConfig
    | FocalRowsConfig
    | InverseFocalRowsConfig
    | Flsd53RowsConfig
    | AdaFocalRowsConfig
    | BrierRowsConfig
    | LabelSmoothingRowsConfig
    | MaeRowsConfig,
    Field(discriminator="kind"),
]
TermConfig = Annotated[
    MmceConfig | WeightedMmceConfig | MdcaConfig | DcaConfig | MblsConfig, Field(discriminator="kind")
]


class ClassifierLossConfig(Section):
    classification: RowsConfig = CeRowsConfig()
    """The loss of each image; its mean over the batch is trained on."""
    auxiliary: tuple[TermConfig, ...] = ()
    """Calibration terms of the batch, added with their weights."""

    def build(self, num_classes: int) -> ClassifierCriterion:
        terms = [(term.weight, term.build(num_classes)) for term in self.auxiliary]
        return ClassifierCriterion(self.classification.build(), terms)


class ClassifierCriterion(nn.Module):
    """The mean loss of a batch, with its calibration terms. There is no box loss."""

    def __init__(self, classification: nn.Module, auxiliary: Sequence[tuple[float, nn.Module]] = ()) -> None:
        super().__init__()
        self.classification = classification
        self.auxiliary_weights = [weight for weight, _ in auxiliary]
        self.auxiliary = nn.ModuleList(module for _, module in auxiliary)

    def forward(self, predictions: Predictions, matches: Matches) -> Losses:
        """The step's losses in float32, also under autocast; predictions and matches are of one anchor an image."""
        logits, labels = predictions.logits[0][:, 0], matches.labels[0][:, 0]
        with torch.autocast(logits.device.type, enabled=False):
            loss = self.batch_loss(logits, labels)
        return Losses(loss, torch.zeros_like(loss), loss, matches.num_positive)

    def batch_loss(self, logits: Float[Tensor, "N K"], labels: Integer[Tensor, "N"]) -> Float[Tensor, ""]:
        """The mean of the rows' losses, and the weighted terms."""
        exact = logits if logits.dtype == torch.float64 else logits.float()
        loss: Tensor = self.classification(exact, labels).mean()
        if len(self.auxiliary):
            rows = whole_foreground(exact, labels)
            for weight, term in zip(self.auxiliary_weights, self.auxiliary, strict=True):
                loss = loss + weight * term(rows)
        return loss


def whole_foreground(logits: Float[Tensor, "N K"], labels: Integer[Tensor, "N"]) -> Foreground:
    """Every image as a positive whose box is exact: what calibration terms read."""
    return Foreground(
        logits=logits,
        scores=logits.softmax(-1),
        labels=labels.long(),
        iou=torch.ones(len(logits), dtype=logits.dtype, device=logits.device),
        levels=((logits[:, None], labels[:, None]),),
        activation="softmax",
    )
