"""The one matching pass: which detection found which object, for every IoU threshold and area range at once.

AP, recall, every calibration error and LRP read its result. The rule is COCO's greedy one-to-one rule. Each pair of an
IoU threshold and an area range is a *case* and owns one bit of a 64-bit mask, so that the greedy scan runs once, with
bit operations, instead of once a case.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Integer, UInt64
from numpy import ndarray

from detection.types import DataError, Detections, Records

COCO_THRESHOLDS = tuple(np.linspace(0.5, 0.95, 10).tolist())
AREA_RANGES = {"all": (0.0, 1e10), "small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, 1e10)}
"""Square pixels, both ends included."""
ANY_OVERLAP = float(np.nextafter(0.0, 1.0))
"""The threshold that stands for "IoU > 0"."""
MAX_CASES = 63
PAIR_CHUNK = 1 << 21


@dataclass(frozen=True, slots=True)
class Case:
    """One row of the result: an IoU threshold (IoU >= it matches) and an area range by its name."""

    iou_threshold: float
    area: str = "all"


COCO_CASES = tuple(Case(t, a) for a in AREA_RANGES for t in COCO_THRESHOLDS)


@dataclass(frozen=True, slots=True, eq=False)
class FlatDetections:
    """All images' detections in scoring order: by class, then falling score, then image id, then input order."""

    image: Int[ndarray, "D"]
    """Position of the image among the sorted image ids."""
    boxes: Float[ndarray, "D 4"]
    scores: Float[ndarray, "D"]
    labels: Int[ndarray, "D"]
    rank: Int[ndarray, "D"]
    """0 for the best detection of its image and class, and so on; all below the detection limit."""
    source: Int[ndarray, "D"]
    """Row in the concatenation of the given detections."""
    area: Float[ndarray, "D"]


@dataclass(frozen=True, slots=True, eq=False)
class FlatObjects:
    """All annotated objects by class, then image id, then file order."""

    image: Int[ndarray, "M"]
    boxes: Float[ndarray, "M 4"]
    labels: Int[ndarray, "M"]
    crowd: Bool[ndarray, "M"]
    area: Float[ndarray, "M"]
    """As the file states it: area ranges of objects go by this, those of detections by their box."""
    source: Int[ndarray, "M"]
    """Row in `Records.boxes`."""


@dataclass(frozen=True, slots=True, eq=False)
class Pairs:
    """Detections and objects of the same image and class that overlap enough for some case, by detection."""

    detection: Int[ndarray, "C"]
    object: Int[ndarray, "C"]
    iou: Float[ndarray, "C"]
    overlap: Float[ndarray, "C"]
    """What is compared with thresholds: the IoU, or for a crowd the share of the detection that it covers."""


