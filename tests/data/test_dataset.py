from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from making import make_dataset, write_entry

from raytron.data.describe import describe
from raytron.data.manifest import FILE_NAME, Unigram, read_manifest, write_manifest
from raytron.data.shard_file import read_shard, replacing, token_dtype
from raytron.data.shards import Dataset, open_dataset
from raytron.errors import DataError

DOCUMENTS = [[5, 6, 7, 0], [8, 0], [9, 10, 0]]


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return make_dataset(tmp_path / "tokens", [DOCUMENTS], validation=[[[5, 0]]])


def test_what_is_written_is_read_back_in_place(dataset: Dataset) -> None:
    shard = dataset.read(dataset.entries("train")[0])
    assert shard.tokens.dtype == np.uint16
    assert shard.tokens.tolist() == [token for document in DOCUMENTS for token in document]
    assert shard.offsets.tolist() == [0, 4, 6, 9]
    assert shard.doc_ids.tolist() == [0, 1, 2]
    assert not shard.tokens.flags.owndata
    dataset.verify()
    assert (dataset.tokens("train"), dataset.documents("train"), dataset.tokens("validation")) == (9, 3, 2)


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, [[[70_000, 0]]], vocab=70_001)
    assert dataset.read(dataset.entries("train")[0]).tokens.tolist() == [70_000, 0]
    assert (token_dtype(65_536), token_dtype(65_537)) == (np.uint16, np.uint32)


def test_the_manifest_comes_back_as_it_was(dataset: Dataset) -> None:
    assert read_manifest(dataset.path) == dataset.manifest
    assert replace(dataset.manifest, eod=1).hash != dataset.hash


def test_unigram_entropy() -> None:
    assert Unigram.of(np.array([4, 4, 0, 4, 4])).nats == pytest.approx(math.log(4))
    assert Unigram.of(np.array([0, 9])) == Unigram(0.0, 9, 1, "0 9")
    assert Unigram.of(np.array([1, 3])).nats == pytest.approx(-0.25 * math.log(0.25) - 0.75 * math.log(0.75))


def test_every_flipped_bit_is_found(dataset: Dataset) -> None:
    path = dataset.path / dataset.entries("train")[0].path
    whole = path.read_bytes()
    for position in range(0, len(whole), 97):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"train-00000.arrow: is damaged: its digest is not the manifest's"):
            dataset.verify()


def test_verify_names_everything_that_is_wrong(dataset: Dataset) -> None:
    train, validation = (dataset.path / entry.path for entry in dataset.manifest.shards)
    train.write_bytes(train.read_bytes()[:-8])
    validation.unlink()
    dataset.tokenizer.write_text("{}")
    with pytest.raises(DataError) as caught:
        dataset.verify()
    text = str(caught.value)
    assert "tokenizer.json: is not the tokenizer that made this data set" in text
    assert "bytes; the manifest says" in text
    assert "validation-00000.arrow: the shard is missing" in text
    assert text.count("remedy:") == 3


def test_verify_finds_ids_beyond_the_vocabulary(dataset: Dataset) -> None:
    entry = write_entry(dataset.path, "train-00000.arrow", "train", [[1, 1000]])
    wrong = Dataset(dataset.path, replace(dataset.manifest, shards=(entry,)))
    with pytest.raises(DataError, match="token id 1000 is beyond the vocabulary of 1000"):
        wrong.verify()


def test_a_shard_that_is_not_what_its_entry_says_is_not_read(dataset: Dataset) -> None:
    entry = replace(dataset.entries("train")[0], tokens=10)
    with pytest.raises(DataError, match="holds 9 tokens in 3 documents; the manifest says 10 in 3"):
        dataset.read(entry)


@pytest.mark.parametrize("content", [b"", b"ARROW1", b"x" * 300])
def test_a_file_that_is_no_shard_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "shard.arrow"
    path.write_bytes(content)
    with pytest.raises(DataError, match="not a readable shard"):
        read_shard(path)


def test_a_folder_without_a_manifest(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(
            DataError, match=r"is no data set: it holds no manifest.json\n    remedy: .*raytron tokenize"
        ):
            open_dataset(folder)


def test_a_manifest_that_was_edited_is_refused(dataset: Dataset) -> None:
    path = dataset.path / FILE_NAME
    path.write_text(path.read_text().replace('"vocab": 1000', '"vocab": 1001'))
    with pytest.raises(DataError, match="was changed after it was written"):
        open_dataset(dataset.path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 3}, "has format version 3; this Raytron reads versions 1 and 2"),
        ({"format": "else"}, "is not the manifest of a data set"),
        ({"vocab": "many"}, "a key is missing or of a wrong type: vocab is 'many'"),
        ({"shards": [{"path": "a"}]}, "a key is missing or of a wrong type"),
    ],
)
def test_a_foreign_manifest_is_refused(dataset: Dataset, changes: dict[str, object], message: str) -> None:
    path = dataset.path / FILE_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(DataError, match=message):
        open_dataset(dataset.path)


def test_text_that_is_no_json_is_refused(dataset: Dataset) -> None:
    (dataset.path / FILE_NAME).write_text("{")
    with pytest.raises(DataError, match="not readable"):
        open_dataset(dataset.path)


@pytest.mark.parametrize("path", ["../outside.arrow", "/etc/hostname", "link/shard.arrow"])
def test_shards_outside_the_folder_are_refused(dataset: Dataset, path: str, tmp_path: Path) -> None:
    (dataset.path / "link").symlink_to(tmp_path)
    entry = replace(dataset.entries("train")[0], path=path)
    write_manifest(dataset.path, replace(dataset.manifest, shards=(entry,)))
    with pytest.raises(DataError, match="lies outside the data set"):
        open_dataset(dataset.path)


def test_a_data_set_without_tokens_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no training token"):
        make_dataset(tmp_path, [])


def test_what_does_not_fit_the_model_or_the_tokenizer(dataset: Dataset) -> None:
    assert dataset.misfits(vocab=1000, tokenizer_sha256=dataset.manifest.tokenizer_sha256) == []
    small, other = dataset.misfits(vocab=999, tokenizer_sha256="f" * 64)
    assert "token ids go up to 999, the model's only to 998" in small.what
    assert small.remedy == "set model.vocab to 1000 or more"
    assert "was tokenized with another tokenizer" in other.what


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("before")

    def write_half() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "before"


def test_describe_shows_counts_and_lengths(dataset: Dataset) -> None:
    page = describe(dataset.path, verify=True)
    assert "train              1            3               9" in page
    assert "1000 ids, end of document 0" in page
    assert "median 2, mean 3, longest 4" in page
    assert "verified" in page
