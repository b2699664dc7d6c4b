"""A detector of one convolution on synthetic images: every engine contract in milliseconds a step.

Run as a script it trains in processes of its own, which can be killed: `toy_training.py '{"RUN": {"resume": true}}'`.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from detection import distributed
from detection.engine.ema import EmaConfig
from detection.engine.fit import Components, FitConfig, FitResult, fit
from detection.engine.optim import OptimConfig, ScheduleConfig
from detection.engine.parallel import parallelise
from detection.engine.step import StepParts, batch_losses
from detection.types import AnchorLevel, Batch, Frame, Losses, Matches, Predictions, Target

CLASSES = ("a", "b", "c")
SIDE, CELLS = 16, 4
ANCHORS = CELLS * CELLS


class ToyModel(nn.Module):
    """Normalised on the device; has a norm with running statistics and a dropout that draws from torch's generator."""

    def __init__(self, seed: int = 0, width: int = 8, dropout: float = 0.1) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.backbone = nn.Sequential(nn.Conv2d(3, width, 4, stride=4), nn.BatchNorm2d(width), nn.ReLU())
        self.dropout = nn.Dropout(dropout)
        self.logits = nn.Conv2d(width, len(CLASSES), 1)
        self.deltas = nn.Conv2d(width, 4, 1)

    def forward(self, images: Tensor) -> Predictions:
        features = self.dropout(self.backbone(images.float() / 255 - 0.5))
        logits, deltas = (head(features).flatten(2).transpose(1, 2) for head in (self.logits, self.deltas))
        return Predictions((logits,), (deltas,), (anchor_level(),))


class ToyCriterion(nn.Module):
    """Cross entropy and L1 over the rank-summed number of positives; counts its calls as state."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, predictions: Predictions, matches: Matches) -> Losses:
        self.calls += 1
        total = distributed.sum_across_ranks(matches.num_positive) / distributed.world_size()
        normaliser = total.clamp(min=1)
        logits, labels = predictions.logits[0].float(), matches.labels[0]
        wanted = F.one_hot(labels.long(), len(CLASSES) + 1)[..., :-1].float()
        classification = F.binary_cross_entropy_with_logits(logits, wanted, reduction="sum") / normaliser
        deltas = predictions.deltas[0].float()
        box = deltas.sum() * 0 + deltas.flatten(0, 1)[matches.positives[0]].abs().sum() / normaliser
        return Losses(classification, box, classification + box, matches.num_positive)


def anchor_level() -> AnchorLevel:
    corners = torch.arange(CELLS) * float(SIDE // CELLS)
    y, x = torch.meshgrid(corners, corners, indexing="ij")
    boxes = torch.stack([x, y, x + SIDE // CELLS, y + SIDE // CELLS], dim=-1).reshape(-1, 4)
    return AnchorLevel(boxes, boxes[:1], (SIDE // CELLS, SIDE // CELLS), (CELLS, CELLS))


def assign(anchors: Sequence[AnchorLevel], targets: Sequence[Target], num_classes: int) -> Matches:
    """Object i of an image is matched to anchor i."""
    labels = torch.full((len(targets), ANCHORS), num_classes, dtype=torch.int32)
    gt_index = torch.full_like(labels, -1)
    for n, target in enumerate(targets):
        count = len(target.labels)
        labels[n, :count] = target.labels.int()
        gt_index[n, :count] = torch.arange(count, dtype=torch.int32)
    positives = (gt_index >= 0).flatten().nonzero().flatten()
    boxes = torch.cat([t.boxes for t in targets])
    return Matches((labels,), (gt_index,), (positives,), (boxes,), torch.tensor(float(len(positives))))


def sample(epoch: int, index: int, objects: bool = True) -> tuple[Tensor, Target, Frame]:
    """The image, a function of (epoch, index) alone; image 100 + index."""
    generator = torch.Generator().manual_seed(1000 * epoch + index)
    image = torch.randint(0, 256, (3, SIDE, SIDE), dtype=torch.uint8, generator=generator)
    count = index % 3 if objects else 0
    labels = torch.randint(0, len(CLASSES), (count,), generator=generator)
    boxes = torch.tensor([0.0, 0.0, 4.0, 4.0]).repeat(count, 1)
    return image, Target(boxes, labels, torch.zeros(count, dtype=torch.bool)), Frame(100 + index, (SIDE, SIDE))


def collate(samples: Sequence[tuple[Tensor, Target, Frame]]) -> Batch:
    images, targets, frames = zip(*samples, strict=True)
    return Batch(torch.stack(images).contiguous(memory_format=torch.channels_last), targets, frames)


class ToyDataset(Dataset[tuple[Tensor, Target, Frame]]):
    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Target, Frame]:
        return sample(*key)


@dataclass
class ToyBatches:
    """`images` images in batches, dealt to the ranks in turn."""

    batch_size: int = 2
    images: int = 16
    workers: int = 0

    @property
    def batches_per_epoch(self) -> int:
        return self.images // (self.batch_size * distributed.world_size())

    def epoch(self, epoch: int, start: int) -> Iterator[Batch]:
        """Lazy: the loader draws its base seed from torch's generator when the first batch is asked for."""
        mine = range(distributed.rank(), self.images, distributed.world_size())
        keys = [(epoch, i) for i in mine]
        order = [keys[b * self.batch_size : (b + 1) * self.batch_size] for b in range(start, self.batches_per_epoch)]
        yield from DataLoader(ToyDataset(), batch_sampler=order, num_workers=self.workers, collate_fn=collate)


