"""Every image is seen, every rank has as many batches, and the order is a function of (seed, epoch)."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy import ndarray

from detection.data.sampler import BatchOrder, EvaluationOrder, epoch_batches, evaluation_batches
from detection.types import DataError


def sizes_of(count: int, wide: int) -> ndarray:
    """`count` sizes (H, W), of which the first `wide` are wide."""
    return np.array([(480, 640) if i < wide else (640, 480) for i in range(count)], dtype=np.int64).reshape(-1, 2)


COUNTS = st.integers(1, 60).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n)))


@settings(max_examples=100, deadline=None)
@given(COUNTS, st.integers(1, 7), st.integers(1, 4), st.integers(0, 5), st.booleans(), st.booleans())
def test_every_image_is_seen_and_ranks_agree(
    counts: tuple[int, int], batch_size: int, world: int, epoch: int, shuffle: bool, group: bool
) -> None:
    sizes = sizes_of(*counts)
    ranks = [epoch_batches(sizes, batch_size, 1, epoch, rank, world, shuffle, group) for rank in range(world)]
    steps = -(-counts[0] // (batch_size * world))
    assert [len(batches) for batches in ranks] == [steps] * world
    assert all(len(batch) == batch_size for batches in ranks for batch in batches)
    seen = Counter(index for batches in ranks for batch in batches for index in batch)
    assert set(seen) == set(range(counts[0]))
    surplus = steps * batch_size * world - counts[0]
    assert sum(seen.values()) - len(seen) == surplus
    assert max(seen.values()) <= 1 + -(-surplus // counts[0])


@settings(max_examples=60, deadline=None)
@given(COUNTS, st.integers(1, 5), st.integers(1, 3), st.integers(0, 5))
def test_drop_last_repeats_nothing(counts: tuple[int, int], batch_size: int, world: int, epoch: int) -> None:
    sizes = sizes_of(*counts)
    if counts[0] < batch_size * world:
        with pytest.raises(DataError, match=f"{counts[0]} images do not fill one step of {world} x {batch_size}"):
            epoch_batches(sizes, batch_size, 0, epoch, 0, world, drop_last=True)
        return
    ranks = [epoch_batches(sizes, batch_size, 0, epoch, rank, world, drop_last=True) for rank in range(world)]
    seen = [index for batches in ranks for batch in batches for index in batch]
    assert len(seen) == len(set(seen)) == counts[0] // (batch_size * world) * batch_size * world


def test_joined_batches_do_not_depend_on_the_world() -> None:
    sizes = sizes_of(50, 30)
    one = epoch_batches(sizes, 8, 3, 2)
    ranks = [epoch_batches(sizes, 2, 3, 2, rank, 4) for rank in range(4)]
    assert [[index for batches in ranks for index in batches[i]] for i in range(len(one))] == one


def test_wide_and_tall_images_share_at_most_the_batches_of_the_rest() -> None:
    sizes = sizes_of(103, 57)
    batches = epoch_batches(sizes, 8, 0, 0)
    mixed = [b for b in batches if len({i < 57 for i in b}) == 2]
    assert len(batches) == 13
    assert len(mixed) <= 2
    assert len([b for b in epoch_batches(sizes, 8, 0, 0, group_by_aspect=False) if len({i < 57 for i in b}) == 2]) > 6


def test_epochs_and_seeds_shuffle_and_repeat_exactly() -> None:
    sizes = sizes_of(64, 32)
    orders = {str(epoch_batches(sizes, 4, seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    assert epoch_batches(sizes, 4, 1, 2) == epoch_batches(sizes, 4, 1, 2)
    assert epoch_batches(sizes_of(6, 6), 4, 0, 0, shuffle=False) == [[0, 1, 2, 3], [4, 5, 0, 1]]


def test_no_images_is_an_error() -> None:
    with pytest.raises(DataError, match="0 images do not fill"):
        epoch_batches(sizes_of(0, 0), 4, 0, 0)


def test_order_resumes_at_any_batch_of_any_epoch() -> None:
    order = BatchOrder(sizes_of(30, 10), batch_size=4, seed=5)
    assert order.batches_per_epoch == len(order) == 8
    order.set_position(3)
    whole = list(order)
    assert whole == list(order)
    assert whole == [[(3, i) for i in batch] for batch in epoch_batches(sizes_of(30, 10), 4, 5, 3)]
    for first in range(9):
        order.set_position(3, first)
        assert len(order) == 8 - first
        assert list(order) == whole[first:]
    with pytest.raises(ValueError, match="batch 9 of an epoch of 8"):
        order.set_position(0, 9)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 40), st.integers(1, 7), st.integers(1, 4))
def test_evaluation_sees_each_image_once(count: int, batch_size: int, world: int) -> None:
    sizes = np.random.default_rng(count).integers(100, 900, (count, 2))
    for rank in range(world):
        batches = list(EvaluationOrder(sizes, batch_size, rank, world))
        keys = [key for batch in batches for key in batch]
        assert sorted(keys) == [(0, i) for i in range(rank, count, world)]
        assert all(len(batch) == batch_size for batch in batches[:-1])


def test_evaluation_wastes_little_padding() -> None:
    sizes = np.random.default_rng(0).integers(200, 900, (400, 2))

    def canvas(batches: list[list[int]]) -> float:
        shapes = [np.round(sizes[b] * (512 / sizes[b].max(axis=1, keepdims=True))) for b in batches]
        return sum(s[:, 0].max() * s[:, 1].max() * len(s) / s.prod(axis=1).sum() for s in shapes) / len(shapes)

    in_order = np.arange(400).reshape(-1, 8).tolist()
    assert canvas(evaluation_batches(sizes, 8)) < 1.05 < 1.4 < canvas(in_order)
