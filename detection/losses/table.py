"""The losses a configuration can name. A new one is its file and a line here."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from detection.losses.adafocal import AdaFocalConfig
from detection.losses.bce import BceConfig
from detection.losses.box import CIoUConfig, DIoUConfig, GIoUConfig, L1Config, SmoothL1Config
from detection.losses.focal import FocalConfig
from detection.losses.mdca import DcaConfig, MdcaConfig

CLASSIFICATION = (FocalConfig, BceConfig, AdaFocalConfig)
AUXILIARY = (MdcaConfig, DcaConfig)
BOX = (SmoothL1Config, L1Config, GIoUConfig, DIoUConfig, CIoUConfig)

ClassificationConfig = Annotated[FocalConfig | BceConfig | AdaFocalConfig, Field(discriminator="kind")]
AuxiliaryConfig = Annotated[MdcaConfig | DcaConfig, Field(discriminator="kind")]
BoxConfig = Annotated[SmoothL1Config | L1Config | GIoUConfig | DIoUConfig | CIoUConfig, Field(discriminator="kind")]
