"""Every test runs with the shape annotations of `detection` checked at each call."""

from __future__ import annotations

import os

from jaxtyping import install_import_hook

os.environ.setdefault("OMP_NUM_THREADS", "1")

install_import_hook("detection", "beartype.beartype")
