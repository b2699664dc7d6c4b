"""Assignment by the highest IoU with two thresholds (Faster R-CNN, RetinaNet); equals torchvision's `Matcher`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from pydantic import Field, model_validator

from detection.assignment.claims import Claims, covered_slots, settle
from detection.assignment.contest import contest
from detection.assignment.scene import Assign, Scene, lay_out
from detection.assignment.windows import ROUNDING, Pairs, nearest, visit
from detection.config import Section
from detection.types import AnchorLevel, Matches, Target


class MaxIouConfig(Section):
    """An anchor takes the object it overlaps most, where the IoU is high enough."""

    kind: Literal["max_iou"] = "max_iou"
    positive: float = Field(0.5, gt=0, le=1)
    """An anchor whose best IoU is at least this is positive."""
    negative: float = Field(0.4, gt=0, le=1)
    """An anchor whose best IoU is below this is negative; in between it is ignored."""
    keep_best: bool = True
    """The anchors of an object's best IoU, all that tie, are positive however low it is."""
    crowd_ioa: float = Field(0.5, gt=0, le=1)
    """A non-positive anchor is ignored where at least this share of it lies in one crowd or difficult region."""

    @model_validator(mode="after")
    def _ordered(self) -> MaxIouConfig:
        if self.negative > self.positive:
            raise ValueError(f"negative ({self.negative}) must not be above positive ({self.positive})")
        return self

    def build(self) -> Assign:
        """The assignment function of these options."""
        return partial(assign_max_iou, config=self)


def assign_max_iou(
    anchors: Sequence[AnchorLevel], targets: Sequence[Target], num_classes: int, config: MaxIouConfig
) -> Matches:
    """The class and the object that each anchor of a batch has to predict.

    Equals `Matcher(positive, negative, allow_low_quality_matches=keep_best)` on the full float32 IoU matrix of the
    objects that are no crowd: the lowest object row wins a tie, every anchor that ties for an object's best IoU is
    kept, and a kept anchor takes the object that it overlaps most itself. One deviation: an object that overlaps no
    anchor at all keeps none, where the matrix would call all anchors its best. Time and memory grow with the pairs
    of overlapping boxes, never with anchors x objects.

    Source: Lin et al. 2017, Focal Loss for Dense Object Detection, section 4.
    Errors: ValueError where anchors are not float32 on the host or not a grid.
    """
    scene = lay_out(anchors, targets)
    claims = Claims(scene)
    kept = np.zeros(scene.num_slots, np.bool_)
    solid = ~scene.crowd & (scene.area > 0) & np.isfinite(scene.boxes).all(axis=1)
    objects = np.flatnonzero(solid)
    best = np.zeros(len(scene.boxes), np.float32)
    for pairs in visit(scene, objects, config.negative):
        claims.enter(pairs, pairs.value >= np.float32(config.negative))
        _keep_ties(pairs, config.negative, best, kept)
    if config.keep_best:
        weak = objects[best[objects] < np.float32(config.negative)]
        if len(weak):
            _keep_weak(scene, claims, weak, objects, config.negative, best, kept)
    else:
        kept[:] = False
    slots = claims.slots()
    values = claims.values(slots)
    positive = kept[slots] | (values >= np.float32(config.positive))
    between = ~positive & (values >= np.float32(config.negative))
    winners = slots[positive]
    ignored = (covered_slots(scene, config.crowd_ioa), slots[between])
    return settle(scene, num_classes, winners, claims.objects(winners), ignored)


def _keep_ties(pairs: Pairs, floor: float, best: Float[ndarray, "M"], kept: Bool[ndarray, "slots"]) -> None:
    """Marks the anchors of each object's best IoU, if that is above 0 and reaches the floor of complete pairs."""
    np.maximum.at(best, pairs.object, pairs.value)
    tied = (pairs.value == best[pairs.object]) & (pairs.value >= np.float32(floor)) & (pairs.value > 0)
    kept[pairs.slot[tied]] = True


def _keep_weak(
    scene: Scene,
    claims: Claims,
    weak: Int[ndarray, "w"],
    objects: Int[ndarray, "m"],
    negative: float,
    best: Float[ndarray, "M"],
    kept: Bool[ndarray, "slots"],
) -> None:
    """Keeps the best anchors of objects that none overlaps by the negative threshold, and finds those anchors' objects.

    Such an anchor may overlap another object more, by less than the threshold too.
    """
    best[weak] = 0
    bound = np.maximum(nearest(scene, weak).astype(np.float64) * (1 - ROUNDING), np.finfo(np.float32).tiny)
    for pairs in visit(scene, weak, np.broadcast_to(bound, (len(scene.grids.level), len(weak)))):
        _keep_ties(pairs, 0.0, best, kept)
        claims.enter(pairs, pairs.value > 0)
    slots = np.flatnonzero(kept)
    slots = slots[claims.values(slots) < np.float32(negative)]
    for pairs in contest(scene, objects, slots, claims.values(slots)):
        claims.enter(pairs, pairs.value > 0)
