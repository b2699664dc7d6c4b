"""Batches do not depend on the workers; padding; errors, interrupts and the end of worker processes."""

from __future__ import annotations

import logging
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy import ndarray
from PIL import Image

from detection.data.dataset import FORMATS, DetectionDataset, ImageConfig, Sample
from detection.data.loader import FILL, BatchLoader, LoaderConfig, build_loader, collate
from detection.data.sampler import BatchOrder, EvaluationOrder
from detection.data.transforms import TransformConfig
from detection.types import Batch, DataError, Frame, Records, Target

CONFIG = TransformConfig(
    mode="longest", size=64, scale_jitter=(0.7, 1.4), crop=0.5, brightness=0.3, hue=0.1, noise=0.5, vertical_flip=0.5
)


def write_records(folder: Path, count: int, bad: Iterable[int] = ()) -> Records:
    """Noise pictures, wide and tall in turn, image i with i % 3 boxes; those in `bad` are no images."""
    rng = np.random.default_rng(0)
    sizes = np.array([(40, 60) if i % 2 else (60, 40) for i in range(count)])
    counts = np.arange(count) % 3
    paths = [folder / f"{i}.png" for i in range(count)]
    for i, path in enumerate(paths):
        Image.fromarray(rng.integers(0, 256, (*sizes[i], 3), np.uint8)).save(path)
        if i in bad:
            path.write_bytes(b"no image")
    total = int(counts.sum())
    return Records(
        class_names=("a",),
        category_ids=(1,),
        paths=np.array([str(p).encode() for p in paths]),
        image_ids=np.arange(count) + 100,
        sizes=sizes,
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        boxes=np.tile(np.array([5.0, 6.0, 30.0, 35.0]), (total, 1)),
        labels=np.zeros(total, np.int64),
        crowd=np.arange(total) % 4 == 0,
        area=np.full(total, 725.0),
    )


def make_loader(
    records: Records, workers: int, *, images: ImageConfig | None = None, persistent: bool = True
) -> tuple[BatchLoader, BatchOrder]:
    dataset = DetectionDataset(records, CONFIG.build(train=True), seed=3, images=images)
    order = BatchOrder(records.sizes, 4, seed=3)
    return build_loader(dataset, order, LoaderConfig(workers=workers, persistent=persistent)), order


def flat(batch: Batch) -> tuple[ndarray, ...]:
    parts = [batch.images, *(t for x in batch.targets for t in (x.boxes, x.labels, x.crowd))]
    return *(p.numpy() for p in parts), np.array([(f.image_id, *f.size, *f.scale, *f.padding) for f in batch.frames])


def equal(a: Batch, b: Batch) -> bool:
    pairs = list(zip(flat(a), flat(b), strict=True))
    return all(np.array_equal(x, y) and x.dtype == y.dtype for x, y in pairs)


def test_batches_are_the_same_for_any_number_of_workers_and_on_resume(tmp_path: Path) -> None:
    records = write_records(tmp_path, 22)
    alone, order = make_loader(records, 0)
    expected = {}
    for epoch in (0, 1):
        order.set_position(epoch)
        expected[epoch] = list(alone)
    assert not equal(expected[0][0], expected[1][0])
    for workers in (1, 2):
        loader, order = make_loader(records, workers)
        for epoch, first in ((0, 0), (1, 0), (1, 4), (0, 3)):
            order.set_position(epoch, first)
            batches = list(loader)
            assert len(batches) == len(loader) == 6 - first
            assert all(equal(a, b) for a, b in zip(batches, expected[epoch][first:], strict=True))


def test_batches_have_the_promised_form(tmp_path: Path) -> None:
    loader, _ = make_loader(write_records(tmp_path, 9), 1)
    for batch in loader:
        assert batch.images.dtype == torch.uint8
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert not any(side % 32 for side in batch.images.shape[2:])
        for target, frame in zip(batch.targets, batch.frames, strict=True):
            assert len(target.boxes) == len(target.labels) == len(target.crowd) <= (frame.image_id - 100) % 3
            assert target.boxes.dtype == torch.float32
            assert target.labels.dtype == torch.int64
            assert target.crowd.dtype == torch.bool


def test_evaluation_order_gives_each_image_once(tmp_path: Path) -> None:
    records = write_records(tmp_path, 7)
    dataset = DetectionDataset(records, CONFIG.build(train=False), seed=0)
    loader = build_loader(dataset, EvaluationOrder(records.sizes, 3), LoaderConfig(workers=0))
    assert sorted(frame.image_id for batch in loader for frame in batch.frames) == list(range(100, 107))


def make_sample(height: int, width: int, value: int) -> Sample:
    image = torch.full((height, width, 3), value, dtype=torch.uint8).permute(2, 0, 1)
    nothing = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.bool))
    return Sample(image, nothing, Frame(1, (height, width)))


