from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.models.detection._utils import Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou

from detection.assignment import windows
from detection.assignment.max_iou import MaxIouConfig
from detection.config import ConfigError, parse
from detection.types import AnchorLevel, Matches, Target

MakeLevel = Callable[[Sequence[Sequence[float]], tuple[int, int], tuple[int, int]], AnchorLevel]
MakeTarget = Callable[..., Target]
Pyramid = Callable[[int, int], list[AnchorLevel]]


def reference(anchors: Sequence[AnchorLevel], target: Target, config: MaxIouConfig) -> Tensor:
    """torchvision's matches of one image from the full matrix, with the crowd rule on top; rows of `target`."""
    boxes = torch.cat([level.boxes for level in anchors])
    solid = torch.nonzero(~target.crowd)[:, 0]
    matrix = box_iou(target.boxes[solid], boxes)
    reached = matrix.amax(dim=1) > 0 if len(solid) else torch.zeros(0, dtype=torch.bool)
    solid, matrix = solid[reached], matrix[reached]
    matches = torch.full((len(boxes),), -1)
    if len(solid):
        matches = Matcher(config.positive, config.negative, config.keep_best)(matrix)
        matches = torch.where(matches >= 0, solid[matches.clamp(min=0)], matches)
    for x1, y1, x2, y2 in target.boxes[target.crowd]:
        width = (torch.minimum(boxes[:, 2], x2) - torch.maximum(boxes[:, 0], x1)).clamp(min=0)
        height = (torch.minimum(boxes[:, 3], y2) - torch.maximum(boxes[:, 1], y1)).clamp(min=0)
        area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        matches[(width * height / area >= config.crowd_ioa) & (matches < 0)] = -2
    return matches


def check(
    anchors: Sequence[AnchorLevel], targets: Sequence[Target], config: MaxIouConfig | None = None, num_classes: int = 7
) -> Matches:
    """Asserts that every field of the matches says what torchvision's matcher says, and returns them."""
    config = config or MaxIouConfig()
    matches = config.build()(anchors, targets, num_classes)
    expected = torch.stack([reference(anchors, target, config) for target in targets])
    assert torch.equal(torch.cat(matches.gt_index, dim=1).long(), expected)
    start = 0
    for level, anchor_level in enumerate(anchors):
        count = len(anchor_level.boxes)
        rows = expected[:, start : start + count]
        start += count
        labels = torch.full_like(rows, num_classes)
        labels[rows == -2] = -1
        image, anchor = torch.nonzero(rows >= 0, as_tuple=True)
        found = rows[image, anchor]
        pairs = list(zip(image.tolist(), found.tolist(), strict=True))
        boxes = torch.stack([targets[n].boxes[row] for n, row in pairs]) if pairs else torch.zeros(0, 4)
        for (n, row), a in zip(pairs, anchor.tolist(), strict=True):
            labels[n, a] = targets[n].labels[row]
        assert matches.labels[level].dtype == matches.gt_index[level].dtype == torch.int32
        assert torch.equal(matches.labels[level].long(), labels)
        assert torch.equal(matches.positives[level], image * count + anchor)
        assert torch.equal(matches.boxes[level], boxes)
    assert matches.num_positive.item() == (expected >= 0).sum().item()
    return matches


def random_boxes(generator: torch.Generator, count: int, height: float, width: float, octaves: float = 5) -> Tensor:
    """Objects of 4 to 4 * 2^octaves pixels around the image, some of them partly outside."""
    side = 4 * torch.exp2(torch.rand(count, generator=generator) * octaves)
    aspect = torch.exp(torch.randn(count, generator=generator) * 0.5)
    extent = torch.stack([side * aspect, side / aspect], dim=1)
    centre = torch.rand(count, 2, generator=generator) * torch.tensor([width, height])
    return torch.cat([centre - extent / 2, centre + extent / 2], dim=1)


def test_random_objects_on_a_retinanet_pyramid(pyramid: Pyramid, make_target: MakeTarget) -> None:
    generator = torch.Generator().manual_seed(1)
    for height, width in ((256, 320), (203, 333)):
        counts = (0, 1, 7, 40, 40)
        targets = [make_target(random_boxes(generator, count, height, width)) for count in counts]
        targets.append(make_target(random_boxes(generator, 30, height, width).round()))
        targets.append(make_target(random_boxes(generator, 30, height, width).clamp(0, height)))
        matches = check(pyramid(height, width), targets)
        assert matches.num_positive > 100


