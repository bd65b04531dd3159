"""Ranks of a node that want the same samples: one reads, the others take what it read, or learn that it can't."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from raytron.data.batch import Batch
from raytron.data.bounds import Bounds
from raytron.errors import DataError
from raytron.training import read_once
from raytron.training.read_once import ReadOnce

LENGTH, SIZE = 6, 4


class Counting:
    """A stream that counts what is read of it. bad: the first sample of a request that can't be read."""

    sequence_length, samples_per_epoch = LENGTH, 100

    def __init__(self, documents=True, bad=None):
        self.asked, self.documents, self.bad = [], documents, bad

    def batch(self, first, count, part=0, parts=1):
        self.asked.append((first, count))
        if first == self.bad:
            raise DataError("the shard is gone")
        ids = np.arange(first, first + count)
        rows = ids[:, None] * 100 + np.arange(LENGTH + 1)
        bounds = Bounds.of_rows([[0, 1 + number % (LENGTH - 1)] for number in ids], LENGTH)
        weights = (rows[:, 1:] % 3 > 0).astype(np.float32)
        return Batch(ids, rows[:, :-1], rows[:, 1:], weights, bounds if self.documents else None)


def ranks(folder, count=3, kept=4, epoch=1, **inner):
    """The streams of some ranks that want the same; the first one reads."""
    streams = [ReadOnce(Counting(**inner), kept) for _ in range(count)]
    for number, stream in enumerate(streams):
        stream.begin(folder, epoch, 0, leads=number == 0)
    return streams


def same(one, other):
    return all(
        (a is None and b is None) or (np.asarray(a).dtype == np.asarray(b).dtype and np.array_equal(a, b))
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("documents", [True, False])
def test_one_reads_and_all_have_the_same(tmp_path, documents):
    """Whoever asks first; in parts of a step, too."""
    first, *others = streams = ranks(tmp_path, documents=documents)
    with ThreadPoolExecutor(len(streams)) as threads:
        for step in range(6):
            asked = [threads.submit(each.batch, step * SIZE, SIZE, 1, 2) for each in reversed(streams)]
            expected = Counting(documents).batch(step * SIZE + 2, 2)
            assert all(same(each.result(timeout=20), expected) for each in asked)
    assert first.inner.asked == [(step * SIZE + 2, 2) for step in range(6)]
    assert [each.inner.asked for each in others] == [[], []]


def test_what_nobody_is_behind_for_is_removed(tmp_path):
    first, _ = ranks(tmp_path, 2, kept=3)
    for step in range(9):
        first.batch(step * SIZE, SIZE)
    left = sorted(path.name for path in next(tmp_path.glob("feed-*")).iterdir())
    assert left == sorted(["reader", *(f"{step * SIZE}-{(step + 1) * SIZE}" for step in (6, 7, 8))])


def test_until_it_begins_each_reads_by_itself():
    stream = ReadOnce(Counting(), 4)
    assert same(stream.batch(8, 4), Counting().batch(8, 4))
    assert (stream.sequence_length, stream.samples_per_epoch) == (LENGTH, 100)


def test_an_error_is_the_readers_and_a_consequence_for_the_others(tmp_path):
    first, other = ranks(tmp_path, 2, bad=8)
    with pytest.raises(DataError, match="the shard is gone"):
        first.batch(8, SIZE)
    with pytest.raises(ConnectionError, match="has ended"):
        other.batch(8, SIZE)


def test_who_ends_frees_the_others_but_for_what_it_has_read(tmp_path):
    first, other = ranks(tmp_path, 2)
    read = first.batch(0, SIZE)
    first.end()
    assert same(other.batch(0, SIZE), read)
    with pytest.raises(ConnectionError, match="has ended"):
        other.batch(SIZE, SIZE)


def test_who_waits_for_a_dead_process_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(read_once, "LOOK_S", 0.05)
    code = "import sys; from pathlib import Path; from raytron.training.read_once import ReadOnce; "
    code += "ReadOnce(None, 4).begin(Path(sys.argv[1]), 1, 0, leads=True)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=100)
    other = ReadOnce(Counting(), 4)
    other.begin(tmp_path, 1, 0, leads=False)
    with pytest.raises(ConnectionError, match="is gone"):
        other.batch(0, SIZE)


def test_who_waits_in_an_older_mesh_is_freed_by_the_next_one(tmp_path, monkeypatch):
    monkeypatch.setattr(read_once, "LOOK_S", 0.05)
    _, old = ranks(tmp_path, 2, epoch=9)
    raised = []

    def wait():
        try:
            old.batch(0, SIZE)
        except ConnectionError as error:
            raised.append(error)

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    time.sleep(0.2)
    assert not raised, "its reader lives, and may be slow"
    ranks(tmp_path, 2, epoch=10)
    waiting.join(timeout=20)
    assert len(raised) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["feed-000010-0"]
