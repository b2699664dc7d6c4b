"""The whole page: what it contains, that nothing in the data runs or breaks it, and that a browser has no complaint."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from detection.evaluation.evaluate import EvaluationConfig
from detection.evaluation.results import write_results
from detection.report.metrics_tables import metrics_table
from detection.report.page import Choices, report, write_report
from detection.report.runs import NO_RAW, RunResults, measure, read_run
from detection.types import DataError, Detections, Records

HOSTILE = "<img src=x onerror=alert(1)>\"'&"
VOID = {"meta", "link", "image", "img", "br"}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


class Page(HTMLParser):
    """The page's tags, and a check that each that opens closes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def make_run(folder: Path, classes: tuple[str, ...] = ("cat", "dog"), images: int = 6, **changes: Any) -> RunResults:
    """A run folder with images, in which each image holds two objects: one is found, one is taken for the other."""
    place = folder / "evaluation" / "test"
    place.mkdir(parents=True)
    rng = np.random.default_rng(0)
    paths = []
    for i in range(images):
        name = folder / f"{i}.png"
        Image.fromarray(rng.integers(0, 255, (100, 120, 3), dtype=np.uint8)).save(name)
        paths.append(str(name).encode())
    boxes = np.tile(np.array([[10.0, 10, 40, 40], [60, 50, 110, 95]]), (images, 1))
    records = Records(
        class_names=classes,
        category_ids=tuple(range(1, len(classes) + 1)),
        paths=np.array(paths),
        image_ids=np.arange(1, images + 1),
        sizes=np.tile(np.array([[100, 120]]), (images, 1)),
        offsets=np.arange(images + 1) * 2,
        boxes=boxes,
        labels=np.tile(np.array([0, 1]), images),
        crowd=np.zeros(2 * images, bool),
        area=(boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]),
    )
    found = [
        Detections(
            i + 1,
            torch.tensor([[60.0, 50, 110, 95], [11, 10, 40, 41], [2, 60, 30, 90]]),
            torch.tensor([0.9, 0.8, 0.2]) - 0.01 * i,
            torch.tensor([0, 0, 1]),
        )
        for i in range(images)
    ]
    write_results(place / "detections.json", found, records)
    (folder / "journal.jsonl").write_text(
        "".join(
            json.dumps(
                {"event": "train", "step": s, "epoch": s / 4, "total": 2 / s, "classification": 1 / s, "lr": 0.1}
            )
            + "\n"
            for s in range(1, 9)
        )
        + json.dumps({"event": "evaluation", "step": 8, "epoch": 2, "metrics": {"ap": 0.5, "d_ece": None}})
        + "\n"
    )
    (place / "metrics.json").write_text(json.dumps(changes.pop("metrics", {"notes": ["a note"]})))
    return read_run(folder, "test", records, {"seed": 0, "model": {"width": 8}})


def test_page_has_every_part_and_closes_its_tags(tmp_path: Path) -> None:
    text = report([(make_run(tmp_path / "run"), EvaluationConfig())], Choices(resamples=20, mistakes=3))
    page = Page(text)
    parts = {section["id"] for section in page.all("section")}
    names = ("summary", "accuracy", "calibration", "classes", "thresholds", "mistakes", "training")
    assert parts == {f"run-{name}" for name in names}
    assert {link["href"] for link in page.all("a")} == {f"#{part}" for part in parts}
    pictures = [picture for picture in page.all("svg") if "role" in picture]
    assert len(pictures) == 2 + 1 + 3 + 1 + 3 + 3
    assert all(len(picture["aria-label"] or "") > 30 and picture["role"] == "img" for picture in pictures)
    assert len(page.all("image")) == 3
    assert "95 % interval" in text
    assert "wrong class (it is dog)" in text
    assert ">nan<" not in text
    assert "NaN" not in text


