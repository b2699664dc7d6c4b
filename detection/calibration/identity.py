"""No calibration: the raw scores."""

from __future__ import annotations

from typing import Literal

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from detection.calibration.score_map import ScoreMap
from detection.config import Section


class IdentityMap(ScoreMap):
    kind: Literal["identity"] = "identity"

    def apply(self, raw_scores: Float[ndarray, "D"]) -> Float[ndarray, "D"]:
        return np.array(raw_scores, np.float64)


class IdentityConfig(Section):
    kind: Literal["identity"] = "identity"

    def fit(
        self, scores: Float[ndarray, "D"], targets: Float[ndarray, "D"], weights: Float[ndarray, "D"] | None = None
    ) -> IdentityMap:
        """The map that changes nothing."""
        return IdentityMap()
