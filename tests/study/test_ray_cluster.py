"""The cells of a study on real Ray clusters of this machine: nodes and drivers are lost, finished work is not."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from detection.config import ConfigError
from detection.study import ray_cluster
from detection.study.cell import _locked, is_complete, read_cell
from detection.study.grid import Work
from detection.study.plan import Cell, read_study
from detection.study.ray_cluster import Resources, places, run_on_ray
from tests.study.test_grid import ROOT, wait_for, write_study

PATIENCE = 600.0
"""Seconds for what takes a few on an idle machine."""

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",  # else Ray writes a token into the home folder
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_raylet_start_wait_time_s": "300",
    "RAY_worker_register_timeout_seconds": "300",
}


@pytest.fixture
def ray_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where Ray writes: a short path, for the names of its sockets. None of its processes may outlive the test."""
    pytest.importorskip("ray")
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as name:
        for variable, value in {**ENVIRONMENT, "RAY_TMPDIR": name}.items():
            monkeypatch.setenv(variable, value)
        yield Path(name)
        end = time.monotonic() + 120
        while (left := processes_in(Path(name))) and time.monotonic() < end:
            time.sleep(0.1)
        for process in left:
            os.kill(process, signal.SIGKILL)
        assert not left, "processes of Ray are left"


def processes_in(folder: Path) -> list[int]:
    """The processes that print into a file of the folder, as all do that Ray starts."""
    found = []
    for link in Path("/proc").glob("[0-9]*/fd/1"):
        with contextlib.suppress(OSError):
            if os.readlink(link).startswith(f"{folder}{os.sep}"):
                found.append(int(link.parts[2]))
    return found


