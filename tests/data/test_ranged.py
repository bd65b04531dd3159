"""Data sets in an object store: the same samples by exact byte ranges, and how many bytes they cost."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from making import make_dataset
from test_remote_sources import s3 as s3

from raytron.config import RunConfig, load
from raytron.data import files
from raytron.data.check import data_problems
from raytron.data.describe import describe
from raytron.data.ensure import ensure_data
from raytron.data.files import Range, read_ranges, url_of
from raytron.data.ranged import RangedShard
from raytron.data.run_data import open_run_data
from raytron.data.sample_page import describe_sample
from raytron.data.shards import Dataset, holds_dataset, open_dataset
from raytron.data.stream import open_stream
from raytron.errors import DataError

URL = "memory://bucket/tokens"
LENGTH = 256


class Counted:
    """Counts what is asked of fsspec's memory."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.bytes = self.calls = 0
        self._inside = files._files(URL)
        real = self._inside.cat_ranges

        def cat_ranges(paths: list[str], starts: list[int], ends: list[int], **more: Any) -> list[bytes]:
            self.calls += 1
            self.bytes += sum(ends) - sum(starts)
            found: list[bytes] = real(paths, starts, ends, **more)
            return found

        monkeypatch.setattr(self._inside, "cat_ranges", cat_ranges)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "WAITS_S", (0.01,))


@pytest.fixture
def local(tmp_path: Path) -> Dataset:
    """Three shards of training documents of 5 to 400 tokens, the first with loss spans; one to validate on."""
    numbers = np.random.default_rng(1)
    shards = [[numbers.integers(1, 900, n).tolist() for n in numbers.integers(5, 400, 120)] for _ in range(3)]
    spans = [[[1, len(document)] for document in shard] for shard in shards]
    held = [[numbers.integers(1, 900, 300).tolist() for _ in range(9)]]
    return make_dataset(tmp_path / "tokens", shards, held, spans=spans)


@pytest.fixture
def remote(local: Dataset) -> Iterator[Dataset]:
    store = fsspec.filesystem("memory")
    for path in sorted(local.path.iterdir()):
        store.pipe_file(f"bucket/tokens/{path.name}", path.read_bytes())
    yield open_dataset(URL)
    store.rm("bucket", recursive=True)


def configured(place: object, run_dir: Path, **changes: Any) -> RunConfig:
    config = load({"data": {"dataset": str(place)}, "sequence_length": LENGTH, "global_batch_size": 4})
    return config.replace(**{"run_dir": str(run_dir), **changes})


@pytest.mark.parametrize("packing", ["chop", "best_fit", "pad"])
@pytest.mark.parametrize("mask", [False, True])
def test_the_samples_are_those_of_the_same_files_on_disk(
    local: Dataset, remote: Dataset, tmp_path: Path, packing: str, mask: bool
) -> None:
    changes = {"data.packing": packing, "data.document_mask": mask}
    for split in ("train", "validation"):
        mine, other = (
            open_stream(configured(each.name, tmp_path, **changes), each, split)  # type: ignore[arg-type]
            for each in (remote, local)
        )
        assert mine.samples_per_epoch == other.samples_per_epoch
        for part in range(3):
            batches = mine.batch(0, 50, part, 3), other.batch(0, 50, part, 3)
            for one, another in zip(*batches, strict=True):
                assert (one is None) == (another is None)
                assert one is None or np.array_equal(one, another)
    assert not [path for path in remote.path.iterdir() if path.suffix == ".arrow"]  # no copy of a shard or a plan