@dataclass(frozen=True, slots=True, eq=False)
class Matching:
    """Who matched whom in every case. Read one case through `outcome`."""

    num_images: int
    num_classes: int
    detections: FlatDetections
    objects: FlatObjects
    cases: tuple[Case, ...]
    pairs: Pairs
    taken: UInt64[ndarray, "C"]
    """Bit c: the pair is matched in case c."""
    class_offsets: Int[ndarray, "K_1"]
    """Detections of class k are rows class_offsets[k]:class_offsets[k + 1]. K_1 is K + 1."""


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What became of every detection in one case; rows as in `FlatDetections`."""

    case: Case
    matched: Int[ndarray, "D"]
    """Row in `FlatObjects`, -1 where nothing was matched."""
    iou: Float[ndarray, "D"]
    """IoU with the matched object (with a crowd: the covered share); 0 where nothing was matched."""
    correct: Bool[ndarray, "D"]
    """True positive."""
    ignored: Bool[ndarray, "D"]
    """Neither true nor false: matched to a crowd or to an object outside the area range, or itself outside it."""
    num_objects: Int[ndarray, "K"]
    """Objects of each class that count: not crowd, inside the area range."""


def match(
    detections: Sequence[Detections],
    records: Records,
    cases: Sequence[Case] = COCO_CASES,
    max_detections: int = 100,
) -> Matching:
    """The matches of all detections with all annotated objects, in every case.

    Per image and class the `max_detections` best-scored detections take part, in falling score (ties: input order).
    Each takes the free object of highest overlap that reaches the threshold (ties: the later object), objects that
    count before ignored ones; a crowd is never used up. A prefix of the ranking has the same matches, so smaller
    detection limits need no other pass.

    Errors: DataError for an unknown image id, a label outside the classes, a score or box that is not finite.
    Source: pycocotools' COCOeval, whose results it equals except where an annotation has id 0 (it takes that for
    "unmatched").
    """
    if not 0 < len(cases) <= MAX_CASES:
        raise ValueError(f"{len(cases)} cases; 1 to {MAX_CASES} fit one pass")
    found = _flatten_detections(detections, records, max_detections)
    objects = _flatten_objects(records)
    pairs = _overlapping_pairs(found, objects, len(records), min(c.iou_threshold for c in cases))
    return Matching(
        num_images=len(records),
        num_classes=records.num_classes,
        detections=found,
        objects=objects,
        cases=tuple(cases),
        pairs=pairs,
        taken=_greedy(pairs, objects, cases),
        class_offsets=np.searchsorted(found.labels, np.arange(records.num_classes + 1)),
    )


def outcome(matching: Matching, case: Case) -> Outcome:
    """What became of every detection in one of the matching's cases."""
    found, objects, pairs = matching.detections, matching.objects, matching.pairs
    rows = matched_pairs(matching, case)
    matched = np.full(len(found.scores), -1, np.int64)
    matched[pairs.detection[rows]] = pairs.object[rows]
    iou = np.zeros(len(found.scores))
    iou[pairs.detection[rows]] = pairs.overlap[rows]
    regular = counts_in(objects, case.area)
    correct = np.zeros(len(found.scores), bool)
    correct[pairs.detection[rows]] = regular[pairs.object[rows]]
    ignored = ~correct & ((matched >= 0) | ~inside(found.area, case.area))
    return Outcome(case, matched, iou, correct, ignored, num_objects(matching, case.area))


def matched_pairs(matching: Matching, case: Case) -> Int[ndarray, "c"]:
    """Rows of `Matching.pairs` that are matched in one case, by detection."""
    bit = np.uint64(1 << matching.cases.index(case))
    return np.flatnonzero(matching.taken & bit)


def num_objects(matching: Matching, area: str) -> Int[ndarray, "K"]:
    """Objects of each class that count in an area range."""
    objects = matching.objects
    return np.bincount(objects.labels[counts_in(objects, area)], minlength=matching.num_classes)


def counts_in(objects: FlatObjects, area: str) -> Bool[ndarray, "M"]:
    """Which objects have to be found in an area range; the others are ignored there."""
    counting: Bool[ndarray, "M"] = inside(objects.area, area) & ~objects.crowd
    return counting


def inside(area: Float[ndarray, "n"], name: str) -> Bool[ndarray, "n"]:
    """Which areas lie in a named range."""
    low, high = AREA_RANGES[name]
    within: Bool[ndarray, "n"] = (area >= low) & (area <= high)
    return within


def _flatten_detections(detections: Sequence[Detections], records: Records, limit: int) -> FlatDetections:
    image_order = np.argsort(records.image_ids, kind="stable")
    image, boxes, scores, labels = _concatenate(detections, records.image_ids[image_order])
    _check(records, image_order, image, boxes, scores, labels)
    order = np.lexsort((image,)) if np.any(np.diff(image) < 0) else np.arange(len(image))
    order = order[np.argsort(-scores[order], kind="stable")]
    order = order[np.argsort(_narrow(labels[order]), kind="stable")]
    rank = _rank_in_image(_narrow(image[order]), labels[order])
    if np.any(rank >= limit):
        order, rank = order[rank < limit], rank[rank < limit]
    boxes = boxes[order]
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return FlatDetections(image[order], boxes, scores[order], labels[order], rank, order, area)


