"""Predictions -> Detections: threshold, best of each level, boxes in the file's frame, class-wise NMS."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from detection.config import Section
from detection.ops.boxes import clip_boxes, decode_deltas
from detection.ops.nms import classwise_nms
from detection.types import Detections, Frame, Predictions


class DecodeConfig(Section):
    """How predictions become detections."""

    score_threshold: float = Field(0.05, ge=0, lt=1)
    """Detections score higher than this."""
    top_k: int = Field(1000, gt=0)
    """The most (anchor, class) pairs that a level passes to NMS."""
    iou_threshold: float = Field(0.5, ge=0, le=1)
    """NMS drops a box whose IoU with a better one of its class is higher than this."""
    max_detections: int = Field(100, gt=0)
    """The most detections of an image."""
    activation: Literal["sigmoid", "softmax"] = "sigmoid"
    """What turns logits into scores; a softmax takes the last logit as background."""


@torch.no_grad()
def decode(predictions: Predictions, frames: Sequence[Frame], config: DecodeConfig) -> list[Detections]:
    """The detections of each image, boxes in its file's frame, by descending score; on the CPU.

    What is left after the thresholds comes to the host in one transfer an image; NMS runs there.
    """
    levels = [_candidates(predictions, level, config) for level in range(len(predictions.logits))]
    return [_detect([level[n] for level in levels], frame, config) for n, frame in enumerate(frames)]


def to_file_frame(boxes: Float[Tensor, "D 4"], frame: Frame) -> Float[Tensor, "D 4"]:
    """Boxes in network pixels as boxes in the file's pixels, cut to the file's image."""
    padding = boxes.new_tensor(frame.padding).repeat(2)
    scale = boxes.new_tensor(frame.scale).repeat(2)
    return clip_boxes((boxes - padding) / scale, frame.size)


def _candidates(predictions: Predictions, level: int, config: DecodeConfig) -> list[Float[Tensor, "k 6"]]:
    """For each image the level's best pairs: box, score, label in a row, by descending score."""
    logits, threshold = _log_scores(predictions.logits[level].float(), config)
    deltas, anchors = predictions.deltas[level], predictions.anchors[level].boxes
    num_classes = logits.shape[-1]
    rows = []
    for n, flat in enumerate(logits.flatten(1)):
        passing = torch.nonzero(flat > threshold).squeeze(1)
        best, order = flat[passing].topk(min(config.top_k, len(passing)))
        pair = passing[order]
        anchor, label = pair // num_classes, pair % num_classes
        boxes = decode_deltas(anchors[anchor], deltas[n, anchor].float())
        score = best.sigmoid() if config.activation == "sigmoid" else best.exp()
        rows.append(torch.cat([boxes, score[:, None], label[:, None].float()], dim=1))
    return rows


def _log_scores(logits: Float[Tensor, "N A_l C"], config: DecodeConfig) -> tuple[Float[Tensor, "N A_l K"], float]:
    """What orders the pairs as their scores do, and the threshold on that scale."""
    p = config.score_threshold
    if config.activation == "sigmoid":
        return logits, math.log(p / (1 - p)) if p > 0 else -math.inf
    return logits.log_softmax(-1)[..., :-1], math.log(p) if p > 0 else -math.inf


def _detect(levels: Sequence[Float[Tensor, "_ 6"]], frame: Frame, config: DecodeConfig) -> Detections:
    rows = torch.cat(list(levels)).cpu()
    rows = rows[rows.isfinite().all(dim=1)]
    boxes, scores, labels = to_file_frame(rows[:, :4], frame), rows[:, 4], rows[:, 5].long()
    keep = classwise_nms(boxes, scores, labels, config.iou_threshold)[: config.max_detections]
    return Detections(frame.image_id, boxes[keep], scores[keep], labels[keep])
