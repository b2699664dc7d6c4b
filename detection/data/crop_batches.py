"""Crops as the engine asks for its training batches: any epoch, from any batch on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from detection.data.crops import CropConfig, Crops, augmented, jitter
from detection.data.sampler import epoch_batches
from detection.types import Batch, Frame, Target


@dataclass(slots=True, eq=False)
class CropBatches:
    """The training batches of one rank: every crop once an epoch, the last batch filled up from the epoch's start."""

    crops: Crops
    config: CropConfig
    batch_size: int
    """Crops in a batch of one rank."""
    seed: int
    rank: int = 0
    world: int = 1
    targets: Sequence[Target] = field(init=False)
    frames: Sequence[Frame] = field(init=False)

    def __post_init__(self) -> None:
        self.targets, self.frames = whole_targets(self.crops)

    @property
    def batches_per_epoch(self) -> int:
        return len(self._order(0))

    def epoch(self, epoch: int, start: int) -> Iterator[Batch]:
        """The batches `start`, `start` + 1, ... of the epoch; the same whenever asked."""
        moves = jitter(self.config, self.seed, epoch, len(self.crops))
        for rows in self._order(epoch)[start:]:
            pixels = torch.from_numpy(augmented(self.crops, rows, moves)).permute(0, 3, 1, 2)
            yield Batch(pixels, tuple(self.targets[r] for r in rows), tuple(self.frames[r] for r in rows))

    def _order(self, epoch: int) -> list[list[int]]:
        sizes = np.full((len(self.crops), 2), self.crops.size)
        return epoch_batches(sizes, self.batch_size, self.seed, epoch, self.rank, self.world, group_by_aspect=False)


def whole_targets(crops: Crops) -> tuple[tuple[Target, ...], tuple[Frame, ...]]:
    """Each crop's one object, whose box is the crop, and its frame, which names the picture it was cut from."""
    side = float(crops.size)
    box, crowd = torch.tensor([[0.0, 0.0, side, side]]), torch.zeros(1, dtype=torch.bool)
    targets = tuple(Target(box, torch.tensor([label]), crowd) for label in crops.labels.tolist())
    frames = tuple(Frame(image_id, (crops.size, crops.size)) for image_id in crops.image_ids.tolist())
    return targets, frames