def _concatenate(
    detections: Sequence[Detections], image_ids: Int[ndarray, "R"]
) -> tuple[Int[ndarray, "D"], Float[ndarray, "D 4"], Float[ndarray, "D"], Int[ndarray, "D"]]:
    position = {image_id: i for i, image_id in enumerate(image_ids.tolist())}
    unknown = next((d.image_id for d in detections if d.image_id not in position), None)
    if unknown is not None:
        raise DataError(f"detections: image id {unknown!r} is not one of the {len(image_ids)} annotated images")
    filled = [d for d in detections if len(d.scores)]
    if not filled:
        return np.zeros(0, np.int64), np.zeros((0, 4)), np.zeros(0), np.zeros(0, np.int64)
    counts = [len(d.scores) for d in filled]
    image = np.repeat([position[d.image_id] for d in filled], counts)
    boxes = torch.cat([d.boxes.detach().cpu() for d in filled]).double().numpy()
    scores = torch.cat([d.scores.detach().cpu() for d in filled]).double().numpy()
    labels = torch.cat([d.labels.detach().cpu() for d in filled]).long().numpy()
    return image, boxes, scores, labels


def _check(
    records: Records,
    image_order: Int[ndarray, "R"],
    image: Int[ndarray, "D"],
    boxes: Float[ndarray, "D 4"],
    scores: Float[ndarray, "D"],
    labels: Int[ndarray, "D"],
) -> None:
    faults = (
        ("score", scores, ~np.isfinite(scores), "finite numbers"),
        ("box", boxes, ~np.isfinite(boxes).all(axis=1), "finite numbers"),
        ("label", labels, (labels < 0) | (labels >= records.num_classes), f"0..{records.num_classes - 1}"),
    )
    for name, values, wrong, allowed in faults:
        if wrong.any():
            row = int(np.flatnonzero(wrong)[0])
            where = records.image_ids[image_order[image[row]]]
            raise DataError(f"detections of image {where}: {name} {values[row].tolist()}; allowed: {allowed}")


def _narrow(values: Int[ndarray, "n"]) -> Integer[ndarray, "n"]:
    """The same numbers in 16 bits where they fit: numpy sorts those by radix, several times faster."""
    return values.astype(np.uint16) if len(values) and values.max() < 1 << 16 else values


def _rank_in_image(image: Integer[ndarray, "D"], labels: Int[ndarray, "D"]) -> Int[ndarray, "D"]:
    """How many earlier rows have the same image and label; rows are grouped by label."""
    order = np.argsort(image, kind="stable")
    order = order[np.argsort(_narrow(labels[order]), kind="stable")]
    image, labels = image[order], labels[order]
    position = np.arange(len(order))
    starts = np.ones(len(order), bool)
    starts[1:] = (image[1:] != image[:-1]) | (labels[1:] != labels[:-1])
    rank = np.empty(len(order), np.int64)
    rank[order] = position - np.maximum.accumulate(np.where(starts, position, 0))
    return rank


def _flatten_objects(records: Records) -> FlatObjects:
    image_order = np.argsort(records.image_ids, kind="stable")
    position = np.empty(len(records), np.int64)
    position[image_order] = np.arange(len(records))
    image = np.repeat(position, np.diff(records.offsets))
    order = np.lexsort((image, records.labels))
    return FlatObjects(
        image=image[order],
        boxes=records.boxes[order].astype(np.float64, copy=False),
        labels=records.labels[order],
        crowd=records.crowd[order],
        area=records.area[order],
        source=order,
    )


def _overlapping_pairs(found: FlatDetections, objects: FlatObjects, num_images: int, lowest: float) -> Pairs:
    """Every detection with every object of its image and class whose overlap reaches `lowest`."""
    keys = objects.labels * num_images + objects.image
    groups, starts, counts = np.unique(keys, return_index=True, return_counts=True)
    if len(groups) == 0 or len(found.scores) == 0:
        none = np.zeros(0, np.int64)
        return Pairs(none, none, np.zeros(0), np.zeros(0))
    wanted = found.labels * num_images + found.image
    group = np.minimum(np.searchsorted(groups, wanted), len(groups) - 1)
    rows = np.flatnonzero(groups[group] == wanted)
    first, number = starts[group[rows]], counts[group[rows]]
    ends = np.cumsum(number)
    parts = []
    begin = 0
    while begin < len(rows):
        done = ends[begin - 1] if begin else 0
        stop = max(int(np.searchsorted(ends, done + PAIR_CHUNK, side="right")), begin + 1)
        part = slice(begin, stop)
        parts.append(_pairs_of(found, objects, rows[part], first[part], number[part], lowest))
        begin = stop
    if not parts:
        none = np.zeros(0, np.int64)
        return Pairs(none, none, np.zeros(0), np.zeros(0))
    columns = [np.concatenate(c) for c in zip(*parts, strict=True)]
    return Pairs(*columns)


