"""Devices, ranks and signals: where the model runs, how gradients meet, and when all ranks stop."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from types import FrameType
from typing import Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from detection.config import ConfigError
from detection.distributed import local_rank, world_size

Precision = Literal["float32", "bfloat16"]

DOUBLE_SIGNAL_SECONDS = 1.0
"""torchrun repeats a terminal's Ctrl-C at once; only one that comes later is the user's second."""


def choose_device(name: str = "auto") -> torch.device:
    """The device that `name` (auto, cpu, cuda, cuda:1) asks for; under torchrun `cuda` is the rank's own."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device {name!r}: expected auto, cpu, cuda or cuda:N") from None
    if device.type != "cuda":
        return device
    index = local_rank() if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise ConfigError(f"device {name!r}: {torch.cuda.device_count()} CUDA devices here, number {index} asked for")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def place(model: nn.Module, device: torch.device, channels_last: bool) -> nn.Module:
    """The model on its device, its convolution weights in the order of the images."""
    if channels_last:
        return model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]
    return model.to(device)


def parallelise(model: nn.Module, device: torch.device, compiled: bool) -> nn.Module:
    """The model whose backward pass averages gradients over ranks; the model itself in a world of one.

    DDP broadcasts rank 0's buffers before every forward pass, so a checkpoint needs one set of them.
    """
    if compiled:
        model.compile()
    if world_size() == 1:
        return model
    ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)


def without_gradient_exchange(model: nn.Module, skip: bool) -> contextlib.AbstractContextManager[None]:
    """A scope in which, where `skip`, a backward pass leaves gradients on its rank (all but the last of a step)."""
    if skip and isinstance(model, DistributedDataParallel):
        return model.no_sync()
    return contextlib.nullcontext()


def autocast(device: torch.device, precision: Precision) -> contextlib.AbstractContextManager[None]:
    """The scope of a forward pass in `precision`."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16")


def broadcast_buffers(model: nn.Module) -> None:
    """Gives every rank rank 0's buffers (running statistics), so that all evaluate the same model."""
    if world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


class StopFlag:
    """Turns SIGTERM and Ctrl-C into a flag that all ranks read alike; a second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.requested = False
        self._since = 0.0
        self._group: dist.ProcessGroup | None = None
        if world_size() > 1:
            group = dist.new_group(backend="gloo")
            assert isinstance(group, dist.ProcessGroup)
            self._group = group
        self._previous: dict[int, signal._HANDLER] = {}
        self._process = os.getpid()

    def __enter__(self) -> StopFlag:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def agreed(self) -> bool:
        """True on every rank if the stop was requested on one. A host-side collective: the device is not waited for."""
        if self._group is None:
            return self.requested
        flag = torch.tensor([int(self.requested)], dtype=torch.int32)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
        return bool(flag.item())

    def _receive(self, number: int, frame: FrameType | None) -> None:
        again = self.requested and time.monotonic() - self._since > DOUBLE_SIGNAL_SECONDS
        if number == signal.SIGINT and again and os.getpid() == self._process:
            raise KeyboardInterrupt
        if not self.requested:
            self.requested = True
            self._since = time.monotonic()
