"""The image classifiers: shapes, size, normalisation, gradients."""

from __future__ import annotations

import pytest
import torch

from detection.config import ConfigError
from detection.model.classifier import ClassifierConfig

IMAGES = torch.randint(0, 256, (5, 3, 24, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("config", [{}, {"norm": "group", "width": 8}, {"stages": 1}, {"name": "test_resnet"}])
def test_a_row_of_logits_an_image(config: dict[str, object]) -> None:
    model = ClassifierConfig.model_validate(config).build(7)
    predictions = model(IMAGES)
    assert predictions.logits[0].shape == (5, 1, 7)
    assert predictions.deltas[0].shape == (5, 1, 4)
    assert predictions.anchors[0].boxes.tolist() == [[0, 0, 24, 24]]
    assert model(IMAGES).anchors[0] is predictions.anchors[0]
    predictions.logits[0].square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


def test_the_default_network_is_small() -> None:
    parameters = sum(p.numel() for p in ClassifierConfig().build(8).parameters())
    assert parameters == 162_800


def test_images_are_normalised_inside() -> None:
    model = ClassifierConfig().build(2)
    seen: list[torch.Tensor] = []
    model.body.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 16, 16))
    torch.testing.assert_close(seen[0][:, 0, 0, 0], torch.tensor([-2.0, 2.0]))


def test_an_unknown_network_is_named() -> None:
    with pytest.raises(ConfigError, match="classifier 'resnet51' cannot be built"):
        ClassifierConfig(name="resnet51").build(2)
