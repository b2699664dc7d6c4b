"""The Triton kernels: the cases of test_focal.py and test_softmax_focal.py once more, interpreted and on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
OPTIONS = ("-p", "no:cacheprovider", "--noconftest", "-x")


def run_again(variable: str, *options: str) -> None:
    """In a process of its own: Triton reads its variable at its import, and the source of kernels, which the
    conftest wraps."""
    files = [str(HERE / "test_focal.py"), str(HERE / "test_softmax_focal.py")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *OPTIONS, *options, *files],
        env={**os.environ, variable: "1"},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_kernels_pass_when_interpreted() -> None:
    pytest.importorskip("triton")
    # numpy warns of the divisions and logarithms of lanes that are not selected.
    run_again("TRITON_INTERPRET", "-m", "not gpu", "-W", "ignore::RuntimeWarning")


@pytest.mark.gpu
def test_kernels_pass_on_the_device() -> None:
    run_again("FOCAL_ON_CUDA")
