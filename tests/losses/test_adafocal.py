"""AdaFocal for dense heads: which gamma each element gets, and how the table answers calibration error."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from detection.losses.adafocal import AdaFocal, AdaFocalConfig, joined_gap, logit_spaced_edges, moved_edges
from detection.losses.focal import FocalConfig
from detection.ops.focal_elements import FocalShape, GammaTable, focal_elements

K = 3
ONE = torch.tensor(1.0)


def built(**options: Any) -> AdaFocal:
    return AdaFocalConfig(**{"rate": 1.0, **options}).build(K, "reference")


def scene() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 60, K, generator=generator) * 3
    return logits, torch.randint(-1, K + 1, (2, 60), generator=generator, dtype=torch.int32)


def pairs(score: float, precision: float, count: int = 100) -> tuple[Tensor, Tensor]:
    """`count` equal scores of which a share `precision` is right."""
    return torch.full((count,), score), (torch.arange(count) < round(precision * count)).float()


def joined(*parts: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return torch.cat([s for s, _ in parts]), torch.cat([t for _, t in parts])


def element_gamma(module: AdaFocal, score: float, positive: bool) -> float:
    """The gamma that an element is trained with, read off its loss."""
    table = GammaTable(module.table, module.edge_logit)
    logit = torch.tensor([[math.log(score / (1 - score))]], dtype=torch.float64)
    label = torch.tensor([0 if positive else 1], dtype=torch.int32)
    loss = focal_elements(logit, label, FocalShape(-1.0, table)).item()
    p = score if positive else 1 - score
    ratio = math.log(loss / -math.log(p))
    return ratio / math.log(1 - p) if ratio < 0 else -ratio / math.log(1 + p)


@pytest.mark.parametrize("implementation", ["reference", "cpu"])
def test_before_any_update_it_is_the_focal_loss(implementation: Any) -> None:
    logits, labels = scene()
    ours = AdaFocalConfig(gamma=2.0).build(K, implementation)(logits, labels, ONE)
    torch.testing.assert_close(ours, FocalConfig().build(K, "reference")(logits, labels, ONE), rtol=1e-6, atol=0)


def test_fixed_edges_are_evenly_spaced_in_logits() -> None:
    edges = logit_spaced_edges(0.05, 2, 3)
    half = math.log(19) / 2
    assert edges[:2].tolist() == pytest.approx([0.05, 1 / (1 + math.exp(half))])
    assert edges[2:].logit().tolist() == pytest.approx([0, math.log(19) / 3, 2 * math.log(19) / 3])
    assert edges[0] == 0.05


def test_moving_edges_hold_equal_counts_on_each_side() -> None:
    scores = torch.cat([torch.linspace(0.06, 0.4, 70), torch.linspace(0.6, 0.99, 40)]).double()
    edges = moved_edges(logit_spaced_edges(0.05, 7, 4), scores, 7)
    index = torch.bucketize(scores, edges, right=True) - 1
    assert edges[0] == 0.05
    assert edges[7] == 0.5
    assert index.bincount(minlength=11).tolist() == pytest.approx([10] * 11, abs=1)
    unmoved = moved_edges(edges, scores[:70], 7)
    assert torch.equal(unmoved[7:], edges[7:])


def test_each_side_answers_for_its_own_range() -> None:
    """Over-confident at .8: positives there get more gamma. Over-confident at .2: negatives there get less."""
    module = built(rate=1.0, min_count=50)
    rows = module.adapt(*joined(pairs(0.8, 0.5), pairs(0.2, 0.1)))
    assert element_gamma(module, 0.8, positive=True) == pytest.approx(2 * math.exp(0.3), rel=1e-4)
    assert element_gamma(module, 0.8, positive=False) == pytest.approx(2, rel=1e-4)
    assert element_gamma(module, 0.2, positive=False) == pytest.approx(2 * math.exp(-0.1), rel=1e-4)
    assert element_gamma(module, 0.2, positive=True) == pytest.approx(2, rel=1e-4)
    ranges = zip(rows["edges"], rows["gap"], rows["count"], strict=True)
    filled = [(round(edge, 2), round(gap, 4)) for edge, gap, count in ranges if count]
    assert filled == [(0.16, -0.1), (0.75, 0.3)]
    assert sum(rows["count"]) == 200


def test_underconfidence_moves_the_other_way() -> None:
    module = built(rate=2.0)
    module.adapt(*joined(pairs(0.8, 1.0), pairs(0.2, 0.4)))
    assert element_gamma(module, 0.8, positive=True) == pytest.approx(2 * math.exp(-0.4), rel=1e-4)
    assert element_gamma(module, 0.2, positive=False) == pytest.approx(2 * math.exp(0.4), rel=1e-4)


def test_easy_background_keeps_its_gamma_whatever_happens() -> None:
    module = built(rate=4.0)
    for _ in range(20):
        module.adapt(*joined(pairs(0.03, 1.0), pairs(0.06, 0.9), pairs(0.97, 0.1)))
    assert element_gamma(module, 0.03, positive=False) == pytest.approx(2, rel=1e-4)
    assert module.table[:, 0, 0].item() == module.table[:, 1, 0].item() == 2


def test_limits_and_the_switch_to_inverse_focal() -> None:
    module = built(rate=4.0)
    seen = []
    for _ in range(12):
        module.adapt(*joined(pairs(0.8, 1.0), pairs(0.2, 0.0)))
        seen.append(element_gamma(module, 0.8, positive=True))
    assert -0.21 < min(g for g in seen if g > -0.25) < -0.19
    assert seen[-1] == pytest.approx(-1.5, rel=1e-4)
    assert element_gamma(module, 0.2, positive=False) == pytest.approx(0.25, rel=1e-3)
    for _ in range(30):
        module.adapt(*joined(pairs(0.8, 0.0), pairs(0.2, 1.0)))
    assert element_gamma(module, 0.8, positive=True) == pytest.approx(10, rel=1e-3)
    assert element_gamma(module, 0.2, positive=False) == pytest.approx(5, rel=1e-3)


def test_faithful_hard_elements_follow_the_range_nearest_to_half() -> None:
    module = built(rate=1.0, hard="faithful")
    module.adapt(*joined(pairs(0.55, 0.25), pairs(0.45, 0.25)))
    positive, negative = 2 * math.exp(0.3), 2 * math.exp(-0.2)
    for score in (0.01, 0.3, 0.49, 0.55):
        assert element_gamma(module, score, positive=True) == pytest.approx(positive, rel=1e-4)
    for score in (0.45, 0.6, 0.9):
        assert element_gamma(module, score, positive=False) == pytest.approx(negative, rel=1e-4)
    assert element_gamma(module, 0.01, positive=False) == pytest.approx(2, rel=1e-4)


def test_small_ranges_answer_to_a_window_around_them() -> None:
    gap = torch.tensor([0.4, 0.2, 0.0, -0.1, 0.5], dtype=torch.float64)
    count = torch.tensor([10, 30, 0, 60, 5])
    wide = (0.2 * 30 - 0.1 * 60) / 90
    assert joined_gap(gap, count, 30).tolist() == pytest.approx([0.25, 0.2, wide, -0.1, (-6 + 2.5) / 65])
    everything = (4 + 6 - 6 + 2.5) / 105
    assert joined_gap(gap, count, 105).tolist() == pytest.approx([everything] * 5)
    assert joined_gap(gap, count, 210).tolist() == pytest.approx([everything / 2] * 5)
    assert joined_gap(gap, count * 0, 30).tolist() == [0] * 5


def test_few_pairs_change_little_and_none_nothing() -> None:
    module = built(min_count=400)
    module.adapt(torch.zeros(0), torch.zeros(0))
    assert (module.table == 2).all()
    module.adapt(*pairs(0.8, 0.0))
    assert element_gamma(module, 0.8, positive=True) == pytest.approx(2 * math.exp(0.8 / 4), rel=1e-4)
    assert element_gamma(module, 0.3, positive=False) == pytest.approx(2, rel=1e-4)
    assert module.epochs == 2


def test_warmup_measures_without_moving() -> None:
    module = built(warmup_epochs=2)
    assert max(module.adapt(*pairs(0.8, 0.0))["gap"]) == pytest.approx(0.8)
    assert (module.table == 2).all()
    module.adapt(*pairs(0.8, 0.0))
    assert element_gamma(module, 0.8, positive=True) == pytest.approx(2 * math.exp(0.8), rel=1e-4)


def test_levels_have_tables_of_their_own_where_they_have_the_pairs() -> None:
    options = {"tables": 2, "pairs": "anchor", "background_bins": 1, "foreground_bins": 1, "min_count": 50}
    module = built(**options)
    scores, targets = joined(pairs(0.8, 0.5, 200), pairs(0.8, 0.9, 40))
    levels = torch.cat([torch.zeros(200, dtype=torch.int64), torch.full((40,), 3)])
    rows = module.adapt(scores, targets, levels)
    pooled = 0.8 - (100 + 36) / 240
    assert rows["gamma_0"][1] == pytest.approx(2 * math.exp(0.3))
    assert rows["gamma_1"][1] == pytest.approx(2 * math.exp(pooled))
    assert rows["count_1"] == [0, 40]
    logits, labels = torch.full((1, 4, K), 1.4), torch.zeros((1, 4), dtype=torch.int32)
    first, second, last = (module(logits, labels, ONE, level=level) for level in (0, 1, 4))
    assert first < second
    assert torch.equal(second, last)


def test_all_of_it_is_state() -> None:
    for edges in ("fixed", "moving"):
        first, second = built(edges=edges), built(edges=edges)
        first.adapt(*joined(pairs(0.8, 0.5), pairs(0.2, 0.1)))
        second.load_state_dict(first.state_dict())
        logits, labels = scene()
        assert torch.equal(first(logits, labels, ONE), second(logits, labels, ONE))
        for module in (first, second):
            module.adapt(*joined(pairs(0.81, 0.5), pairs(0.15, 0.1)))
        assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())


def test_an_adapted_loss_is_the_same_in_every_implementation() -> None:
    modules = [AdaFocalConfig(hard="faithful").build(K, name) for name in ("reference", "cpu")]
    logits, labels = scene()
    found = []
    for module in modules:
        for _ in range(3):
            module.adapt(*joined(pairs(0.97, 1.0), pairs(0.6, 0.2), pairs(0.2, 0.6), pairs(0.45, 0.1)))
        own = logits.clone().requires_grad_()
        loss = module(own, labels, ONE)
        loss.backward()
        found.append((loss.detach(), own.grad))
    assert len(set(modules[0].table.flatten().tolist())) > 4
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-6, atol=0)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"background_bins": 8, "foreground_bins": 8}, "at most 15"),
        ({"gamma": 6.0}, "outside negative limits"),
        ({"tables": 3}, "does not tell its pyramid level"),
    ],
)
def test_contradictions_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdaFocalConfig(**options)
