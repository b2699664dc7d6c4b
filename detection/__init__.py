"""Train RetinaNet-style detectors and know how far their scores can be trusted.

Public names are imported when first used, so that `import detection` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "Batch": "types",
    "DataError": "types",
    "Detections": "types",
    "Matches": "types",
    "Predictions": "types",
    "Record": "types",
    "Records": "types",
    "Target": "types",
    "ConfigError": "config",
}

__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'detection' has no attribute {name!r}")
    return getattr(import_module(f"detection.{_PUBLIC[name]}"), name)
