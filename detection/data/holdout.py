"""Training images that are kept out of training: what a loss may measure its own calibration on."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np

from detection.types import DataError, Records


def hold_out(records: Records, share: float, seed: int) -> tuple[Records, Records]:
    """(records to train on, records kept out): an image is kept out by a hash of its id and the seed.

    Neither the other images nor their order matter. Errors: DataError where one of the two is left empty.
    """
    kept_out = np.array([_uniform(seed, image_id) < share for image_id in records.image_ids.tolist()], bool)
    count = int(kept_out.sum())
    if count in (0, len(records)):
        raise DataError(
            f"data.holdout = {share:g} keeps {count} of {len(records)} images out of training; it has to keep out "
            "at least one, and leave one"
        )
    trained = records.select(np.flatnonzero(~kept_out))
    return trained, replace(records.select(np.flatnonzero(kept_out)), notes=())


def _uniform(seed: int, image_id: int) -> float:
    """A number of [0, 1) that the two decide."""
    digest = hashlib.blake2b(f"{seed} {image_id}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2.0**53
