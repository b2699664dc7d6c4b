"""The cells of a study on a real local Ray cluster that loses the node at work."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from detection.config import ConfigError
from detection.study.grid import Progress, Work
from detection.study.plan import read_study
from detection.study.ray_cluster import Resources, run_on_ray
from tests.study.test_grid import wait_for, write_study


def test_without_ray_the_option_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'detection\[ray\]'"):
        run_on_ray([], Work(), "local", Resources(), print)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_lost_node_costs_no_finished_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    utilities = pytest.importorskip("ray.cluster_utils")
    study = write_study(tmp_path, "fit.epochs=40", "fit.evaluate_every=0")
    cells = read_study(study, [], tmp_path / "cells")[1]
    first, second = cells
    cluster = utilities.Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    node = cluster.add_node(num_cpus=1)

    def lose_the_node() -> None:
        wait_for(first.folder / "last.pt")
        cluster.remove_node(node, allow_graceful=False)
        cluster.add_node(num_cpus=1)

    thread = threading.Thread(target=lose_the_node)
    thread.start()
    seen: list[Progress] = []
    try:
        assert run_on_ray(cells, Work(), cluster.address, Resources(cpus=1.0), seen.append)
        thread.join()
        assert {(p.cell.head, p.outcome) for p in seen} == {("focal", "done"), ("bce", "done")}
        assert "resumed at step" in (tmp_path / "cells" / f"{first.name}.log").read_text()
        record = (first.folder / "cell.json").read_bytes()
        assert run_on_ray(cells, Work(), cluster.address, Resources(cpus=1.0), seen.append)
        assert len(seen) == 2
        assert (first.folder / "cell.json").read_bytes() == record
        assert (second.folder / "cell.json").exists()
    finally:
        cluster.shutdown()
