"""The loop: journal, checkpoints, best, early stopping, signals, and a resume that changes no bit."""

from __future__ import annotations

import dataclasses
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from toy_training import (
    ToyBatches,
    ToyCriterion,
    components,
    leaves,
    run_ranks,
    toy_config,
    train,
    weight_sum,
)

from detection.config import ConfigError
from detection.engine.checkpoint import Checkpoint, CheckpointError, load
from detection.engine.fit import FitResult, fit
from detection.engine.journal import read_journal
from detection.engine.step import NonFiniteError
from detection.types import Losses

CPU = torch.device("cpu")


def assert_same(one: Checkpoint, two: Checkpoint, but: tuple[str, ...] = ()) -> None:
    fields = [f.name for f in dataclasses.fields(Checkpoint) if f.name not in but]
    a, b = (dict(leaves({name: getattr(c, name) for name in fields})) for c in (one, two))
    assert a.keys() == b.keys()
    for name in a:
        same = torch.equal(a[name], b[name]) if isinstance(a[name], torch.Tensor) else a[name] == b[name]
        assert same, name


def history(run: Path) -> list[dict[str, Any]]:
    """The journal without times and without the marks of a resume."""
    timed = ("images_per_second", "data_wait", "seconds", "notes")
    events = [e for e in read_journal(run) if e["event"] in ("train", "evaluation")]
    return [{key: value for key, value in event.items() if key not in timed} for event in events]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> FitResult:
    return train(tmp_path_factory.mktemp("whole"), {})


@pytest.mark.parametrize("stop_at", [1, 5, 8, 13])
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path: Path, whole: FitResult, stop_at: int) -> None:
    part = train(tmp_path, {"term_at": stop_at})
    assert part.interrupted
    assert part.step == stop_at
    rest = train(tmp_path, {"resume": True})
    assert not rest.interrupted
    assert rest.step == whole.step == 16
    assert_same(load(whole.last), load(rest.last))
    assert history(tmp_path) == history(whole.last.parent)
    assert (rest.best, rest.best_step, rest.metrics) == (whole.best, whole.best_step, whole.metrics)


def test_killed_with_workers_and_resumed_equals_uninterrupted(tmp_path: Path, whole: FitResult) -> None:
    options = {"workers": 2, "save_every": 3}
    killed = run_ranks(1, json.dumps({str(tmp_path / "run"): {**options, "kill_at": 14}}))
    assert killed == [-signal.SIGKILL]
    assert load(tmp_path / "run/last.pt").step == 12
    assert run_ranks(1, json.dumps({str(tmp_path / "run"): {**options, "resume": True}})) == [0]
    assert_same(load(whole.last), load(tmp_path / "run/last.pt"), but=("config",))
    assert history(tmp_path / "run") == history(whole.last.parent)


def test_two_ranks_killed_and_resumed_equal_uninterrupted(tmp_path: Path) -> None:
    options = {"save_every": 3, "images": 20}
    whole, part = str(tmp_path / "whole"), str(tmp_path / "part")
    codes = run_ranks(2, json.dumps({whole: options, part: {**options, "kill_at": 8}}))
    assert -signal.SIGKILL in codes
    assert load(tmp_path / "part/last.pt").step == 6
    assert run_ranks(2, json.dumps({part: {**options, "resume": True}})) == [0, 0]
    one, two = load(tmp_path / "whole/last.pt"), load(tmp_path / "part/last.pt")
    assert one.step == 10
    assert one.samples_seen == 40
    assert_same(one, two)
    assert not torch.equal(one.ranks[0]["random"]["cpu"], one.ranks[1]["random"]["cpu"])
    assert history(tmp_path / "whole") == history(tmp_path / "part")


def test_an_evaluation_that_a_kill_prevented_is_made_up_for(tmp_path: Path, whole: FitResult) -> None:
    def killed(model: nn.Module) -> dict[str, float]:
        raise KeyboardInterrupt

    config = toy_config()
    with pytest.raises(KeyboardInterrupt):
        fit(components(config, ToyBatches(), evaluate=killed), config, tmp_path, CPU)
    assert load(tmp_path / "last.pt").progress["evaluation_pending"]
    rest = train(tmp_path, {"resume": True})
    assert_same(load(whole.last), load(rest.last))
    assert history(tmp_path) == history(whole.last.parent)


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    first = train(tmp_path, {"epochs": 1})
    before = first.last.read_bytes()
    again = train(tmp_path, {"epochs": 1, "resume": True})
    assert (again.step, again.metrics, again.interrupted) == (first.step, first.metrics, False)
    assert first.last.read_bytes() == before


def test_resume_where_nothing_was_saved_starts_at_zero(tmp_path: Path, whole: FitResult) -> None:
    rest = train(tmp_path / "new", {"resume": True})
    assert_same(load(whole.last), load(rest.last))


def test_resume_with_other_settings_is_refused(tmp_path: Path) -> None:
    result = train(tmp_path, {"epochs": 1})
    before = result.last.read_bytes()
    with pytest.raises(CheckpointError, match=r"fit.accumulate: 1 -> 2"):
        train(tmp_path, {"epochs": 1, "accumulate": 2, "resume": True})
    train(tmp_path, {"epochs": 1, "log_every": 100, "resume": True})
    assert result.last.read_bytes() == before


