"""Megatron's .bin and .idx: a way there and back, against its own reader and writer, and every kind of damage."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from making import make_dataset

from raytron import cli
from raytron.data import megatron
from raytron.data.megatron import Index, export_megatron, import_megatron, read_index, write_index
from raytron.data.shards import Dataset, open_dataset
from raytron.errors import ConfigError, DataError

EOD = 256


def documents(count: int = 60, seed: int = 0) -> list[list[int]]:
    """Of bytes, each with its end."""
    random = np.random.default_rng(seed)
    return [[*random.integers(0, 256, random.integers(1, 40)).tolist(), EOD] for _ in range(count)]


def write(prefix: Path, tokens: list[list[int]], dtype: str = "<u2", bounds: list[int] | None = None) -> Path:
    """Sequences; each is a document unless `bounds` says otherwise."""
    flat = np.array([one for sequence in tokens for one in sequence], dtype)
    Path(f"{prefix}.bin").write_bytes(flat.tobytes())
    lengths = np.array([len(sequence) for sequence in tokens], np.int32)
    ends = list(range(len(tokens) + 1)) if bounds is None else bounds
    write_index(Path(f"{prefix}.idx"), np.dtype(dtype), lengths, np.array(ends, np.int64))
    return prefix


def held(dataset: Dataset) -> list[list[int]]:
    """Every document, sorted."""
    found = []
    for entry in dataset.manifest.shards:
        shard = dataset.read(entry)
        found += [part.tolist() for part in np.split(shard.tokens, shard.offsets[1:-1])]
    return sorted(found)


@pytest.mark.parametrize("dtype", ["<u2", "<i4", "<i8"])
def test_there_and_back(tmp_path: Path, dtype: str) -> None:
    dataset = import_megatron(
        write(tmp_path / "a", documents(), dtype), tmp_path / "data", "byte", validation_fraction=0.2
    )
    dataset.verify()
    assert held(dataset) == sorted(documents())
    assert 0 < dataset.documents("validation") < 30
    assert dataset.manifest.unigram.tokens == dataset.tokens("train")
    paths = export_megatron(dataset.path, tmp_path / "b")
    assert paths == [tmp_path / "b-train.bin", tmp_path / "b-validation.bin"]
    for split, path in zip(("train", "validation"), paths, strict=True):
        index = read_index(path.with_suffix(""))
        tokens = np.fromfile(path, index.dtype)
        expected = np.concatenate([dataset.read(entry).tokens for entry in dataset.entries(split)])  # type: ignore[arg-type]
        assert tokens.tolist() == expected.tolist()
        assert len(index.lengths) == dataset.documents(split)  # type: ignore[arg-type]
    again = import_megatron(tmp_path / "b-train", tmp_path / "again", "byte")
    assert again.tokens("train") + again.tokens("validation") == dataset.tokens("train")


def test_large_vocabularies_are_exported_as_int32(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "data", [[[70_000, 5, 0], [1, 0]]], vocab=70_001)
    export_megatron(dataset.path, tmp_path / "a")
    assert read_index(tmp_path / "a-train").dtype == np.dtype("<i4")
    assert np.fromfile(tmp_path / "a-train.bin", "<i4").tolist() == [70_000, 5, 0, 1, 0]


def test_documents_of_several_sequences_empty_ones_and_missing_ends(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", [[1, 2], [3], [], [4, EOD], [5]], bounds=[0, 2, 3, 4, 5])
    dataset = import_megatron(prefix, tmp_path / "data", "byte", validation_fraction=0.001)
    assert held(dataset) == [[1, 2, 3, EOD], [4, EOD], [5, EOD]]
    assert dataset.manifest.skipped == 1


def test_batches_and_giants_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    giant = [[7] * 5000, [8] * 300 + [EOD]]
    prefix = write(tmp_path / "a", [*documents(), *giant])
    whole = import_megatron(prefix, tmp_path / "whole", "byte", validation_fraction=0.2)
    monkeypatch.setattr(megatron, "BATCH_TOKENS", 100)
    pieces = import_megatron(prefix, tmp_path / "pieces", "byte", validation_fraction=0.2)
    assert held(pieces) == held(whole)
    assert pieces.documents("validation") == whole.documents("validation")


def test_ids_beyond_the_vocabulary_are_refused(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", [[1, 300]])
    with pytest.raises(DataError, match=r"a\.bin: token id 300 is not in the vocabulary of 257\n.*give the tokenizer"):
        import_megatron(prefix, tmp_path / "data", "byte")
    with pytest.raises(DataError, match="token id -1 is not"):
        import_megatron(write(tmp_path / "b", [[1, -1]], "<i4"), tmp_path / "other", "byte")
    with pytest.raises(ConfigError, match="use more than 0"):
        import_megatron(prefix, tmp_path / "third", "byte", validation_fraction=1.0)


def damaged(content: bytes, how: str) -> bytes:
    header = len(megatron.MAGIC)
    changes = {
        "it begins with": lambda: b"X" + content[1:],
        "its version is 2": lambda: content[:header] + struct.pack("<Q", 2) + content[header + 8 :],
        "no type of token ids": lambda: content[: header + 8] + b"\x07" + content[header + 9 :],
        "buffer": lambda: content[:-8],
        "one after another": lambda: content[: header + 25] + struct.pack("<i", 1) + content[header + 29 :],
        "documents are not all": lambda: content[:-8] + struct.pack("<q", 99),
    }
    return changes[how]()


@pytest.mark.parametrize(
    "how",
    [
        "it begins with",
        "its version is 2",
        "no type of token ids",
        "buffer",
        "one after another",
        "documents are not all",
    ],
)
def test_a_damaged_index_is_named(tmp_path: Path, how: str) -> None:
    write(tmp_path / "a", documents())
    path = tmp_path / "a.idx"
    path.write_bytes(damaged(path.read_bytes(), how))
    with pytest.raises(DataError, match=rf"a\.idx: is not Megatron's index of a data set: .*{how}"):
        read_index(tmp_path / "a")


def test_files_that_are_missing_cut_off_or_in_the_way(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.idx: can't be read: No such file"):
        read_index(tmp_path / "absent")
    prefix = write(tmp_path / "a", documents())
    dataset = import_megatron(prefix, tmp_path / "data", "byte")
    with pytest.raises(DataError, match="is not empty"):
        import_megatron(prefix, tmp_path / "data", "byte")
    export_megatron(dataset.path, tmp_path / "out")
    with pytest.raises(DataError, match=r"out-train\.bin: is there already"):
        export_megatron(dataset.path, tmp_path / "out")
    content = (tmp_path / "a.bin").read_bytes()
    (tmp_path / "a.bin").write_bytes(content[:-2])
    with pytest.raises(DataError, match=rf"take {len(content)} bytes, and the \.bin file has {len(content) - 2}"):
        read_index(prefix)


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "a", documents())
    there = ["import", "megatron-data", f"{tmp_path}/a", f"{tmp_path}/data", "--tokenizer", "byte"]
    assert cli.main([*there, "--validation-fraction", "0.2"]) == 0
    assert "257 ids, end of document 256" in capsys.readouterr().out
    assert cli.main(["export", "megatron-data", f"{tmp_path}/data", f"{tmp_path}/b"]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/b-train.bin\n{tmp_path}/b-validation.bin\n"
    assert cli.main(there) == 1
    assert "is not empty" in capsys.readouterr().err
    assert open_dataset(tmp_path / "data").manifest.build == {"megatron": f"{tmp_path}/a"}


@pytest.fixture(scope="module")
def theirs() -> Any:
    """megatron-core's own reader and writer."""
    return pytest.importorskip(
        "megatron.core.datasets.indexed_dataset", reason="needs megatron-core", exc_type=ImportError
    )


