from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch

from detection.evaluation import results
from detection.evaluation.evaluate import evaluate
from detection.evaluation.results import ground_truth, read_results, write_results
from detection.types import DataError


def test_round_trip(scene, tmp_path):
    detections, records = scene(3)
    write_results(tmp_path / "detections.json", detections, records)
    again = read_results(tmp_path / "detections.json", records)
    assert [d.image_id for d in again] == records.image_ids.tolist()
    for a, b in zip(detections, again, strict=True):
        torch.testing.assert_close(a.boxes, b.boxes, atol=1e-9, rtol=0)
        assert torch.equal(a.scores, b.scores)
        assert torch.equal(a.labels, b.labels)
    assert evaluate(again, records).metrics == pytest.approx(evaluate(detections, records).metrics, nan_ok=True)


def test_category_ids_are_the_data_sets_own(scene, tmp_path):
    detections, records = scene(3)
    write_results(tmp_path / "d.json", detections, records)
    used = {row["category_id"] for row in json.loads((tmp_path / "d.json").read_text())}
    assert used <= {1, 3, 5, 7}
    assert len(used) > 1


def test_a_failed_write_leaves_the_old_file_and_no_other(scene, tmp_path, monkeypatch):
    detections, records = scene(3)
    path = tmp_path / "d.json"
    path.write_text("[]")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_results(path, detections, records)
    assert path.read_text() == "[]"
    assert list(tmp_path.iterdir()) == [path]


def test_scores_come_back_sorted_with_ties_in_file_order(scene, tmp_path):
    _, records = scene(3)
    image = int(records.image_ids[0])
    rows = [
        {"image_id": image, "category_id": c, "bbox": [0, 0, 1, 1], "score": s}
        for c, s in ((1, 0.2), (3, 0.9), (5, 0.9), (7, 1))
    ]
    (tmp_path / "d.json").write_text(json.dumps(rows))
    first = read_results(tmp_path / "d.json", records)[0]
    assert first.scores.tolist() == [1.0, 0.9, 0.9, 0.2]
    assert first.labels.tolist() == [3, 1, 2, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": 5000}, "detection 1: image_id 5000"),
        ({"image_id": "12"}, "detection 1: image_id '12'"),
        ({"image_id": True}, "detection 1: image_id True"),
        ({"category_id": 2}, "detection 1: category_id 2"),
        ({"category_id": None}, "detection 1: category_id None"),
        ({"category_id": [1]}, r"detection 1: category_id \[1\]"),
        ({"score": float("nan")}, "detection 1: score nan"),
        ({"score": 1.01}, "detection 1: score 1.01"),
        ({"score": "high"}, "detection 1: score 'high'"),
        ({"score": None}, "detection 1: score None"),
        ({"bbox": [0, 0, 1]}, r"detection 1: bbox \[0, 0, 1\]"),
        ({"bbox": [0, 0, float("inf"), 1]}, "detection 1: bbox"),
        ({"bbox": [0, 0, -4, 1]}, "must not be negative"),
        ({"bbox": [10**400, 0, 4, 1]}, "detection 1: bbox"),
        ({"bbox": {}}, "detection 1: bbox"),
    ],
)
def test_a_bad_entry_is_named(scene, tmp_path, change, message):
    _, records = scene(3)
    good = {"image_id": int(records.image_ids[0]), "category_id": 1, "bbox": [0, 0, 4, 4], "score": 0.5}
    path = tmp_path / "d.json"
    path.write_text(json.dumps([good, {**good, **change}]))
    with pytest.raises(DataError, match=message) as caught:
        read_results(path, records)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not JSON"),
        (b'{"annotations": []}', "is a list of detections; this is a dict"),
        (b"[3]", "detection 0: expected an object"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 200_000, "nested too deeply"),
    ],
)
def test_a_bad_file_is_named(scene, tmp_path, content, message):
    _, records = scene(3)
    path = tmp_path / "d.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_results(path, records)


def test_missing_and_oversized_files(scene, tmp_path, monkeypatch):
    _, records = scene(3)
    with pytest.raises(DataError, match="No such file"):
        read_results(tmp_path / "none.json", records)
    monkeypatch.setattr(results, "MAX_RESULT_BYTES", 10)
    (tmp_path / "d.json").write_text("[] " * 10)
    with pytest.raises(DataError, match="30 bytes; at most 10"):
        read_results(tmp_path / "d.json", records)


def test_an_empty_list_is_no_detections(scene, tmp_path):
    _, records = scene(3)
    (tmp_path / "d.json").write_text("[]")
    assert sum(len(d.scores) for d in read_results(tmp_path / "d.json", records)) == 0


def test_ground_truth_counts_ids_from_one(scene):
    _, records = scene(3)
    truth = ground_truth(records)
    assert [a["id"] for a in truth["annotations"]] == list(range(1, len(records.labels) + 1))
    assert {i["id"] for i in truth["images"]} == set(records.image_ids.tolist())
    np.testing.assert_allclose([a["area"] for a in truth["annotations"]], records.area)
