"""torchvision's RetinaNet as the peer of a whole training step: losses and gradients at the same weights and batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import retinanet_resnet50_fpn, retinanet_resnet50_fpn_v2
from torchvision.models.detection.image_list import ImageList

from detection.assignment.max_iou import MaxIouConfig
from detection.losses.box import GIoUConfig, L1Config
from detection.losses.criterion import CriterionConfig
from detection.losses.focal import FocalConfig
from detection.model.retinanet import TORCHVISION_V1, TORCHVISION_V2, RetinaNetConfig
from detection.model.weights import convert_torchvision, load_matching
from detection.types import Target

NUM_CLASSES = 5
SIZE = (64, 96)
# In float64 and with statistics that do not train, so that what is compared is the loss and not rounding in ReLUs.
FROZEN = {"batch_norm": "frozen", "batch_norm_eps": None}
PEERS = {
    "v1": (retinanet_resnet50_fpn, TORCHVISION_V1, L1Config()),
    "v2": (retinanet_resnet50_fpn_v2, TORCHVISION_V2, GIoUConfig()),
}


def batch() -> tuple[Tensor, list[Target]]:
    """Three images: many objects, one object, none."""
    generator = torch.Generator().manual_seed(4)
    images = torch.randint(0, 256, (3, 3, *SIZE), dtype=torch.uint8, generator=generator)
    targets = []
    for count in (7, 1, 0):
        corner = torch.rand(count, 2, generator=generator) * 40
        boxes = torch.cat([corner, corner + 12 + 20 * torch.rand(count, 2, generator=generator)], dim=1)
        labels = torch.randint(0, NUM_CLASSES, (count,), generator=generator)
        targets.append(Target(boxes, labels, torch.zeros(count, dtype=torch.bool)))
    return images, targets


def peer_losses(peer: Any, images: Tensor, targets: list[Target]) -> dict[str, Tensor]:
    colours = (peer.transform.image_mean, peer.transform.image_std)
    mean, std = (torch.tensor(c).double().view(1, 3, 1, 1) for c in colours)
    features = list(peer.backbone((images.double() / 255 - mean) / std).values())
    outputs = peer.head(features)
    # Its own anchors and matching, in float32 as its users have them.
    anchors = peer.anchor_generator(ImageList(images.float(), [SIZE] * 3), [f.float() for f in features])
    wanted = [{"boxes": t.boxes, "labels": t.labels} for t in targets]
    losses: dict[str, Tensor] = peer.compute_loss(wanted, outputs, anchors)
    return losses


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_losses_and_gradients_are_torchvisions(version: str) -> None:
    build, preset, box = PEERS[version]
    torch.manual_seed(0)
    peer = build(weights=None, weights_backbone=None, num_classes=NUM_CLASSES).double()
    for module in peer.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
            module.requires_grad_(False)
    backbone = {**preset["backbone"], **FROZEN}
    ours = RetinaNetConfig.model_validate({**preset, "backbone": backbone}).build(NUM_CLASSES)
    load_matching(ours, convert_torchvision(peer.state_dict()), tuple("abcde"), None)
    ours = ours.double().train()
    images, targets = batch()

    expected = peer_losses(peer, images, targets)
    sum(expected.values()).backward()  # type: ignore[union-attr]

    criterion = CriterionConfig(classification=FocalConfig(), box=box, normaliser="image")
    predictions = ours(images)
    matches = MaxIouConfig().build()(predictions.anchors, targets, NUM_CLASSES)
    for implementation in ("reference", "cpu"):
        ours.zero_grad(set_to_none=True)
        losses = criterion.build(NUM_CLASSES, implementation)(ours(images), matches)
        losses.total.backward()
        torch.testing.assert_close(losses.classification.double(), expected["classification"], rtol=1e-5, atol=0)
        torch.testing.assert_close(losses.box.double(), expected["bbox_regression"], rtol=1e-5, atol=0)
        gradients = convert_torchvision({n: p.grad for n, p in peer.named_parameters() if p.grad is not None})
        trained = {n: p.grad for n, p in ours.named_parameters() if p.requires_grad}
        assert len(trained) > 70
        for name, gradient in trained.items():
            assert gradient is not None, name
            error = (gradient - gradients[name]).abs().max() / gradients[name].abs().max()
            assert error < 1e-5, f"{implementation} {name}: {error}"