def _pairs_of(
    found: FlatDetections,
    objects: FlatObjects,
    rows: Int[ndarray, "d"],
    first: Int[ndarray, "d"],
    number: Int[ndarray, "d"],
    lowest: float,
) -> tuple[Int[ndarray, "c"], Int[ndarray, "c"], Float[ndarray, "c"], Float[ndarray, "c"]]:
    ends = np.cumsum(number)
    d = np.repeat(rows, number)
    o = np.arange(ends[-1]) + np.repeat(first - (ends - number), number)
    a, b = found.boxes, objects.boxes
    width = np.minimum(a[d, 2], b[o, 2]) - np.maximum(a[d, 0], b[o, 0])
    height = np.minimum(a[d, 3], b[o, 3]) - np.maximum(a[d, 1], b[o, 1])
    touching = (width > 0) & (height > 0)
    if lowest > 0:
        d, o, width, height = (x[touching] for x in (d, o, width, height))
        touching = np.ones(len(d), bool)
    shared = np.where(touching, width * height, 0.0)
    object_area = (b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1])
    own = found.area[d]
    iou = np.divide(shared, own + object_area[o] - shared, out=np.zeros(len(d)), where=touching)
    covered = np.divide(shared, own, out=np.zeros(len(d)), where=touching)
    overlap = np.where(objects.crowd[o], covered, iou)
    keep = overlap >= lowest
    return d[keep], o[keep], iou[keep], overlap[keep]


def _greedy(pairs: Pairs, objects: FlatObjects, cases: Sequence[Case]) -> UInt64[ndarray, "C"]:
    """For every pair, the cases in which it is matched, as a bit mask."""
    reached = _cases_reached(pairs.overlap, cases)
    counted = np.zeros(len(objects.labels), np.uint64)
    for bit, case in enumerate(cases):
        counted |= counts_in(objects, case.area).astype(np.uint64) << np.uint64(bit)
    as_regular = reached & counted[pairs.object]
    as_ignored = reached & ~counted[pairs.object]
    pair = np.concatenate([np.flatnonzero(as_regular), np.flatnonzero(as_ignored)])
    mask = np.concatenate([as_regular[as_regular > 0], as_ignored[as_ignored > 0]])
    second_choice = np.arange(len(pair)) >= np.count_nonzero(as_regular)
    order = np.lexsort((-pairs.object[pair], -pairs.overlap[pair], second_choice, pairs.detection[pair]))
    pair, mask = pair[order], mask[order]
    taken = np.zeros(len(pairs.detection), np.uint64)
    won = _scan(pairs.detection[pair].tolist(), pairs.object[pair].tolist(), mask.tolist(), objects.crowd)
    np.bitwise_or.at(taken, pair, np.array(won, np.uint64))
    return taken


def _cases_reached(overlap: Float[ndarray, "C"], cases: Sequence[Case]) -> UInt64[ndarray, "C"]:
    thresholds = np.minimum([c.iou_threshold for c in cases], 1 - 1e-10)
    order = np.argsort(thresholds, kind="stable")
    table = np.zeros(len(cases) + 1, np.uint64)
    table[1:] = np.bitwise_or.accumulate(np.uint64(1) << order.astype(np.uint64))
    return table[np.searchsorted(thresholds[order], overlap, side="right")]


def _scan(detection: list[int], target: list[int], mask: list[int], crowd: Bool[ndarray, "M"]) -> list[int]:
    """The cases that each (detection, object) entry wins; entries come in the order in which the rule looks at them.

    A plain loop over integers: an entry needs what earlier entries took, and a mask settles all its cases at once.
    """
    everything = (1 << MAX_CASES) - 1
    used_up = np.where(crowd, 0, everything).tolist()
    free = [everything] * len(used_up)
    won = []
    current, looking = -1, everything
    for d, o, cases in zip(detection, target, mask, strict=True):
        if d != current:
            current, looking = d, everything
        take = cases & looking & free[o]
        if take:
            looking ^= take
            free[o] ^= take & used_up[o]
        won.append(take)
    return won
