"""One optimisation step, and the window of steps between two looks at the device."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from detection.distributed import all_gather_objects, sum_across_ranks, world_size
from detection.engine.parallel import Precision, autocast, without_gradient_exchange
from detection.types import AnchorLevel, Batch, Losses, Matches, Predictions, Target

Assign = Callable[[Sequence[AnchorLevel], Sequence[Target], int], Matches]

MAX_IDS_SHOWN = 64
MAX_NAMES_SHOWN = 8

COLUMNS = ("total", "classification", "box", "num_positive", "grad_norm")
"""What a step leaves on the device, in this order."""


class NonFiniteError(ValueError):
    """Training met an infinity or a NaN. The message names the steps and the image ids."""


@dataclass(frozen=True, slots=True)
class StepParts:
    """What a step needs and does not change from step to step."""

    model: nn.Module
    """The model, or DDP around it."""
    assign: Assign
    criterion: nn.Module
    optimiser: torch.optim.Optimizer
    num_classes: int
    device: torch.device
    precision: Precision
    clip_norm: float


def optimisation_step(parts: StepParts, batches: Sequence[Batch]) -> Tensor:
    """The step's `COLUMNS`, float32 on the device, after one update from the mean gradient of `batches`.

    The loss normaliser (positives of all ranks) is that of each batch on its own, so accumulating over k batches
    averages k normalised losses; DDP's mean over ranks then equals a world of one on the joined batch.
    """
    rows = []
    for index, batch in enumerate(batches):
        with without_gradient_exchange(parts.model, index + 1 < len(batches)):
            losses = batch_losses(parts, batch)
            (losses.total / len(batches)).backward()  # type: ignore[no-untyped-call]
        rows.append(torch.stack([losses.total, losses.classification, losses.box, losses.num_positive]).detach())
    norm = clip_gradient(parts.optimiser, parts.clip_norm)
    parts.optimiser.step()
    parts.optimiser.zero_grad(set_to_none=True)
    return torch.cat([torch.stack(rows).mean(dim=0), norm.reshape(1)])


def batch_losses(parts: StepParts, batch: Batch) -> Losses:
    """The losses of one batch: forward under autocast, assignment on the host meanwhile, criterion in float32."""
    batch = batch.to(parts.device)
    with autocast(parts.device, parts.precision):
        predictions: Predictions = parts.model(batch.images)
    anchors = [level.on_host or level for level in predictions.anchors]
    matches = parts.assign(anchors, batch.targets, parts.num_classes).to(parts.device)
    losses: Losses = parts.criterion(predictions, matches)
    return losses


def clip_gradient(optimiser: torch.optim.Optimizer, largest: float) -> Tensor:
    """The gradient's total norm before it is scaled down to `largest` (0: left alone). No host sync."""
    parameters = [p for group in optimiser.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if largest > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, largest, norm)
    return norm.float()


@dataclass(slots=True)
class Window:
    """What happened since the last look at the device: sums stay there until `read`."""

    device: torch.device
    first: int = 0
    """Step count before the window's first step of this process."""
    carried: int = 0
    """Steps whose sums a checkpoint brought along."""
    sums: Tensor = field(init=False)
    rows: list[Tensor] = field(default_factory=list)
    image_ids: list[tuple[int, ...]] = field(default_factory=list)
    images: int = 0
    waited: float = 0.0
    started: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self.sums = torch.zeros(len(COLUMNS), device=self.device)

    @property
    def steps(self) -> int:
        return self.carried + len(self.rows)

    def resume(self, step: int, sums: Tensor, carried: int) -> None:
        """Opens the window again as a checkpoint at `step` left it."""
        self.first, self.carried = step, carried
        self.sums = sums.to(self.device)

    def restart_clock(self) -> None:
        """Leaves out the time since the last step: evaluation and saving are not training."""
        if not self.rows:
            self.started = time.perf_counter()

    def add(self, row: Tensor, batches: Sequence[Batch], waited: float) -> None:
        self.sums = self.sums + row
        self.rows.append(row)
        self.image_ids.append(tuple(frame.image_id for batch in batches for frame in batch.frames))
        self.images += sum(len(batch.frames) for batch in batches)
        self.waited += waited

    def check(self) -> None:
        """Raises NonFiniteError on every rank if a step of the window was not finite on one. A host sync."""
        rows = torch.stack(self.rows) if self.rows else self.sums.new_zeros(0, len(COLUMNS))
        bad = sum_across_ranks((~torch.isfinite(rows)).any(dim=1).int()).cpu()
        if not bool(bad.any()):
            return
        own = torch.isfinite(rows[:, : len(COLUMNS) - 1]).all(dim=1).cpu()
        step = int(bad.nonzero()[0])
        raise NonFiniteError(_explain(self, step, bool(own[step]), rows[step].tolist()))

    def means(self) -> dict[str, float]:
        """The mean of each column over the window's steps and ranks. A host sync."""
        count = max(self.steps, 1)
        values = (sum_across_ranks(self.sums) / (count * world_size())).tolist()
        return dict(zip(COLUMNS, values, strict=True))

    def rates(self) -> dict[str, float]:
        """images_per_second over all ranks, and data_wait: this rank's share of time spent waiting for batches."""
        seconds = max(time.perf_counter() - self.started, 1e-9)
        return {
            "images_per_second": self.images * world_size() / seconds,
            "data_wait": min(self.waited / seconds, 1.0),
        }


def check_weights(model: nn.Module, step: int) -> None:
    """Raises NonFiniteError on every rank if a weight or a running statistic is not finite on one. A host sync."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    finite = torch.stack([torch.isfinite(tensor).all() for _, tensor in tensors]).cpu()
    names = [name for (name, _), good in zip(tensors, finite.tolist(), strict=True) if not good]
    reports = [name for names in all_gather_objects(names[:MAX_NAMES_SHOWN]) for name in names]
    if reports:
        listed = ", ".join(sorted(set(reports)))
        raise NonFiniteError(f"weights are not finite after step {step}, so they are not saved: {listed}")


def _explain(window: Window, index: int, own_loss_finite: bool, row: list[float]) -> str:
    """The message about the window's `index`-th step. Collective: every rank gives its image ids."""
    reports = all_gather_objects((own_loss_finite, window.image_ids[index], window.image_ids))
    culprits = [ids for finite, ids, _ in reports if not finite] or [ids for _, ids, _ in reports]
    seen = sorted({i for _, _, steps in reports for ids in steps for i in ids})
    values = ", ".join(f"{name} {value:g}" for name, value in zip(COLUMNS, row, strict=True))
    first, last = window.first + 1, window.first + len(window.image_ids)
    return (
        f"training is not finite at step {window.first + index + 1} ({values}), in the window of steps {first}-{last}\n"
        f"  image ids of that step: {_show([i for ids in culprits for i in ids])}\n"
        f"  image ids of the window: {_show(seen)}\n"
        "  the last checkpoint was saved before and is sound; try a lower optim.lr, a longer warm-up, "
        'optim.clip_norm, or precision = "float32"'
    )


def _show(ids: Sequence[int]) -> str:
    text = ", ".join(str(i) for i in ids[:MAX_IDS_SHOWN])
    return text if len(ids) <= MAX_IDS_SHOWN else f"{text}, ... ({len(ids)} in all)"
