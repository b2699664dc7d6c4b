"""Between a running training and its checkpoint: what is captured, how it is put back."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from detection.config import ConfigError
from detection.distributed import all_gather_objects, broadcast_object, rank, world_size
from detection.engine.checkpoint import Checkpoint, CheckpointError, load_weights, save
from detection.engine.ema import Ema
from detection.engine.step import Window


@dataclass(slots=True)
class Progress:
    """How far a run is and what it has found."""

    step: int = 0
    samples_seen: int = 0
    evaluation_pending: bool = False
    """The epoch is trained, its evaluation still to come."""
    best: float | None = None
    best_step: int = 0
    evaluations_since_best: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    """Of the last evaluation."""

    def note_metrics(self, metrics: dict[str, float], name: str, direction: str) -> bool:
        """Whether these are the best so far; remembers them. A NaN is never the best.

        Errors: ConfigError where there is no metric of that name.
        """
        if name not in metrics:
            raise ConfigError(f"best_metric {name!r}: not among the metrics: {', '.join(sorted(metrics))}")
        value = float(metrics[name])
        self.metrics, self.evaluation_pending = dict(metrics), False
        sign = 1.0 if direction == "max" else -1.0
        is_best = value == value and (self.best is None or sign * value > sign * self.best)
        if is_best:
            self.best, self.best_step, self.evaluations_since_best = value, self.step, 0
        else:
            self.evaluations_since_best += 1
        return is_best


@dataclass(frozen=True, slots=True)
class Live:
    """The objects whose state a checkpoint holds."""

    model: nn.Module
    """Not wrapped."""
    optimiser: torch.optim.Optimizer
    criterion: nn.Module
    ema: Ema | None
    device: torch.device


def versions() -> dict[str, str]:
    """Of Python and torch."""
    return {"python": platform.python_version(), "torch": str(torch.__version__)}


def capture(
    live: Live,
    progress: Progress,
    window: Window,
    config: dict[str, Any],
    class_names: tuple[str, ...],
    category_ids: tuple[int, ...],
) -> Checkpoint:
    """The run as it stands, on every rank. Collective."""
    own = {"random": random_state(live.device), "window_sums": window.sums.cpu(), "window_steps": window.steps}
    counts = asdict(progress)
    step, samples_seen = counts.pop("step"), counts.pop("samples_seen")
    return Checkpoint(
        config=config,
        class_names=class_names,
        category_ids=category_ids,
        step=step,
        samples_seen=samples_seen,
        world_size=world_size(),
        model=dict(live.model.state_dict()),
        ema=dict(live.ema.model.state_dict()) if live.ema is not None else None,
        optimiser=live.optimiser.state_dict(),
        criterion=dict(live.criterion.state_dict()),
        ranks=all_gather_objects(own),
        progress=counts,
        versions=versions(),
    )


def save_on_rank_0(checkpoint: Checkpoint, *paths: Path) -> None:
    """Writes the checkpoint; a failure is raised on every rank. Collective."""
    problem = None
    if rank() == 0:
        try:
            save(checkpoint, *paths)
        except CheckpointError as error:
            problem = str(error)
    problem = broadcast_object(problem)
    if problem is not None:
        raise CheckpointError(problem)


def restore(checkpoint: Checkpoint, live: Live, window: Window, path: Path) -> Progress:
    """How far the run was, after its objects, this rank's random generators and open window are as they were.

    Errors: CheckpointError.
    """
    load_weights(live.model, checkpoint.model, path)
    if (checkpoint.ema is None) != (live.ema is None):
        raise CheckpointError(f"{path}: the averaged weights (ema) are missing, or not wanted by this configuration")
    if live.ema is not None and checkpoint.ema is not None:
        load_weights(live.ema.model, checkpoint.ema, path)
    load_weights(live.criterion, checkpoint.criterion, path)
    try:
        live.optimiser.load_state_dict(checkpoint.optimiser)
        own = checkpoint.ranks[rank()]
        set_random_state(own["random"], live.device)
        window.resume(checkpoint.step, own["window_sums"], own["window_steps"])
        return Progress(step=checkpoint.step, samples_seen=checkpoint.samples_seen, **checkpoint.progress)
    except (ValueError, KeyError, TypeError, IndexError, RuntimeError) as error:
        raise CheckpointError(f"{path}: damaged or from another setup ({str(error).splitlines()[0][:200]})") from None


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """torch's generators: the only ones that training draws from on the main process."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
