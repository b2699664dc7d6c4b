"""Calibration, the comparison with unfamiliar images, evaluation and prediction are the same on two ranks as on one."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from detection.engine.checkpoint import load as load_checkpoint
from detection.experiment import evaluate_run
from detection.prediction import predict_images
from detection.repair import calibrate_run
from detection.report.calibration_tables import print_lines
from detection.screening import evaluate_ood

RANK = """
import os, sys
from pathlib import Path
import torch
import detection.distributed as distributed
from detection.experiment import evaluate_run
from detection.prediction import predict_images
from detection.repair import calibrate_run
from detection.report.calibration_tables import print_lines
from detection.screening import evaluate_ood

run, images = Path(sys.argv[1]), Path(sys.argv[2])
distributed.initialise(torch.device("cpu"))
distributed.shut_down = lambda: None  # one group for all four
calibrate_run(run, None, ["calibration.map.kind=platt"])
evaluate_run(run, None, [], None)
evaluate_ood(run, "ood", None, [], None)
predict_images(run, [images], run / "predicted", score_threshold=0.0)
print_lines(["done"])
sys.stdout.flush()
distributed.barrier()
os._exit(0)
"""


def run_two_ranks(script: Path, *arguments: str) -> list[str]:
    """What each rank of `script` printed, in rank order."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    own = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    processes = []
    for rank in ("0", "1"):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **own, "RANK": rank, "LOCAL_RANK": rank}
        command = [sys.executable, str(script), *arguments]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    try:
        printed = [process.communicate(timeout=600)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0]
    return printed


@pytest.mark.slow
def test_two_ranks_do_what_one_does(trained: Path, tmp_path: Path) -> None:
    one, two, script = tmp_path / "one", tmp_path / "two", tmp_path / "rank.py"
    for folder in (one, two):
        folder.mkdir()
        shutil.copy(trained, folder / "best.pt")
    images = next((trained.parent / "digits").iterdir()) / "test" / "images"
    script.write_text(RANK)
    assert run_two_ranks(script, str(two), str(images)) == ["done\n", ""]

    calibrate_run(one, None, ["calibration.map.kind=platt"])
    evaluate_run(one, None, [], None)
    evaluate_ood(one, "ood", None, [], None)
    predict_images(one, [images], one / "predicted", score_threshold=0.0)
    print_lines(["done"])
    files = sorted(str(p.relative_to(one)) for p in one.rglob("*") if p.is_file())
    assert sorted(str(p.relative_to(two)) for p in two.rglob("*") if p.is_file()) == files
    for name in (f for f in files if f.endswith(".json")):
        for a, b in zip(_numbers(one / name), _numbers(two / name), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=2e-4, err_msg=name)
    ours, theirs = (load_checkpoint(folder / "best.pt").calibrators for folder in (one, two))
    assert ours["fitted_on"] == theirs["fitted_on"]
    for a, b in zip(ours["calibrator"]["classes"], theirs["calibrator"]["classes"], strict=True):
        assert (a["count"], a["trust"]) == (b["count"], b["trust"])
        assert a["own"] == pytest.approx(b["own"], abs=1e-3)


def _numbers(path: Path) -> list[float]:
    """All numbers of a JSON file, in order."""

    def walk(value: object) -> list[float]:
        if isinstance(value, dict):
            return [number for key in sorted(value) for number in walk(value[key])]
        if isinstance(value, list):
            return [number for item in value for number in walk(item)]
        return [float(value)] if isinstance(value, int | float) else []

    return walk(json.loads(path.read_text()))
