from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from detection.assignment.atss import AtssConfig
from detection.assignment.max_iou import MaxIouConfig
from detection.assignment.table import Assignment
from detection.config import ConfigError, Section, load
from detection.types import AnchorLevel, Target


class Root(Section):
    assignment: Assignment = MaxIouConfig()


def test_the_kind_chooses_the_rule() -> None:
    assert load(Root).assignment == MaxIouConfig()
    assert load(Root, overrides=["assignment.kind=atss", "assignment.top_k=5"]).assignment == AtssConfig(top_k=5)
    with pytest.raises(ConfigError, match="max_iou"):
        load(Root, overrides=["assignment.kind=max_iuo"])


@pytest.mark.parametrize("config", [MaxIouConfig(), AtssConfig()], ids=lambda config: config.kind)
def test_every_rule_keeps_the_contract(
    config: Assignment,
    pyramid: Callable[[int, int], list[AnchorLevel]],
    make_target: Callable[..., Target],
) -> None:
    levels: Sequence[AnchorLevel] = pyramid(96, 128)
    targets = [make_target([[10, 10, 60, 70], [50, 8, 90, 40]], crowd=(1,)), make_target([])]
    matches = config.build()(levels, targets, 3)
    assert matches.num_positive > 0
    for labels, gt_index, positives, boxes in zip(
        matches.labels, matches.gt_index, matches.positives, matches.boxes, strict=True
    ):
        flat, index = labels.view(-1), gt_index.view(-1)
        assert positives.tolist() == (index >= 0).nonzero()[:, 0].tolist()
        assert (flat[positives] == 0).all()
        assert boxes.tolist() == [[10, 10, 60, 70]] * len(positives)
        assert ((index == -1) == (flat == 3)).all()
        assert ((index == -2) == (flat == -1)).all()
        assert (index.view(2, -1)[1] == -1).all()
    assert any((labels == -1).any() for labels in matches.labels)
    assert config.build()(levels, [], 3).num_positive == 0