def test_collate_pads_right_and_below_with_the_mean_colour() -> None:
    batch = collate([make_sample(10, 33, 1), make_sample(20, 5, 2)])
    assert batch.images.shape == (2, 3, 32, 64)
    for image, (height, width, value) in zip(batch.images, ((10, 33, 1), (20, 5, 2)), strict=True):
        assert (image[:, :height, :width] == value).all()
        outside = torch.ones(32, 64, dtype=torch.bool)
        outside[:height, :width] = False
        assert image[:, outside].unique(dim=1).flatten().tolist() == list(FILL)
    assert collate([make_sample(32, 64, 1)]).images.shape == (1, 3, 32, 64)
    assert collate([make_sample(33, 64, 1)], multiple=1).images.shape == (1, 3, 33, 64)


def test_fill_is_about_zero_after_imagenet_normalisation() -> None:
    normalised = (np.array(FILL) / 255 - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
    assert np.abs(normalised).max() < 0.01


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_file_is_a_data_error_without_a_workers_traceback(tmp_path: Path, workers: int) -> None:
    loader, _ = make_loader(write_records(tmp_path, 8, bad=[5]), workers)
    message = ""
    try:
        list(loader)
    except DataError as error:
        message = str(error)
    assert message == f"{tmp_path / '5.png'}: not an image ({', '.join(FORMATS)} are read)"


@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_files_leave_smaller_batches_and_are_counted_once(
    tmp_path: Path, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    records = write_records(tmp_path, 8, bad=[1, 5])
    loader, order = make_loader(records, workers, images=ImageConfig(on_bad_image="skip"))
    with caplog.at_level(logging.WARNING):
        for epoch in (0, 1):
            order.set_position(epoch)
            batches = list(loader)
            assert sum(len(b.frames) for b in batches) == 6
            assert all(len(b.images) == len(b.targets) == len(b.frames) for b in batches)
    assert len(loader.skipped) == 2
    assert len(caplog.records) == 2
    assert "5.png: not an image" in caplog.text


def test_a_batch_of_bad_files_alone_is_an_error_even_when_skipping(tmp_path: Path) -> None:
    loader, _ = make_loader(write_records(tmp_path, 4, bad=range(4)), 0, images=ImageConfig(on_bad_image="skip"))
    with pytest.raises(DataError, match="no image of a batch of 4 can be read"):
        list(loader)


def test_nothing_is_pickled_for_each_image(tmp_path: Path) -> None:
    records = write_records(tmp_path, 4)
    many = records.select(np.tile(np.arange(4), 5_000))
    dataset = DetectionDataset(many, CONFIG.build(train=True), seed=0)
    arrays = (many.paths, many.image_ids, many.sizes, many.offsets, many.boxes, many.labels, many.crowd, many.area)
    assert len(pickle.dumps(dataset)) < sum(a.nbytes for a in arrays) + 20_000


def resident_of(pid: int) -> int:
    """Bytes of anonymous memory that a process holds."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty"))


def children() -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(os.getpid())], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split() if Path(f"/proc/{pid}/cmdline").exists()]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_worker_memory_is_flat_over_epochs(tmp_path: Path) -> None:
    records = write_records(tmp_path, 4).select(np.tile(np.arange(4), 60))
    before = set(children())
    loader, order = make_loader(records, 1)
    held = []
    for epoch in range(4):
        order.set_position(epoch)
        for _ in loader:
            pass
        (worker,) = [p for p in children() if p not in before and b"ps" not in Path(f"/proc/{p}/comm").read_bytes()]
        held.append(resident_of(worker))
    assert held[3] - held[1] < 4 << 20


SCRIPT = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_loader import make_loader, write_records
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
loader, order = make_loader(write_records(Path({folder!r}), 200), 2)
print("ready", flush=True)
seen = 0
for epoch in range(1000):
    order.set_position(epoch)
    for batch in loader:
        seen += 1
        if seen == 3:
            print("loading", flush=True)
        if stop:
            stop.append(1)
        if len(stop) > 20:
            print("saved", flush=True)
            sys.exit(0)
"""


def start_script(folder: Path) -> subprocess.Popen[str]:
    code = SCRIPT.format(tests=str(Path(__file__).parent), folder=str(folder))
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == ["ready\n", "loading\n"]
    return process


def group_is_gone(pid: int, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            os.killpg(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.skipif(sys.platform != "linux", reason="process groups")
def test_workers_serve_on_after_a_group_wide_sigterm_and_end_with_the_parent(tmp_path: Path) -> None:
    process = start_script(tmp_path)
    os.killpg(process.pid, signal.SIGTERM)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (0, "saved\n"), err
    assert group_is_gone(process.pid, 8)


@pytest.mark.skipif(sys.platform != "linux", reason="process groups")
def test_ctrl_c_prints_one_traceback_and_leaves_no_worker(tmp_path: Path) -> None:
    process = start_script(tmp_path)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert err.count("Traceback") == 1
    assert err.strip().endswith("KeyboardInterrupt")
    assert group_is_gone(process.pid, 8)
