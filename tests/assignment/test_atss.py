from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou

from detection.assignment import atss
from detection.assignment.atss import AtssConfig, nearest_anchors
from detection.assignment.scene import tabulate
from detection.types import AnchorLevel, Target

MakeLevel = Callable[[Sequence[Sequence[float]], tuple[int, int], tuple[int, int]], AnchorLevel]
MakeTarget = Callable[..., Target]
Pyramid = Callable[[int, int], list[AnchorLevel]]


def nearest_cells(level: AnchorLevel, box: Tensor, top_k: int) -> list[int]:
    """The anchors of the cells nearest to the box's centre, all distances sorted; ties by the cell's number."""
    centre = ((level.cell[:, :2] + level.cell[:, 2:]) / 2).double().mean(dim=0)
    offset = (box[:2].double() + box[2:].double()) / 2 - centre
    height, width = level.size
    distances = [
        ((column * level.stride[1] - offset[0]) ** 2 + (row * level.stride[0] - offset[1]) ** 2).item()
        for row in range(height)
        for column in range(width)
    ]
    cells = sorted(range(height * width), key=lambda cell: (distances[cell], cell))[:top_k]
    members = len(level.cell)
    return [cell * members + member for cell in cells for member in range(members)]


def reference(anchors: Sequence[AnchorLevel], target: Target, config: AtssConfig) -> Tensor:
    """Algorithm 1 of the paper, one object after the other, on the full matrix."""
    boxes = torch.cat([level.boxes for level in anchors])
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    matches = torch.full((len(boxes),), -1)
    highest = torch.zeros(len(boxes))
    for row in torch.nonzero(~target.crowd)[:, 0].tolist():
        box = target.boxes[row]
        chosen, start = [], 0
        for level in anchors:
            chosen += [start + anchor for anchor in nearest_cells(level, box, config.top_k)]
            start += len(level.boxes)
        candidates = torch.tensor(chosen)
        iou = box_iou(box[None], boxes[candidates])[0]
        spread = iou.double().std() if len(iou) > 1 else torch.tensor(0.0)
        inside = torch.cat([centres[candidates] - box[:2], box[2:] - centres[candidates]], dim=1).amin(dim=1) > 0.01
        positive = (iou.double() >= iou.double().mean() + spread) & inside
        better = positive & (iou > highest[candidates])
        matches[candidates[better]] = row
        highest[candidates[better]] = iou[better]
    for box in target.boxes[target.crowd]:
        lower, upper = torch.maximum(boxes[:, :2], box[:2]), torch.minimum(boxes[:, 2:], box[2:])
        area = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)
        covered = (upper - lower).clamp(min=0).prod(dim=1) / area >= config.crowd_ioa
        matches[covered & (matches < 0)] = -2
    return matches


def random_boxes(seed: int, count: int, height: float, width: float) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    side = 4 * torch.exp2(torch.rand(count, generator=generator) * 5)
    aspect = torch.exp(torch.randn(count, generator=generator) * 0.4)
    extent = torch.stack([side * aspect, side / aspect], dim=1)
    centre = torch.rand(count, 2, generator=generator) * torch.tensor([width, height])
    return torch.cat([centre - extent / 2, centre + extent / 2], dim=1)


def check(anchors: Sequence[AnchorLevel], targets: Sequence[Target], config: AtssConfig) -> int:
    """Asserts equality with the paper's algorithm; the number of positives."""
    matches = config.build()(anchors, targets, 7)
    expected = torch.stack([reference(anchors, target, config) for target in targets])
    assert torch.equal(torch.cat(matches.gt_index, dim=1).long(), expected)
    labels = torch.full_like(expected, 7)
    labels[expected == -2] = -1
    for image, target in enumerate(targets):
        positive = expected[image] >= 0
        labels[image, positive] = target.labels[expected[image, positive]]
    assert torch.equal(torch.cat(matches.labels, dim=1).long(), labels)
    assert matches.num_positive.item() == sum(len(p) for p in matches.positives) == (expected >= 0).sum()
    return int(matches.num_positive)


@pytest.mark.parametrize("top_k", [1, 4, 9])
def test_random_objects(top_k: int, pyramid: Pyramid, make_level: MakeLevel, make_target: MakeTarget) -> None:
    targets = [
        make_target(random_boxes(1, 12, 96, 128), crowd=(2, 5)),
        make_target([]),
        make_target(random_boxes(2, 8, 96, 128)),
        make_target([[0, 0, 50, 60]], crowd=(0,)),
    ]
    square = [make_level([[-4 * s, -4 * s, 4 * s, 4 * s]], (s, s), (96 // s, 128 // s)) for s in (8, 16, 32, 64)]
    assert check(square, targets, AtssConfig(top_k=top_k)) > 5
    assert check(pyramid(96, 128), targets, AtssConfig(top_k=top_k)) > 20


def test_an_anchor_claimed_twice_takes_the_higher_iou_then_the_lower_row(
    make_level: MakeLevel, make_target: MakeTarget
) -> None:
    levels = [make_level([[-16, -16, 16, 16]], (8, 8), (12, 12)), make_level([[-32, -32, 32, 32]], (16, 16), (6, 6))]
    close = [[20.0, 20.0, 52.0, 54.0], [22.0, 21.0, 54.0, 52.0], [20.0, 20.0, 52.0, 54.0]]
    matches = AtssConfig().build()(levels, [make_target(close)], 7)
    assert set(matches.gt_index[0].unique().tolist()) == {-1, 0, 1}
    check(levels, [make_target(close)], AtssConfig())


@pytest.mark.parametrize("size", [(1, 1), (2, 7), (9, 3), (12, 13)])
@pytest.mark.parametrize("top_k", [1, 2, 5, 9, 20])
def test_nearest_anchors_equal_a_full_sort(size: tuple[int, int], top_k: int, make_level: MakeLevel) -> None:
    generator = torch.Generator().manual_seed(top_k)
    corner = torch.rand(40, 2, generator=generator) * 160 - 30
    corner[:20] = (corner[:20] / 4).round() * 4
    boxes = torch.cat([corner, corner + 8], dim=1)
    for cell in ([[-4, -4, 4, 4], [-8, -2, 8, 2]], [[0, 1, 8, 8]]):
        level = make_level(cell, (8, 12), size)
        found = nearest_anchors(tabulate([level]), boxes.numpy(), 0, top_k)
        assert found.tolist() == [nearest_cells(level, box, top_k) for box in boxes]


def test_chunks_do_not_change_the_result(
    pyramid: Pyramid, make_target: MakeTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atss, "PAIRS_AT_ONCE", 1000)
    check(pyramid(96, 128), [make_target(random_boxes(3, 10, 96, 128)), make_target([[3, 4, 40, 50]])], AtssConfig())


def test_two_thousand_objects_and_objects_smaller_than_a_cell(pyramid: Pyramid, make_target: MakeTarget) -> None:
    levels = pyramid(512, 512)
    many = make_target(random_boxes(4, 2000, 512, 512))
    assert AtssConfig().build()(levels, [many], 7).num_positive > 2000
    tiny = make_target([[33.0, 33.0, 34.0, 34.0]])
    assert AtssConfig().build()(levels, [tiny], 7).num_positive == 0