@contextlib.contextmanager
def started(*command: str | Path, output: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that prints into a file; it is killed where it has not ended."""
    with (
        open(output, "w") as file,
        subprocess.Popen(
            [sys.executable, *map(str, command)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=file,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process,
    ):
        try:
            yield process
        finally:
            process.kill()


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[tuple[str, Callable[[str], None]]]:
    """The address of a cluster of two nodes with a CPU each, and what kills one of them by its id."""
    folder.mkdir()
    with started("tests/study/local_ray_cluster.py", folder, output=folder / "output.txt") as process:
        assert process.stdin is not None
        wait_for(folder / "address", PATIENCE)

        def lose(node: str) -> None:
            assert process.stdin is not None
            process.stdin.write(f"{node}\n")
            process.stdin.flush()
            wait_for(folder / node, PATIENCE)

        try:
            yield (folder / "address").read_text(), lose
        finally:
            process.stdin.close()
            status = process.wait(PATIENCE)
        assert status == 0


class Driven:
    """A study that a driver of its own runs on a cluster, as a user would."""

    def __init__(self, folder: Path, study: Path) -> None:
        self.folder, self.study = folder, study
        self.cells = read_study(study, [], folder / "cells")[1]
        self.output = folder / "driver.txt"

    def driver(self, address: str) -> contextlib.AbstractContextManager[subprocess.Popen[str]]:
        where = ("--cells", self.folder / "cells", "--out", self.folder / "out", "--ray", address)
        return started("tools/benchmark_heads.py", self.study, *where, output=self.output)

    def log(self, cell: Cell) -> str:
        path = self.folder / "cells" / f"{cell.name}.log"
        return path.read_text() if path.exists() else ""

    def starts(self, cell: Cell) -> list[tuple[int, str]]:
        """The process and the node of each time that a cell was started."""
        return [(int(p), n) for p, n in re.findall(r"^process (\d+) of .*, Ray node (\w+)$", self.log(cell), re.M)]

    def files(self) -> dict[str, bytes]:
        """What a cell that runs would change."""
        paths = [*self.folder.glob("cells/*.log"), *self.folder.glob("cells/*/*.json*")]
        return {str(path): path.read_bytes() for path in paths}


def wait_until(condition: Callable[[], Any], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"never came: {what}"
        time.sleep(0.05)


@pytest.mark.slow
def test_lost_nodes_and_drivers_cost_no_finished_work(tmp_path: Path, ray_folder: Path) -> None:
    study = write_study(tmp_path, "fit.epochs=150", "fit.evaluate_every=0")
    study.write_text(study.read_text().replace('kind=bce"', 'kind=bce", "fit.epochs=1"'))
    run = Driven(tmp_path, study)
    long, short = run.cells
    with cluster(tmp_path / "cluster") as (address, lose):
        # Held back by their locks, both cells have to be at work at once: on two nodes. One ends, the driver is lost.
        with _locked(long.folder):
            with run.driver(address) as driver:
                with _locked(short.folder):
                    wait_until(lambda: run.starts(long) and run.starts(short), "two cells at work")
                    assert run.starts(long)[0][1] != run.starts(short)[0][1]
                wait_until(lambda: "[1/2] bce seed 0: done" in run.output.read_text(), "the short cell")
                driver.kill()
            orphan = run.starts(long)[0][0]
            wait_until(lambda: not Path("/proc", str(orphan)).exists(), "the end of the lost driver's worker")
        finished = {name: content for name, content in run.files().items() if short.name in name}
        assert is_complete(short, read_cell(short.folder))

        # The next driver: the worker is told to stop, then its node is lost.
        with run.driver(address) as driver:
            wait_for(long.folder / "last.pt", PATIENCE)
            os.kill(run.starts(long)[1][0], signal.SIGTERM)
            wait_until(lambda: len(run.starts(long)) == 3 and "resumed at step" in run.log(long), "another start")
            node = run.starts(long)[2][1]
            lose(node)
            assert not (long.folder / "cell.json").exists(), "lost too late to test anything"
            assert driver.wait(PATIENCE) == 0
        assert "[2/2] focal seed 0: done" in run.output.read_text()
        assert len(run.starts(long)) == 4
        assert run.starts(long)[3][1] != node
        assert len(re.findall("^resumed at step", run.log(long), re.M)) == 2
        assert is_complete(long, read_cell(long.folder))
        files = run.files()
        assert {name: files[name] for name in finished} == finished

        # One more: nothing is left to do.
        with run.driver(address) as driver:
            assert driver.wait(PATIENCE) == 0
        assert "seed 0: " not in run.output.read_text()
        assert run.files() == files


@pytest.mark.slow
def test_a_cluster_of_its_own_is_stopped_and_goes_on(tmp_path: Path, ray_folder: Path) -> None:
    run = Driven(tmp_path, write_study(tmp_path, "fit.epochs=60", "fit.evaluate_every=0", heads=("focal",)))
    with run.driver("local") as driver:
        wait_for(run.cells[0].folder / "last.pt", PATIENCE)
        driver.terminate()
        assert driver.wait(PATIENCE) == 1
    assert "focal seed 0: interrupted" in run.output.read_text()
    assert "stopped; the same command goes on from here" in run.output.read_text()
    wait_until(lambda: not processes_in(ray_folder), "the end of the cluster")
    with run.driver("local") as driver:
        assert driver.wait(PATIENCE) == 0
    assert "[1/1] focal seed 0: done" in run.output.read_text()
    assert "resumed at step" in run.log(run.cells[0])


def test_without_ray_the_option_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'detection\[ray\]'"):
        run_on_ray([], Work(), "local", Resources(), print, print)


def test_an_address_where_nothing_listens_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace())
    monkeypatch.setenv("RAY_NUM_REDIS_GET_RETRIES", "1")
    with pytest.raises(ConfigError, match=r"--ray localhost:1: no cluster answers there \(.*refused"):
        run_on_ray([], Work(), "localhost:1", Resources(), print, print)


def test_cells_do_not_span_nodes() -> None:
    assert places({"CPU": 3.0}, Resources(cpus=2.0)) == 1
    assert places({"CPU": 3.0}, Resources(cpus=1.0, gpus=1.0)) == 0
    assert places({"CPU": 64.0, "GPU": 1.0}, Resources(cpus=1.0, gpus=0.1)) == 10
    assert places({}, Resources(cpus=0.0)) == 1


def nodes(*cpus: float) -> SimpleNamespace:
    """A cluster; a negative node is a dead one."""
    return SimpleNamespace(nodes=lambda: [{"Alive": n >= 0, "Resources": {"CPU": abs(n)}} for n in cpus])


class Hand:
    """A clock that is moved by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(ray_cluster, "time", self)

    def monotonic(self) -> float:
        return self.now


def test_a_cell_that_no_node_can_hold_is_waited_for_aloud_and_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Hand(monkeypatch)
    said: list[str] = []
    room = ray_cluster._Room(nodes(1.0, 2.0, -8.0), Resources(cpus=8.0), 300.0, said.append)
    room.check()
    clock.now += 299
    room.check()
    lack = "no node of the cluster is large enough for a cell, which asks for 8 CPU(s); there is: 2 CPU(s), 1 CPU(s)"
    assert said == [f"{lack}; waiting 300 s for one"]
    clock.now += 2
    with pytest.raises(ConfigError, match=re.escape(lack)):
        room.check()


def test_a_cluster_of_its_own_does_not_grow() -> None:
    said: list[str] = []
    with pytest.raises(ConfigError, match="asks for 8 CPU"):
        ray_cluster._Room(nodes(2.0), Resources(cpus=8.0), 0.0, said.append).check()
    assert said == []


def test_a_task_that_does_not_end_when_asked_is_killed_later(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Hand(monkeypatch)
    asked: list[tuple[str, bool]] = []
    ending = ray_cluster._Ending(SimpleNamespace(cancel=lambda task, force: asked.append((task, force))))
    for seconds in (0, 1, 60, 1):
        clock.now += seconds
        ending.cancel(["task"])
    assert asked == [("task", False), ("task", True)]
