"""The checkpoint: what it contains, how it reaches the disk whole, and how an untrusted one is read.

Only tensors and plain containers are stored, and only those are accepted back: loading never runs code.
"""

from __future__ import annotations

import dataclasses
import io
import os
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from detection.config import difference

FORMAT = 1
"""Raised when the contents change in a way that older code cannot read."""

LAST, BEST = "last.pt", "best.pt"

HARMLESS = (
    "workers",
    "prefetch",
    "pin_memory",
    "persistent",
    "log_every",
    "save_every",
    "tensorboard",
    "progress",
)
"""Last names of options that cannot change a result: a resumed run may differ in them."""

AFTERWARDS = ("calibration", "ood")
"""Sections that take part only once a run is trained: it may be resumed with others, or from before they existed."""

MAX_LISTED = 8


class CheckpointError(ValueError):
    """A checkpoint cannot be written, read, or used here. The message names the file and why."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Everything that a run is, between two steps."""

    config: dict[str, Any]
    """The resolved configuration."""
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    step: int
    """Steps taken; the schedule's position."""
    samples_seen: int
    """Over all ranks."""
    world_size: int
    model: dict[str, Any]
    ema: dict[str, Any] | None
    """Averaged weights; None where no average was kept."""
    optimiser: dict[str, Any]
    criterion: dict[str, Any]
    ranks: list[dict[str, Any]]
    """Each rank's random generators and open log window."""
    progress: dict[str, Any]
    """Best metric so far, evaluations since, and whether this epoch's evaluation is still to come."""
    versions: dict[str, str]
    calibrators: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT

    @property
    def evaluation_weights(self) -> dict[str, Any]:
        """The averaged weights where there are any, else the trained ones."""
        return self.model if self.ema is None else self.ema


def save(checkpoint: Checkpoint, *paths: Path) -> None:
    """Writes the checkpoint to each path, whole or not at all: what was there stays until the new file is on the disk.

    Errors: CheckpointError where the disk is full or the folder cannot be written.
    """
    buffer = io.BytesIO()
    torch.save({f.name: getattr(checkpoint, f.name) for f in dataclasses.fields(checkpoint)}, buffer)
    for path in paths:
        write_atomically(path, buffer.getbuffer())


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Replaces the file by `content`: temporary name in the same folder, fsync, rename, fsync of the folder."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        kept = "the previous one is untouched" if path.exists() else "nothing was left behind"
        raise CheckpointError(f"{path}: cannot be written ({error.strerror or error}); {kept}") from error


def load(path: str | Path) -> Checkpoint:
    """The checkpoint of a file, its tensors on the CPU. The file is not trusted.

    Errors: CheckpointError where it is missing, truncated, not a checkpoint, of another format, or has code in it.
    """
    path = Path(path)
    _check_archive(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).split("\n")[0]
        raise CheckpointError(f"{path}: refused: it holds more than tensors and plain values ({reason})") from None
    except (RuntimeError, OSError, EOFError, KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{path}: damaged ({str(error).splitlines()[0][:200]})") from None
    return _parse(content, path)


def _check_archive(path: Path) -> None:
    """Refuses what is not a stored, complete zip archive, before anything of it is unpacked."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        raise CheckpointError(f"{path}: truncated, or not a checkpoint") from None
    if unpacked > path.stat().st_size:
        raise CheckpointError(f"{path}: not a checkpoint (compressed; would unpack to {unpacked} bytes)")


def _parse(content: object, path: Path) -> Checkpoint:
    fields = {f.name: f for f in dataclasses.fields(Checkpoint)}
    if not isinstance(content, dict) or "format" not in content:
        raise CheckpointError(f"{path}: holds weights or other data, but is not a checkpoint of this toolkit")
    if content["format"] != FORMAT:
        raise CheckpointError(f"{path}: checkpoint format {content['format']!r}; this version reads {FORMAT}")
    if content.keys() != fields.keys():
        odd = ", ".join(sorted(map(str, content.keys() ^ fields.keys())))
        raise CheckpointError(f"{path}: not a checkpoint of this toolkit (missing or unknown: {odd})")
    kinds = {
        dict: ("config", "model", "optimiser", "criterion", "progress", "versions", "calibrators"),
        tuple: ("class_names", "category_ids"),
        int: ("step", "samples_seen", "world_size"),
        list: ("ranks",),
    }
    for kind, names in kinds.items():
        for name in names:
            if not isinstance(content[name], kind):
                raise CheckpointError(f"{path}: {name} is {type(content[name]).__name__}, expected {kind.__name__}")
    if not isinstance(content["ema"], dict | None):
        raise CheckpointError(f"{path}: ema is {type(content['ema']).__name__}, expected dict or None")
    return Checkpoint(**content)


def find_checkpoint(place: str | Path) -> Path:
    """The checkpoint that a run folder or a file means: a folder's best.pt, else its last.pt."""
    place = Path(place)
    if place.is_file():
        return place
    for name in (BEST, LAST):
        if (place / name).is_file():
            return place / name
    raise CheckpointError(f"{place}: no such file, nor a run folder with {BEST} or {LAST}")


def load_weights(model: nn.Module, weights: Mapping[str, Any], path: str | Path) -> None:
    """Copies `weights` into the model, all of them, names and shapes equal.

    Errors: CheckpointError that lists the first few names and shapes in which the two differ.
    """
    own = model.state_dict()
    lines = [f"{name}: in the checkpoint only" for name in weights if name not in own]
    lines += [f"{name}: in the model only" for name in own if name not in weights]
    for name in own:
        if name in weights:
            stored = getattr(weights[name], "shape", None)
            if stored != getattr(own[name], "shape", None):
                shape = None if stored is None else list(stored)
                lines.append(f"{name}: {shape} in the checkpoint, {list(own[name].shape)} in the model")
    if lines:
        more = [f"... and {len(lines) - MAX_LISTED} more"] if len(lines) > MAX_LISTED else []
        listed = "\n  ".join(lines[:MAX_LISTED] + more)
        raise CheckpointError(f"{path}: from another architecture than the model built here:\n  {listed}")
    model.load_state_dict(dict(weights))


def load_evaluation_weights(model: nn.Module, checkpoint: Checkpoint, path: str | Path) -> None:
    """Copies the weights that are evaluated (the average where there is one) into the model."""
    load_weights(model, checkpoint.evaluation_weights, path)


def with_calibrators(checkpoint: Checkpoint, calibrators: dict[str, Any]) -> Checkpoint:
    """The checkpoint with these fitted calibrators (plain values and tensors)."""
    return dataclasses.replace(checkpoint, calibrators=calibrators)


def check_same_run(
    checkpoint: Checkpoint, config: Mapping[str, Any], class_names: Sequence[str], world: int, path: Path
) -> None:
    """Refuses to go on with a run under a configuration, classes or a number of ranks that are not its own.

    Errors: CheckpointError with one line for every difference.
    """
    lines = [line for line in difference(checkpoint.config, dict(config)) if not _is_harmless(line)]
    if tuple(checkpoint.class_names) != tuple(class_names):
        lines.append(f"classes: {list(checkpoint.class_names)} -> {list(class_names)}")
    if checkpoint.world_size != world:
        lines.append(f"ranks: {checkpoint.world_size} -> {world}")
    if lines:
        listed = "\n  ".join(lines)
        raise CheckpointError(f"{path}: cannot resume, the run was started with other settings:\n  {listed}")


def _is_harmless(line: str) -> bool:
    names = line.split(":")[0].split(".")
    return names[0] in AFTERWARDS or names[-1] in HARMLESS
