"""The head: outputs are views in the anchors' order, untrained scores are the prior, the signal lives at any width."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from detection.model.head import HeadConfig, per_anchor

SIZES = [(8, 12), (4, 6), (1, 1)]


def levels(channels: int, count: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(count, channels, *size, generator=generator) for size in SIZES]
    return [x.contiguous(memory_format=torch.channels_last) for x in drawn]


def test_values_come_in_the_anchors_order() -> None:
    x = torch.arange(2 * 6 * 2 * 3, dtype=torch.float32).reshape(2, 6, 2, 3)
    out = per_anchor(x, 3)
    assert out.shape == (2, 12, 3)
    row, column, b, value = 1, 2, 1, 0
    assert out[1, (row * 3 + column) * 2 + b, value] == x[1, b * 3 + value, row, column]


def test_outputs_are_views_of_what_the_convolution_wrote() -> None:
    head = HeadConfig(depth=1).build(16, 3, 9).to(memory_format=torch.channels_last)
    written: list[Tensor] = []
    for subnet in (head.classes, head.boxes):
        subnet.output.register_forward_hook(lambda _module, _inputs, out: written.append(out))
    logits, deltas = head(levels(16))
    for out, source in zip(logits + deltas, written, strict=True):
        assert out.data_ptr() == source.data_ptr()
        assert out.is_contiguous()


@pytest.mark.parametrize("norm", ["none", "group"])
def test_shapes(norm: str) -> None:
    head = HeadConfig.model_validate({"norm": norm, "width": 24, "depth": 2}).build(16, 3, 6)
    logits, deltas = head(levels(16))
    assert [tuple(x.shape) for x in logits] == [(2, 576, 3), (2, 144, 3), (2, 6, 3)]
    assert [tuple(x.shape) for x in deltas] == [(2, 576, 4), (2, 144, 4), (2, 6, 4)]


@pytest.mark.parametrize("init", ["scaled", "paper"])
def test_untrained_scores_are_the_prior(init: str) -> None:
    torch.manual_seed(0)
    logits, _ = HeadConfig.model_validate({"init": init, "prior": 0.02}).build(32, 4, 9)(levels(32))
    assert torch.cat(logits, 1).sigmoid().median().item() == pytest.approx(0.02, rel=0.1)


def test_untrained_foreground_under_a_softmax_is_the_prior() -> None:
    torch.manual_seed(0)
    head = HeadConfig(prior=0.02, background=True).build(32, 4, 9)
    scores = torch.cat(head(levels(32))[0], 1).softmax(-1)
    assert scores.shape[-1] == 5
    assert scores[..., :4].sum(-1).median().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("norm", ["none", "group"])
@pytest.mark.parametrize("width", [24, 96, 256])
def test_the_scaled_signal_and_gradient_are_alive_at_every_width(width: int, norm: str) -> None:
    """The paper's deviation of .01 loses a factor of about (.01 * sqrt(9 * width / 2)) ** 4: 4e-5 at width 48."""
    torch.manual_seed(0)
    head = HeadConfig.model_validate({"norm": norm}).build(width, 3, 9)
    x = levels(width)[0].requires_grad_()
    logits, deltas = head([x])
    for out in (logits[0], deltas[0]):
        spread = out.detach().std(dim=1).mean()
        assert 0.02 < float(spread) < 0.3
        (gradient,) = torch.autograd.grad(out.square().sum().sqrt(), x, retain_graph=True)
        assert float(gradient.norm()) > 0.01


def test_the_papers_initialisation_is_torchvisions() -> None:
    torch.manual_seed(0)
    head = HeadConfig(init="paper").build(64, 3, 9)
    weights = [p for name, p in head.named_parameters() if name.endswith("weight")]
    assert len(weights) == 10
    assert all(float(w.detach().std()) == pytest.approx(0.01, rel=0.03) for w in weights)


def test_groups_always_divide_the_width() -> None:
    head = HeadConfig(norm="group", width=40).build(16, 2, 1)
    assert [norm.num_groups for norm in head.classes.norms] == [8] * 4  # type: ignore[union-attr]