def test_their_reader_reads_ours(theirs: Any, tmp_path: Path) -> None:
    dataset = import_megatron(write(tmp_path / "a", documents()), tmp_path / "data", "byte", validation_fraction=0.2)
    export_megatron(dataset.path, tmp_path / "b")
    read = theirs.IndexedDataset(str(tmp_path / "b-train"))
    shards = [dataset.read(entry) for entry in dataset.entries("train")]
    expected = [part.tolist() for shard in shards for part in np.split(shard.tokens, shard.offsets[1:-1])]
    assert [read[n].tolist() for n in range(len(read))] == expected
    assert read.document_indices.tolist() == list(range(len(expected) + 1))
    assert read.index.dtype == np.uint16


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_their_writer_writes_what_ours_does(theirs: Any, tmp_path: Path, dtype: Any) -> None:
    import torch

    builder = theirs.IndexedDatasetBuilder(str(tmp_path / "b.bin"), dtype=dtype)
    for document in documents():
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(str(tmp_path / "b.idx"))
    write(tmp_path / "a", documents(), np.dtype(dtype).str)
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()
    dataset = import_megatron(tmp_path / "b", tmp_path / "data", "byte", validation_fraction=0.2)
    assert held(dataset) == sorted(documents())
    assert isinstance(read_index(tmp_path / "b"), Index)
