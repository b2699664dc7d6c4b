"""torchvision's RetinaNet as the peer: its weights give its logits, deltas, gradients, anchors and detections."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import retinanet_resnet50_fpn, retinanet_resnet50_fpn_v2
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FrozenBatchNorm2d

from detection.model.decode import DecodeConfig, decode
from detection.model.retinanet import TORCHVISION_V1, TORCHVISION_V2, RetinaNet, RetinaNetConfig
from detection.model.weights import convert_torchvision, load_matching
from detection.types import Frame, Predictions

NUM_CLASSES = 5
NAMES = tuple("abcde")
SIZE = (128, 160)
PRESETS = {"v1": (retinanet_resnet50_fpn, TORCHVISION_V1), "v2": (retinanet_resnet50_fpn_v2, TORCHVISION_V2)}


def randomise(model: nn.Module) -> None:
    """Weights of an alive network: no output vanishes, every batch norm has statistics of its own."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
            if module.bias is not None:
                nn.init.uniform_(module.bias, -0.1, 0.1)
        if isinstance(module, nn.BatchNorm2d | FrozenBatchNorm2d | nn.GroupNorm):
            nn.init.uniform_(module.weight, 0.2, 0.6)
            nn.init.uniform_(module.bias, -0.2, 0.2)
        if isinstance(module, nn.BatchNorm2d | FrozenBatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)


def freeze(module: nn.Module) -> nn.Module:
    """The module with every batch norm turned into torchvision's frozen one with an epsilon of 0."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            frozen = FrozenBatchNorm2d(child.num_features, eps=0.0)
            setattr(module, name, frozen)
        else:
            freeze(child)
    return module


@pytest.fixture(scope="module", params=["v1", "v2"])
def pair(request: pytest.FixtureRequest) -> tuple[str, Any, RetinaNet]:
    build, preset = PRESETS[request.param]
    torch.manual_seed(0)
    peer = build(weights=None, weights_backbone=None, num_classes=NUM_CLASSES)
    if request.param == "v1":
        peer = freeze(peer)
    randomise(peer)
    ours = RetinaNetConfig.model_validate(preset).build(NUM_CLASSES)
    report = load_matching(ours, convert_torchvision(peer.state_dict()), NAMES, None)
    assert report.kept_classes == NAMES
    assert not report.fresh_tensors
    return request.param, peer, ours


def peer_outputs(peer: Any, images: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    dtype = next(peer.parameters()).dtype
    colours = (peer.transform.image_mean, peer.transform.image_std)
    mean, std = (torch.tensor(colour).to(dtype).view(1, 3, 1, 1) for colour in colours)
    features = list(peer.backbone((images.to(dtype) / 255 - mean) / std).values())
    out = peer.head(features)
    return out["cls_logits"], out["bbox_regression"], features


def images(count: int = 2, size: tuple[int, int] = SIZE) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 3, *size), dtype=torch.uint8, generator=generator)


def relative_error(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max() / b.detach().abs().max())


def test_logits_and_deltas_are_torchvisions(pair: tuple[str, Any, RetinaNet]) -> None:
    _, peer, ours = pair
    peer.eval()
    ours.eval()
    with torch.no_grad():
        logits, deltas, _ = peer_outputs(peer, images())
        predictions = ours(images())
    assert logits.std() > 0.05
    assert relative_error(torch.cat(predictions.logits, 1), logits) < 1e-5
    assert relative_error(torch.cat(predictions.deltas, 1), deltas) < 1e-5


def test_training_outputs_and_gradients_are_torchvisions(pair: tuple[str, Any, RetinaNet]) -> None:
    """In float64: in float32 a value next to 0 may pass one ReLU and not the other, in any two implementations."""
    _, peer, ours = (pair[0], copy.deepcopy(pair[1]).double().train(), copy.deepcopy(pair[2]).double().train())
    batch = images(size=(64, 96))
    logits, deltas, _ = peer_outputs(peer, batch)
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in (logits, deltas)]
    ((logits * weights[0]).mean() + (deltas * weights[1]).mean()).backward()
    out = ours(batch)
    our_logits, our_deltas = torch.cat(out.logits, 1), torch.cat(out.deltas, 1)
    ((our_logits * weights[0]).mean() + (our_deltas * weights[1]).mean()).backward()
    assert relative_error(our_logits, logits) < 1e-9
    assert relative_error(our_deltas, deltas) < 1e-9
    expected = convert_torchvision({n: p.grad for n, p in peer.named_parameters() if p.grad is not None})
    trained = {n: p.grad for n, p in ours.named_parameters() if p.requires_grad}
    assert len(trained) > 70
    assert all(grad is not None and relative_error(grad, expected[n]) < 1e-9 for n, grad in trained.items())


def test_anchors_are_torchvisions(pair: tuple[str, Any, RetinaNet]) -> None:
    _, peer, ours = pair
    batch = images(1)
    with torch.no_grad():
        _, _, features = peer_outputs(peer, batch)
        predictions = ours(batch)
    expected = peer.anchor_generator(ImageList(batch.float(), [SIZE]), features)[0]
    assert torch.equal(torch.cat([level.boxes for level in predictions.anchors]), expected)


def test_detections_are_torchvisions(pair: tuple[str, Any, RetinaNet]) -> None:
    _, peer, ours = pair
    peer.eval()
    ours.eval()
    predictions = scattered(ours(images()))
    config = DecodeConfig(score_threshold=0.3, top_k=200, max_detections=80)
    peer.score_thresh, peer.topk_candidates, peer.detections_per_img = 0.3, 200, 80
    outputs = {"cls_logits": list(predictions.logits), "bbox_regression": list(predictions.deltas)}
    anchors = [[level.boxes for level in predictions.anchors]] * 2
    expected = peer.postprocess_detections(outputs, anchors, [SIZE, SIZE])
    expected = peer.transform.postprocess(expected, [SIZE, SIZE], [(64, 320), SIZE])
    frames = [Frame(7, (64, 320), scale=(0.5, 2.0)), Frame(8, SIZE)]
    for mine, theirs in zip(decode(predictions, frames, config), expected, strict=True):
        assert len(mine.scores) == 80
        assert torch.equal(mine.labels, theirs["labels"])
        torch.testing.assert_close(mine.scores, theirs["scores"], rtol=1e-6, atol=0)
        torch.testing.assert_close(mine.boxes, theirs["boxes"], rtol=1e-5, atol=1e-3)


def scattered(predictions: Predictions) -> Predictions:
    """The predictions with random values, so that scores differ and boxes overlap."""
    generator = torch.Generator().manual_seed(2)
    draw: Callable[[Tensor], Tensor] = lambda x: torch.randn(x.shape, generator=generator)  # noqa: E731
    logits = tuple(draw(x) * 1.5 - 1 for x in predictions.logits)
    return Predictions(logits, tuple(draw(x) * 0.2 for x in predictions.deltas), predictions.anchors)


def test_old_files_convert_to_the_same_names() -> None:
    """Version 1 files (as torchvision's COCO v1 weights) number the towers 0, 2, 4, 6 and have no inner index."""
    old = {
        "backbone.fpn.inner_blocks.2.weight": torch.zeros(1),
        "backbone.fpn.layer_blocks.0.bias": torch.zeros(1),
        "head.classification_head.conv.6.weight": torch.zeros(1),
        "head.regression_head.conv.2.bias": torch.zeros(1),
    }
    assert list(convert_torchvision(old)) == [
        "pyramid.lateral.2.weight",
        "pyramid.output.0.bias",
        "head.classes.convs.3.weight",
        "head.boxes.convs.1.bias",
    ]
