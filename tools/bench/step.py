"""One optimisation step (forward, loss, backward, update) against torchvision, on the same network and batch.

    python -m tools.bench.step --out tools/bench/results/step.jsonl

Same backbone, pyramid width, head depth, anchors, batch and optimiser; float32; torchvision in its own memory format.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet as TorchvisionRetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator

from detection.assignment.max_iou import MaxIouConfig
from detection.engine.optim import OptimConfig, build_optimiser
from detection.engine.step import StepParts, optimisation_step
from detection.losses.criterion import CriterionConfig
from detection.model.retinanet import RetinaNet, RetinaNetConfig
from detection.types import Batch, Frame, Target
from tools.bench.harness import arguments, compare, report

SIZES = (32, 64, 128, 256, 512)


class PyramidFeatures(nn.Module):
    """Our backbone and pyramid behind torchvision's interface, in the memory format that torchvision users have."""

    def __init__(self, model: RetinaNet, width: int) -> None:
        super().__init__()
        self.backbone, self.pyramid, self.out_channels = model.backbone, model.pyramid, width

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        return OrderedDict((str(i), level) for i, level in enumerate(self.pyramid(self.backbone(images))))


def make_batch(count: int, height: int, width: int, classes: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)
    targets = []
    for _ in range(count):
        corner = torch.rand(13, 2, generator=generator) * torch.tensor([width - 64.0, height - 64.0])
        boxes = torch.cat([corner, corner + 20 + 44 * torch.rand(13, 2, generator=generator)], dim=1)
        labels = torch.randint(0, classes, (13,), generator=generator)
        targets.append(Target(boxes, labels, torch.zeros(13, dtype=torch.bool)))
    frames = tuple(Frame(i + 1, (height, width)) for i in range(count))
    return Batch(images.contiguous(memory_format=torch.channels_last), tuple(targets), frames)


def our_step(config: RetinaNetConfig, batch: Batch, classes: int, implementation: Any) -> Callable[[], float]:
    torch.manual_seed(0)
    model = config.build(classes).train()
    device = torch.device("cpu")
    criterion = CriterionConfig().build(classes, implementation, device)
    optimiser = build_optimiser(model, 1e-4, OptimConfig(kind="sgd"))
    parts = StepParts(model, MaxIouConfig().build(), criterion, optimiser, classes, device, "float32", 10.0)
    return lambda: float(optimisation_step(parts, [batch])[0])


def torchvision_step(config: RetinaNetConfig, batch: Batch, classes: int) -> Callable[[], float]:
    torch.manual_seed(0)
    features = PyramidFeatures(config.build(classes), config.pyramid.width)
    features = features.to(memory_format=torch.contiguous_format)
    scales = tuple(tuple(int(size * 2 ** (i / 3)) for i in range(3)) for size in SIZES)
    height, width = batch.images.shape[-2:]
    model = TorchvisionRetinaNet(
        features,
        classes,
        min_size=height,
        max_size=width,
        anchor_generator=AnchorGenerator(scales, ((0.5, 1.0, 2.0),) * len(SIZES)),
    ).train()
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, weight_decay=1e-4, fused=True)
    images = [image.contiguous().float() / 255 for image in batch.images]
    targets = [{"boxes": target.boxes, "labels": target.labels} for target in batch.targets]

    def step() -> float:
        loss: Tensor = sum(model(images, targets).values())
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--backbone", default="tf_efficientnet_lite0")
    parser.add_argument("--width", type=int, default=96, help="channels of pyramid and head")
    parser.add_argument("--classes", type=int, default=3)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--height", type=int, default=256)
    parser.add_argument("--size", type=int, default=320, help="image width")
    options = parser.parse_args()
    config = RetinaNetConfig.model_validate(
        {
            "backbone": {"name": options.backbone, "batch_norm": "live"},
            "pyramid": {"width": options.width},
            "anchors": {"rounding": True},
        }
    )
    batch = make_batch(options.batch, options.height, options.size, options.classes)
    candidates = {
        "torchvision": torchvision_step(config, batch, options.classes),
        "ours": our_step(config, batch, options.classes, "auto"),
        "ours, reference loss": our_step(config, batch, options.classes, "reference"),
    }

    def check(name: str, loss: object) -> None:
        assert isinstance(loss, float)
        assert 0 < loss < 100, f"{name}: loss {loss}"

    rows = compare(candidates, "torchvision", repeats=options.repeats, warm_up=2, check=check)
    setting = {k: getattr(options, k) for k in ("backbone", "width", "classes", "batch")}
    size = f"{options.height}x{options.size}"
    report("step", [{**row, **setting, "size": size} for row in rows], options.out)


if __name__ == "__main__":
    main()
