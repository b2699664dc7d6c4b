"""Which images make up which batch: pure functions of (sizes, seed, epoch, rank, world), and their order as a sampler.

Opens no file. An image is named by (epoch, index), so that a worker needs no state to know its augmentation.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from jaxtyping import Int
from numpy import ndarray
from torch.utils.data import Sampler

from detection.types import DataError


def epoch_batches(
    sizes: Int[ndarray, "R 2"],
    batch_size: int,
    seed: int,
    epoch: int,
    rank: int = 0,
    world: int = 1,
    shuffle: bool = True,
    group_by_aspect: bool = True,
    drop_last: bool = False,
) -> list[list[int]]:
    """The batches of record indices that `rank` trains on in `epoch`: full, as many on every rank and in every epoch.

    `batch_size` is a rank's. A step's joined batch is the same for every world that divides it. With grouping, wide and
    tall images (W > H, H >= W; of `sizes` (H, W)) do not share a batch, except in the few that take the rest of both.
    The incomplete last batch is filled with the first images of the epoch's order; with `drop_last` it is left out
    instead, so that no image is seen twice and some, others in every epoch, are not seen.
    Errors: DataError where there are no images, or, with `drop_last`, fewer than one step needs.
    """
    joined = batch_size * world
    count = len(sizes)
    if count == 0 or (drop_last and count < joined):
        raise DataError(f"{count} images do not fill one step of {world} x {batch_size}")
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(count) if shuffle else np.arange(count)
    wide = (sizes[:, 1] > sizes[:, 0])[order] & group_by_aspect
    groups = (order[wide], order[~wide])
    full = [group[: len(group) // joined * joined] for group in groups]
    rest = np.concatenate([group[len(group) // joined * joined :] for group in groups])
    rest = rest[: len(rest) // joined * joined] if drop_last else _fill(rest, order, joined)
    steps = np.concatenate([*full, rest]).reshape(-1, world, batch_size)
    if shuffle:
        steps = steps[rng.permutation(len(steps))]
    batches: list[list[int]] = steps[:, rank].tolist()
    return batches


def _fill(rest: Int[ndarray, "r"], order: Int[ndarray, "R"], multiple: int) -> Int[ndarray, "f"]:
    """`rest` followed by as much of `order`, from its start and around again, as a multiple needs."""
    missing = -len(rest) % multiple
    return np.concatenate([rest, np.resize(order, missing)])


def evaluation_batches(sizes: Int[ndarray, "R 2"], batch_size: int, rank: int = 0, world: int = 1) -> list[list[int]]:
    """The batches of record indices that `rank` evaluates: index % world == rank, each image once on one rank.

    Images of like aspect ratio share a batch, so that little of it is padding. The last batch may be smaller and ranks
    may have different numbers of batches.
    """
    mine = np.arange(rank, len(sizes), world)
    order = mine[np.argsort(sizes[mine, 0] / sizes[mine, 1], kind="stable")]
    return [order[i : i + batch_size].tolist() for i in range(0, len(order), batch_size)]


class BatchOrder(Sampler[list[tuple[int, int]]]):
    """The training batches of one epoch as lists of (epoch, index), from a given batch on.

    The position is set, never advanced by reading: a loader reads ahead of what training has used.
    """

    def __init__(
        self,
        sizes: Int[ndarray, "R 2"],
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        shuffle: bool = True,
        group_by_aspect: bool = True,
        drop_last: bool = False,
    ) -> None:
        self.sizes = sizes
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world = world
        self.shuffle = shuffle
        self.group_by_aspect = group_by_aspect
        self.drop_last = drop_last
        self.epoch = 0
        self.first = 0
        self.batches_per_epoch = len(self._batches(0))

    def set_position(self, epoch: int, batch: int = 0) -> None:
        """The next iteration yields the batches of `epoch` from number `batch` on."""
        if not 0 <= batch <= self.batches_per_epoch:
            raise ValueError(f"batch {batch} of an epoch of {self.batches_per_epoch}")
        self.epoch = epoch
        self.first = batch

    def __len__(self) -> int:
        return self.batches_per_epoch - self.first

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, first = self.epoch, self.first
        return ([(epoch, index) for index in batch] for batch in self._batches(epoch)[first:])

    def _batches(self, epoch: int) -> list[list[int]]:
        return epoch_batches(
            self.sizes,
            self.batch_size,
            self.seed,
            epoch,
            self.rank,
            self.world,
            self.shuffle,
            self.group_by_aspect,
            self.drop_last,
        )


class EvaluationOrder(Sampler[list[tuple[int, int]]]):
    """The evaluation batches of a rank as lists of (0, index)."""

    def __init__(self, sizes: Int[ndarray, "R 2"], batch_size: int, rank: int = 0, world: int = 1) -> None:
        self.batches = evaluation_batches(sizes, batch_size, rank, world)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return ([(0, index) for index in batch] for batch in self.batches)
