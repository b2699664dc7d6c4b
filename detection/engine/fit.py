"""Training: one straight line from a run folder to a best checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from pydantic import Field
from torch import nn

from detection.config import Section
from detection.distributed import broadcast_object, rank, world_size
from detection.engine.checkpoint import BEST, LAST, check_same_run, load
from detection.engine.display import Display
from detection.engine.ema import Ema, EmaConfig
from detection.engine.journal import Journal, open_run_folder
from detection.engine.optim import OptimConfig, ScheduleConfig, build_optimiser, lr_factor, scaled_lr, set_lr
from detection.engine.parallel import Precision, StopFlag, broadcast_buffers, parallelise, place
from detection.engine.state import Live, Progress, capture, restore, save_on_rank_0
from detection.engine.step import Assign, StepParts, Window, check_weights, optimisation_step
from detection.types import Batch


class FitConfig(Section):
    """How a model is trained."""

    epochs: int = Field(12, ge=1)
    """Passes over the training split."""
    accumulate: int = Field(1, ge=1)
    """Batches whose gradients make one step. Each keeps its own loss normaliser."""
    precision: Precision = "float32"
    """Of the forward pass; losses and box maths are always float32."""
    channels_last: bool = True
    """Store convolution weights in the order of the images."""
    compile: bool = False
    """Compile the model with torch.compile."""
    optim: OptimConfig = OptimConfig()
    """Optimiser."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Learning rate over the run."""
    ema: EmaConfig = EmaConfig()
    """Average of the weights."""
    evaluate_every: int = Field(1, ge=0)
    """Epochs between evaluations; the last epoch is always evaluated. 0 never evaluates."""
    best_metric: str = "ap"
    """The metric that decides which checkpoint is best.pt."""
    best_direction: Literal["max", "min"] = "max"
    """Whether more or less of it is better."""
    patience: int = Field(0, ge=0)
    """Stop after this many evaluations without a better one; 0 never stops early."""
    log_every: int = Field(20, ge=1)
    """Steps between log lines; the device is waited for only there."""
    save_every: int = Field(0, ge=0)
    """Steps between checkpoints within an epoch; every epoch ends with one in any case."""
    tensorboard: bool = True
    """Write TensorBoard scalars into the run folder."""


@runtime_checkable
class TrainBatches(Protocol):
    """The training batches of this rank."""

    @property
    def batch_size(self) -> int:
        """Images in a batch of one rank."""
        ...

    @property
    def batches_per_epoch(self) -> int:
        """Equal on every rank."""
        ...

    def epoch(self, epoch: int, start: int) -> Iterable[Batch]:
        """The batches `start`, `start` + 1, ... of the epoch; the same whenever asked."""
        ...


@dataclass(frozen=True, slots=True)
class Components:
    """What is trained, on what, judged by what."""

    model: nn.Module
    """Images -> Predictions."""
    assign: Assign
    criterion: nn.Module
    """(Predictions, Matches) -> Losses."""
    batches: TrainBatches
    evaluate: Callable[[nn.Module], dict[str, float]] | None
    """The model's metrics; called on every rank, and gives every rank the same."""
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    config: dict[str, Any]
    """The resolved configuration, plain JSON values."""
    adapt: Callable[[nn.Module, nn.Module], dict[str, list[float]]] | None = None
    """What (model, criterion) do after every epoch for a loss that follows its own calibration error; the rows are
    journaled. Called on every rank, with the weights being trained."""
    seed: int = 0
    """Of dropout and the like on the main process; rank r takes seed + r."""
    backbone: tuple[str, ...] = ("backbone.",)
    """Prefixes of the parameter names that optim.backbone_lr applies to."""
    notes: tuple[str, ...] = ()
    """Sentences for the head of the log."""


@dataclass(frozen=True, slots=True)
class FitResult:
    """How a training ended."""

    step: int
    epoch: float
    interrupted: bool
    """By SIGTERM or Ctrl-C; it can be resumed."""
    stopped_early: bool
    best: float | None
    """Best value of the best_metric."""
    best_step: int
    metrics: dict[str, float]
    """Of the last evaluation."""
    last: Path
    best_path: Path | None


