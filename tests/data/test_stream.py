from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from making import make_dataset, write_entry

from raytron.data.manifest import write_manifest
from raytron.data.order import ShuffledOrder
from raytron.data.reader import ChopReader
from raytron.data.shards import Dataset
from raytron.data.stream import ShardStream
from raytron.errors import DataError

LENGTH = 4


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Tokens that count up, so that a sample says where it comes from: shards of 61, 3 and 42 tokens."""
    numbers = iter(range(1, 200))
    shards = [[[next(numbers) for _ in range(size)] for size in sizes] for sizes in ([30, 31], [3], [41, 1])]
    folder = tmp_path_factory.mktemp("data")
    return make_dataset(folder, shards, validation=[[list(range(500, 520))]])


def test_samples_are_slices_of_their_shard(dataset: Dataset) -> None:
    stream = ShardStream(dataset, "train", LENGTH, seed=3)
    assert stream.samples_per_epoch == 15 + 0 + 10
    batch = stream.batch(0, 25)
    assert batch.tokens.shape == batch.labels.shape == batch.weights.shape == (25, LENGTH)
    assert (batch.tokens.dtype, batch.weights.dtype) == (np.int64, np.float32)
    assert np.array_equal(batch.labels, batch.tokens + 1)
    assert np.array_equal(np.diff(batch.tokens), np.ones((25, LENGTH - 1)))
    starts = sorted(batch.tokens[:, 0].tolist())
    assert starts == [1 + LENGTH * i for i in range(15)] + [65 + LENGTH * i for i in range(10)]
    assert (batch.weights == 1).all()


@settings(max_examples=60, deadline=None)
@given(first=st.integers(0, 200), count=st.integers(0, 40), parts=st.integers(1, 9))
def test_every_number_of_parts_gives_the_same_global_batch(
    dataset: Dataset, first: int, count: int, parts: int
) -> None:
    stream = ShardStream(dataset, "train", LENGTH, seed=1, documents=True)
    whole = stream.batch(first, count)
    pieces = [stream.batch(first, count, part, parts) for part in range(parts)]
    for name in whole._fields:
        assert np.array_equal(np.concatenate([getattr(piece, name) for piece in pieces]), getattr(whole, name))


@settings(max_examples=30, deadline=None)
@given(steps=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 7)), max_size=20), seed=st.integers(0, 9))
def test_changing_meshes_and_batches_lose_and_repeat_nothing(
    dataset: Dataset, steps: list[tuple[int, int]], seed: int
) -> None:
    seen: list[int] = []
    for count, parts in steps:
        first = len(seen)
        for part in range(parts):
            seen += ShardStream(dataset, "train", LENGTH, seed).batch(first, count, part, parts).ids.tolist()
    assert seen == list(range(len(seen)))


def test_documents_are_told_apart(dataset: Dataset) -> None:
    """The shard of documents of 30 and 31 tokens: sample 7 starts at token 28, so token 30 begins a document."""
    batch = ShardStream(dataset, "train", LENGTH, seed=3, documents=True).batch(0, 25)
    plain = ShardStream(dataset, "train", LENGTH, seed=3).batch(0, 25)
    assert plain.documents is None
    assert batch.documents is not None
    assert all(np.array_equal(mine, other) for mine, other in zip(batch[:3], plain[:3], strict=True))
    row = batch.tokens[:, 0].tolist().index(29)
    numbers = np.asarray(batch.documents)
    assert numbers.dtype == np.int32
    assert numbers[row].tolist() == [0, 0, 1, 1]
    assert batch.weights[row].tolist() == [1, 0, 1, 1]  # token 30 ends its document: what follows is not its to tell
    assert numbers.sum() == 2
    assert (batch.weights == 0).sum() == 1


def test_seeds_and_epochs_differ_and_repeat(dataset: Dataset) -> None:
    def starts(seed: int, first: int) -> list[int]:
        return ShardStream(dataset, "train", LENGTH, seed).batch(first, 25).tokens[:, 0].tolist()

    assert starts(0, 0) == starts(0, 0)
    assert starts(0, 0) != starts(1, 0)
    assert starts(0, 0) != starts(0, 25)
    assert sorted(starts(0, 0)) == sorted(starts(1, 0)) == sorted(starts(0, 25))


def test_validation_is_read_in_order_whatever_the_seed(dataset: Dataset) -> None:
    batch = ShardStream(dataset, "validation", LENGTH, seed=8).batch(0, 5)
    assert batch.tokens[:, 0].tolist() == [500, 504, 508, 512, 500]


def test_an_empty_part_has_no_rows(dataset: Dataset) -> None:
    batch = ShardStream(dataset, "train", LENGTH).batch(0, 1, part=1, parts=2)
    assert batch.tokens.shape == (0, LENGTH)


def test_too_few_tokens_say_what_would_fit(dataset: Dataset) -> None:
    with pytest.raises(DataError, match=r"one sample needs 101\n.*sequence_length of at most 60"):
        ShardStream(dataset, "train", 100)
    with pytest.raises(DataError, match="validation_fraction"):
        ShardStream(dataset, "validation", 100)
    assert ShardStream(dataset, "train", 60).samples_per_epoch == 1


def test_few_shards_stay_open(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raytron.data.open_shards.MAX_OPEN_SHARDS", 1)
    stream = ShardStream(dataset, "train", LENGTH)
    assert len(set(stream.batch(0, 25).tokens[:, 0].tolist())) == 25
    (reader,) = stream.readers
    assert isinstance(reader, ChopReader)
    assert len(reader.shards._open) == 1


def test_an_id_beyond_the_vocabulary_names_its_shard(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, [[[1, 2, 3, 4, 5, 6]]])
    entry = write_entry(tmp_path, "train-00000.arrow", "train", [[1, 2, 3, 4, 5, 1500]])
    write_manifest(tmp_path, replace(dataset.manifest, shards=(entry,)))
    with pytest.raises(DataError, match=r"train-00000.arrow: token id 1500 is beyond the vocabulary of 1000"):
        ShardStream(dataset, "train", 5).batch(0, 1)


def test_the_order_is_the_seam(dataset: Dataset) -> None:
    stream = ShardStream(dataset, "train", LENGTH, seed=5)
    assert stream.order == ShuffledOrder(25, 5)
