"""The curvature of a trained classifier's loss, as `detection.analysis` measures a detector's."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from detection.classification_task import ClassificationExperiment, load_classifier, training_crops
from detection.config import override
from detection.engine.checkpoint import load as load_checkpoint
from detection.engine.checkpoint import load_weights
from detection.engine.parallel import choose_device
from detection.evaluation.curvature import curvature_numbers, hessian_product


def measure_classifier_curvature(path: Path, images: int) -> dict[str, float | int | bool]:
    """The curvature of the training loss at a checkpoint, see `curvature_numbers`.

    The loss is that of one batch of `images` training crops, evenly spread over them and not augmented, as a function
    of all parameters that train, in float32, with the model in evaluation mode. Errors: one of `USER_ERRORS`.
    """
    started = time.perf_counter()
    checkpoint = load_checkpoint(path)
    experiment = override(ClassificationExperiment, checkpoint.config, [], str(path))
    device = choose_device(experiment.device)
    crops = training_crops(experiment)
    rows = np.unique(np.linspace(0, len(crops) - 1, images).round().astype(np.int64))
    pixels = torch.from_numpy(np.ascontiguousarray(crops.plain()[rows])).permute(0, 3, 1, 2).to(device)
    labels = torch.from_numpy(crops.labels[rows]).to(device)
    criterion = experiment.loss.build(len(crops.class_names))
    load_weights(criterion, checkpoint.criterion, path)
    criterion.to(device)
    model = load_classifier(checkpoint, path, experiment).to(device).eval()
    parameters = [p for p in model.parameters() if p.requires_grad]

    def loss() -> Tensor:
        return criterion.batch_loss(model(pixels).logits[0][:, 0], labels)

    # Convolutions in TF32 would leave three digits.
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        found = curvature_numbers(hessian_product(loss, parameters), parameters)
    return {**found, "images": len(rows), "seconds": time.perf_counter() - started}
