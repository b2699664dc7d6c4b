"""A trained detector as one file that needs torch alone: network, decoding, NMS and calibrator in one graph.

    program = torch.export.load("detector.pt2").module()        # after `import torch, torchvision`
    boxes, labels, scores, raw_scores = program(images, sizes)

The file also holds `detector.json`: class names, how images are resized, thresholds, the calibrator's origin
(`torch.export.load(path, extra_files={"detector.json": ""})` fills it in).
"""

from __future__ import annotations

import io
import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from detection.calibration.module import CalibratorModule
from detection.calibration.stored import StoredCalibrator
from detection.config import ConfigError, override
from detection.data.loader import FILL, MULTIPLE
from detection.data.transforms import TransformConfig
from detection.engine.checkpoint import find_checkpoint, write_atomically
from detection.engine.checkpoint import load as load_checkpoint
from detection.experiment import Experiment, load_model, stored_calibrator
from detection.model.decode import DecodeConfig
from detection.model.retinanet import RetinaNet
from detection.ops.boxes import decode_deltas
from detection.ops.nms import grouped_nms

DESCRIPTION = "detector.json"
MOST_IMAGES = 1024
"""Largest batch of a program that takes any number of images."""
Outputs = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written."""

    path: Path
    description: dict[str, Any]
    error: float
    """Largest difference between the loaded program's outputs and the model's own, on random images."""

    @property
    def lines(self) -> list[str]:
        """The same in words."""
        origin = self.description["calibrator"]
        scores = "raw scores: no calibrator" if origin is None else f"calibrated scores: {origin['settings']}"
        batch, _, height, width = self.description["inputs"]["images"]
        return [
            f"{self.path}: {self.path.stat().st_size / 1e6:.1f} MB, images uint8 ({batch}, 3, {height}, {width})",
            scores,
            f"loaded back and run: outputs differ from the model's by at most {self.error:.1g}",
        ]


class Detector(nn.Module):
    """uint8 images of one size -> detections in the pixels of their files: what `decode` and the calibrator give.

    A fixed number of rows an image, so that outputs are plain tensors: rows without a detection have label -1, score 0.
    """

    def __init__(self, model: RetinaNet, stored: StoredCalibrator | None, size: tuple[int, int]) -> None:
        super().__init__()
        self.model = model
        self.config: DecodeConfig = model.config.decode
        self.calibrator = None if stored is None else CalibratorModule(stored.calibrator)
        with torch.no_grad():
            levels = model(torch.zeros((1, 3, *size), dtype=torch.uint8)).anchors
        for i, level in enumerate(levels):
            self.register_buffer(f"anchors{i}", level.boxes.clone())

    def forward(self, images: UInt8[Tensor, "N 3 H W"], sizes: Int[Tensor, "N 4"]) -> Outputs:
        """Boxes (N, D, 4) xyxy, labels (N, D), scores (N, D) float64 by falling order, raw scores (N, D).

        `sizes`: height and width of each image within its canvas, then height and width of its file.
        """
        features = self.model.pyramid(self.model.backbone(self.model.normalise(images)))
        logits, deltas = self.model.head(features)
        found = [self._candidates(level, logits[level], deltas[level]) for level in range(len(logits))]
        boxes, scores, labels = (torch.cat([part[i] for part in found], dim=1) for i in range(3))
        boxes = to_files(boxes, sizes)
        best, rows = _keep(boxes, scores, labels, self.config).topk(
            min(self.config.max_detections, scores.shape[1]), dim=1
        )
        labels = torch.where(best >= 0, labels.gather(1, rows), -1)
        boxes = torch.where(best[..., None] >= 0, boxes.gather(1, rows[..., None].expand(-1, -1, 4)), 0.0)
        raw = best.clamp(min=0.0)
        calibrated = raw.double()
        if self.calibrator is not None:
            flat = self.calibrator(raw.flatten(), labels.flatten().clamp(min=0))
            calibrated = torch.where(labels >= 0, flat.reshape(raw.shape), 0.0)
        order = torch.where(labels >= 0, calibrated, -1.0).argsort(dim=1, descending=True, stable=True)
        boxes = boxes.gather(1, order[..., None].expand(-1, -1, 4))
        return boxes, labels.gather(1, order), calibrated.gather(1, order), raw.gather(1, order)

    def _candidates(
        self, level: int, logits: Float[Tensor, "N A C"], deltas: Float[Tensor, "N A 4"]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The level's best pairs: boxes in canvas pixels, scores (-1 where there is no detection), labels."""
        values = logits.float()
        if self.config.activation == "softmax":
            values = values.log_softmax(-1)[..., :-1]
        classes = values.shape[-1]
        flat = values.flatten(1)
        best, pair = flat.topk(min(self.config.top_k, flat.shape[1]), dim=1)
        anchor, label = pair // classes, pair % classes
        anchors = self.get_buffer(f"anchors{level}")
        boxes = decode_deltas(anchors[anchor], deltas.float().gather(1, anchor[..., None].expand(-1, -1, 4)))
        scores = best.sigmoid() if self.config.activation == "sigmoid" else best.exp()
        valid = (best > self._threshold()) & torch.isfinite(boxes).all(-1) & torch.isfinite(scores)
        return torch.where(valid[..., None], boxes, 0.0), torch.where(valid, scores, -1.0), label

    def _threshold(self) -> float:
        """The score threshold on the scale of what is ordered: log-odds, or log-probabilities."""
        p = self.config.score_threshold
        if p == 0:
            return -math.inf
        return math.log(p / (1 - p)) if self.config.activation == "sigmoid" else math.log(p)


