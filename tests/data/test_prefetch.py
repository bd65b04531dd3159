"""Batches that are read ahead: the ones that are asked for, at most so many, and none that is counted."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from making import counting, make_dataset

from raytron.config import RunConfig
from raytron.data.batch import Batch
from raytron.data.prefetch import PrefetchStream
from raytron.data.stream import ShardStream
from raytron.errors import DataError, Problem

SIZE = 4  # samples of a step


class Slow:
    """Reads for a while; tells what was asked of it, and from which threads."""

    sequence_length, samples_per_epoch = 3, 10**9

    def __init__(self, seconds: float = 0.0, broken: int | None = None):
        self.seconds, self.broken = seconds, broken
        self.asked: list[tuple[int, int]] = []
        self.threads: set[int] = set()

    def batch(self, first: int, count: int, part: int = 0, parts: int = 1) -> Batch:
        assert (part, parts) == (0, 1)
        self.asked.append((first, count))
        self.threads.add(threading.get_ident())
        time.sleep(self.seconds)
        if self.broken is not None and first <= self.broken < first + count:
            raise DataError(Problem("shard", "is gone", "restore it"))
        ids = np.arange(first, first + count)
        tokens = np.repeat(ids[:, None], 3, axis=1)
        return Batch(ids, tokens, tokens + 1, np.ones(tokens.shape, np.float32))


def waits_until(true: object, timeout_s: float = 5.0) -> None:
    assert callable(true)
    end = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < end
        time.sleep(0.002)


def test_the_next_batches_are_read_before_they_are_asked_for_and_no_more() -> None:
    inner = Slow()
    stream = PrefetchStream(inner, 2, lambda first: SIZE)
    assert stream.batch(0, SIZE).ids.tolist() == [0, 1, 2, 3]
    waits_until(lambda: len(inner.asked) == 3)
    time.sleep(0.05)
    assert inner.asked == [(0, 4), (4, 4), (8, 4)]
    assert stream.batch(4, SIZE).ids[0] == 4
    waits_until(lambda: len(inner.asked) == 4)
    assert inner.asked[-1] == (12, 4)
    assert stream.missed == 1  # the first
    assert len(inner.threads) == 1
    assert threading.get_ident() not in inner.threads


def test_a_step_does_not_wait_for_what_is_read_beside_it() -> None:
    inner = Slow(seconds=0.05)
    stream, waited = PrefetchStream(inner, 2, lambda first: SIZE), []
    for step in range(6):
        begin = time.perf_counter()
        stream.batch(step * SIZE, SIZE)
        waited.append(time.perf_counter() - begin)
        time.sleep(0.2)  # a step
    assert waited[0] > 0.045
    assert sorted(waited[1:])[2] < 0.02  # the median: others may have had the processor


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 9)), max_size=12), st.integers(1, 4), st.integers(0, 20))
def test_any_requests_give_what_the_stream_inside_gives(
    requests: list[tuple[int, int]], depth: int, stride: int
) -> None:
    """Rollbacks, other meshes, other batch sizes: all are only other requests."""
    stream, inner = PrefetchStream(Slow(), depth, lambda first: stride), Slow()
    for first, count in requests:
        mine, other = stream.batch(first, count), inner.batch(first, count)
        assert all(np.array_equal(one, another) for one, another in zip(mine[:4], other[:4], strict=True))
    stream.close()


def test_after_a_rollback_reading_begins_anew_where_it_goes_on() -> None:
    inner = Slow()
    stream = PrefetchStream(inner, 2, lambda first: SIZE)
    for step in (0, 1, 2, 1, 2):
        assert stream.batch(step * SIZE, SIZE).ids[0] == step * SIZE
    assert stream.missed == 2
    assert stream.batch(3 * SIZE, SIZE).ids[0] == 12


def test_parts_are_read_ahead_part_by_part() -> None:
    inner = Slow()
    stream = PrefetchStream(inner, 1, lambda first: 7)
    for step in range(3):
        assert stream.batch(7 * step, 7, 1, 3).ids.tolist() == [7 * step + 3, 7 * step + 4]
    assert stream.missed == 1


def test_a_fault_is_raised_where_its_batch_is_asked_for() -> None:
    stream = PrefetchStream(Slow(broken=9), 3, lambda first: SIZE)
    stream.batch(0, SIZE)
    stream.batch(4, SIZE)
    with pytest.raises(DataError, match="is gone"):
        stream.batch(8, SIZE)
    assert stream.batch(12, SIZE).ids[0] == 12


def test_a_stream_that_is_dropped_leaves_no_thread() -> None:
    inner = Slow()
    stream = PrefetchStream(inner, 2, lambda first: SIZE)
    stream.batch(0, SIZE)

    def alive() -> bool:
        return any(thread.ident in inner.threads for thread in threading.enumerate())

    assert alive()
    del stream
    waits_until(lambda: not alive())


def test_batches_are_moved_in_the_thread() -> None:
    threads = set()

    def keep(batch: Batch) -> Batch:
        threads.add(threading.current_thread().name)
        return batch._replace(tokens=batch.tokens + 100)

    assert PrefetchStream(Slow(), 1, lambda first: SIZE, keep).batch(0, 1).tokens[0, 0] == 100
    assert all(name.startswith("prefetch") for name in threads)


def test_shards_are_read_ahead_as_they_are_read(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, counting([9, 30, 7, 61], [44]))
    plain = ShardStream(dataset, "train", 4, seed=2, documents=True)
    stream = PrefetchStream(ShardStream(dataset, "train", 4, seed=2, documents=True), 2, lambda first: SIZE)
    assert (stream.sequence_length, stream.samples_per_epoch) == (4, plain.samples_per_epoch)
    for step in range(30):
        mine, other = stream.batch(step * SIZE, SIZE), plain.batch(step * SIZE, SIZE)
        assert all(np.array_equal(one, another) for one, another in zip(mine, other, strict=True))


def test_how_many_is_a_choice() -> None:
    assert RunConfig().data.prefetch == 2
    with pytest.raises(ValueError, match="can't be read ahead"):
        PrefetchStream(Slow(), 0, lambda first: SIZE)
