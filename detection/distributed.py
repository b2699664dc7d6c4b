"""Rank and world size as torchrun sets them, and the few collectives the toolkit needs; no-ops in a world of one."""

from __future__ import annotations

import os
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def initialise(device: torch.device) -> None:
    """Joins the process group that torchrun's environment names; does nothing where there is none."""
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def shut_down() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def sum_across_ranks(value: Tensor) -> Tensor:
    """The sum of a tensor over ranks, as a new tensor without gradient."""
    value = value.detach().clone()
    if world_size() > 1:
        dist.all_reduce(value)
    return value


def any_across_ranks(flag: bool) -> bool:
    """True on every rank if it is true on one."""
    if world_size() == 1:
        return flag
    return any(all_gather_objects(flag))


def all_gather_objects(value: T) -> list[T]:
    """Every rank's value, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def gather_objects(value: T) -> list[T] | None:
    """Every rank's value, in rank order, on rank 0; None on the others."""
    if world_size() == 1:
        return [value]
    gathered: list[Any] | None = [None] * world_size() if rank() == 0 else None
    dist.gather_object(value, gathered)
    return gathered


def broadcast_object(value: T) -> T:
    """Rank 0's value, on every rank."""
    if world_size() == 1:
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box)
    return box[0]  # type: ignore[no-any-return]


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()
