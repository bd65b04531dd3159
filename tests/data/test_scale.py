"""Data sets far larger than any disk here: manifests of many shards, without the shards."""

from __future__ import annotations

import hashlib
import os
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from making import TOKENIZER, make_dataset

from raytron.data.manifest import Manifest, ShardEntry, Source, Unigram, read_manifest, write_manifest
from raytron.data.reader import ChopReader
from raytron.data.shard_table import TABLE_FROM, TABLE_NAME, ShardTable
from raytron.data.shards import open_dataset
from raytron.data.stream import ShardStream
from raytron.errors import DataError

TOKENS = 1 << 27  # of a shard: 256 MiB
DOCUMENT = 800  # tokens
LENGTH = 4096


def entries(count: int) -> list[ShardEntry]:
    """Shards of which the last one is for validation."""
    return [
        ShardEntry(
            f"{'train' if number < count - 1 else 'validation'}-{number:05d}.arrow",
            "train" if number < count - 1 else "validation",
            TOKENS // DOCUMENT, TOKENS - number % 7, 2 * TOKENS + 900, f"{number:032x}",
        )
        for number in range(count)
    ]  # fmt: skip


def manifest_of(shards: list[ShardEntry]) -> Manifest:
    return Manifest(
        shards=tuple(shards),
        tokenizer_sha256=hashlib.sha256(TOKENIZER).hexdigest(),
        vocab=50_000,
        eod=0,
        sources=(Source("made", 1, 1),),
        validation_fraction=0.01,
        unigram=Unigram.of(np.arange(50_000)),
        build={},
        corpus_xxh3_128="0" * 32,
    )


@pytest.fixture(scope="module", params=[10**5, 10**8, 10**10], ids=["1e5", "1e8", "1e10"])
def large(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large")
    (folder / "tokenizer.json").write_bytes(TOKENIZER)
    write_manifest(folder, manifest_of(entries(max(2, request.param * DOCUMENT // TOKENS))))
    return folder


def test_opening_takes_milliseconds_and_megabytes(large: Path) -> None:
    """50 ms of this process's time and 10 MB, for any number of documents up to 10^10 (60,000 shards)."""

    def open_stream() -> ShardStream:
        return ShardStream(open_dataset(large), "train", LENGTH, seed=1)

    open_stream()
    seconds = []
    for _ in range(5):
        begin = time.process_time()
        open_stream()
        seconds.append(time.process_time() - begin)
    tracemalloc.start()
    stream = open_stream()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert min(seconds) < 0.05
    assert peak < 10e6
    assert stream.samples_per_epoch > 0


def test_samples_lie_where_a_running_sum_says(large: Path) -> None:
    stream = ShardStream(open_dataset(large), "train", LENGTH, seed=1)
    (reader,) = stream.readers
    assert isinstance(reader, ChopReader)
    tokens = np.array([entry.tokens for entry in reader.dataset.entries("train")[:50]])
    ends = np.cumsum((tokens - 1) // LENGTH)
    shard, offset = reader.locate(ends)
    assert (offset[:-1] == 0).all()
    assert shard[:-1].tolist() == list(range(1, len(ends)))
    shard, offset = reader.locate(ends - 1)
    assert shard.tolist() == list(range(len(ends)))
    assert (offset + LENGTH + 1 <= tokens).all()
    last, _ = reader.locate(np.array([reader.size - 1]))
    assert last[0] == len(reader.dataset.entries("train")) - 1


@pytest.mark.parametrize("count", [TABLE_FROM - 1, TABLE_FROM])
def test_what_is_written_is_read_back(tmp_path: Path, count: int) -> None:
    shards = entries(count)
    made = manifest_of(shards)
    write_manifest(tmp_path, made)
    assert (tmp_path / TABLE_NAME).exists() == (count >= TABLE_FROM)
    found = read_manifest(tmp_path)
    assert found.hash == made.hash
    assert list(found.shards) == shards
    assert found.table == made.table
    assert list(found.table.of_split("validation")) == shards[-1:]
    assert found.table.of_split("train")[-1] == shards[-2]
    other = [*shards[:-1], replace(shards[-1], tokens=shards[-1].tokens - 1)]
    assert manifest_of(other).hash != made.hash


def test_splits_that_are_mixed_are_told_apart() -> None:
    shards = entries(20)
    mixed = ShardTable.of([shards[0], shards[19], *shards[1:5], shards[19]])
    assert list(mixed.of_split("train")) == shards[:5]
    assert list(mixed.of_split("validation")) == [shards[19]] * 2
    assert mixed.of_split("train").column("tokens").tolist() == [shard.tokens for shard in shards[:5]]
    assert list(ShardTable.of([]).of_split("train")) == []


def test_a_damaged_table_is_refused(tmp_path: Path) -> None:
    write_manifest(tmp_path, manifest_of(entries(TABLE_FROM)))
    path = tmp_path / TABLE_NAME
    whole = path.read_bytes()
    at = len(whole) // 2
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    with pytest.raises(DataError, match=r"shards.arrow: was changed after it was written"):
        read_manifest(tmp_path)
    path.write_bytes(whole[:100])
    with pytest.raises(DataError, match="table of shards is not readable"):
        read_manifest(tmp_path)
    path.unlink()
    with pytest.raises(DataError, match="table of shards is not readable"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("path", ["../x.arrow", "/x.arrow", "/etc/x.arrow", "a/../../x.arrow"])
@pytest.mark.parametrize("count", [3, TABLE_FROM])
def test_paths_out_of_the_folder_are_refused_in_a_table_too(tmp_path: Path, path: str, count: int) -> None:
    shards = entries(count)
    write_manifest(tmp_path, manifest_of([*shards[:-1], replace(shards[-1], path=path)]))
    with pytest.raises(DataError, match="lies outside the data set"):
        read_manifest(tmp_path)


def test_a_shard_that_is_a_link_out_of_the_folder_is_not_read(tmp_path: Path) -> None:
    inside = make_dataset(tmp_path / "inside", [[[1, 2, 3, 4, 5]]])
    outside = make_dataset(tmp_path / "outside", [[[1, 2, 3, 4, 5]]])
    path = inside.path / inside.entries("train")[0].path
    path.unlink()
    os.symlink(outside.path / path.name, path)
    with pytest.raises(DataError, match="lies outside the data set"):
        inside.read(inside.entries("train")[0])
