"""Times max-IoU assignment on 201,600 anchors against torchvision's box_iou + Matcher, and measures its memory.

Run: python -m tools.bench.assignment --repeats 7
Equality with torchvision is checked before timing. Peak extra memory is VmHWM after the call minus VmRSS before it, in
a fresh process that has warmed up on a small image and reset the high-water mark (Linux: 5 > /proc/self/clear_refs); it
includes the matches themselves.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

from detection.assignment.atss import AtssConfig
from detection.assignment.max_iou import MaxIouConfig
from detection.model.anchors import AnchorConfig, anchor_levels
from detection.types import AnchorLevel, Matches, Target
from tools.bench.harness import arguments, compare, report

SIZE = (800, 1344)
SCENES = ("mixed", "tiny", "as large as the image", "tiny and large", "crowds")
CANDIDATES = ("max_iou", "atss", "torchvision")


def levels_of(size: tuple[int, int]) -> tuple[AnchorLevel, ...]:
    features = [(-(-size[0] // stride), -(-size[1] // stride)) for stride in (8, 16, 32, 64, 128)]
    return anchor_levels(AnchorConfig(), size, features, torch.device("cpu"))


def objects(scene: str, count: int, size: tuple[int, int], seed: int) -> Target:
    """Sides log-normal about 55 px as in COCO (crowds too), or 4 px, or the image's, or half of each of these two."""
    generator = torch.Generator().manual_seed(seed)
    limit = torch.tensor([size[1], size[0]], dtype=torch.float32)
    extent = torch.exp(torch.randn(count, 2, generator=generator) * 0.9 + 4)
    corner = torch.rand(count, 2, generator=generator) * (limit - 8)
    small = torch.arange(count) % 2 == 0 if scene == "tiny and large" else torch.full((count,), scene == "tiny")
    large = ~small if scene == "tiny and large" else torch.full((count,), scene == "as large as the image")
    extent[small] = 2 + 4 * torch.rand(int(small.sum()), 2, generator=generator)
    corner[large] = torch.rand(int(large.sum()), 2, generator=generator) * 8
    extent[large] = limit
    boxes = torch.cat([corner, torch.minimum(corner + extent, limit)], dim=1)
    crowd = torch.full((count,), scene == "crowds")
    return Target(boxes, torch.arange(count) % 80, crowd)


def torchvision_matches(anchors: Tensor, targets: list[Target]) -> Tensor:
    """Matched rows as torchvision's RetinaNet finds them, image by image."""
    matcher = Matcher(0.5, 0.4, allow_low_quality_matches=True)
    return torch.stack([matcher(box_iou(target.boxes, anchors)) for target in targets])


def time_batch(images: int, count: int, repeats: int) -> list[dict[str, object]]:
    levels = levels_of(SIZE)
    anchors = torch.cat([level.boxes for level in levels])
    targets = [objects("mixed", count, SIZE, seed) for seed in range(images)]
    assign, atss = MaxIouConfig().build(), AtssConfig().build()
    expected = torchvision_matches(anchors, targets)

    def check(name: str, output: object) -> None:
        if name == "max_iou":
            assert isinstance(output, Matches)
            assert torch.equal(torch.cat(output.gt_index, dim=1).long(), expected)

    rows = compare(
        {
            "torchvision": lambda: torchvision_matches(anchors, targets),
            "max_iou": lambda: assign(levels, targets, 80),
            "atss": lambda: atss(levels, targets, 80),
        },
        "torchvision",
        repeats=repeats,
        check=check,
    )
    return [{**row, "images": images, "objects": count, "anchors": len(anchors)} for row in rows]


def memory_of(candidate: str, scene: str, count: int) -> float:
    """MiB of peak extra memory of one call on one image, in this process (meant to be a fresh one)."""
    rules = {"max_iou": MaxIouConfig().build(), "atss": AtssConfig().build()}
    for size in ((128, 128), SIZE):
        levels = levels_of(size)
        anchors = torch.cat([level.boxes for level in levels])
        target = objects(scene, count if size == SIZE else 20, size, seed=0)
        Path("/proc/self/clear_refs").write_text("5")
        before = status("VmRSS")
        if candidate == "torchvision":
            torchvision_matches(anchors, [target])
        else:
            rules[candidate](levels, [target], 80)
    return (status("VmHWM") - before) / 1024


def status(field: str) -> int:
    """KiB of this process's memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def time_and_memory(candidate: str, scene: str, count: int, repeats: int) -> list[dict[str, object]]:
    """One row: the candidate alone on one image, its memory from a fresh process."""
    levels = levels_of(SIZE)
    target = objects(scene, count, SIZE, seed=0)
    command = [sys.executable, "-m", "tools.bench.assignment", "--memory", candidate, scene, str(count)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    size = {"images": 1, "objects": count, "scene": scene, "peak_extra_mib": float(printed)}
    if candidate == "torchvision":
        return [{"candidate": candidate, **size}]
    assign = MaxIouConfig().build() if candidate == "max_iou" else AtssConfig().build()
    rows = compare({candidate: lambda: assign(levels, [target], 80)}, candidate, repeats=repeats)
    return [{**row, **size} for row in rows]


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--memory", nargs=3, metavar=("CANDIDATE", "SCENE", "OBJECTS"), help="print one figure only")
    options = parser.parse_args()
    if options.memory:
        print(memory_of(options.memory[0], options.memory[1], int(options.memory[2])))
        return
    rows = time_batch(1, 100, options.repeats) + time_batch(8, 100, max(options.repeats // 2, 1))
    for candidate in CANDIDATES:
        rows += time_and_memory(candidate, "mixed", 100, options.repeats)
    for scene in SCENES:
        rows += time_and_memory("max_iou", scene, 2000, 3)
    rows += time_and_memory("atss", "mixed", 2000, 3)
    report("assignment", rows, options.out)


if __name__ == "__main__":
    main()
