"""Blends whose documents are packed: every packing under every order, in training and in validation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tokenizers
from making import counting, make_dataset

from raytron.config import RunConfig, load, to_yaml
from raytron.data.batch import Batch
from raytron.data.check import data_problems
from raytron.data.ensure import ensure_data
from raytron.data.pack import PackRule
from raytron.data.reader import PackReader
from raytron.data.run_data import open_run_data
from raytron.data.sample_page import describe_sample
from raytron.data.shards import Dataset
from raytron.data.stream import SampleStream, open_stream
from raytron.errors import ConfigError

LENGTH = 8


@pytest.fixture
def sources(tmp_path: Path) -> list[Dataset]:
    """Two data sets of documents of many lengths; the tokens of the second are 500 and more. One holds conversations."""
    web = counting([3, 17, 1, 8, 40, 2, 9, 9], [5, 5, 4])
    code = counting([26, 7, 6, 1, 18], first=500)
    spans = [[[1, length] if length > 1 else [] for length in map(len, shard)] for shard in code]
    return [
        make_dataset(tmp_path / "web", web, validation=counting([4, 9, 3], first=400)),
        make_dataset(tmp_path / "code", code, validation=counting([12, 5], first=900), spans=spans),
    ]


def blended(sources: list[Dataset], **changes: object) -> RunConfig:
    blend = [{"dataset": str(each.path), "weight": weight} for each, weight in zip(sources, (0.75, 0.25), strict=True)]
    config = load({"data": {"blend": blend, "blend_block": 16}, "sequence_length": LENGTH, "global_batch_size": 8})
    return config.replace(**{"steps": 10, "data.packing": "best_fit", **changes})


def rows_of(batch: Batch) -> list[tuple[list[int], ...]]:
    assert batch.documents is not None
    fields = (batch.tokens, batch.labels, batch.weights, np.asarray(batch.documents))
    return [tuple(each[row].tolist() for each in fields) for row in range(len(batch.ids))]


@pytest.mark.parametrize("packing", ["best_fit", "pad"])
def test_a_blend_of_packed_sources_holds_each_sources_own_bins(sources: list[Dataset], packing: str) -> None:
    config = blended(sources, **{"data.packing": packing})
    data = open_run_data(config, "unused")
    stream = data.train()
    assert isinstance(stream, SampleStream)
    assert all(isinstance(reader, PackReader) for reader in stream.readers)
    assert data.sizes == tuple(reader.size for reader in stream.readers)
    samples = 16 * max(data.sizes)
    batch, place = stream.batch(0, samples), stream.order.locate(np.arange(samples))
    rows = rows_of(batch)
    for number, dataset in enumerate(sources):
        alone = open_stream(config.replace(**{"data.blend": [], "data.dataset": str(dataset.path)}), dataset, "train")
        bins = {tuple(map(tuple, row)) for row in rows_of(alone.batch(0, alone.samples_per_epoch))}
        here = {tuple(map(tuple, rows[row])) for row in np.flatnonzero(place.source == number)}
        assert here == bins
    assert np.bincount(place.source).tolist() == [samples * 3 // 4, samples // 4]


def test_documents_stay_apart_and_padding_counts_for_nothing(sources: list[Dataset]) -> None:
    batch = open_run_data(blended(sources), "unused").train().batch(0, 64)
    assert batch.documents is not None
    counts = batch.weights > 0
    assert np.array_equal(batch.labels[counts], batch.tokens[counts] + 1)  # each after the token before it
    new = np.diff(batch.documents, axis=1) != 0
    assert (batch.weights[:, :-1][new] == 0).all()
    assert not counts[(batch.tokens == 0) | (batch.labels == 0)].any()


def test_loss_spans_of_one_source_hold_beside_one_without(sources: list[Dataset]) -> None:
    stream = open_run_data(blended(sources), "unused").train()
    batch = stream.batch(0, 256)
    learned = set(batch.labels[batch.weights > 0].tolist())
    told_only = {500}  # the first token of each document of the second source lies in no span
    assert not learned & told_only
    assert {501, 2} <= learned


def test_parts_put_together_are_the_batch_whatever_their_number(sources: list[Dataset]) -> None:
    stream = open_run_data(blended(sources), "unused").train()
    whole = rows_of(stream.batch(5, 40))
    for parts in (2, 3, 7):
        assert [row for part in range(parts) for row in rows_of(stream.batch(5, 40, part, parts))] == whole


def test_validation_sets_are_packed_too(sources: list[Dataset]) -> None:
    data = open_run_data(blended(sources), "unused")
    web, code = data.validation()
    tokens = [each.stream.batch(0, each.stream.samples_per_epoch) for each in (web, code)]
    assert [(batch.labels[batch.weights > 0] // 100).min() for batch in tokens] == [4, 9]
    assert sorted(tokens[0].labels[tokens[0].weights > 0].tolist()) == [
        *range(401, 404), *range(405, 413), 414, 415
    ]  # fmt: skip


def test_plans_are_made_before_workers_would(sources: list[Dataset]) -> None:
    config = blended(sources)
    ensure_data(config)
    for dataset in sources:
        for split in ("train", "validation"):
            rule = PackRule(split, "best_fit", LENGTH)  # type: ignore[arg-type]
            assert (dataset.path / f"{rule.name}-{dataset.hash[:8]}.arrow").exists()


def test_how_often_a_packed_source_is_read_is_told_once_it_is_packed(sources: list[Dataset]) -> None:
    blend = [
        {"dataset": str(each.path), "weight": weight, "max_epochs": 1.5}
        for each, weight in zip(sources, (0.75, 0.25), strict=True)
    ]
    config = blended(sources, **{"data.blend": blend})
    assert data_problems(config) == []  # nobody knows yet
    with pytest.raises(ConfigError) as told:
        ensure_data(config)
    bins = open_run_data(config, "unused").sizes
    for problem, taken, size in zip(told.value.problems, (60, 20), bins, strict=True):
        assert f"is read {taken / size:.3g} times within 10 steps" in problem.what
    assert data_problems(config) == list(told.value.problems)


def test_middles_are_filled_in_over_a_whole_blend(tmp_path: Path) -> None:
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.add_special_tokens(["<pre>", "<mid>", "<suf>"])  # ids 0 to 2
    sources = [
        make_dataset(tmp_path / name, counting([9, 7, 8], first=first), eod=999, tokenizer=inner.to_str().encode())
        for name, first in (("one", 11), ("two", 500))
    ]
    names = {"data.fim.prefix": "<pre>", "data.fim.middle": "<mid>", "data.fim.suffix": "<suf>"}
    config = blended(sources, **{"data.fim.rate": 1.0, **names})
    assert data_problems(config) == []
    batch = open_run_data(config, "unused").train().batch(0, 64)
    assert (batch.tokens[:, 0] == 0).all()  # each document begins with the first of the three
    assert {True, False} == set((batch.tokens >= 500).any(axis=1).tolist())
    held = open_run_data(config.replace(**{"data.fim.rate": 0.0}), "unused").train().batch(0, 64)
    assert (held.tokens > 2).all()
    (problem,) = data_problems(config.replace(**{"data.fim.middle": "<absent>"}))
    assert problem.where == "data.fim.middle"


def test_a_packed_sample_is_shown_document_by_document(sources: list[Dataset], tmp_path: Path) -> None:
    config = blended(sources)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    stream = open_run_data(config, "unused").train()
    assert isinstance(stream, SampleStream)
    for sample in range(12):
        page = describe_sample(tmp_path, sample)
        _, rows = stream.rows(sample, 1)
        assert rows.documents is not None
        padded = not rows.counts[0].all() and rows.tokens[0, -1] == 0
        assert page.count("document ") == np.asarray(rows.documents)[0, -1] + 1 - padded
        assert ("padding" in page) == padded
