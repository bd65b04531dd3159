"""Loss spans: which labels count, however a document is cut or its shard joined with others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from making import counting, make_dataset, spans_of, write_entry

from raytron.config import RunConfig
from raytron.data.compact import compact
from raytron.data.describe import describe
from raytron.data.loss_spans import counted
from raytron.data.parts import Part
from raytron.data.shard_file import Shard, offsets_of, read_shard
from raytron.data.stream import open_stream
from raytron.errors import DataError

LENGTHS = [10, 4, 23]
SPANS = [[2, 5, 8, 10], [], [0, 1, 5, 20]]
LEARNED = [3, 4, 5, 9, 10, *range(20, 35)]  # of tokens that count from 1: spans without each document's first token


@pytest.mark.parametrize("packing", ["chop", "best_fit", "pad"])
@pytest.mark.parametrize("length", [3, 6, 36])
def test_labels_in_spans_count_and_no_others(tmp_path: Path, packing: str, length: int) -> None:
    dataset = make_dataset(tmp_path, counting(LENGTHS), spans=[SPANS])
    dataset.verify()
    changes: dict[str, Any] = {"sequence_length": length, "data.packing": packing, "data.document_mask": True}
    stream = open_stream(RunConfig().replace(**changes), dataset, "train")
    batch = stream.batch(0, stream.samples_per_epoch)
    read = stream.samples_per_epoch * length + 1 if packing == "chop" else 37
    expected = [token for token in LEARNED if token <= read]
    assert sorted(batch.labels[batch.weights > 0].tolist()) == expected


def test_a_shard_without_spans_counts_all(tmp_path: Path) -> None:
    write_entry(tmp_path, "one", "train", counting(LENGTHS)[0], spans=SPANS)
    write_entry(tmp_path, "two", "train", counting([2, 3])[0])
    one, two = read_shard(tmp_path / "one"), read_shard(tmp_path / "two")
    assert two.spans is None
    assert one.spans is not None
    assert one.spans.offsets.tolist() == [0, 4, 4, 8]
    assert one.spans.values.tolist() == [2, 5, 8, 10, 0, 1, 5, 20]
    numbers = pa.array([[1], [2]], pa.list_(pa.int64()))
    with pytest.raises(DataError, match=r"`loss_spans` is list<.*int64>, not a list of int32"):
        assert replace(two, columns={"loss_spans": numbers}).spans


def test_joining_and_cutting_shards_keeps_spans(tmp_path: Path) -> None:
    """The tail becomes the validation split: 40 % of 51 tokens, that is 20."""
    for name, lengths, spans in (("one", LENGTHS, SPANS), ("two", [14], [[0, 14]])):
        write_entry(tmp_path, name, "train", counting(lengths)[0], spans=spans)
    parts = [Part(str(tmp_path / "one"), "train", 3, 37), Part(str(tmp_path / "two"), "train", 1, 14)]
    entries = compact(tmp_path, parts, 1000, 0.4)
    train, validation = (read_shard(tmp_path / entry.path) for entry in entries)
    assert train.spans is not None
    assert validation.spans is not None
    assert np.diff(train.offsets).tolist() == [10, 4, 17]
    assert train.spans.values.tolist() == [2, 5, 8, 10, 0, 1, 5, 17]
    assert np.diff(validation.offsets).tolist() == [6, 14]
    assert validation.spans.values.tolist() == [0, 3, 0, 14]


@settings(max_examples=100, deadline=None)
@given(data=st.data(), lengths=st.lists(st.integers(1, 12), min_size=1, max_size=6))
def test_any_slice_says_what_the_whole_says(data: st.DataObject, lengths: list[int]) -> None:
    marks = [data.draw(st.lists(st.booleans(), min_size=n, max_size=n)) for n in lengths]
    offsets, total = offsets_of(np.array(lengths)), sum(lengths)
    spans = []
    for mark in marks:
        edges = np.flatnonzero(np.diff([False, *mark, False]))
        spans.append(edges.tolist())
    shard = Shard(Path("made"), np.zeros(total, np.uint16), offsets, np.zeros(len(lengths), np.uint64), spans_of(spans))
    start = data.draw(st.integers(0, total - 1))
    stop = data.draw(st.integers(start + 1, total))
    assert counted(shard, start, stop).tolist() == [m for mark in marks for m in mark][start:stop]


@pytest.mark.parametrize("wrong", [[5, 2], [0, 11], [-1, 2], [0, 5, 3, 8], [4], [3, 3]])
def test_spans_that_are_none_are_found(tmp_path: Path, wrong: list[int]) -> None:
    dataset = make_dataset(tmp_path, counting(LENGTHS), spans=[[wrong, [], []]])
    with pytest.raises(DataError, match="loss spans are not pairs that ascend within their document"):
        dataset.verify()


@pytest.mark.parametrize("packing", ["best_fit", "pad"])
def test_conversations_stay_whole(tmp_path: Path, packing: str) -> None:
    """Those that are too long are left out and counted; of the others the model learns its own part."""
    lengths = [10, 4, 23, 7, 12]
    spans = [[2, 5, 8, 10], [], [0, 1, 5, 20], [3, 7], [1, 12]]
    dataset = make_dataset(tmp_path, counting(lengths), spans=[spans])
    changes: dict[str, Any] = {"sequence_length": 11, "data.packing": packing, "data.too_long": "drop"}
    stream = open_stream(RunConfig().replace(**changes), dataset, "train")
    batch = stream.batch(0, stream.samples_per_epoch)
    whole = [document for document in counting(lengths)[0] if len(document) <= 12]
    learned = [document[at] for document, pairs in zip(whole, [*spans[:2], *spans[3:]], strict=True)
               for start, stop in zip(pairs[::2], pairs[1::2], strict=True) for at in range(start, stop)]  # fmt: skip
    assert sorted(batch.labels[batch.weights > 0].tolist()) == learned
    rows = [[*tokens, label] for tokens, label in zip(batch.tokens.tolist(), batch.labels[:, -1].tolist(), strict=True)]
    for document in whole:
        assert any(row[at : at + len(document)] == document for row in rows for at in range(12)), document
    assert "5 documents: 0 cut (4 pieces in all), 1 too long and left out (23 tokens)" in describe(tmp_path)
