"""Filling in the middle: nothing is lost but three tokens, the places are random, and a sample's draws are its own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from making import counting, make_dataset
from numpy.typing import NDArray

from raytron.config import RunConfig
from raytron.data.bounds import Bounds
from raytron.data.draw import below, uniform
from raytron.data.fim import FillInTheMiddle, fim_problems
from raytron.data.rows import Rows
from raytron.data.shards import Dataset
from raytron.data.stream import open_stream
from raytron.errors import DataError

PREFIX, MIDDLE, SUFFIX, EOD = 901, 902, 903, 0
NAMES = {"prefix": "<pre>", "middle": "<mid>", "suffix": "<suf>"}


def filled(rate: float = 1.0, spm_rate: float = 0.5, seed: int = 1) -> FillInTheMiddle:
    return FillInTheMiddle(seed, rate, spm_rate, PREFIX, MIDDLE, SUFFIX, EOD)


def restored(tokens: list[int]) -> tuple[str, list[int]]:
    """The form of a document whose middle comes last, and the document as it was."""
    assert tokens[0] == PREFIX
    middle = tokens.index(MIDDLE)
    if tokens[1] == SUFFIX:
        return "spm", tokens[middle + 1 :] + tokens[2:middle]
    suffix = tokens.index(SUFFIX)
    return "psm", tokens[1:suffix] + tokens[middle + 1 :] + tokens[suffix + 1 : middle]


def rows_of(lengths: list[int], padding: int = 0, count: int = 1) -> Rows:
    """The same documents in each row, counting up from 1 and ended, then padding."""
    tokens = [token for n in lengths for token in [*range(1, n), EOD]] + [EOD] * padding
    numbers = np.repeat(np.arange(len(lengths) + 1), [*lengths, padding]).astype(np.int32)
    counts = numbers < len(lengths)
    each: tuple[NDArray[Any], ...] = (np.array(tokens, np.int64), counts, numbers)
    tokens, counts, numbers = (np.tile(part, (count, 1)) for part in each)
    return Rows(tokens, counts, Bounds.of_numbers(numbers))


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=8),
    padding=st.integers(0, 9),
    sample=st.integers(0, 10**9),
)
def test_documents_can_be_put_together_again(lengths: list[int], padding: int, sample: int) -> None:
    rows = rows_of(lengths, padding)
    out = filled()(rows, np.array([sample]))
    assert np.array_equal(out.documents, rows.documents)  # type: ignore[arg-type]
    assert np.array_equal(out.counts, rows.counts)
    at = 0
    for n in lengths:
        before, after = rows.tokens[0, at : at + n].tolist(), out.tokens[0, at : at + n].tolist()
        assert after[-1] == EOD
        if n < 5:
            assert after == before
        else:
            form, text = restored(after[:-1])
            assert form in ("psm", "spm")
            assert text == before[:-4]
        at += n
    assert np.array_equal(out.tokens[0, at:], rows.tokens[0, at:])


def test_a_document_that_goes_on_elsewhere_has_no_end_to_keep() -> None:
    rows = rows_of([12])
    rows.tokens[0, -1] = 12
    assert restored(filled()(rows, np.array([3])).tokens[0].tolist())[1] == list(range(1, 10))


def test_shares_and_places() -> None:
    """20,000 documents: shares within four standard deviations, and each cut equally likely."""
    rows = rows_of([14] * 10, count=2000)
    out = filled(rate=0.7, spm_rate=0.3)(rows, np.arange(2000))
    documents = out.tokens.reshape(-1, 14)
    moved = documents[documents[:, 0] == PREFIX]
    assert abs(len(moved) - 14_000) < 4 * np.sqrt(20_000 * 0.7 * 0.3)
    psm = moved[moved[:, 1] != SUFFIX]
    empty = len(moved) * 0.7 * (2 * 11 - 1) / 11**2  # psm with an empty prefix reads as spm
    spm = len(moved) - len(psm)
    assert abs(spm - (0.3 * len(moved) + empty)) < 4 * np.sqrt(len(moved) * 0.25)
    first = (psm == SUFFIX).argmax(axis=1) - 1  # length of the prefix: the smaller of two cuts in 0 … 10, but for 0
    expected = np.array([(2 * (10 - k) + 1) for k in range(1, 11)]) / 100
    found = np.bincount(first, minlength=11)[1:]
    chi_square = ((found - expected * len(psm)) ** 2 / (expected * len(psm))).sum()
    assert chi_square < 30  # nine degrees of freedom: once in 2,000


def test_a_sample_depends_on_seed_and_id_alone() -> None:
    rows = rows_of([20, 9, 14], count=6)
    whole = filled(rate=0.5)(rows, np.arange(40, 46))
    for row in range(6):
        alone = filled(rate=0.5)(rows_of([20, 9, 14]), np.array([40 + row]))
        assert np.array_equal(alone.tokens[0], whole.tokens[row])
    assert not np.array_equal(filled(rate=0.5, seed=2)(rows, np.arange(40, 46)).tokens, whole.tokens)
    assert rows.tokens.max() < PREFIX  # what was given is unchanged


def test_what_counts_moves_with_its_token() -> None:
    rows = rows_of([16])
    learned = {3, 4, 5, 11}
    rows.counts[0] = np.isin(rows.tokens[0], [*learned])
    out = filled()(rows, np.array([8]))
    assert set(out.tokens[0, out.counts[0]].tolist()) == learned | {PREFIX, MIDDLE, SUFFIX}


def test_numbers_of_a_sample_are_its_own_and_even() -> None:
    ids = np.arange(3000)
    numbers = uniform(77, ids, 40)
    assert np.array_equal(uniform(77, ids[5:9], 3), numbers[5:9, :3])
    assert numbers.min() >= 0
    assert numbers.max() < 1
    share = np.histogram(numbers, bins=50, range=(0, 1))[0] / numbers.size
    assert abs(share - 0.02).max() < 5 * np.sqrt(0.02 / numbers.size)
    assert abs(np.corrcoef(numbers[:-1].ravel(), numbers[1:].ravel())[0, 1]) < 0.015
    assert abs(np.corrcoef(numbers[:, :-1].ravel(), numbers[:, 1:].ravel())[0, 1]) < 0.015
    assert sorted(np.unique(below(numbers, 7))) == [0, 1, 2, 3, 4, 5, 6]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """With a tokenizer that has the three tokens, as ids 0 to 2; documents count up from 11."""
    folder = tmp_path_factory.mktemp("filled")
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.add_special_tokens([*NAMES.values()])
    documents, held_out = counting([12, 20, 9, 31, 6], first=11), counting([40], first=11)
    return make_dataset(folder, documents, held_out, eod=999, tokenizer=inner.to_str().encode())


def configured(**changes: Any) -> RunConfig:
    fim = {"data.fim.rate": 1.0, **{f"data.fim.{key}": name for key, name in NAMES.items()}}
    return RunConfig().replace(**{"sequence_length": 16, **fim, **changes})


@pytest.mark.parametrize("packing", ["chop", "best_fit", "pad"])
@pytest.mark.parametrize("mask", [False, True])
def test_training_samples_are_filled_in_and_validation_is_not(dataset: Dataset, packing: str, mask: bool) -> None:
    config = configured(**{"data.packing": packing, "data.document_mask": mask})
    stream = open_stream(config, dataset, "train")
    batch = stream.batch(0, stream.samples_per_epoch)
    assert (batch.tokens == 0).sum() > 3
    assert (batch.documents is not None) == (mask or packing != "chop")
    parts = [stream.batch(0, stream.samples_per_epoch, part, 3) for part in range(3)]
    assert np.array_equal(np.concatenate([part.tokens for part in parts]), batch.tokens)
    held_out = open_stream(config, dataset, "validation")
    assert held_out.batch(0, held_out.samples_per_epoch).tokens.min() > 2


def test_a_tokenizer_without_the_tokens_is_named(dataset: Dataset) -> None:
    config = configured(**{"data.fim.middle": "<hole>"})
    found = fim_problems(dataset.tokenizer, config.data)
    assert [problem.where for problem in found] == ["data.fim.middle"]
    assert "has no token '<hole>'" in found[0].what
    with pytest.raises(DataError, match="has no token '<hole>'"):
        open_stream(config, dataset, "train")
    assert not fim_problems(dataset.tokenizer, configured(**{"data.fim.rate": 0.0}).data)
