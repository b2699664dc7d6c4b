"""The exported program gives what `predict_images` gives, and needs torch alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from detection.config import ConfigError
from detection.data.dataset import read_image
from detection.data.transforms import TransformConfig
from detection.export import Detector, canvas_size, export_detector
from detection.model.retinanet import RetinaNetConfig
from detection.prediction import predict_images
from detection.repair import calibrate_run

ALONE = """
import sys, torch, torchvision
program = torch.export.load(sys.argv[1]).module()
outputs = program(torch.full((1, 3, 64, 64), 90, dtype=torch.uint8), torch.tensor([[64, 64, 64, 64]]))
assert not [name for name in sys.modules if name.split(".")[0] in ("detection", "timm", "pydantic", "sklearn")]
print([list(part.shape) for part in outputs])
"""


@pytest.fixture(scope="module")
def calibrated(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a calibrator, and beside the checkpoint the exported program."""
    run = tmp_path_factory.mktemp("export")
    (run / "best.pt").write_bytes(trained.read_bytes())
    calibrate_run(run, None, ["calibration.operating_threshold=lrp"])
    done = export_detector(run, run / "detector.pt2", (64, 64), any_batch=True)
    assert done.error < 1e-6
    assert "calibrated scores: isotonic map" in done.lines[1]
    return run


def images_of(trained: Path) -> list[Path]:
    folder = next((trained.parent / "digits").iterdir())
    return sorted((folder / "test" / "images").iterdir())


def test_program_gives_the_predictions_of_the_run(calibrated: Path, trained: Path) -> None:
    extra = {"detector.json": ""}
    program = torch.export.load(calibrated / "detector.pt2", extra_files=extra).module()
    files = images_of(trained)
    pixels = [torch.from_numpy(read_image(path)).permute(2, 0, 1) for path in files]
    sizes = torch.tensor([[64, 64, 64, 64]] * len(files))
    boxes, labels, scores, raw = program(torch.stack(pixels), sizes)
    predicted = predict_images(calibrated, files, score_threshold=0.0)
    assert len(predicted.images) == len(files)
    for n, image in enumerate(predicted.images):
        count = len(image.scores)
        assert count > 3
        assert int((labels[n] >= 0).sum()) == count
        np.testing.assert_array_equal(labels[n, :count].numpy(), image.labels)
        for found, expected in ((boxes, image.boxes), (scores, image.scores), (raw, image.raw_scores)):
            np.testing.assert_allclose(found[n, :count].numpy(), expected, rtol=0, atol=1e-5)
        assert float(np.abs(image.scores - image.raw_scores).max()) > 0.01
        assert torch.all(scores[n].diff() <= 0)
        assert torch.all(boxes[n, count:] == 0)
    one = program(torch.stack(pixels[2:3]), sizes[:1])
    torch.testing.assert_close(one[2], scores[2:3], rtol=0, atol=1e-6)
    description = json.loads(extra["detector.json"])
    assert description["classes"][1] == {"label": 1, "name": "one", "category_id": 2}
    assert description["calibrator"]["split"] == "calibration"
    assert len(description["operating_thresholds"]) == len(description["classes"])


@pytest.mark.slow
def test_program_needs_torch_alone(calibrated: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "-c", ALONE, str(calibrated / "detector.pt2")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[1, 10, 4], [1, 10], [1, 10], [1, 10]]


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_detector_equals_decoding(activation: str) -> None:
    """Padding, scaled files, thresholds, both activations, and images without a detection."""
    from detection.model.decode import decode
    from detection.types import Frame

    torch.manual_seed(0)
    config = RetinaNetConfig.model_validate(
        {
            "backbone": {"name": "test_resnet.r160_in1k"},
            "pyramid": {"width": 16, "levels": 3},
            "head": {"depth": 1, "background": activation == "softmax"},
            "anchors": {"size_factor": 3.0},
            "decode": {"activation": activation, "score_threshold": 0.2, "top_k": 300, "max_detections": 40},
        }
    )
    model = config.build(4).eval()
    with torch.no_grad():
        model.head.classes.output.weight.normal_(std=0.3)
        model.head.classes.output.bias.zero_()
    images = torch.randint(0, 256, (3, 3, 64, 96), dtype=torch.uint8)
    sizes = torch.tensor([[64, 96, 128, 192], [50, 90, 25, 45], [64, 40, 200, 125]])
    frames = [Frame(n, (fh, fw), (w / fw, h / fh), (-0.0, -0.0)) for n, (h, w, fh, fw) in enumerate(sizes.tolist())]
    with torch.no_grad():
        expected = decode(model(images), frames, config.decode)
        boxes, labels, scores, raw = Detector(model, None, (64, 96))(images, sizes)
        nothing = RetinaNetConfig.model_validate(
            {**config.model_dump(), "decode": {"score_threshold": 0.999, "activation": activation}}
        )
        model.config = nothing
        empty = Detector(model, None, (64, 96))(images, sizes)
    assert torch.all(empty[1] == -1)
    assert torch.equal(scores, raw.double())
    for n, want in enumerate(expected):
        count = len(want.scores)
        assert count > 5
        assert int((labels[n] >= 0).sum()) == count
        torch.testing.assert_close(raw[n, :count], want.scores, rtol=0, atol=1e-6)
        torch.testing.assert_close(boxes[n, :count], want.boxes, rtol=0, atol=1e-4)
        assert torch.equal(labels[n, :count], want.labels)


def test_canvas_holds_every_image_of_the_run() -> None:
    assert canvas_size(TransformConfig(mode="longest", size=300, max_size=300), None) == (320, 320)
    assert canvas_size(TransformConfig(), None) == (1344, 1344)
    assert canvas_size(TransformConfig(), (64, 96)) == (64, 96)
    with pytest.raises(ConfigError, match="65 x 64 pixels; allowed: positive multiples of 32"):
        canvas_size(TransformConfig(), (65, 64))