def test_a_sample_costs_hardly_more_bytes_than_it_holds(
    remote: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = open_stream(configured(URL, tmp_path), remote, "train")
    count = Counted(monkeypatch)
    (reader,) = stream.readers
    pieces = reader.pieces(np.arange(200))  # type: ignore[attr-defined]
    tokens = list(reader.shards._fetched(pieces))  # type: ignore[attr-defined]
    wanted = sum(each.nbytes for each in tokens)
    assert wanted == 200 * (LENGTH + 1) * 2
    shards = len({piece.shard for piece in pieces})
    assert count.bytes == wanted + shards * 2 * 8192
    assert count.bytes < 2 * wanted
    assert count.calls == shards + 1  # where each shard's tokens lie, then all samples at once
    list(reader.shards._fetched(pieces))  # type: ignore[attr-defined]
    assert count.bytes == 2 * wanted + shards * 2 * 8192


def test_a_blend_and_its_validation_may_be_remote(local: Dataset, remote: Dataset, tmp_path: Path) -> None:
    other = make_dataset(tmp_path / "other", [[[7] * 3000]])
    blend = [{"dataset": URL, "weight": 0.5}, {"dataset": str(other.path), "weight": 0.5}]
    config = configured("x", tmp_path / "run").replace(**{"data.dataset": None, "data.blend": blend})
    config = config.replace(**{"data.validation": [{"name": "far", "dataset": URL}], "data.packing": "best_fit"})
    assert data_problems(config) == []
    data = open_run_data(config, ensure_data(config))
    assert [each.url for each in data.sources] == [URL, None]
    batch = data.train().batch(0, 64)
    assert {True, False} == set((batch.tokens[:, 0] == 7).tolist())
    assert data.validation()[0].stream.batch(0, 2).tokens.shape == (2, LENGTH)
    assert sorted(path.name.split("-")[0] for path in (tmp_path / "run" / "packs").iterdir()) == ["train", "validation"]


def test_pages_tell_of_remote_data_too(remote: Dataset) -> None:
    assert holds_dataset(URL)
    assert not holds_dataset("memory://bucket/elsewhere")
    page = describe(URL, verify=True)
    assert f"data set {URL}" in page
    assert "verified: every digest" in page
    assert "shard       train-0000" in describe_sample(URL, 3, LENGTH)


def test_a_data_set_is_small_to_send(remote: Dataset) -> None:
    again = pickle.loads(pickle.dumps(remote))
    assert again.hash == remote.hash
    assert again.url == URL


def test_what_is_missing_or_damaged_is_named(local: Dataset, remote: Dataset) -> None:
    store, entry = fsspec.filesystem("memory"), remote.entries("train")[0]
    name = f"bucket/tokens/{entry.path}"
    whole = store.cat_file(name)
    store.pipe_file(name, whole[: len(whole) // 2] + b"\x01" + whole[len(whole) // 2 + 1 :])
    with pytest.raises(DataError, match=rf"{URL}/{entry.path}: is damaged: its digest is not the manifest's"):
        remote.verify()
    store.pipe_file(name, b"x" * len(whole))
    with pytest.raises(DataError, match="not a readable shard"):
        remote.read(entry)
    other = local.path / remote.entries("train")[1].path
    store.pipe_file(name, other.read_bytes())
    with pytest.raises(DataError, match=r"not a readable shard|the manifest says"):
        remote.read(entry)
    store.rm(name)
    with pytest.raises(DataError, match="the shard is missing"):
        remote.read(entry)
    with pytest.raises(DataError, match=r"is no data set: it holds no manifest.json"):
        open_dataset("memory://bucket/nothing")


def test_a_store_that_gives_other_bytes_is_not_believed(remote: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files._files(URL), "cat_ranges", lambda *_, **__: [b"whole file"])
    with pytest.raises(DataError, match=r"gave 10 bytes for 4 from byte 0 on"):
        read_ranges([Range(f"{URL}/manifest.json", 0, 4)])


def test_a_footer_that_is_long_is_read_by_more_bytes(remote: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raytron.data.ranged.ENDS_BYTES", (16, 64, 4096))
    entry = remote.entries("train")[0]
    shard = RangedShard(remote.path_of(entry), entry.bytes)
    assert (len(shard.tokens), shard.documents) == (entry.tokens, entry.documents)


def test_a_url_is_one_with_one_slash_too() -> None:
    assert url_of("s3://bucket/a/") == url_of(Path("s3://bucket/a")) == "s3://bucket/a"
    assert url_of("/data/a") is url_of("a/b") is url_of("file:///a") is None


def test_a_data_set_in_a_bucket(s3: str, local: Dataset, tmp_path: Path) -> None:
    store, url = fsspec.filesystem("s3"), f"{s3}/tokens"
    for path in local.path.iterdir():
        store.pipe_file(f"{url}/{path.name}", path.read_bytes())
    remote = open_dataset(Path(url))
    changes = {"data.packing": "best_fit"}
    mine, other = (open_stream(configured("x", tmp_path, **changes), each, "train") for each in (remote, local))
    batches = mine.batch(0, 40), other.batch(0, 40)
    assert all(np.array_equal(one, another) for one, another in zip(*batches, strict=True))  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"s3://texts/absent: is no data set"):
        open_dataset("s3://texts/absent")