def to_files(boxes: Float[Tensor, "N D 4"], sizes: Int[Tensor, "N 4"]) -> Float[Tensor, "N D 4"]:
    """Boxes in canvas pixels as boxes in the files' pixels, cut to the files' images."""
    shown, file = sizes[:, :2].flip(1).double(), sizes[:, 2:].flip(1)
    scale = (shown / file).float().repeat(1, 2)[:, None]
    limit = file.to(boxes.dtype).repeat(1, 2)[:, None]
    return torch.minimum((boxes / scale).clamp(min=0.0), limit)


def _keep(
    boxes: Float[Tensor, "N D 4"], scores: Float[Tensor, "N D"], labels: Int[Tensor, "N D"], config: DecodeConfig
) -> Float[Tensor, "N D"]:
    """The scores, -1 where a better box of the image and the class overlaps too much."""
    count, width = scores.shape
    rows = torch.nonzero(scores.flatten() >= 0).squeeze(1)
    flat = scores.flatten()
    groups = (rows // width) * (labels.max() + 1) + labels.flatten()[rows]
    kept = rows[grouped_nms(boxes.reshape(count * width, 4)[rows], flat[rows], groups, config.iou_threshold)]
    return torch.full_like(flat, -1.0).index_copy(0, kept, flat[kept]).reshape(count, width)


def export_detector(
    place: Path,
    out: Path,
    size: Sequence[int] | None = None,
    any_batch: bool = False,
    raw: bool = False,
    overrides: Sequence[str] = (),
) -> Exported:
    """Writes a run folder's best checkpoint, or a checkpoint file, as a program of torch.export.

    `size`: height and width of the canvas, by default the smallest that holds every image as the run resizes it.
    The program takes one image at a time, with `any_batch` any number. It computes in float32 on the CPU;
    `torch.export.passes.move_to_device_pass` moves it. Errors: one of `USER_ERRORS`.
    """
    path = find_checkpoint(place)
    checkpoint = load_checkpoint(path)
    experiment = override(Experiment, checkpoint.config, overrides, str(path))
    stored = None if raw else stored_calibrator(checkpoint, path)
    canvas = canvas_size(experiment.data.transform, size)
    detector = Detector(load_model(checkpoint, path, experiment).eval(), stored, canvas).eval()
    for parameter in detector.requires_grad_(False).parameters():
        parameter.data = parameter.data.contiguous()  # torch.export.save restores no other order of memory reliably
    description = {
        "classes": [
            {"label": i, "name": name, "category_id": number}
            for i, (name, number) in enumerate(zip(checkpoint.class_names, checkpoint.category_ids, strict=True))
        ],
        "inputs": _inputs(experiment.data.transform, canvas, any_batch),
        "outputs": "boxes xyxy in file pixels, labels (-1: no detection), calibrated scores float64, raw scores",
        "score_threshold": experiment.model.decode.score_threshold,
        "calibrator": None if stored is None else stored.fitted_on.model_dump(mode="json"),
        "operating_thresholds": None if stored is None else list(stored.calibrator.operating_thresholds),
        "checkpoint": path.name,
        "step": checkpoint.step,
        "torch": str(torch.__version__),
    }
    content = _program(detector, canvas, any_batch, description)
    write_atomically(out, content)
    return Exported(out, description, _difference(detector, out, canvas, 2 if any_batch else 1))


def canvas_size(transform: TransformConfig, size: Sequence[int] | None) -> tuple[int, int]:
    """Height and width of the canvas. Errors: ConfigError where they are not whole multiples of the largest stride."""
    if size is None:
        longest = transform.size if transform.mode == "longest" else transform.max_size or transform.size
        side = -(-longest // MULTIPLE) * MULTIPLE
        return side, side
    height, width = size
    if min(height, width) <= 0 or height % MULTIPLE or width % MULTIPLE:
        raise ConfigError(f"canvas of {height} x {width} pixels; allowed: positive multiples of {MULTIPLE}")
    return height, width


def _inputs(transform: TransformConfig, canvas: tuple[int, int], any_batch: bool) -> dict[str, Any]:
    """How a caller makes them from a file."""
    return {
        "images": ["N" if any_batch else 1, 3, *canvas],
        "dtype": "uint8, RGB, upright",
        "resize": {"mode": transform.mode, "size": transform.size, "max_size": transform.max_size},
        "interpolation": "bilinear; where a side shrinks to half or less, area averaging by 2, 4 or 8 before",
        "place": "the resized image at the top left, the rest filled",
        "fill": list(FILL),
        "sizes": "int64 (N, 4): height and width of the resized image, height and width of the file's image",
    }


def _program(detector: Detector, canvas: tuple[int, int], any_batch: bool, description: dict[str, Any]) -> memoryview:
    count = 2 if any_batch else 1
    dynamic = {0: torch.export.Dim("images", min=1, max=MOST_IMAGES)} if any_batch else None
    buffer = io.BytesIO()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`create_unbacked_symint` is deprecated")
        program = torch.export.export(detector, _example(canvas, count), dynamic_shapes=(dynamic, dynamic))
        torch.export.save(program, buffer, extra_files={DESCRIPTION: json.dumps(description, indent=1)})
    return buffer.getbuffer()


def _example(canvas: tuple[int, int], count: int) -> tuple[Tensor, Tensor]:
    """Random images that fill the canvas, from files twice as large."""
    source = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, *canvas), generator=source, dtype=torch.uint8)
    return images, torch.tensor([[*canvas, 2 * canvas[0], 2 * canvas[1]]] * count)


def _difference(detector: Detector, path: Path, canvas: tuple[int, int], count: int) -> float:
    example = _example(canvas, count)
    with torch.no_grad():
        expected, found = detector(*example), torch.export.load(path).module()(*example)
    return max(float((a.double() - b.double()).abs().max()) for a, b in zip(expected, found, strict=True))
