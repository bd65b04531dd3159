"""Pack plans and what is read by them: every label once, documents apart, padding that counts for nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from making import counting, make_dataset

from raytron.config import RunConfig
from raytron.data.batch import Batch
from raytron.data.describe import describe
from raytron.data.manifest import write_manifest
from raytron.data.pack import WINDOW, PackRule, cut, make_plan_file, open_plan, plans_in, read_plan
from raytron.data.reader import PackReader
from raytron.data.shard_file import offsets_of
from raytron.data.shards import Dataset, open_dataset
from raytron.data.stream import ShardStream, open_stream
from raytron.errors import DataError

LENGTHS = ([3, 17, 1, 8, 40, 2, 9, 9], [5], [26, 7, 6, 1, 18, 25])
VOCAB = 1000


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("packed")
    return make_dataset(folder, counting(*LENGTHS), validation=counting([4, 9], first=900), vocab=VOCAB)


def configured(dataset: Dataset, **changes: Any) -> RunConfig:
    return RunConfig().replace(**{"sequence_length": 8, "data.dataset": str(dataset.path), **changes})


def epoch(dataset: Dataset, **changes: Any) -> Batch:
    stream = open_stream(configured(dataset, **changes), dataset, "train")
    return stream.batch(0, stream.samples_per_epoch)


def kept(length: int, whole: bool) -> list[list[int]]:
    """The documents that give labels."""
    documents = [document for shard in counting(*LENGTHS) for document in shard]
    return [document for document in documents if len(document) > 1 and not (whole and len(document) > length + 1)]


@pytest.mark.parametrize("packing", ["best_fit", "pad"])
@pytest.mark.parametrize("too_long", ["cut", "drop"])
@pytest.mark.parametrize("length", [2, 7, 8, 24, 64])
def test_every_label_counts_once(dataset: Dataset, packing: str, too_long: str, length: int) -> None:
    batch = epoch(dataset, **{"data.packing": packing, "data.too_long": too_long, "sequence_length": length})
    documents = kept(length, too_long == "drop")
    counts = batch.weights > 0
    assert sorted(batch.labels[counts].tolist()) == sorted(token for document in documents for token in document[1:])
    assert np.array_equal(batch.labels[counts], batch.tokens[counts] + 1)  # each after the token before it
    assert set(np.unique(batch.weights)) <= {0, 1}


@pytest.mark.parametrize("packing", ["best_fit", "pad"])
@pytest.mark.parametrize("length", [2, 7, 24])
def test_documents_and_positions_begin_where_pieces_do(dataset: Dataset, packing: str, length: int) -> None:
    batch = epoch(dataset, **{"data.packing": packing, "sequence_length": length})
    assert batch.documents is not None
    first_tokens = {document[0] for document in kept(length, False)}
    positions, numbers = batch.documents.positions(), np.asarray(batch.documents)
    for row in range(len(batch.ids)):
        for number in np.unique(numbers[row]):
            at = np.flatnonzero(numbers[row] == number)
            tokens = batch.tokens[row, at]
            assert np.array_equal(positions[row, at], np.arange(len(at)))
            if tokens[0] == 0:  # padding: the end-of-document token to the end of the row
                assert not tokens.any()
                assert not batch.weights[row, at].any()
                assert at[-1] == length - 1
            else:  # one piece: it counts up, and begins a document or what a cut one goes on with
                assert np.array_equal(np.diff(tokens), np.ones(len(at) - 1))
                assert tokens[0] in first_tokens or any((tokens[0] - first) % length == 0 for first in first_tokens)
                last_is_told = at[-1] == length - 1 and batch.labels[row, -1] == tokens[-1] + 1
                assert batch.weights[row, at].tolist() == [1] * (len(at) - 1) + [int(last_is_told)]


def test_a_padded_sample_holds_one_document(dataset: Dataset) -> None:
    batch = epoch(dataset, **{"data.packing": "pad", "data.too_long": "drop", "sequence_length": 9})
    row = batch.tokens[:, 0].tolist().index(1)  # the document 1 2 3
    assert batch.tokens[row].tolist() == [1, 2, 3, 0, 0, 0, 0, 0, 0]
    assert batch.labels[row].tolist() == [2, 3, 0, 0, 0, 0, 0, 0, 0]
    assert batch.weights[row].tolist() == [1, 1, 0, 0, 0, 0, 0, 0, 0]
    assert batch.documents is not None
    assert np.asarray(batch.documents)[row].tolist() == [0, 0, 0, 1, 1, 1, 1, 1, 1]


@settings(max_examples=60, deadline=None)
@given(first=st.integers(0, 100), count=st.integers(0, 30), parts=st.integers(1, 7))
def test_every_number_of_parts_gives_the_same_samples(dataset: Dataset, first: int, count: int, parts: int) -> None:
    stream = open_stream(configured(dataset, **{"data.packing": "best_fit"}), dataset, "train")
    whole = stream.batch(first, count)
    pieces = [stream.batch(first, count, part, parts) for part in range(parts)]
    for name in whole._fields:
        assert np.array_equal(np.concatenate([getattr(piece, name) for piece in pieces]), getattr(whole, name))


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 90), max_size=40), size=st.integers(1, 30), whole=st.booleans())
def test_pieces_cover_their_documents(lengths: list[int], size: int, whole: bool) -> None:
    pieces, report = cut(offsets_of(np.array(lengths, np.int64)), size, whole)
    labels = [n for start, n in zip(*pieces, strict=True) for n in range(start + 1, start + n)]
    starts = np.cumsum([0, *lengths])
    fit = [d for d, n in enumerate(lengths) if n > 1 and not (whole and n > size + 1)]
    assert labels == [n for d in fit for n in range(starts[d] + 1, starts[d + 1])]
    assert all(2 <= n <= size + 1 for n in pieces.lengths)
    long = [n for n in lengths if n > size + 1]
    assert (report.cut, report.dropped, report.dropped_tokens) == (
        (0, len(long), sum(long)) if whole else (len(long), 0, 0)
    )
    assert (report.single, report.documents, report.tokens) == (lengths.count(1), len(lengths), sum(lengths))


@pytest.mark.parametrize("window", [1, 3, 7, 100])
def test_windows_pack_the_same_pieces(dataset: Dataset, tmp_path: Path, window: int) -> None:
    rule = PackRule("train", "best_fit", 8)
    make_plan_file(dataset, rule, tmp_path / "plan.arrow", window)
    plan, of = read_plan(tmp_path / "plan.arrow", verify=True)
    assert (of, plan.rule) == (dataset.hash, rule)
    pieces = [(int(start), int(n)) for b in range(plan.bins) for start, n in zip(*plan.bin(b), strict=True)]
    cuts = cut(offsets_of(np.concatenate([np.array(lengths) for lengths in LENGTHS])), 8, False)[0]
    assert sorted(pieces) == sorted(zip(cuts.starts.tolist(), cuts.lengths.tolist(), strict=True))
    rows = PackReader(dataset, plan).read(np.arange(plan.bins))
    padding = plan.bins * 9 - sum(n for _, n in pieces)
    assert (plan.report.padding, plan.report.bins) == (padding, plan.bins)
    assert (rows.tokens == 0).sum() == padding
    assert plan.report.pieces == len(pieces)


def test_the_packing_never_changes_between_versions(tmp_path: Path) -> None:
    """Another plan under the same format number would change what a run that goes on reads."""
    dataset = make_dataset(tmp_path, counting([3, 9, 4, 5, 2, 20, 6]))
    plan = open_plan(dataset, PackRule("train", "best_fit", 8), [tmp_path])
    bins = [list(zip(*(part.tolist() for part in plan.bin(number)), strict=True)) for number in range(plan.bins)]
    assert bins == [[(3, 9)], [(23, 9)], [(31, 9)], [(43, 6), (0, 3)], [(16, 5), (12, 4)], [(39, 4), (21, 2)]]
    assert WINDOW == 1 << 21


def test_a_plan_is_made_once_beside_the_shards(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "tokens", counting([4, 5]))
    rule, folders = PackRule("train", "best_fit", 8), [dataset.path, tmp_path / "run"]
    plan = open_plan(dataset, rule, folders)
    assert plan.path.parent == dataset.path
    written = plan.path.stat().st_mtime_ns
    assert open_plan(dataset, rule, folders).path.stat().st_mtime_ns == written
    assert [str(one) for one in plans_in(dataset.path, dataset)] == [str(plan)]
    page = describe(dataset.path, verify=True)
    assert page.count("  packed      train-best_fit-8: 1 samples, 0 tokens of padding (0.000 %)\n") == 1
    assert "\n              2 documents: 0 cut (2 pieces in all), 0 too long" in page


def test_a_plan_goes_where_it_can_be_written(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "tokens", counting([4, 5]))
    (tmp_path / "a file").write_text("")
    plan = open_plan(dataset, PackRule("train", "pad", 8), [tmp_path / "a file", tmp_path / "run"])
    assert plan.path.parent == tmp_path / "run"
    with pytest.raises(DataError, match=r"the pack plan can't be written: .*\n.*give a run_dir"):
        open_plan(dataset, PackRule("train", "pad", 9), [tmp_path / "a file"])


def test_a_damaged_plan_is_refused(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, counting([7, 6, 5, 4]))
    rule = PackRule("train", "best_fit", 8)
    path = open_plan(dataset, rule, [tmp_path]).path
    whole = path.read_bytes()
    at = whole.index(np.array([7, 6, 5, 4], np.int32).tobytes())  # the lengths, as they lie in the file
    path.write_bytes(whole[:at] + b"\x06" + whole[at + 1 :])
    open_plan(dataset, rule, [tmp_path])  # looks at the structure only
    with pytest.raises(DataError, match=r"(?s)is damaged.*remove the file"):
        open_plan(dataset, rule, [tmp_path], verify=True)
    with pytest.raises(DataError, match="is damaged"):
        describe(tmp_path, verify=True)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="not a readable pack plan"):
        open_plan(dataset, rule, [tmp_path])


def test_a_plan_of_other_data_is_refused(tmp_path: Path) -> None:
    one, other = (make_dataset(tmp_path / name, counting([4, n])) for name, n in (("one", 5), ("other", 6)))
    rule = PackRule("train", "best_fit", 8)
    path = open_plan(one, rule, [one.path]).path
    path.rename(other.path / f"{rule.name}-{other.hash[:8]}.arrow")
    with pytest.raises(DataError, match="is not a plan of"):
        open_plan(other, rule, [other.path])


def test_no_document_that_fits_says_what_would(dataset: Dataset, tmp_path: Path) -> None:
    single = make_dataset(tmp_path / "single", [[[5], [6]]])
    with pytest.raises(DataError, match="no document of 2 tokens or more"):
        open_plan(single, PackRule("train", "best_fit", 8), [single.path])
    long = make_dataset(tmp_path / "long", counting([30, 40]))
    with pytest.raises(DataError, match=r"no document of 2 to 9 tokens\n.*larger sequence_length"):
        open_plan(long, PackRule("train", "pad", 8, whole=True), [long.path])
    assert not [*long.path.glob(".*")]
    assert len([*long.path.glob("train-*")]) == 1


def test_the_seed_shuffles_bins_and_validation_stays_in_order(dataset: Dataset) -> None:
    def first_tokens(seed: int, split: str) -> list[int]:
        stream = open_stream(configured(dataset, seed=seed, **{"data.packing": "pad"}), dataset, split)
        return stream.batch(0, stream.samples_per_epoch).tokens[:, 0].tolist()

    assert sorted(first_tokens(0, "train")) == sorted(first_tokens(1, "train"))
    assert first_tokens(0, "train") != first_tokens(1, "train")
    assert first_tokens(0, "validation") == first_tokens(1, "validation") == [900, 904]


def test_chop_as_configured_is_the_plain_stream(dataset: Dataset) -> None:
    config = configured(dataset, **{"data.document_mask": True, "seed": 4})
    mine = open_stream(config, dataset, "train").batch(0, 9)
    plain = ShardStream(dataset, "train", 8, 4, documents=True).batch(0, 9)
    assert all(np.array_equal(one, other) for one, other in zip(mine, plain, strict=True))


def test_an_id_beyond_the_vocabulary_is_named_in_a_bin_too(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, [[[1, 2, 3], [4, 70, 0]]], vocab=71)
    write_manifest(tmp_path, replace(dataset.manifest, vocab=64))
    dataset = open_dataset(tmp_path)
    with pytest.raises(DataError, match=r"train-00000.arrow: token id 70 is beyond the vocabulary of 64"):
        open_stream(configured(dataset, **{"data.packing": "best_fit"}), dataset, "train").batch(0, 1)
