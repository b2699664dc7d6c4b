"""Samples to batches: padding, worker processes, prefetch, and an end that leaves no process behind.

What a batch holds is settled by the order and the dataset; nothing here, the number of workers included, changes it.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from numpy import ndarray
from pydantic import Field
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from detection.config import Section
from detection.data.dataset import DetectionDataset, Sample
from detection.types import Batch, DataError, Frame, Target

MULTIPLE = 32
FILL = (124, 116, 104)
"""RGB of the padding: ImageNet's mean, so that it is about zero once the model has normalised."""

Keys = list[tuple[int, int]]
log = logging.getLogger(__name__)


class LoaderConfig(Section):
    """How batches are made ready; has no influence on what they hold."""

    workers: int = Field(default=2, ge=0, le=256)
    """Worker processes of each rank; 0 loads in the training process."""
    prefetch: int = Field(default=2, ge=1, le=64)
    """Batches that each worker prepares ahead."""
    pin_memory: bool = True
    """Page-locked batches, for copies that overlap with the device's work. Without CUDA it does nothing."""
    persistent: bool = True
    """Keep the workers from one epoch to the next."""


class BatchLoader:
    """An iterable of `Batch`, one pass an iteration, over an order that names (epoch, index)."""

    def __init__(self, loader: DataLoader[_Packed | _Failure]) -> None:
        self._loader = loader
        self.skipped: set[str] = set()
        """One message for each file that could not be read and was left out."""

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        """Errors: DataError for a file that cannot be read, as the dataset in a worker raised it."""
        for packed in self._loader:
            if isinstance(packed, _Failure):
                raise DataError(packed.message)
            for problem in packed.problems:
                if problem not in self.skipped:
                    self.skipped.add(problem)
                    log.warning("left out: %s", problem)
            yield packed.unpack()


def build_loader(dataset: DetectionDataset, order: Sampler[Keys], config: LoaderConfig) -> BatchLoader:
    """The batches of `order`, in its order, whatever the number of workers."""
    parallel = config.workers > 0
    # Forked workers share the pages of the records; the other start methods would copy them into every worker.
    context = "fork" if parallel and sys.platform == "linux" else None
    return BatchLoader(
        DataLoader(
            _PackedBatches(dataset),
            batch_size=None,
            sampler=order,
            num_workers=config.workers,
            prefetch_factor=config.prefetch if parallel else None,
            persistent_workers=config.persistent and parallel,
            pin_memory=config.pin_memory and torch.cuda.is_available(),
            collate_fn=_unchanged,
            worker_init_fn=_start_worker,
            multiprocessing_context=context,
        )
    )


def collate(samples: Sequence[Sample], multiple: int = MULTIPLE) -> Batch:
    """The samples as one batch, each image at the top left of a canvas filled with `FILL`.

    The canvas's sides are the largest height and width among the samples, rounded up to `multiple`.
    """
    images = pad_images([sample.image for sample in samples], multiple)
    return Batch(images, tuple(s.target for s in samples), tuple(s.frame for s in samples))


def pad_images(images: Sequence[UInt8[Tensor, "3 _ _"]], multiple: int = MULTIPLE) -> UInt8[Tensor, "N 3 H W"]:
    """The images on one canvas each, channels_last."""
    height, width = (-(-max(image.shape[axis] for image in images) // multiple) * multiple for axis in (1, 2))
    canvas = torch.empty((len(images), height, width, 3), dtype=torch.uint8)
    fill = torch.tensor(FILL, dtype=torch.uint8)
    for row, image in zip(canvas, images, strict=True):
        h, w = image.shape[1:]
        row[:h, :w] = image.permute(1, 2, 0)
        row[h:] = fill
        row[:h, w:] = fill
    return canvas.permute(0, 3, 1, 2)


@dataclass(frozen=True, slots=True, eq=False)
class _Failure:
    """A user's error on its way out of a worker, without the traceback that would be put around an exception."""

    message: str

    def pin_memory(self) -> _Failure:
        return self


@dataclass(frozen=True, slots=True, eq=False)
class _Packed:
    """A batch on its way out of a worker: one tensor in shared memory instead of three for every image."""

    images: UInt8[Tensor, "N 3 H W"]
    offsets: Int[ndarray, "N+1"]
    boxes: Float[ndarray, "M 4"]
    labels: Int[ndarray, "M"]
    crowd: Bool[ndarray, "M"]
    frames: tuple[Frame, ...]
    problems: tuple[str, ...]

    def pin_memory(self) -> _Packed:
        images = self.images.pin_memory()
        return _Packed(images, self.offsets, self.boxes, self.labels, self.crowd, self.frames, self.problems)

    def unpack(self) -> Batch:
        boxes, labels, crowd = (torch.from_numpy(a) for a in (self.boxes, self.labels, self.crowd))
        rows = [slice(a, b) for a, b in zip(self.offsets[:-1].tolist(), self.offsets[1:].tolist(), strict=True)]
        return Batch(self.images, tuple(Target(boxes[r], labels[r], crowd[r]) for r in rows), self.frames)


def _pack(samples: Sequence[Sample], problems: Sequence[str]) -> _Packed:
    batch = collate(samples)
    targets = batch.targets
    return _Packed(
        images=batch.images,
        offsets=np.cumsum([0, *(len(t.labels) for t in targets)]),
        boxes=torch.cat([t.boxes for t in targets]).numpy(),
        labels=torch.cat([t.labels for t in targets]).numpy(),
        crowd=torch.cat([t.crowd for t in targets]).numpy(),
        frames=batch.frames,
        problems=tuple(problems),
    )


class _PackedBatches(Dataset[_Packed | _Failure]):
    """The dataset as its workers see it: an item is the batch of a list of (epoch, index)."""

    def __init__(self, dataset: DetectionDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, keys: Keys) -> _Packed | _Failure:
        try:
            return _pack(*self.dataset.read(keys))
        except DataError as error:
            return _Failure(str(error))


def _unchanged(item: Any) -> Any:
    return item


def _start_worker(_: int) -> None:
    """Prepares a worker: one thread for each library, and signals left to the training process."""
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    if sys.platform == "linux":
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_at_parents_wish, daemon=True).start()


def _end_at_parents_wish() -> None:
    """Ends the worker at a SIGTERM of its own parent; one that a scheduler sent to the whole group is the parent's to
    answer, which still needs the worker for the step after which it saves.
    """
    while True:
        sent = signal.sigwaitinfo({signal.SIGTERM})
        if sent.si_pid == os.getppid():
            os._exit(0)