def fit(components: Components, config: FitConfig, run: Path, device: torch.device, resume: bool = False) -> FitResult:
    """How the training ended; checkpoints, journal and config.json are in the run folder.

    Errors: ConfigError (folder taken, unknown metric), CheckpointError (cannot resume or save), NonFiniteError.
    """
    # ---- run folder -------------------------------------------------------------------------------------------
    open_run_folder(run, components.config, resume)
    torch.manual_seed(components.seed + rank())

    # ---- model, optimiser, average ----------------------------------------------------------------------------
    model = place(components.model, device, config.channels_last)
    criterion = components.criterion.to(device)
    images_per_step = components.batches.batch_size * world_size() * config.accumulate
    lr = scaled_lr(config.optim, images_per_step)
    optimiser = build_optimiser(model, lr, config.optim, components.backbone)
    ema = Ema(model, config.ema) if config.ema.decay else None
    live = Live(model, optimiser, criterion, ema, device)
    window = Window(device)

    # ---- resume -----------------------------------------------------------------------------------------------
    progress = Progress()
    if resume and broadcast_object((run / LAST).exists()):
        checkpoint = load(run / LAST)
        check_same_run(checkpoint, components.config, components.class_names, world_size(), run / LAST)
        progress = restore(checkpoint, live, window, run / LAST)

    # ---- the loop ---------------------------------------------------------------------------------------------
    parts = StepParts(
        parallelise(model, device, config.compile),
        components.assign,
        criterion,
        optimiser,
        len(components.class_names),
        device,
        config.precision,
        config.optim.clip_norm,
    )
    steps_per_epoch = -(-components.batches.batches_per_epoch // config.accumulate)
    total = steps_per_epoch * config.epochs
    journal = Journal(run, progress.step, progress.evaluation_pending, config.tensorboard)
    with StopFlag() as stop, Display(progress.step, total, config.epochs) as display:
        loop = _Loop(components, config, run, live, parts, progress, window, steps_per_epoch, journal, display, stop)
        try:
            loop.announce(lr, images_per_step)
            return loop.run_to_end()
        finally:
            journal.close()


@dataclass(slots=True)
class _Loop:
    """The names that the parts of the loop share; only `window` is replaced."""

    components: Components
    config: FitConfig
    run: Path
    live: Live
    parts: StepParts
    progress: Progress
    window: Window
    steps_per_epoch: int
    journal: Journal
    display: Display
    stop: StopFlag

    @property
    def total(self) -> int:
        return self.steps_per_epoch * self.config.epochs

    @property
    def epoch(self) -> float:
        """Epochs trained, in parts."""
        return self.progress.step / self.steps_per_epoch

    @property
    def exhausted(self) -> bool:
        patience = self.config.patience
        return 0 < patience <= self.progress.evaluations_since_best

    def announce(self, lr: float, images_per_step: int) -> None:
        step, parts = self.progress.step, self.parts
        trained = sum(p.numel() for group in parts.optimiser.param_groups for p in group["params"])
        lines = (
            f"run folder {self.run}",
            f"{trained:,} trained parameters on {parts.device}, {world_size()} rank(s), {parts.precision}",
            f"{self.config.optim.kind}, peak lr {lr:.3g} for {images_per_step} images a step; "
            f"{self.steps_per_epoch} steps an epoch, {self.total} in all",
            *self.components.notes,
        )
        for line in (*lines, f"resumed at step {step}") if step else lines:
            self.display.line(line)
        self.journal.write("resume" if step else "start", step, {"peak_lr": lr, "notes": list(lines)})

    def run_to_end(self) -> FitResult:
        """Epoch after epoch: train, save, evaluate, save; until the last one, early stopping, or a signal."""
        interrupted = False
        while not self.exhausted and (self.progress.step < self.total or self.progress.evaluation_pending):
            if not self.progress.evaluation_pending:
                self.train_epoch()
                self.save(LAST)
            interrupted = self.stop.agreed() and (self.progress.step < self.total or self.progress.evaluation_pending)
            if interrupted:
                break
            if self.progress.evaluation_pending:
                is_best = self.evaluate()
                self.save(LAST, *([BEST] if is_best else []))
        return self.finish(interrupted)

    def train_epoch(self) -> None:
        """Steps to the end of the epoch, or until all ranks agree to stop."""
        config, progress, accumulate = self.config, self.progress, self.config.accumulate
        epoch, done = divmod(progress.step, self.steps_per_epoch)
        batches = iter(self.components.batches.epoch(epoch, done * accumulate))
        self.window.restart_clock()
        for index in range(done, self.steps_per_epoch):
            count = min(accumulate, self.components.batches.batches_per_epoch - index * accumulate)
            group, waited = fetch(batches, count, self.stop)
            if self.stop.agreed():
                return
            set_lr(self.parts.optimiser, lr_factor(progress.step, self.steps_per_epoch, config.epochs, config.schedule))
            row = optimisation_step(self.parts, group)
            if self.live.ema is not None:
                self.live.ema.update(self.live.model, progress.step)
            progress.step += 1
            progress.samples_seen += sum(len(batch.frames) for batch in group) * world_size()
            self.window.add(row, group, waited)
            self.display.advance(progress.step)
            at_end = index + 1 == self.steps_per_epoch
            if at_end or progress.step % config.log_every == 0:
                self.log()
            if config.save_every and not at_end and progress.step % config.save_every == 0:
                self.save(LAST)
        self.adapt()
        progress.evaluation_pending = self.evaluation_due(epoch + 1)

    def adapt(self) -> None:
        """Lets the loss follow what the model has become; its state is in the criterion, so in the checkpoint."""
        if self.components.adapt is None:
            return
        broadcast_buffers(self.live.model)
        with preserved_random_state(self.parts.device):
            rows = self.components.adapt(self.live.model, self.live.criterion)
        self.journal.write("adapt", self.progress.step, {"epoch": self.epoch, **rows})

    def evaluation_due(self, epochs_done: int) -> bool:
        every = self.config.evaluate_every
        if every == 0 or self.components.evaluate is None:
            return False
        return epochs_done % every == 0 or epochs_done == self.config.epochs

    def log(self) -> None:
        """Reads the window off the device, refuses it where it is not finite, writes it down, opens the next."""
        window, progress = self.window, self.progress
        window.check()
        group = self.parts.optimiser.param_groups[-1]
        values = {**window.means(), "lr": group["lr"], **window.rates()}
        self.display.train(progress.step, self.epoch, values)
        self.journal.write("train", progress.step, {"epoch": self.epoch, **values})
        self.journal.scalars("train", progress.step, values)
        self.window = Window(self.parts.device, first=progress.step)

    def evaluate(self) -> bool:
        """Whether the model's metrics are the best so far."""
        assert self.components.evaluate is not None
        model = self.live.model if self.live.ema is None else self.live.ema.model
        started = time.perf_counter()
        broadcast_buffers(model)
        with preserved_random_state(self.parts.device):
            metrics = self.components.evaluate(model)
        is_best = self.progress.note_metrics(metrics, self.config.best_metric, self.config.best_direction)
        step, seconds = self.progress.step, time.perf_counter() - started
        self.display.evaluation(step, self.epoch, metrics, is_best)
        content = {"epoch": self.epoch, "best": is_best, "metrics": metrics, "seconds": seconds}
        self.journal.write("evaluation", step, content)
        self.journal.scalars("evaluation", step, metrics)
        return is_best

    def save(self, *names: str) -> None:
        """Writes the checkpoint, unless a step since the last look or a weight is not finite."""
        self.window.check()
        check_weights(self.live.model, self.progress.step)
        parts = self.components
        checkpoint = capture(self.live, self.progress, self.window, parts.config, parts.class_names, parts.category_ids)
        save_on_rank_0(checkpoint, *(self.run / name for name in names))

    def finish(self, interrupted: bool) -> FitResult:
        progress, best_path = self.progress, self.run / BEST
        early = not interrupted and self.exhausted and progress.step < self.total
        result = FitResult(
            step=progress.step,
            epoch=self.epoch,
            interrupted=interrupted,
            stopped_early=early,
            best=progress.best,
            best_step=progress.best_step,
            metrics=progress.metrics,
            last=self.run / LAST,
            best_path=best_path if best_path.exists() else None,
        )
        reason = "interrupted; resume it with --resume" if interrupted else "stopped early" if early else "finished"
        found = "" if progress.best is None else f", best {self.config.best_metric} {progress.best:.4f}"
        self.display.line(f"{reason} at step {progress.step}{found}{f' (step {progress.best_step})' if found else ''}")
        self.journal.write("end", progress.step, {"epoch": self.epoch, "reason": reason, "best": progress.best})
        return result


def fetch(batches: Iterator[Batch], count: int, stop: StopFlag) -> tuple[Sequence[Batch], float]:
    """The next `count` batches and the seconds waited for them; fewer where a stop was requested meanwhile.

    A signal to the whole process group may have ended the loader's workers: what it raises then is no error.
    """
    started = time.perf_counter()
    try:
        with preserved_random_state():
            group = list(islice(batches, count))
    except RuntimeError:
        if not stop.requested:
            raise
        group = []
    assert stop.requested or len(group) == count, f"the loader ended early: {len(group)} of {count} batches"
    return group, time.perf_counter() - started


def preserved_random_state(device: torch.device | None = None) -> AbstractContextManager[None]:
    """A scope after which torch's generators (the host's, and the device's) are as before.

    Data loaders draw a base seed when an epoch's first batch is asked for, which a resumed run does more often.
    """
    devices = [device] if device is not None and device.type == "cuda" else []
    return torch.random.fork_rng(devices=devices)
