"""The detector: images -> Predictions. Its parts are in the files beside this one; decoding is in `decode.py`."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, UInt8
from pydantic import model_validator
from torch import Tensor, nn

from detection.config import Section
from detection.model.anchors import AnchorConfig, anchor_levels
from detection.model.backbone import BackboneConfig
from detection.model.decode import DecodeConfig
from detection.model.head import HeadConfig
from detection.model.pyramid import PyramidConfig
from detection.types import AnchorLevel, Predictions


class RetinaNetConfig(Section):
    """One-stage detector over a feature pyramid. Source: Lin et al., Focal Loss for Dense Object Detection, 2018."""

    backbone: BackboneConfig = BackboneConfig()
    """Network that gives C3, C4, C5."""
    pyramid: PyramidConfig = PyramidConfig()
    """Feature pyramid."""
    head: HeadConfig = HeadConfig()
    """Class and box subnets."""
    anchors: AnchorConfig = AnchorConfig()
    """Reference boxes."""
    decode: DecodeConfig = DecodeConfig()
    """How predictions become detections."""

    @model_validator(mode="after")
    def _parts_fit(self) -> RetinaNetConfig:
        if self.anchors.size_factor is None and len(self.anchors.sizes) != self.pyramid.levels:
            given = len(self.anchors.sizes)
            raise ValueError(f"anchors.sizes has {given} entries for pyramid.levels = {self.pyramid.levels}")
        if self.head.background != (self.decode.activation == "softmax"):
            raise ValueError("head.background and decode.activation = 'softmax' go together: give both or neither")
        return self

    def build(self, num_classes: int) -> RetinaNet:
        """The detector for `num_classes` classes (background not counted), channels_last, on the CPU."""
        return RetinaNet(self, num_classes)


class RetinaNet(nn.Module):
    """Images -> logits and deltas for every anchor of every level."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: RetinaNetConfig, num_classes: int) -> None:
        super().__init__()
        assert num_classes > 0, num_classes
        self.config = config
        self.num_classes = num_classes
        self.backbone = config.backbone.build()
        self.pyramid = config.pyramid.build(self.backbone.channels)
        self.head = config.head.build(config.pyramid.width, num_classes, config.anchors.per_cell)
        self.register_buffer("mean", torch.tensor(self.backbone.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(self.backbone.std).view(1, 3, 1, 1), persistent=False)
        self.to(memory_format=torch.channels_last)

    def forward(self, images: UInt8[Tensor, "N 3 H W"] | Float[Tensor, "N 3 H W"]) -> Predictions:
        """The raw predictions for a batch of images: uint8 0..255, or float 0..1; normalised here, on their device.

        Dtype: logits and deltas are in the dtype of the convolutions (bfloat16 under autocast).
        """
        levels = self.pyramid(self.backbone(self.normalise(images)))
        logits, deltas = self.head(levels)
        return Predictions(logits, deltas, self.anchors(images, levels))

    def normalise(self, images: UInt8[Tensor, "N 3 H W"] | Float[Tensor, "N 3 H W"]) -> Float[Tensor, "N 3 H W"]:
        """(images - mean) / std, float32, channels_last."""
        unit = 255.0 if images.dtype == torch.uint8 else 1.0
        images = images.contiguous(memory_format=torch.channels_last)
        return (images - self.mean * unit) / (self.std * unit)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def anchors(self, images: Tensor, levels: list[Tensor]) -> tuple[AnchorLevel, ...]:
        """The anchors for images and pyramid levels of these sizes, the same objects each time."""
        height, width = images.shape[-2:]
        sizes = [(level.shape[-2], level.shape[-1]) for level in levels]
        return anchor_levels(self.config.anchors, (height, width), sizes, images.device)


TORCHVISION_V1: dict[str, Any] = {
    "backbone": {"name": "resnet50", "batch_norm": "frozen", "batch_norm_eps": 0.0, "frozen_stages": 2},
    "pyramid": {"width": 256, "p6_from": "p5"},
    "head": {"init": "paper"},
    "anchors": {"rounding": True},
}
"""Options of torchvision's `retinanet_resnet50_fpn` with its COCO weights (which have an epsilon of 0)."""

TORCHVISION_V2: dict[str, Any] = {
    "backbone": {"name": "resnet50", "batch_norm": "live"},
    "pyramid": {"width": 256, "p6_from": "c5"},
    "head": {"init": "paper", "norm": "group", "groups": 32},
    "anchors": {"rounding": True},
}
"""Options of torchvision's `retinanet_resnet50_fpn_v2`."""
