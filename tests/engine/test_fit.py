"""The loop: journal, checkpoints, best, early stopping, and a resume that changes no bit."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from toy_training import leaves, train

from detection.engine.checkpoint import Checkpoint, load


def assert_same(one: Checkpoint, two: Checkpoint) -> None:
    a = dict(leaves({f.name: getattr(one, f.name) for f in dataclasses.fields(one)}))
    b = dict(leaves({f.name: getattr(two, f.name) for f in dataclasses.fields(two)}))
    assert a.keys() == b.keys()
    for name in a:
        same = torch.equal(a[name], b[name]) if isinstance(a[name], torch.Tensor) else a[name] == b[name]
        assert same, name


@pytest.mark.parametrize("stop_at", [3, 5, 8, 13])
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path: Path, stop_at: int) -> None:
    whole = train(tmp_path / "whole", {})
    part = train(tmp_path / "part", {"term_at": stop_at})
    assert part.interrupted
    assert part.step == stop_at
    rest = train(tmp_path / "part", {"resume": True})
    assert not rest.interrupted
    assert rest.step == whole.step == 16
    assert_same(load(whole.last), load(rest.last))
