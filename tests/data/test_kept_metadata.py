"""Metadata and bad records from the configuration to the shards, the manifest and what `raytron inspect` prints."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from raytron.config import DataConfig, RunConfig, TokenizerConfig
from raytron.data.compact import compact
from raytron.data.corpus import resolve
from raytron.data.describe import describe
from raytron.data.prepare import prepare
from raytron.data.records import Fields
from raytron.data.shard_file import read_shard
from raytron.data.shards import Dataset, open_dataset
from raytron.data.stream import ShardStream
from raytron.data.task import Job, tokenize_group
from raytron.data.tokenizer import Tokenizer
from raytron.errors import ConfigError, DataError
from raytron.rules import problems

BYTE = TokenizerConfig(path="byte")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Fifty documents, one of them long, and two bad lines."""
    lines = [json.dumps({"text": f"document {n} says", "url": f"u{n}", "score": n / 2}) for n in range(49)]
    lines.insert(20, '{"text": 3}')
    lines.insert(30, '{"body": ')
    lines.append(json.dumps({"text": "long " * 300_000, "url": "long"}))
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines))
    return path


def by_url(dataset: Dataset) -> dict[str, tuple[str, dict[str, object]]]:
    """The text and the metadata of each document."""
    tokenizer, found = Tokenizer(dataset.tokenizer, "<|endoftext|>"), {}
    for entry in dataset.manifest.shards:
        shard = dataset.read(entry)
        for row, metadata in enumerate(shard.columns["metadata"].to_pylist()):
            tokens = shard.tokens[shard.offsets[row] : shard.offsets[row + 1]]
            kept = json.loads(metadata)
            found[kept["url"]] = (tokenizer.decode(tokens.tolist()), kept)
    return found


def test_metadata_stays_with_its_document_and_bad_records_are_told(local_ray: None, text: Path, tmp_path: Path) -> None:
    data = DataConfig(
        sources=(str(text),),
        metadata_keys=("url", "score"),
        on_bad_record="skip",
        validation_fraction=0.3,
        tokenizer=BYTE,
    )
    dataset = open_dataset(prepare(data, tmp_path / "data"))
    dataset.verify()
    found = by_url(dataset)
    assert len(found) == 50
    assert dataset.documents("validation") > 3
    assert all(found[f"u{n}"] == (f"document {n} says", {"url": f"u{n}", "score": n / 2}) for n in range(49))
    assert found["long"] == ("long " * 300_000, {"url": "long"})
    assert dataset.manifest.bad_records == 2
    page = describe(dataset.path)
    assert "bad records 2 left out, such as" in page
    assert "field 'text' is int, not text" in page
    assert "is not JSON" in page
    assert ShardStream(dataset, "train", 64).batch(0, 2).tokens.shape == (2, 64)
    with pytest.raises(
        ConfigError, match=r"data\.metadata_keys: is \['url'\], but .* was prepared with \['url', 'score'\]"
    ):
        prepare(replace(data, metadata_keys=("url",)), tmp_path / "data")


def test_a_bad_record_stops_where_it_is_not_to_be_skipped(local_ray: None, text: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"field 'text' is int, not text\n.*; or set data\.on_bad_record to skip"):
        prepare(DataConfig(sources=(str(text),), tokenizer=BYTE), tmp_path / "data")


def test_metadata_is_joined_and_cut_with_its_documents(text: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer("byte", "<|endoftext|>").save(tmp_path / "tokenizer.json")
    fields = Fields(metadata_keys=("url",), on_bad_record="skip")
    job = Job(
        str(tmp_path), str(tokenizer.path), "<|endoftext|>", "text", 1e-9, part_tokens=100, metadata_keys=("url",),
        on_bad_record="skip",
    )  # fmt: skip
    done = tokenize_group(0, resolve([str(text)], fields=fields).units, job)[0]
    assert done.bad == 2
    entries = compact(tmp_path, done.parts, 10**7, 0.5)
    train, validation = (tmp_path / entry.path for entry in entries)
    urls = [f"u{n}" for n in range(49)] + ["long"]

    assert [json.loads(one)["url"] for one in read_shard(train).columns["metadata"].to_pylist()] == urls
    assert read_shard(validation).columns["metadata"].to_pylist() == ['{"url": "long"}']
    assert pa.types.is_large_string(read_shard(train).columns["metadata"].type)


@pytest.mark.parametrize("limit", [1, 50, 10**6])
def test_a_part_ends_with_the_document_that_fills_it(text: Path, tmp_path: Path, limit: int) -> None:
    tokenizer = Tokenizer("byte", "<|endoftext|>").save(tmp_path / "tokenizer.json")
    (tmp_path / "parts").mkdir()
    job = Job(str(tmp_path / "parts"), str(tokenizer.path), "<|endoftext|>", "text", 0.1, limit, (), "skip")
    units = resolve([str(text)], fields=Fields(on_bad_record="skip")).units
    done, counts = tokenize_group(0, units, job)
    assert done.documents == sum(part.documents for part in done.parts) == 50
    assert counts.sum() == sum(part.tokens for part in done.parts if part.split == "train")
    again, counted = tokenize_group(0, units, job)
    assert again.kept
    assert (again.parts, counted.tolist()) == (done.parts, counts.tolist())
    names = {path.name for path in (tmp_path / "parts").iterdir()}
    assert names == {Path(part.path).name for part in done.parts} | {"000000.json"}


@pytest.mark.parametrize(
    ("changes", "where", "what"),
    [
        ({"data.metadata_keys": ("text",)}, "data.metadata_keys", "'text' holds the text"),
        ({"data.metadata_keys": ("a", "a")}, "data.metadata_keys", "a name is empty or there twice"),
        ({"data.metadata_keys": ("a", " ")}, "data.metadata_keys", "a name is empty or there twice"),
        ({"data.tokenizer.pattern": "gpt2"}, "data.tokenizer.pattern", "has no effect where a tokenizer is trained"),
        ({"data.tokenizer.path": "t", "data.tokenizer.pattern": " "}, "data.tokenizer.pattern", "is empty"),
        (
            {"data.dataset": "d", "data.on_bad_record": "skip"},
            "data.on_bad_record",
            "where the data set is made already",
        ),
        ({"data.dataset": "d", "data.tokenizer.backend": "tokenizers"}, "data.tokenizer.backend", "has no effect"),
    ],
)
def test_values_that_do_not_go_together(changes: dict[str, object], where: str, what: str) -> None:
    assert [(one.where, what in one.what) for one in problems(RunConfig().replace(**changes))] == [(where, True)]
