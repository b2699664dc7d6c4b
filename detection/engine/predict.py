"""A model over an evaluation set, spread over the ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from detection.distributed import gather_objects
from detection.engine.parallel import Precision, autocast
from detection.types import Batch, Detections, Frame, Predictions

Decode = Callable[[Predictions, Sequence[Frame]], list[Detections]]


def predict(
    model: nn.Module,
    batches: Iterable[Batch],
    decode: Decode,
    device: torch.device,
    precision: Precision = "float32",
) -> list[Detections] | None:
    """Every image's detections, on the CPU, by ascending image id; None on ranks other than 0.

    `batches` are this rank's images, in any order and number; no image may be another rank's too.
    The model is in evaluation mode meanwhile and as before afterwards.
    """
    found: list[Detections] = []
    host = torch.device("cpu")
    # Not inference_mode: anchors that the model caches here are used in training, too.
    with evaluation_mode(model), torch.no_grad():
        for batch in batches:
            with autocast(device, precision):
                predictions = model(batch.to(device).images)
            found += [d.to(host) for d in decode(predictions, batch.frames)]
    gathered = gather_objects(found)
    return None if gathered is None else in_order(gathered)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """A scope in which the model is in evaluation mode; each of its modules is as before afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def in_order(shares: Sequence[Sequence[Detections]]) -> list[Detections]:
    """The detections of the ranks' shares by ascending image id, so that the number of ranks changes nothing."""
    joined = sorted((d for share in shares for d in share), key=lambda d: d.image_id)
    ids = [d.image_id for d in joined]
    assert len(set(ids)) == len(ids), "an image was evaluated twice"
    return joined
