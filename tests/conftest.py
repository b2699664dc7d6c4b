"""Every test runs with the shape annotations of `detection` checked at each call. A small detector to test with."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

os.environ.setdefault("OMP_NUM_THREADS", "1")

install_import_hook("detection", "beartype.beartype")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leaves out what is marked `gpu` where there is no CUDA device."""
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


SMALL = [
    "device=cpu",
    "data.batch_size=4",
    "data.loader.workers=0",
    "data.source.kind=digits",
    "data.source.image_size=64",
    "data.source.min_size=16",
    "data.source.max_size=48",
    "data.source.train=3",
    "data.source.calibration=10",
    "data.source.test=6",
    "data.source.ood=5",
    "data.transform={size=64, mode='longest', max_size=64}",
    "model.backbone.name=test_resnet.r160_in1k",
    "model.pyramid={width=16, levels=3}",
    "model.head={depth=1}",
    "model.anchors={size_factor=3.0, scales=[1.0], ratios=[1.0]}",
    "model.decode={score_threshold=0.0, top_k=20, max_detections=10}",
]
"""Overrides that make a detector and a data set of a few seconds."""


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of random weights whose scores spread over (0, 1)."""
    import torch

    from detection.config import load
    from detection.engine.checkpoint import Checkpoint, save
    from detection.experiment import Experiment, read_split

    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    experiment = load(Experiment, None, [*SMALL, f"data.source.folder={folder / 'digits'}"])
    records = read_split(experiment, "calibration")
    model = experiment.model.build(records.num_classes)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for name in [n for n in state if n.startswith("head.classes.output")]:
        if state[name].is_floating_point():
            state[name] = torch.randn_like(state[name])
    checkpoint = Checkpoint(
        config=experiment.model_dump(mode="json"),
        class_names=records.class_names,
        category_ids=records.category_ids,
        step=7,
        samples_seen=28,
        world_size=1,
        model=state,
        ema={name: value * 1 for name, value in state.items()},
        optimiser={"state": {0: {"step": torch.tensor(7.0)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
        criterion={},
        ranks=[{"torch": torch.get_rng_state()}],
        progress={"best": 0.25},
        versions={"torch": str(torch.__version__)},
    )
    path = folder / "best.pt"
    save(checkpoint, path)
    return path


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A fresh run folder with that checkpoint."""
    (tmp_path / "best.pt").write_bytes(trained.read_bytes())
    return tmp_path
