"""The assignment rules to choose from, by `kind`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from detection.assignment.atss import AtssConfig
from detection.assignment.max_iou import MaxIouConfig

Assignment = Annotated[MaxIouConfig | AtssConfig, Field(discriminator="kind")]
