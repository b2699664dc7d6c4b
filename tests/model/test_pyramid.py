"""The feature pyramid: sizes, what P6 comes from, the top-down path, the initial signal."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from detection.model.pyramid import Pyramid, PyramidConfig

CHANNELS = (8, 16, 32)


def features(height: int = 24, width: int = 40) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = [(-(-height // s), -(-width // s)) for s in (1, 2, 4)]
    return [torch.randn(2, c, *size, generator=generator) for c, size in zip(CHANNELS, sizes, strict=True)]


def test_levels_halve_rounding_up() -> None:
    levels = PyramidConfig(width=12, levels=6).build(CHANNELS)(features(23, 37))
    assert [tuple(x.shape) for x in levels] == [
        (2, 12, 23, 37),
        (2, 12, 12, 19),
        (2, 12, 6, 10),
        (2, 12, 3, 5),
        (2, 12, 2, 3),
        (2, 12, 1, 2),
    ]


def test_three_levels_need_no_further_convolution() -> None:
    pyramid = PyramidConfig(width=12, levels=3).build(CHANNELS)
    assert len(pyramid.extra) == 0
    assert len(pyramid(features())) == 3


def test_p6_comes_from_p5_or_c5() -> None:
    torch.manual_seed(0)
    for p6_from, inputs in (("p5", 12), ("c5", 32)):
        pyramid = Pyramid(PyramidConfig.model_validate({"width": 12, "p6_from": p6_from}), CHANNELS)
        first = pyramid.extra[0]
        assert isinstance(first, nn.Conv2d)
        assert first.in_channels == inputs
        c = features()
        levels = pyramid(c)
        torch.testing.assert_close(levels[3], first(c[2] if p6_from == "c5" else levels[2]))
        torch.testing.assert_close(levels[4], pyramid.extra[1](levels[3].relu()))


def test_coarse_features_reach_fine_levels_and_not_the_other_way() -> None:
    pyramid = PyramidConfig(width=12).build(CHANNELS)
    before = pyramid(features())
    coarse, fine = features(), features()
    coarse[2] += 1
    fine[0] += 1
    assert not torch.equal(pyramid(coarse)[0], before[0])
    assert torch.equal(pyramid(fine)[1], before[1])


def test_the_initial_signal_keeps_its_size() -> None:
    torch.manual_seed(0)
    levels = PyramidConfig(width=64).build(CHANNELS)(features(64, 64))
    assert all(0.3 < float(x.detach().std()) < 3 for x in levels[:4])
