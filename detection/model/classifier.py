"""Image classifiers, in the shape of a detector with one anchor an image: a small network of our own, or timm's."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import UInt8
from pydantic import Field
from torch import Tensor, nn

from detection.config import Section
from detection.model.backbone import create_classifier
from detection.types import AnchorLevel, Predictions

PLAIN = "plain"
GROUPS = 8


class ClassifierConfig(Section):
    name: str = PLAIN
    """`plain`: convolutions of 3 x 3, two a stage, each stage at half the resolution and twice the width; or any timm
    model (`timm.list_models()`)."""
    width: int = Field(24, ge=8, le=1024, multiple_of=8)
    """plain only: channels of the first stage."""
    stages: int = Field(3, ge=1, le=6)
    """plain only: stages of two convolutions."""
    norm: Literal["batch", "group"] = "batch"
    """plain only: normalisation after every convolution."""
    pretrained: bool = False
    """timm only: start from timm's weights (from the network or its cache)."""

    def build(self, num_classes: int) -> Classifier:
        """The classifier on the CPU. Errors: ConfigError for a timm model that cannot be built."""
        if self.name != PLAIN:
            body, mean, std = create_classifier(self.name, num_classes, self.pretrained)
            return Classifier(body, mean, std)
        return Classifier(plain_network(self, num_classes))


class Classifier(nn.Module):
    """Images -> one row of logits each, as the predictions of a single anchor whose box is the image."""

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        body: nn.Module,
        mean: tuple[float, ...] = (0.5, 0.5, 0.5),
        std: tuple[float, ...] = (0.25, 0.25, 0.25),
    ) -> None:
        super().__init__()
        self.body = body
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self._anchors: dict[tuple[torch.Size, torch.device], AnchorLevel] = {}

    def forward(self, images: UInt8[Tensor, "N 3 H W"]) -> Predictions:
        """Logits of exactly K classes for each image; deltas are zeros and lead nowhere."""
        logits = self.body((images - self.mean * 255) / (self.std * 255))
        deltas = logits.new_zeros(len(images), 1, 4)
        return Predictions((logits[:, None],), (deltas,), (self._anchor(images),))

    def _anchor(self, images: Tensor) -> AnchorLevel:
        key = (images.shape[-2:], images.device)
        if key not in self._anchors:
            height, width = images.shape[-2:]
            box = torch.tensor([[0.0, 0.0, width, height]])
            host = AnchorLevel(box, box, (height, width), (1, 1))
            there = box.to(images.device)
            self._anchors[key] = AnchorLevel(there, there, (height, width), (1, 1), host)
        return self._anchors[key]


def plain_network(config: ClassifierConfig, num_classes: int) -> nn.Sequential:
    """The built-in network: images (N, 3, H, W) -> logits (N, K)."""
    layers: list[nn.Module] = []
    given = 3
    for stage in range(config.stages):
        width = config.width << stage
        layers += [*_convolution(given, width, 2, config.norm), *_convolution(width, width, 1, config.norm)]
        given = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(given, num_classes))


def _convolution(given: int, width: int, stride: int, norm: str) -> list[nn.Module]:
    convolution = nn.Conv2d(given, width, 3, stride, padding=1, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    normalised = nn.BatchNorm2d(width) if norm == "batch" else nn.GroupNorm(GROUPS, width)
    return [convolution, normalised, nn.ReLU(inplace=True)]
