"""Records to the batches of a run: which images there are, and how they are ordered, augmented and loaded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pydantic import Field

import detection.distributed as distributed
from detection.config import ConfigError, Section
from detection.data.blanked import BlankedDataset
from detection.data.dataset import DetectionDataset, ImageConfig
from detection.data.loader import BatchLoader, LoaderConfig, build_loader
from detection.data.sampler import BatchOrder, EvaluationOrder
from detection.data.source import DigitsSource, Source
from detection.data.transforms import TransformConfig
from detection.types import Batch, Records


class DataConfig(Section):
    """Which images are trained on, which one selects the best checkpoint by, and which are reported."""

    source: Source = DigitsSource()
    """The data set."""
    train: str = "train"
    """Split that the weights are trained on."""
    select: str | None = "calibration"
    """Split that is evaluated during training, for the best checkpoint; never the one that is reported."""
    test: str | None = "test"
    """Split that is reported once at the end."""
    holdout: float = Field(0.0, ge=0, lt=1)
    """Share of the training split's images that are kept out of training, for losses that follow their own calibration
    error (adafocal, which wants 0.1 or so); chosen by image id and the run's seed."""
    batch_size: int = Field(16, ge=1)
    """Images of a batch, all ranks together."""
    evaluation_batch_size: int | None = Field(None, ge=1)
    """Likewise in evaluation; by default the same."""
    group_by_aspect: bool = True
    """Wide and tall images go into different batches, so that less is padding."""
    drop_last: bool = False
    """Leave out an epoch's incomplete last batch, instead of filling it up."""
    images: ImageConfig = ImageConfig()
    """What reading an image file accepts."""
    transform: TransformConfig = TransformConfig()
    """Resize, and the augmentation of training."""
    loader: LoaderConfig = LoaderConfig()
    """Worker processes."""


@dataclass(slots=True)
class TrainingBatches:
    """The training split as the engine asks for it: any epoch, from any batch on."""

    order: BatchOrder
    loader: BatchLoader

    @property
    def batch_size(self) -> int:
        return self.order.batch_size

    @property
    def batches_per_epoch(self) -> int:
        return self.order.batches_per_epoch

    def epoch(self, epoch: int, start: int) -> Iterable[Batch]:
        self.order.set_position(epoch, start)
        return self.loader


def training_batches(data: DataConfig, records: Records, seed: int) -> TrainingBatches:
    """This rank's shuffled and augmented batches of `records`.

    Errors: ConfigError where the batch size does not divide among the ranks.
    """
    world = distributed.world_size()
    if data.batch_size % world:
        raise ConfigError(f"data.batch_size = {data.batch_size} does not divide among {world} ranks")
    dataset = DetectionDataset(records, data.transform.build(train=True), seed, data.images)
    order = BatchOrder(
        records.sizes,
        data.batch_size // world,
        seed,
        distributed.rank(),
        world,
        group_by_aspect=data.group_by_aspect,
        drop_last=data.drop_last,
    )
    return TrainingBatches(order, build_loader(dataset, order, data.loader))


def evaluation_loader(data: DataConfig, records: Records, seed: int, *, blanked: bool = False) -> BatchLoader:
    """This rank's share of `records`, each image once and not augmented; `blanked`: with its objects painted over."""
    world = distributed.world_size()
    kind = BlankedDataset if blanked else DetectionDataset
    dataset = kind(records, data.transform.build(train=False), seed, data.images)
    batch_size = max(1, (data.evaluation_batch_size or data.batch_size) // world)
    order = EvaluationOrder(records.sizes, batch_size, distributed.rank(), world)
    return build_loader(dataset, order, data.loader.model_copy(update={"persistent": False}))
