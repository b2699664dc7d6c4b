"""The losses a configuration can name. A new one is its file and a line here."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from detection.losses.adafocal import AdaFocalConfig
from detection.losses.bce import BceConfig
from detection.losses.box import CIoUConfig, DIoUConfig, GIoUConfig, L1Config, SmoothL1Config
from detection.losses.flsd53 import Flsd53Config
from detection.losses.focal import FocalConfig
from detection.losses.inverse_focal import InverseFocalConfig
from detection.losses.label_smoothing import LabelSmoothingConfig
from detection.losses.mae import MaeConfig
from detection.losses.mbls import MblsConfig
from detection.losses.mdca import DcaConfig, MdcaConfig
from detection.losses.mmce import MmceConfig, WeightedMmceConfig
from detection.losses.mse import MseConfig
from detection.losses.msle import MsleConfig
from detection.losses.poisson import PoissonConfig
from detection.losses.quality_focal import QualityFocalConfig
from detection.losses.softmax_ce import SoftmaxCeConfig
from detection.losses.softmax_focal import SoftmaxFocalConfig
from detection.losses.squared_hinge import SquaredHingeConfig
from detection.losses.tcd import TcdConfig
from detection.losses.varifocal import VarifocalConfig

CLASSIFICATION = (
    FocalConfig,
    BceConfig,
    AdaFocalConfig,
    InverseFocalConfig,
    Flsd53Config,
    LabelSmoothingConfig,
    MaeConfig,
    MseConfig,
    MsleConfig,
    PoissonConfig,
    SquaredHingeConfig,
    QualityFocalConfig,
    VarifocalConfig,
    SoftmaxCeConfig,
    SoftmaxFocalConfig,
)
AUXILIARY = (MdcaConfig, DcaConfig, MmceConfig, WeightedMmceConfig, MblsConfig, TcdConfig)
BOX = (SmoothL1Config, L1Config, GIoUConfig, DIoUConfig, CIoUConfig)

ClassificationConfig = Annotated[
    FocalConfig
    | BceConfig
    | AdaFocalConfig
    | InverseFocalConfig
    | Flsd53Config
    | LabelSmoothingConfig
    | MaeConfig
    | MseConfig
    | MsleConfig
    | PoissonConfig
    | SquaredHingeConfig
    | QualityFocalConfig
    | VarifocalConfig
    | SoftmaxCeConfig
    | SoftmaxFocalConfig,
    Field(discriminator="kind"),
]
AuxiliaryConfig = Annotated[
    MdcaConfig | DcaConfig | MmceConfig | WeightedMmceConfig | MblsConfig | TcdConfig, Field(discriminator="kind")
]
BoxConfig = Annotated[SmoothL1Config | L1Config | GIoUConfig | DIoUConfig | CIoUConfig, Field(discriminator="kind")]