def test_a_taken_folder_is_refused_untouched(tmp_path: Path) -> None:
    result = train(tmp_path, {"epochs": 1})
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(ConfigError, match="already taken, it holds a run"):
        train(tmp_path, {"epochs": 1})
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    assert result.last.exists()


def scripted(values: Iterator[float]) -> Any:
    return lambda model: {"ap": next(values), "d_ece": 0.1}


def test_best_and_early_stopping(tmp_path: Path) -> None:
    config = toy_config(epochs=9, patience=2)
    values = iter([0.1, float("nan"), 0.4, 0.4, 0.2, 0.9])
    result = fit(components(config, ToyBatches(images=4), evaluate=scripted(values)), config, tmp_path, CPU)
    assert result.stopped_early
    assert (result.step, result.best, result.best_step) == (10, 0.4, 6)
    assert result.best_path is not None
    assert load(result.best_path).step == 6
    assert load(result.last).step == 10
    marks = [(e["metrics"]["ap"], e["best"]) for e in read_journal(tmp_path) if e["event"] == "evaluation"]
    assert marks == [(0.1, True), (None, False), (0.4, True), (0.4, False), (0.2, False)]


def test_best_may_be_the_smallest(tmp_path: Path) -> None:
    config = toy_config(epochs=3, best_metric="ap", best_direction="min", evaluate_every=2)
    result = fit(components(config, ToyBatches(images=4), evaluate=scripted(iter([0.3, 0.2]))), config, tmp_path, CPU)
    assert (result.best, result.best_step, result.step) == (0.2, 6, 6)


def test_an_unknown_metric_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="best_metric 'map': not among the metrics: ap, d_ece"):
        train(tmp_path, {"best_metric": "map", "epochs": 1})
    assert load(tmp_path / "last.pt").step == 8


def test_evaluation_sees_the_average_and_draws_nothing_from_training(tmp_path: Path) -> None:
    seen = []

    def evaluate(model: nn.Module) -> dict[str, float]:
        seen.append({k: v.clone() for k, v in model.state_dict().items()})
        return weight_sum(model)

    config = toy_config(epochs=1)
    result = fit(components(config, ToyBatches(), evaluate=evaluate), config, tmp_path, CPU)
    ema = load(result.last).ema
    assert ema is not None
    assert all(torch.equal(seen[0][k], ema[k]) for k in ema)


def test_accumulation_uses_every_batch_and_resumes(tmp_path: Path) -> None:
    """5 batches by 2 are 3 steps an epoch, the last of one batch."""
    options: dict[str, object] = {"accumulate": 2, "images": 10}
    whole = train(tmp_path / "whole", options)
    assert whole.step == 6
    assert load(whole.last).samples_seen == 20
    assert load(whole.last).criterion["calls"] == 10
    part = train(tmp_path / "part", {**options, "term_at": 7})
    assert (part.step, part.interrupted) == (4, True)
    assert_same(load(whole.last), load(train(tmp_path / "part", {**options, "resume": True}).last))


def test_not_finite_names_steps_and_images_and_saves_nothing(tmp_path: Path) -> None:
    config = toy_config(log_every=100, save_every=3)
    criterion = ToyCriterion()
    criterion.register_forward_hook(lambda c, _, losses: nan_total(losses) if c.calls == 14 else losses)
    with pytest.raises(NonFiniteError, match="not finite at step 14 ") as error:
        fit(components(config, ToyBatches(), criterion=criterion), config, tmp_path, CPU)
    message = str(error.value)
    assert "steps 9-15" in message
    assert "image ids of that step: 110, 111\n" in message
    assert "image ids of the window: 100, 101, 102, 103, " in message
    kept = load(tmp_path / "last.pt")
    assert kept.step == 12
    assert all(torch.isfinite(tensor).all() for tensor in kept.model.values())


def nan_total(losses: Losses) -> Losses:
    return dataclasses.replace(losses, total=losses.total * float("nan"))


def test_weights_that_an_update_made_infinite_are_not_saved(tmp_path: Path) -> None:
    config = toy_config(epochs=1, schedule={"kind": "constant"}, optim={"lr": 1e38, "clip_norm": 0, "scaling": "none"})
    with pytest.raises(NonFiniteError, match="not finite"):
        fit(components(config, ToyBatches(images=2)), config, tmp_path, CPU)
    assert not (tmp_path / "last.pt").exists()


def test_tensorboard_scalars(tmp_path: Path) -> None:
    train(tmp_path, {"epochs": 1, "tensorboard": True})
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))


def test_plain_lines_where_there_is_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path, {"epochs": 1})
    lines = capsys.readouterr().out.splitlines()
    assert "peak lr 0.05 for 2 images a step; 8 steps an epoch, 8 in all" in lines[2]
    assert lines[3].startswith("epoch 0.38/1  step 3/8  loss ")
    assert "images/s  data wait " in lines[3]
    assert lines[-2].startswith("evaluation  epoch 1  step 8  ap ")
    assert "d_ece 0.2500  (best so far)" in lines[-2]
    assert lines[-1].startswith("finished at step 8, best ap")
