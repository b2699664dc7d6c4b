"""The detector as a whole: contract of its output, memory format, precision, options that do not fit together."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from detection.config import ConfigError, parse
from detection.model.retinanet import RetinaNet, RetinaNetConfig
from detection.types import Predictions

SMALL: dict[str, Any] = {"backbone": {"name": "resnet10t"}, "pyramid": {"width": 16}, "head": {"depth": 1}}


def build(**changes: Any) -> RetinaNet:
    torch.manual_seed(0)
    return parse(RetinaNetConfig, {**SMALL, **changes}, "test").build(3)


def images(height: int = 64, width: int = 96) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8, generator=generator)
    return drawn.contiguous(memory_format=torch.channels_last)


def outputs(predictions: Predictions) -> tuple[Tensor, ...]:
    return predictions.logits + predictions.deltas


@pytest.mark.parametrize("size", [(64, 96), (96, 64), (72, 100)])
def test_every_anchor_has_its_logits_and_deltas(size: tuple[int, int]) -> None:
    predictions = build()(images(*size))
    assert len(predictions.anchors) == 5
    for logits, deltas, level in zip(predictions.logits, predictions.deltas, predictions.anchors, strict=True):
        count = level.size[0] * level.size[1] * 9
        assert logits.shape == (2, count, 3)
        assert deltas.shape == (2, count, 4)
        assert level.boxes.shape == (count, 4)
        assert logits.is_contiguous()
        assert deltas.is_contiguous()


def test_uint8_and_unit_range_images_mean_the_same() -> None:
    model = build().eval()
    for a, b in zip(outputs(model(images())), outputs(model(images().float() / 255)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_normalised_images_have_the_colours_of_the_weights() -> None:
    model = build(backbone={"name": "resnet10t", "mean": (0.5, 0.25, 0.0), "std": (0.5, 0.25, 1.0)})
    white = torch.full((1, 3, 32, 32), 255, dtype=torch.uint8)
    assert model.normalise(white)[0, :, 0, 0].tolist() == pytest.approx([1.0, 3.0, 1.0])


def test_the_memory_format_of_the_images_changes_nothing() -> None:
    model = build().eval()
    for a, b in zip(outputs(model(images())), outputs(model(images().contiguous())), strict=True):
        assert torch.equal(a, b)


def test_convolutions_are_channels_last() -> None:
    weight = build().head.classes.convs[0].weight
    assert isinstance(weight, Tensor)
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_autocast_gives_bfloat16_outputs_near_the_float32_ones() -> None:
    model = build().eval()
    with torch.no_grad():
        exact = model(images())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = model(images())
    assert half.logits[0].dtype == torch.bfloat16
    assert half.anchors[0].boxes.dtype == torch.float32
    for a, b in zip(half.logits, exact.logits, strict=True):
        torch.testing.assert_close(a.float(), b, rtol=0.05, atol=0.05)


def test_every_trained_parameter_gets_a_gradient() -> None:
    model = build(head={"depth": 1, "norm": "group", "background": True}, decode={"activation": "softmax"})
    torch.stack([x.square().mean() for x in outputs(model(images()))]).sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_a_deep_copy_is_independent_and_keeps_norms_frozen() -> None:
    model = build(backbone={"name": "resnet10t", "batch_norm": "frozen"})
    twin = copy.deepcopy(model).train()
    assert not any(norm.training for norm in twin.backbone.frozen_norms)
    assert {id(n) for n in twin.backbone.frozen_norms} <= {id(m) for m in twin.modules()}
    before = outputs(model.eval()(images()))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1)
    assert all(torch.equal(a, b) for a, b in zip(before, outputs(model(images())), strict=True))


def test_the_state_holds_weights_only() -> None:
    """Anchors and colours follow from the configuration."""
    assert not [name for name in build().state_dict() if name in ("mean", "std") or "anchor" in name]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"pyramid": {"levels": 4}}, "5 entries for pyramid.levels = 4"),
        ({"head": {"background": True}}, "go together"),
        ({"decode": {"activation": "softmax"}}, "go together"),
        ({"head": {"prior": 1.0}}, "head.prior"),
    ],
)
def test_options_that_do_not_fit_are_refused(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        parse(RetinaNetConfig, changes, "test")


def test_four_levels_with_sizes_in_strides() -> None:
    model = build(pyramid={"width": 16, "levels": 4}, anchors={"size_factor": 3.0, "scales": [1.0, 1.5]})
    predictions = model(images())
    assert [len(level.cell) for level in predictions.anchors] == [6] * 4
