"""A model over an evaluation set, spread over the ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn

from detection.distributed import gather_objects, rank, world_size
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
    """Every image's detections, on the CPU, in the data set's order; None on ranks other than 0.

    `batches` are this rank's images: those at rank, rank + world, ... of the data set, in that order.
    The model is in evaluation mode meanwhile and as before afterwards.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    found: list[Detections] = []
    try:
        with torch.inference_mode():
            for batch in batches:
                with autocast(device, precision):
                    predictions = model(batch.to(device).images)
                found += [d.to(torch.device("cpu")) for d in decode(predictions, batch.frames)]
    finally:
        for module, training in modes.items():
            module.training = training
    gathered = gather_objects(found)
    return interleave(gathered) if rank() == 0 and gathered is not None else None


def interleave(shares: Sequence[Sequence[Detections]]) -> list[Detections]:
    """The detections of image 0, 1, ... from the ranks' shares, image i being element i // world of share i % world."""
    count = sum(len(share) for share in shares)
    expected = [len(range(r, count, len(shares))) for r in range(len(shares))]
    assert [len(share) for share in shares] == expected, f"shares of {[len(s) for s in shares]} images"
    return [shares[i % len(shares)][i // len(shares)] for i in range(count)]


def share(count: int) -> range:
    """The data-set indices of this rank's share of `count` images."""
    return range(rank(), count, world_size())