def test_the_grid_of_torchvisions_generator(make_target: MakeTarget) -> None:
    sizes = tuple((side, int(side * 2 ** (1 / 3)), int(side * 2 ** (2 / 3))) for side in (32, 64, 128))
    generator = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 3)
    image = torch.zeros(1, 3, 256, 224)
    maps = [torch.zeros(1, 1, 256 // stride, 224 // stride) for stride in (8, 16, 32)]
    boxes = generator(ImageList(image, [(256, 224)]), maps)[0]
    counts = [m.shape[-2] * m.shape[-1] * 9 for m in maps]
    levels = [
        AnchorLevel(part, cell, (stride, stride), (m.shape[-2], m.shape[-1]))
        for part, cell, stride, m in zip(boxes.split(counts), generator.cell_anchors, (8, 16, 32), maps, strict=True)
    ]
    check(levels, [make_target(random_boxes(torch.Generator().manual_seed(2), 60, 256, 224))])


cell_sides = st.sampled_from([3.0, 8.0, 11.3137, 16.0, 33.6, 64.0, 101.0])
coordinates = st.one_of(st.integers(-20, 120).map(float), st.floats(-20, 120, width=32))
sides = st.one_of(st.sampled_from([0.25, 1.0, 8.0, 16.0, 64.0, 150.0]), st.floats(0.125, 150, width=32))


@settings(max_examples=200, deadline=None)
@given(
    shapes=st.lists(st.tuples(cell_sides, cell_sides), min_size=1, max_size=3),
    shift=st.tuples(st.sampled_from([0.0, 4.0, 3.7]), st.sampled_from([0.0, -2.5])),
    grid=st.tuples(st.integers(1, 12), st.integers(1, 9), st.sampled_from([4, 8, 11]), st.sampled_from([5, 8, 32])),
    objects=st.lists(st.tuples(coordinates, coordinates, sides, sides), max_size=12),
    copies=st.integers(0, 2),
    crowd=st.sets(st.integers(0, 11), max_size=3),
    thresholds=st.sampled_from([(0.5, 0.4), (0.7, 0.3), (0.5, 0.5), (0.25, 0.04), (1.0, 1.0)]),
    keep_best=st.booleans(),
)
def test_any_grid_and_any_objects(
    shapes: list[tuple[float, float]],
    shift: tuple[float, float],
    grid: tuple[int, int, int, int],
    objects: list[tuple[float, float, float, float]],
    copies: int,
    crowd: set[int],
    thresholds: tuple[float, float],
    keep_best: bool,
    make_level: MakeLevel,
    make_target: MakeTarget,
) -> None:
    cell = [[shift[0] - w / 2, shift[1] - h / 2, shift[0] + w / 2, shift[1] + h / 2] for w, h in shapes]
    rows, columns, stride_y, stride_x = grid
    levels = [
        make_level(cell, (stride_y, stride_x), (rows, columns)),
        make_level(cell[:1], (2 * stride_y, 2 * stride_x), (max(rows // 2, 1), max(columns // 2, 1))),
    ]
    boxes = torch.tensor([[x, y, x + w, y + h] for x, y, w, h in objects + objects[:copies]]).reshape(-1, 4)
    exact = levels[0].boxes[:: max(len(levels[0].boxes) // 3, 1)]
    targets = [
        make_target(boxes, [row for row in crowd if row < len(boxes)]),
        make_target(torch.cat([boxes[:2], exact, exact[:1]])),
    ]
    config = MaxIouConfig(positive=thresholds[0], negative=thresholds[1], keep_best=keep_best)
    check(levels, targets, config)


def test_all_anchors_that_tie_for_an_objects_best_are_kept(make_level: MakeLevel, make_target: MakeTarget) -> None:
    level = make_level([[-16, -16, 16, 16]], (8, 8), (16, 16))
    inside = check([level], [make_target([[61, 61, 63, 63]])])
    assert inside.num_positive == 16
    around = check([level], [make_target([[-500, -500, 900, 900]])])
    assert around.num_positive == 256
    shared = check([level], [make_target([[61, 61, 63, 63], [58, 58, 63, 63], [82, 82, 84, 83]])])
    assert set(shared.gt_index[0].unique().tolist()) == {-1, 1, 2}


def test_an_anchor_kept_for_one_object_takes_the_object_it_overlaps_most(
    make_level: MakeLevel, make_target: MakeTarget
) -> None:
    level = make_level([[-8, -8, 8, 8]], (64, 64), (1, 1))
    matches = check([level], [make_target([[0, 0, 3, 3], [-2, -2, 6, 6]])])
    assert matches.gt_index[0].tolist() == [[1]]
    large = make_level([[-16, -16, 16, 16]], (8, 8), (24, 24))
    generator = torch.Generator().manual_seed(4)
    tiny = random_boxes(generator, 60, 190, 190, octaves=1.5)
    huge = random_boxes(generator, 20, 190, 190) * 3
    check([large], [make_target(torch.cat([tiny, huge])), make_target(huge), make_target(tiny)])


def test_equal_overlaps_go_to_the_lower_row(make_level: MakeLevel, make_target: MakeTarget) -> None:
    level = make_level([[-8, -8, 8, 8]], (8, 8), (6, 6))
    twice = [[60.0, 60.0, 90.0, 90.0], [8.0, 8.0, 24.0, 24.0], [8.0, 8.0, 24.0, 24.0]]
    matches = check([level], [make_target(twice), make_target(twice[1:])])
    assert set(matches.gt_index[0][1].unique().tolist()) == {-1, 0}
    assert 1 in matches.gt_index[0][0]


def test_thresholds_are_closed_below(make_level: MakeLevel, make_target: MakeTarget) -> None:
    level = make_level([[0, 0, 10, 10]], (100, 100), (1, 3))
    best = [0.0, 0.0, 10.0, 10.0]
    matches = check([level], [make_target([best, [100, 0, 110, 5]]), make_target([best, [100, 0, 110, 4]])])
    assert matches.gt_index[0].tolist() == [[0, 1, -1], [0, 1, -1]]
    config = MaxIouConfig(keep_best=False)
    matches = check([level], [make_target([[100, 0, 110, 5]]), make_target([[100, 0, 110, 4]])], config)
    assert matches.gt_index[0].tolist() == [[-1, 0, -1], [-1, -2, -1]]
    assert matches.labels[0].tolist() == [[7, 0, 7], [7, -1, 7]]


def test_an_object_that_overlaps_no_anchor_keeps_none(make_level: MakeLevel, make_target: MakeTarget) -> None:
    level = make_level([[-4, -4, 4, 4]], (32, 32), (4, 4))
    outside = [[12, 12, 16, 16], [-90, -90, -80, -70], [5, 5, 5, 9], [500, 500, 600, 600]]
    matches = MaxIouConfig().build()([level], [make_target(outside)], 7)
    assert (matches.gt_index[0] == -1).all()
    assert matches.num_positive == 0


def test_images_without_objects_and_batches_of_crowds_only(pyramid: Pyramid, make_target: MakeTarget) -> None:
    levels = pyramid(128, 160)
    empty = make_target([])
    matches = check(levels, [empty, empty])
    assert all((labels == 7).all() for labels in matches.labels)
    assert [len(p) for p in matches.positives] == [0] * 5
    regions = [[0.0, 0.0, 90.0, 120.0], [100.0, 100.0, 104.0, 104.0]]
    crowded = check(levels, [make_target(regions, crowd=(0, 1)), empty])
    assert crowded.num_positive == 0
    assert (crowded.labels[0][0] == -1).sum() > 500
    assert (crowded.labels[0][1] == 7).all()


def test_positives_inside_a_crowd_region_stay_positive(pyramid: Pyramid, make_target: MakeTarget) -> None:
    levels = pyramid(128, 160)
    boxes = [[0, 0, 160, 128], [30, 30, 65, 62], [31, 30, 66, 62]]
    mixed = check(levels, [make_target(boxes, crowd=(0,)), make_target(boxes[1:]), make_target(boxes, crowd=(2,))])
    first, second = mixed.gt_index[0][0], mixed.gt_index[0][1]
    assert torch.equal(first >= 0, second >= 0)
    assert (first[second == -1] == -2).any()


def test_one_class_and_labels_of_any_order(pyramid: Pyramid, make_target: MakeTarget) -> None:
    boxes = random_boxes(torch.Generator().manual_seed(5), 12, 128, 160)
    check(pyramid(128, 160), [make_target(boxes, labels=torch.zeros(12, dtype=torch.int64))], num_classes=1)
    check(pyramid(128, 160), [make_target(boxes, labels=torch.arange(11, -1, -1))], num_classes=12)


def test_chunks_do_not_change_the_result(
    pyramid: Pyramid, make_target: MakeTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(6)
    boxes = torch.cat([random_boxes(generator, 50, 128, 160), random_boxes(generator, 30, 128, 160, octaves=1)])
    targets = [make_target(boxes, crowd=(3, 70)), make_target(boxes[40:]), make_target([])]
    monkeypatch.setattr(windows, "PAIRS_AT_ONCE", 64)
    monkeypatch.setattr(windows, "ROWS_AT_ONCE", 100)
    check(pyramid(128, 160), targets)


@pytest.mark.parametrize("kind", ["mixed", "tiny", "as large as the image", "tiny and large"])
def test_two_thousand_objects_visit_few_pairs(
    kind: str, pyramid: Pyramid, make_target: MakeTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    side, count = 512, 2000
    generator = torch.Generator().manual_seed(7)
    tiny = random_boxes(generator, count, side, side, octaves=0.5)
    large = torch.tensor([0.0, 0.0, side, side]) + torch.rand(count, 4, generator=generator) * 8
    boxes = {
        "mixed": random_boxes(generator, count, side, side, octaves=7),
        "tiny": tiny,
        "as large as the image": large,
        "tiny and large": torch.cat([tiny[:40], large[40:]]),
    }[kind]
    visited = 0
    largest = 0
    measure = windows.overlap

    def counted(*arguments: object) -> object:
        nonlocal visited, largest
        value = measure(*arguments)  # type: ignore[arg-type]
        visited += len(value)
        largest = max(largest, len(value))
        return value

    monkeypatch.setattr(windows, "overlap", counted)
    monkeypatch.setattr("detection.assignment.contest.overlap", counted)
    levels = pyramid(side, side)
    matches = MaxIouConfig().build()(levels, [make_target(boxes)], 7)
    num_anchors = sum(len(level.boxes) for level in levels)
    assert matches.num_positive > 0
    assert visited < 0.02 * num_anchors * count
    assert largest <= 2 * windows.PAIRS_AT_ONCE + num_anchors


def test_two_thousand_objects_equal_torchvision(pyramid: Pyramid, make_target: MakeTarget) -> None:
    generator = torch.Generator().manual_seed(8)
    boxes = torch.cat([random_boxes(generator, 1500, 160, 192), random_boxes(generator, 500, 160, 192, octaves=0.5)])
    check(pyramid(160, 192), [make_target(boxes)])


def test_wrong_anchors_are_refused(make_level: MakeLevel, make_target: MakeTarget) -> None:
    good = make_level([[-4, -4, 4, 4]], (8, 8), (3, 4))
    assign = MaxIouConfig().build()
    with pytest.raises(ValueError, match="3 x 4 cells of 1 anchors has 11 boxes"):
        assign([AnchorLevel(good.boxes[:-1], good.cell, good.stride, good.size)], [make_target([])], 2)
    with pytest.raises(ValueError, match="not its cell shifted"):
        assign([AnchorLevel(good.boxes + 1, good.cell, good.stride, good.size)], [make_target([])], 2)
    with pytest.raises(ValueError, match="float32 on cpu"):
        assign([AnchorLevel(good.boxes.double(), good.cell, good.stride, good.size)], [make_target([])], 2)


def test_options_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"negative \(0.6\) must not be above positive \(0.5\)"):
        parse(MaxIouConfig, {"negative": 0.6}, "here")
    with pytest.raises(ConfigError, match="positive: "):
        parse(MaxIouConfig, {"positive": 0}, "here")
    assert np.isclose(MaxIouConfig().negative, 0.4)
