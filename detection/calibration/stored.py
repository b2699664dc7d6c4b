"""What a checkpoint, or a file of its own, holds of a calibrator: its numbers, classes and what it was fitted on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from detection.calibration.calibrator import CalibrationConfig, Calibrator
from detection.types import DataError

MAX_BYTES = 64 << 20
"""An isotonic map of 1,000 classes with 1,000 knots each takes about 40 MB."""
LISTED = 20


class FittedOn(BaseModel):
    """The data and the rules behind a fit."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    split: str
    """Name of the split, or of the annotation file."""
    images: int = Field(ge=0)
    detections: int = Field(ge=0)
    """Those that counted: matched to no crowd, of a class with objects, at or above the pre-threshold."""
    matching: str
    """The matching rule in words."""
    iou_threshold: float = Field(ge=0, lt=1)
    settings: str
    """The other choices in words."""


class StoredCalibrator(BaseModel):
    """A fitted calibrator that knows its classes and its origin."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    version: Literal[1] = 1
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    fitted_on: FittedOn
    calibrator: Calibrator

    @model_validator(mode="after")
    def _one_map_a_class(self) -> StoredCalibrator:
        maps, names, ids = self.calibrator.num_classes, len(self.class_names), len(self.category_ids)
        if not maps == names == ids:
            raise ValueError(f"{maps} maps, {names} class names, {ids} category ids; allowed: equally many")
        return self

    def state(self) -> dict[str, Any]:
        """Dicts, lists, numbers and strings from which `from_state` makes the same object."""
        return self.model_dump(mode="json")

    def check_classes(self, class_names: Sequence[str], where: str) -> None:
        """Errors: DataError where it was fitted for other classes."""
        if tuple(class_names) != self.class_names:
            raise DataError(
                f"{where}: fitted for the classes {_shown(self.class_names)}; asked to apply to {_shown(class_names)}"
            )

    def notes(self, split: str) -> list[str]:
        """What to know about calibrated numbers of `split`, one sentence each."""
        origin = self.fitted_on
        said = [f"calibrator: {origin.settings}; fitted on {origin.split}, {origin.images} images, {origin.matching}"]
        if origin.split == split:
            said.append("the calibrator was fitted on these very images: the calibrated numbers are too good")
        return said

    @staticmethod
    def from_state(state: object, where: str) -> StoredCalibrator:
        """The stored calibrator of an untrusted state. Errors: DataError that lists what is wrong with it."""
        try:
            return StoredCalibrator.model_validate(state)
        except ValidationError as error:
            found = error.errors(include_url=False, include_input=False)
            lines = [f"  {'.'.join(map(str, e['loc'])) or '(all of it)'}: {e['msg']}" for e in found[:LISTED]]
            raise DataError("\n".join([f"{where}: not a calibrator, {len(found)} problems", *lines])) from None


def read_calibrator(path: Path) -> StoredCalibrator:
    """The calibrator of a JSON file. Errors: DataError naming the file and what is wrong with it."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise DataError(f"{path}: {path.stat().st_size} bytes; at most {MAX_BYTES} are read")
        state = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except DataError:
        raise
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON: {error}") from None
    return StoredCalibrator.from_state(state, str(path))


def settings_text(config: CalibrationConfig) -> str:
    """The choices behind a fit, apart from its data and matching, in one line."""
    kind = f"{config.map.kind} map, "
    kind += f"class-wise with shrinkage {config.shrinkage:g}" if config.class_wise else "one for all classes"
    target = "IoU of a true detection, else 0" if config.target == "iou" else "true 1, false 0"
    before, after = (
        "LRP-optimal" if t == "lrp" else f"{t:g}" for t in (config.pre_threshold, config.operating_threshold)
    )
    ties = f"ties broken by the raw score ({config.tie_break:g})" if config.tie_break else "ties not broken"
    return f"{kind}, target: {target}, pre-threshold {before}, operating threshold {after}, {ties}"


def _shown(names: Sequence[str]) -> str:
    more = f", ... ({len(names)} in all)" if len(names) > LISTED else ""
    return f"{', '.join(map(str, names[:LISTED]))}{more}"
