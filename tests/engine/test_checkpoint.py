"""Whole or not at all on the way to the disk; nothing but plain data on the way back."""

from __future__ import annotations

import os
import pickle
import resource
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from toy_training import CLASSES, ToyModel, train

from detection.engine import checkpoint as checkpoints
from detection.engine.checkpoint import Checkpoint, CheckpointError, find_checkpoint, load, save


@pytest.fixture
def checkpoint() -> Checkpoint:
    return Checkpoint(
        config={"fit": {"epochs": 2, "log_every": 3}, "seed": 0},
        class_names=CLASSES,
        category_ids=(1, 2, 7),
        step=5,
        samples_seen=10,
        world_size=1,
        model=dict(ToyModel().state_dict()),
        ema=None,
        optimiser={"state": {}, "param_groups": []},
        criterion={},
        ranks=[{}],
        progress={"best": None},
        versions={"torch": "2"},
    )


@pytest.fixture
def full_disk() -> Iterator[Callable[[], None]]:
    """Files may not grow beyond 4 kB once the function was called."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_round_trip(tmp_path: Path, checkpoint: Checkpoint) -> None:
    save(checkpoint, tmp_path / "a.pt", tmp_path / "b.pt")
    for name in ("a.pt", "b.pt"):
        read = load(tmp_path / name)
        assert (read.config, read.class_names, read.category_ids) == (checkpoint.config, CLASSES, (1, 2, 7))
        assert (read.step, read.samples_seen, read.ema, read.format) == (5, 10, None, 1)
        assert all(torch.equal(read.model[k], v) for k, v in checkpoint.model.items())
    assert sorted(os.listdir(tmp_path)) == ["a.pt", "b.pt"]


def test_calibrators_travel_along(tmp_path: Path, checkpoint: Checkpoint) -> None:
    values = {"platt": {"slope": torch.tensor([1.5]), "classwise": True}}
    save(checkpoints.with_calibrators(checkpoint, values), tmp_path / "a.pt")
    assert load(tmp_path / "a.pt").calibrators["platt"]["slope"].item() == 1.5


def test_full_disk_leaves_the_last_good_checkpoint(
    tmp_path: Path, checkpoint: Checkpoint, full_disk: Callable[[], None]
) -> None:
    path = tmp_path / "last.pt"
    save(checkpoint, path)
    before = path.read_bytes()
    full_disk()
    with pytest.raises(CheckpointError, match=r"last.pt: cannot be written \(.*\); the previous one is untouched"):
        save(checkpoint, path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["last.pt"]
    assert load(path).step == 5


def test_a_kill_while_writing_leaves_the_last_good_checkpoint(
    tmp_path: Path, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.pt"
    save(checkpoint, path)
    before = path.read_bytes()

    def killed(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        save(checkpoint, path)
    monkeypatch.undo()
    assert path.read_bytes() == before
    save(checkpoint, path)
    assert os.listdir(tmp_path) == ["last.pt"]


class Malicious:
    def __reduce__(self) -> tuple[object, ...]:
        return (os.system, ("touch executed",))


def test_code_is_refused_and_not_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"format": 1, "model": Malicious()}, "zip.pt")
    Path("plain.pt").write_bytes(pickle.dumps(Malicious()))
    torch.save({"model": Malicious()}, "legacy.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"zip.pt: refused: it holds more than tensors"):
        load("zip.pt")
    for name in ("plain.pt", "legacy.pt"):
        with pytest.raises(CheckpointError, match="not a checkpoint"):
            load(name)
    assert not Path("executed").exists()


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_truncated_is_refused(tmp_path: Path, checkpoint: Checkpoint, share: float) -> None:
    path = tmp_path / "last.pt"
    save(checkpoint, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CheckpointError, match=r"last.pt: truncated, or not a checkpoint"):
        load(path)


def test_damaged_inside_is_refused(tmp_path: Path, checkpoint: Checkpoint) -> None:
    save(checkpoint, tmp_path / "good.pt")
    with zipfile.ZipFile(tmp_path / "good.pt") as good, zipfile.ZipFile(tmp_path / "bad.pt", "w") as bad:
        for entry in good.infolist():
            if "data/3" not in entry.filename:
                bad.writestr(entry.filename, good.read(entry))
    with pytest.raises(CheckpointError, match=r"bad.pt: damaged"):
        load(tmp_path / "bad.pt")


def test_a_bomb_is_refused_before_it_unpacks(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 50_000_000)
    assert path.stat().st_size < 1_000_000
    with pytest.raises(CheckpointError, match="would unpack to 50000000 bytes"):
        load(path)


def test_other_content_is_refused(tmp_path: Path, checkpoint: Checkpoint) -> None:
    path = tmp_path / "x.pt"
    with pytest.raises(CheckpointError, match="no such file"):
        load(path)
    torch.save(ToyModel().state_dict(), path)
    with pytest.raises(CheckpointError, match="not a checkpoint of this toolkit"):
        load(path)
    torch.save({"format": 99}, path)
    with pytest.raises(CheckpointError, match="format 99; this version reads 1"):
        load(path)
    torch.save({"format": 1, "step": 3}, path)
    with pytest.raises(CheckpointError, match=r"missing or unknown: .*category_ids"):
        load(path)
    content = {name: getattr(checkpoint, name) for name in Checkpoint.__slots__}
    torch.save({**content, "step": "five"}, path)
    with pytest.raises(CheckpointError, match="step is str, expected int"):
        load(path)


def test_another_architecture_is_named(checkpoint: Checkpoint) -> None:
    model = ToyModel(width=4)
    model.extra = torch.nn.Linear(1, 1)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(CheckpointError) as error:
        checkpoints.load_evaluation_weights(model, checkpoint, "best.pt")
    message = str(error.value)
    assert "best.pt: from another architecture" in message
    assert "extra.weight: in the model only" in message
    assert "backbone.0.weight: [8, 3, 4, 4] in the checkpoint, [4, 3, 4, 4] in the model" in message
    assert "more" in message
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_evaluation_takes_the_average(tmp_path: Path) -> None:
    result = train(tmp_path / "run", {"epochs": 1})
    checkpoint, model = load(result.last), ToyModel(seed=9)
    checkpoints.load_evaluation_weights(model, checkpoint, result.last)
    assert checkpoint.ema is not None
    assert torch.equal(model.logits.weight, checkpoint.ema["logits.weight"])
    assert not torch.equal(model.logits.weight, checkpoint.model["logits.weight"])


def test_resume_with_other_settings_shows_the_difference(checkpoint: Checkpoint) -> None:
    path = Path("last.pt")
    same = {"fit": {"epochs": 2, "log_every": 50}, "seed": 0}
    checkpoints.check_same_run(checkpoint, same, CLASSES, 1, path)
    other = {"fit": {"epochs": 3, "log_every": 3}, "seed": 1}
    with pytest.raises(CheckpointError) as error:
        checkpoints.check_same_run(checkpoint, other, ("a", "b"), 2, path)
    lines = str(error.value).splitlines()
    assert lines[0] == "last.pt: cannot resume, the run was started with other settings:"
    assert [line.strip() for line in lines[1:]] == [
        "fit.epochs: 2 -> 3",
        "seed: 0 -> 1",
        "classes: ['a', 'b', 'c'] -> ['a', 'b']",
        "ranks: 1 -> 2",
    ]


def test_find_checkpoint(tmp_path: Path, checkpoint: Checkpoint) -> None:
    with pytest.raises(CheckpointError, match=r"nor a run folder with best.pt or last.pt"):
        find_checkpoint(tmp_path)
    save(checkpoint, tmp_path / "last.pt")
    assert find_checkpoint(tmp_path) == tmp_path / "last.pt"
    save(checkpoint, tmp_path / "best.pt")
    assert find_checkpoint(tmp_path) == tmp_path / "best.pt"
    assert find_checkpoint(tmp_path / "last.pt") == tmp_path / "last.pt"