def weight_sum(model: nn.Module) -> dict[str, float]:
    """A stand-in for metrics: deterministic in the weights."""
    torch.rand(3)
    return {"ap": float(sum(p.double().sum() for p in model.parameters())), "d_ece": 0.25}


def toy_config(**changes: object) -> FitConfig:
    settings: dict[str, object] = {
        "epochs": 2,
        "log_every": 3,
        "tensorboard": False,
        "optim": OptimConfig(lr=0.05, base_batch=2),
        "schedule": ScheduleConfig(kind="cosine", warmup_steps=4),
        "ema": EmaConfig(decay=0.9),
    }
    return FitConfig.model_validate({**settings, **changes})


def components(config: FitConfig, batches: ToyBatches, **changes: object) -> Components:
    settings: dict[str, object] = {
        "model": ToyModel(),
        "assign": assign,
        "criterion": ToyCriterion(),
        "batches": batches,
        "evaluate": weight_sum,
        "class_names": CLASSES,
        "category_ids": (1, 2, 7),
        "config": {"fit": config.model_dump(mode="json"), "loader": {"workers": batches.workers}},
    }
    return Components(**{**settings, **changes})  # type: ignore[arg-type]


def at_call(number: int, action: Callable[[], None]) -> Callable[..., Matches]:
    """`assign`, which acts just before its `number`-th call (from 1)."""
    calls = iter(range(1, 1 << 30))

    def wrapped(anchors: Sequence[AnchorLevel], targets: Sequence[Target], num_classes: int) -> Matches:
        if next(calls) == number:
            action()
        return assign(anchors, targets, num_classes)

    return wrapped


def train(run: Path, options: dict[str, object]) -> FitResult:
    """Trains on the CPU; options: resume, workers, kill_at, term_at (calls of assign), and those of `FitConfig`."""
    options = dict(options)
    images, workers = int(options.pop("images", 16)), int(options.pop("workers", 0))  # type: ignore[call-overload]
    batches = ToyBatches(images=images, workers=workers)
    resume = bool(options.pop("resume", False))
    chosen: Callable[..., Matches] = assign
    for name, number in (("kill_at", signal.SIGKILL), ("term_at", signal.SIGTERM)):
        if call := options.pop(name, None):
            chosen = at_call(call, lambda number=number: os.kill(os.getpid(), number))  # type: ignore[arg-type,misc]
    config = toy_config(**options)
    return fit(components(config, batches, assign=chosen), config, run, torch.device("cpu"), resume)


def leaves(tree: object, name: str = "") -> Iterator[tuple[str, object]]:
    """Every tensor and value of a checkpoint with its place."""
    if isinstance(tree, dict):
        for key in tree:
            yield from leaves(tree[key], f"{name}.{key}")
    elif isinstance(tree, list | tuple):
        for index, value in enumerate(tree):
            yield from leaves(value, f"{name}.{index}")
    else:
        yield name, tree


def save_gradients(folder: Path, empty_rank: int) -> None:
    """Writes this rank's gradients of its share of a joined batch of 8; `empty_rank` of two has no objects at all."""
    model = ToyModel(dropout=0.0).eval()
    parts = StepParts(
        parallelise(model, torch.device("cpu"), compiled=False),
        assign,
        ToyCriterion(),
        torch.optim.SGD(model.parameters()),
        len(CLASSES),
        torch.device("cpu"),
        "float32",
        0.0,
    )
    per_half = [[sample(0, i + 4 * half, objects=half != empty_rank) for i in range(4)] for half in range(2)]
    mine = per_half[distributed.rank()] if distributed.world_size() == 2 else per_half[0] + per_half[1]
    batch_losses(parts, collate(mine)).total.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    torch.save(gradients, folder / f"{distributed.world_size()}-{distributed.rank()}.pt")


def run_ranks(world: int, *arguments: str, script: str = __file__) -> list[int]:
    """Exit codes of this file (or another) run with `arguments` in `world` processes, as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = []
    for rank in range(world):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        if world > 1:
            environment |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
        command = [sys.executable, script, *arguments]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL))
    try:
        return [process.wait(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()


if __name__ == "__main__":
    torch.set_num_threads(1)
    distributed.initialise(torch.device("cpu"))
    if sys.argv[1] == "gradients":
        save_gradients(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        for folder, options in json.loads(sys.argv[1]).items():
            train(Path(folder), options)
    distributed.barrier()  # no rank takes its connections down while another still uses them
    # Rank 0 serves torch's key-value store here (under torchrun the launcher does); its thread has been seen to abort
    # the interpreter's exit about once in thirty runs, after all work was done.
    os._exit(0)
