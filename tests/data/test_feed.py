"""Batches through Ray Data: the same as those that a rank reads by itself, whatever is asked for next."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from making import counting, make_dataset
from numpy.typing import NDArray

from raytron.config import load
from raytron.data.batch import Batch
from raytron.data.feed import RayDataStream
from raytron.data.prefetch import PrefetchStream
from raytron.data.run_data import RunData, open_run_data
from raytron.errors import DataError

SIZE, LENGTH = 6, 8


@pytest.fixture
def data(tmp_path: Path) -> RunData:
    one = make_dataset(tmp_path / "one", counting([3, 17, 1, 8, 40, 2, 9, 9], [5, 31]))
    two = make_dataset(tmp_path / "two", counting([26, 7, 6, 1, 18], first=500))
    blend = [{"dataset": str(each.path), "weight": 0.5} for each in (one, two)]
    config = load({"data": {"blend": blend, "blend_block": 8, "packing": "best_fit"}, "sequence_length": LENGTH})
    return open_run_data(config.replace(global_batch_size=SIZE), "unused")


def array(part: Any) -> Any:
    return None if part is None else np.asarray(part)


def same(one: Batch, other: Batch) -> bool:
    return all(
        (a is None and b is None) or (a.dtype == b.dtype and np.array_equal(a, b))
        for a, b in (map(array, pair) for pair in zip(one, other, strict=True))
    )


def test_the_batches_are_those_that_are_read_directly(local_ray: None, data: RunData) -> None:
    """Three parts of uneven size, a rollback, a new window and a step out of turn."""
    direct = data.train()
    for part in range(2):
        stream = RayDataStream(data, lambda first: SIZE, window=4)
        assert (stream.sequence_length, stream.samples_per_epoch) == (LENGTH, direct.samples_per_epoch)
        for step in (0, 1, 2, 3, 4, 2, 3):
            request = (step * SIZE, SIZE, part, 2)
            assert same(stream.batch(*request), direct.batch(*request))
        assert stream.windows == 3
    assert same(stream.batch(9, 0), direct.batch(9, 0))


def test_a_feed_is_read_ahead_as_any_stream(local_ray: None, data: RunData) -> None:
    stream = PrefetchStream(RayDataStream(data, lambda first: SIZE, window=8), 2, lambda first: SIZE)
    direct = data.train()
    for step in range(5):
        assert same(stream.batch(step * SIZE, SIZE), direct.batch(step * SIZE, SIZE))
    assert stream.missed == 1


@pytest.mark.parametrize("kind", ["in another order", "one is lost", "one is there twice", "another one"])
def test_what_comes_is_put_in_order_and_checked(
    local_ray: None, data: RunData, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    direct = data.train()
    stream = RayDataStream(data, lambda first: SIZE, window=3)

    def run(requests: list[tuple[int, int]]) -> Iterator[Mapping[str, NDArray[Any]]]:
        blocks = [direct.batch(*request) for request in requests]
        blocks = {
            "in another order": blocks[::-1],
            "one is lost": blocks[1:],
            "one is there twice": [blocks[1], *blocks],
            "another one": [direct.batch(100, 2), *blocks],
        }[kind]
        yield from ({name: array(part) for name, part in each._asdict().items() if part is not None} for each in blocks)

    monkeypatch.setattr(stream, "_run", run)
    if kind == "in another order":
        for step in range(3):
            assert same(stream.batch(step * SIZE, SIZE), direct.batch(step * SIZE, SIZE))
        return
    told = {
        "one is lost": "ended before the sample 0 had come",
        "one is there twice": "gave the sample 6, which",
        "another one": "gave the sample 100, which was not asked for",
    }
    with pytest.raises(DataError, match=told[kind]):
        list(map(stream.batch, range(0, 3 * SIZE, SIZE), [SIZE] * 3))
