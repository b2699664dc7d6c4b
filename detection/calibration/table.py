"""The maps a configuration can name, and what each becomes when fitted. A new one is its file and a line in each."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from detection.calibration.beta import BetaConfig, BetaMap
from detection.calibration.histogram import HistogramConfig, HistogramMap
from detection.calibration.identity import IdentityConfig, IdentityMap
from detection.calibration.isotonic import IsotonicConfig, IsotonicMap
from detection.calibration.linear import LinearConfig, LinearMap
from detection.calibration.platt import PlattConfig, PlattMap
from detection.calibration.temperature import TemperatureConfig, TemperatureMap

MAPS = (IsotonicConfig, PlattConfig, BetaConfig, TemperatureConfig, HistogramConfig, LinearConfig, IdentityConfig)

MapConfig = Annotated[
    IsotonicConfig | PlattConfig | BetaConfig | TemperatureConfig | HistogramConfig | LinearConfig | IdentityConfig,
    Field(discriminator="kind"),
]
FittedMap = Annotated[
    IsotonicMap | PlattMap | BetaMap | TemperatureMap | HistogramMap | LinearMap | IdentityMap,
    Field(discriminator="kind"),
]
