"""Where a run's images and annotations come from: one section for each kind of data set, listed in `Source`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from detection.config import ConfigError, Section
from detection.data.coco import read_coco
from detection.data.coco_json import MAX_BYTES
from detection.data.digits import SPLITS, DigitsOptions, make_digits
from detection.data.voc import VocLayout, read_voc
from detection.types import Records


class CocoSplit(Section):
    """One annotation file and the folder of its images."""

    annotations: str
    """The COCO JSON file."""
    images: str
    """The folder that the file names of the JSON file start from."""


class CocoSource(Section):
    """A data set in COCO format."""

    kind: Literal["coco"] = "coco"
    splits: Annotated[dict[str, CocoSplit], Field(min_length=1)]
    """The splits by name, for example train, val and test."""
    classes: tuple[str, ...] | None = None
    """Names of the classes to keep, in label order; by default all, in the order of their category ids."""
    max_bytes: int = Field(MAX_BYTES, ge=1)
    """Largest annotation file that is read, in bytes."""

    def read(self, split: str) -> Records:
        """The records of a split. Errors: ConfigError for an unknown split, DataError for wrong files."""
        _check_split(split, self.splits)
        chosen = self.splits[split]
        return read_coco(Path(chosen.annotations), Path(chosen.images), self.classes, self.max_bytes)


class VocSource(Section):
    """A data set in Pascal VOC format: a devkit, or plain folders of XML files and images."""

    kind: Literal["voc"] = "voc"
    root: str
    """The folder that holds the three below, VOC2007 for example."""
    splits: dict[str, str] = Field({"train": "train", "val": "val", "test": "test"}, min_length=1)
    """Name of the image-set list of each split; "all" is every annotation file, for data sets without lists."""
    classes: tuple[str, ...] | None = None
    """Names of the classes to keep, in label order; by default all of the annotations folder, sorted."""
    annotations_dir: str = "Annotations"
    """The folder of the XML files, below the root."""
    images_dir: str = "JPEGImages"
    """The folder of the images, below the root."""
    lists_dir: str = "ImageSets/Main"
    """The folder of the image-set lists, below the root."""
    one_based: bool = True
    """VOC counts pixels from 1 and includes the last; false for tools that write 0-based, continuous corners."""

    def read(self, split: str) -> Records:
        """The records of a split. Errors: ConfigError for an unknown split, DataError for wrong files."""
        _check_split(split, self.splits)
        layout = VocLayout(self.annotations_dir, self.images_dir, self.lists_dir, self.one_based)
        return read_voc(Path(self.root), self.splits[split], self.classes, layout)


class DigitsSource(DigitsOptions):
    """The embedded data set, rendered on first use: splits train, calibration, test, ood (digits never trained on)."""

    kind: Literal["digits"] = "digits"
    folder: str = "datasets/digits"
    """Where data sets are rendered to; each set of options gets its own folder inside."""

    def read(self, split: str) -> Records:
        """The records of a split; those of "ood" have its own classes. Errors: ConfigError for an unknown split."""
        _check_split(split, SPLITS)
        options = DigitsOptions.model_validate(self.model_dump(include=set(DigitsOptions.model_fields)))
        folder = Path(self.folder) / options.key
        make_digits(folder, options)
        return read_coco(folder / split / "annotations.json", folder / split / "images")


Source = Annotated[CocoSource | VocSource | DigitsSource, Field(discriminator="kind")]


def _check_split(split: str, known: Iterable[str]) -> None:
    names = tuple(known)
    if split not in names:
        raise ConfigError(f"split {split!r}: not a split of this data set; known: {', '.join(names)}")
