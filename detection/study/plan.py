"""What a study is: its file, and the cells of its grid, each with the folder that its settings name."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, field_validator

from detection.classification_task import ClassificationExperiment
from detection.config import ConfigError, Section, difference, load, parse
from detection.engine.journal import CONFIG, read_journal
from detection.experiment import Experiment
from detection.report.runs import read_config
from detection.types import DataError

Task = Literal["detection", "classification"]
HeadName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+-]{0,39}$")]
"""Part of a folder's name."""

IDENTITY_DIGITS = 8
MAX_SEEDS = 1000


class HeadConfig(Section):
    """One row of the study's table."""

    set: tuple[str, ...] = ()
    """What makes this head, as `name=value` overrides of the base."""


class MeasuresConfig(Section):
    """What is measured of every trained cell."""

    calibration: tuple[str, ...] = (
        "calibration.map.kind=isotonic",
        "calibration.target=tp",
        "calibration.iou_threshold=0.5",
    )
    """Overrides for the calibrator behind the "after" numbers of a detection study; by default isotonic, after NMS,
    for the chance of being a true positive. Empty: not measured. A classifier's temperature is set by
    its base config."""
    ood: str = "ood"
    """Unfamiliar images of a detection study: a split of the data set, a configuration (.toml), or a folder of images.
    Empty: not measured. A classifier's are set by its base config."""
    curvature_images: int = Field(0, ge=0)
    """Training images (a classifier's crops) behind the largest eigenvalue and the trace of the classification loss's
    Hessian; 0: not measured."""
    alpha: float = Field(0.05, gt=0, lt=1)
    """Level of the paired test over seeds that tells heads from the best one."""


class Study(Section):
    """A grid of heads and seeds over one base configuration."""

    title: str = ""
    """The heading of its table."""
    task: Task = "detection"
    """What a cell is: a run of tools/train.py, or of tools/classify.py."""
    base: str
    """The configuration that every cell starts from; a path from the study file's folder."""
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field((0, 1, 2), min_length=1, max_length=MAX_SEEDS)
    """Each head is trained once with each."""
    set: tuple[str, ...] = ()
    """`name=value` overrides of the base in every cell."""
    heads: dict[HeadName, HeadConfig] = Field(min_length=1)
    """The rows of the table, by name."""
    measures: MeasuresConfig = MeasuresConfig()

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds):
            raise ValueError("a seed is given twice")
        return seeds


@dataclass(frozen=True, slots=True)
class Cell:
    """One head with one seed. Cells with the same settings share a folder, whichever study they belong to."""

    head: str
    seed: int
    task: Task
    config: Path
    overrides: tuple[str, ...]
    """Of the base configuration; the seed is among them."""
    measures: MeasuresConfig
    resolved: dict[str, Any]
    """The whole configuration, plain JSON values."""
    identity: str
    """A digest of all settings that differ from the defaults."""
    folder: Path
    """Its run folder."""

    @property
    def name(self) -> str:
        return self.folder.name


def read_study(path: Path, overrides: Sequence[str], cells: Path) -> tuple[Study, list[Cell]]:
    """The study of a file and its cells, seed by seed. `overrides` are added to those of all cells.

    Errors: ConfigError with the problems of the study, or of every cell's configuration.
    """
    study = load(Study, path)
    base = path.parent / study.base
    known = known_cells(cells, schema_of(study.task))
    found, problems = [], []
    for seed in study.seeds:
        for name, head in study.heads.items():
            own = (*study.set, *head.set, *overrides, f"seed={seed}")
            try:
                found.append(_cell(name, seed, study, base, own, cells, known))
            except ConfigError as error:
                problems.append(f"{path}: head {name!r}: {error}")
        if problems:
            raise ConfigError("\n".join(problems))
    _check_distinct(found, path)
    return study, found


def identity(config: Section) -> str:
    """A digest of every option whose value is not the default one. Options added later do not change it."""
    text = json.dumps(_changed(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:IDENTITY_DIGITS]


def schema_of(task: Task) -> type[Section]:
    """The schema of a cell's configuration."""
    return Experiment if task == "detection" else ClassificationExperiment


def known_cells(cells: Path, schema: type[Section]) -> dict[str, Path]:
    """Identity -> run folder of what is in the folder of cells: by name, or by settings for any other finished run."""
    found: dict[str, Path] = {}
    for folder in sorted(p for p in cells.glob("*") if p.is_dir()):
        named = re.fullmatch(rf".*-s\d+-([0-9a-f]{{{IDENTITY_DIGITS}}})", folder.name)
        digest = named[1] if named else _identity_of_run(folder, schema)
        if digest is not None:
            found.setdefault(digest, folder)
    return found


def is_trained(folder: Path) -> bool:
    """Whether the training of a run folder came to its end."""
    last = read_journal(folder)[-1:]
    return any(e.get("event") == "end" and not str(e.get("reason", "")).startswith("interrupted") for e in last)


def other_settings(folder: Path, resolved: dict[str, Any]) -> list[str]:
    """The options in which a run folder differs from a configuration, but for those that only one of them knows."""
    path = folder / CONFIG
    if not path.is_file():
        return []
    lines = difference(read_config(folder), resolved)
    return [line for line in lines if "'(absent)'" not in line]


def _identity_of_run(folder: Path, schema: type[Section]) -> str | None:
    """None where there is no run that came to its end, or one of another task."""
    if not is_trained(folder):
        return None
    try:
        return identity(parse(schema, read_config(folder), str(folder)))
    except (DataError, ConfigError):
        return None


def _cell(
    head: str, seed: int, study: Study, base: Path, overrides: tuple[str, ...], cells: Path, known: dict[str, Path]
) -> Cell:
    config = load(schema_of(study.task), base, overrides)
    digest = identity(config)
    resolved = config.model_dump(mode="json")
    folder = cells / f"{head}-s{seed}-{digest}"
    if digest in known and not other_settings(known[digest], resolved):
        folder = known[digest]
    differing = other_settings(folder, resolved)
    if differing:
        lines = "\n  ".join(differing)
        raise ConfigError(f"{folder}: made with other defaults; move it, or choose other cells:\n  {lines}")
    return Cell(
        head=head,
        seed=seed,
        task=study.task,
        config=base,
        overrides=overrides,
        measures=study.measures,
        resolved=resolved,
        identity=digest,
        folder=folder,
    )


def _changed(value: Any) -> Any:
    """The options of a section that differ from their defaults, and always its kind; other values as JSON."""
    if isinstance(value, Section):
        found = {}
        for name, field in type(value).model_fields.items():
            own = getattr(value, name)
            if name == "kind" or field.is_required() or own != field.get_default(call_default_factory=True):
                found[name] = _changed(own)
        return found
    if isinstance(value, tuple | list):
        return [_changed(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _changed(item) for key, item in value.items()}
    return value


def _check_distinct(cells: Sequence[Cell], path: Path) -> None:
    seen: dict[str, Cell] = {}
    for cell in cells:
        first = seen.setdefault(cell.identity, cell)
        if first is not cell:
            raise ConfigError(f"{path}: heads {first.head!r} and {cell.head!r} have the same settings")