def test_page_needs_no_network_and_no_script(tmp_path: Path) -> None:
    page = Page(report([(make_run(tmp_path / "run"), EvaluationConfig())], Choices(resamples=0)))
    assert page.all("script") == []
    assert all((image["href"] or "").startswith("data:image/jpeg;base64,") for image in page.all("image"))
    assert all((link["href"] or "").startswith(("data:", "#")) for link in page.all("link") + page.all("a"))
    policy = next(meta["content"] for meta in page.all("meta") if meta.get("http-equiv"))
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_names_from_the_data_stay_text(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", classes=(HOSTILE, "dog"), metrics={"notes": [HOSTILE]})
    run = replace(run, name=HOSTILE, config={"a": HOSTILE}, journal=[{"event": "start", "notes": [HOSTILE]}])
    gone = np.array([f"{HOSTILE}.png".encode()] * len(run.records))
    run = replace(run, records=replace(run.records, paths=gone))
    for runs in ([run], [run, run]):
        text = report([(r, EvaluationConfig()) for r in runs], Choices(resamples=5, mistakes=2))
        assert Page(text).all("img") == []
        assert "<img" not in text
        assert "The image file cannot be read" in text


def test_nothing_detected_and_nothing_annotated(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    empty = [Detections(d.image_id, torch.zeros(0, 4), torch.zeros(0), torch.zeros(0).long()) for d in run.detections]
    bare = replace(
        run.records,
        offsets=np.zeros(len(run.records) + 1, np.int64),
        boxes=np.zeros((0, 4)),
        labels=np.zeros(0, np.int64),
        crowd=np.zeros(0, bool),
        area=np.zeros(0),
    )
    for changed in (
        replace(run, detections=empty),
        replace(run, records=bare),
        replace(run, records=bare, detections=empty),
    ):
        Page(report([(changed, EvaluationConfig())], Choices(resamples=5)))


def halved(run: RunResults) -> RunResults:
    """The run as a calibrator that halves every score leaves it."""
    after = [Detections(d.image_id, d.boxes, d.scores / 2, d.labels) for d in run.detections]
    return replace(run, detections=after, raw=run.detections)


def test_pictures_and_numbers_before_and_after_calibration(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    page = report([(run, EvaluationConfig())], Choices(resamples=0))
    assert "raw scores" not in page
    text = report([(halved(run), EvaluationConfig())], Choices(resamples=5))
    for title in ("Reliability", "Calibration by box size", "Calibration by position", "Scores of true and false"):
        titles = [part.split("</p>")[0] for part in text.split('<p class="title">')[1:] if part.startswith(title)]
        assert [t.split(", ")[-1] for t in titles] == ["raw scores", "calibrated scores"]
    raw = measure(run, EvaluationConfig())
    both = measure(halved(run), EvaluationConfig())
    assert both.before is not None
    for name in ("ap", "d_ece", "brier", "precision"):
        assert both.before.evaluation.metrics[name] == raw.evaluation.metrics[name]
    assert both.evaluation.metrics["d_ece"] != raw.evaluation.metrics["d_ece"]
    row = next(row for row in metrics_table(both, {"d_ece": ""}, "").rows if row[0] == "d_ece")
    assert row[1:3] == (both.evaluation.metrics["d_ece"], raw.evaluation.metrics["d_ece"])


def test_raw_detections_are_read_where_they_were_kept(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run = make_run(folder, metrics={"calibrated": {}, "notes": ["a note"]})
    assert run.raw is None
    assert run.notes == ("a note", NO_RAW)
    place = folder / "evaluation" / "test"
    (place / "detections_raw.json").write_bytes((place / "detections.json").read_bytes())
    again = read_run(folder, "test", run.records, {})
    assert again.raw is not None
    assert again.raw[0].scores.tolist() == again.detections[0].scores.tolist()
    assert again.notes == ("a note",)


def test_mistakes_without_images_are_boxes_alone(tmp_path: Path) -> None:
    run = replace(make_run(tmp_path / "run"), images=False)
    text = report([(run, EvaluationConfig())], Choices(resamples=0, mistakes=3))
    page = Page(text)
    assert page.all("image") == []
    assert "boxes alone" in text
    assert len([box for box in page.all("rect") if box["class"] == "found"]) == 3
    assert "cannot be read" not in text


def test_malformed_files_are_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    stored = tmp_path / "run" / "evaluation" / "test" / "metrics.json"
    for content, message in (("[", "not JSON"), ('{"calibrated": 3}', "calibrated"), ('{"notes": [1]}', "notes")):
        stored.write_text(content)
        with pytest.raises(DataError, match=message):
            read_run(tmp_path / "run", "test", run.records, {})
    with pytest.raises(DataError, match=r"no detections\.json"):
        read_run(tmp_path / "run", "other", run.records, {})


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
@pytest.mark.slow
def test_browser_shows_the_page_without_complaint(tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    write_report([(make_run(tmp_path / "run"), EvaluationConfig())], out, Choices(resamples=20, mistakes=3))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    options += [
        "--disable-background-networking",
        "--disable-component-update",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    command = [str(CHROMIUM), *options, "--enable-logging=stderr", "--window-size=500,900", "--dump-dom", out.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr
    assert done.stdout.count("<svg") == out.read_text(encoding="utf-8").count("<svg")
