"""Masked tokens: 15 %, of which 80, 10 and 10 %; whole words; labels where the tokens stood."""

from __future__ import annotations

from collections import Counter
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from making import counting, make_dataset

from raytron.data.batch import Batch
from raytron.data.bounds import Bounds
from raytron.data.masked import Masking, word_starts
from raytron.data.rows import Rows
from raytron.data.stream import ShardStream

MASK, VOCAB, EOD = 1000, 1000, 0


def rows_of(count: int, length: int, seed: int = 0) -> Rows:
    draw = np.random.default_rng(seed)
    tokens = draw.integers(1, VOCAB, (count, length + 1))
    documents = np.sort(draw.integers(0, 4, (count, length + 1)), axis=1).astype(np.int32)
    return Rows(tokens, np.ones(tokens.shape, np.bool_), Bounds.of_numbers(documents))


def masked(rows: Rows, ids: np.ndarray[Any, Any], **changes: Any) -> Batch:
    return Masking(**{"seed": 3, "mask": MASK, "vocab": VOCAB, **changes})(rows, ids)


def near(count: int, trials: int, share: float) -> bool:
    """Within four standard deviations of a binomial count."""
    return abs(count - trials * share) < 4 * sqrt(trials * share * (1 - share))


def test_shares_of_chosen_masked_random_and_kept() -> None:
    rows = rows_of(400, 512)
    batch = masked(rows, np.arange(400))
    chosen = batch.weights > 0
    total, kept = int(chosen.sum()), batch.tokens == batch.labels
    assert near(total, chosen.size, 0.15)
    assert near(int((batch.tokens == MASK).sum()), total, 0.8)
    other = chosen & ~kept & (batch.tokens != MASK)
    assert near(int(other.sum()), total, 0.1 * (1 - 1 / VOCAB))
    assert near(int((chosen & kept).sum()), total, 0.1 + 0.1 / VOCAB)
    assert kept[~chosen].all()
    assert np.array_equal(batch.labels, rows.tokens[:, :-1])
    drawn = batch.tokens[other]
    assert drawn.min() < 20
    assert drawn.max() >= VOCAB - 20
    assert drawn.max() < VOCAB
    assert near(int(chosen[:, 0].sum()), 400, 0.15)
    assert near(int(chosen[:, -1].sum()), 400, 0.15)


def test_other_shares_too() -> None:
    batch = masked(rows_of(200, 256), np.arange(200), rate=0.4, masked=0.5, random=0.5)
    chosen = batch.weights > 0
    assert near(int(chosen.sum()), chosen.size, 0.4)
    assert near(int((batch.tokens == MASK).sum()), int(chosen.sum()), 0.5)
    assert near(int((chosen & (batch.tokens == batch.labels)).sum()), int(chosen.sum()), 0.5 / VOCAB)


def test_whole_words_are_chosen() -> None:
    rows = rows_of(300, 256)
    starts = np.random.default_rng(9).random(VOCAB) < 0.4
    batch = masked(rows, np.arange(300), word_starts=starts)
    assert batch.documents is not None
    begins = starts[batch.labels]
    begins[:, 0] = True
    numbers = np.asarray(batch.documents)
    begins[:, 1:] |= numbers[:, 1:] != numbers[:, :-1]
    words = begins.ravel().cumsum() - 1
    chosen = np.bincount(words, weights=batch.weights.ravel())
    lengths = np.bincount(words)
    assert set(np.unique(chosen / lengths)) == {0, 1}
    assert near(int((chosen > 0).sum()), len(lengths), 0.15)
    assert len(Counter(batch.tokens[batch.weights > 0].tolist())) > 100  # what becomes of each token is its own matter


def test_padding_and_spared_tokens_are_never_chosen() -> None:
    rows = rows_of(50, 64)
    rows.counts[:, 40:] = False
    rows.tokens[:, 7] = EOD
    batch = masked(rows, np.arange(50), rate=1.0, spared=(EOD,))
    assert not batch.weights[:, 40:].any()
    assert not batch.weights[:, 7].any()
    assert batch.weights[:, [*range(7), *range(8, 40)]].all()


@settings(max_examples=40, deadline=None)
@given(first=st.integers(0, 10**9), row=st.integers(0, 5))
def test_a_sample_depends_on_seed_and_id_alone(first: int, row: int) -> None:
    rows, ids = rows_of(6, 20), np.arange(first, first + 6)
    whole = masked(rows, ids)
    assert rows.documents is not None
    here, bounds = slice(row, row + 1), Bounds.of_rows([rows.documents[row]], 21)
    alone = masked(Rows(rows.tokens[here], rows.counts[here], bounds), ids[here])
    assert all(np.array_equal(mine[0], theirs[row]) for mine, theirs in zip(alone, whole, strict=True))
    assert not np.array_equal(masked(rows, ids, seed=4).weights, whole.weights)


def saved(path: Path, inner: Any) -> Path:
    inner.save(str(path))
    return path


def begins(path: Path, text: str) -> list[bool]:
    ids = tokenizers.Tokenizer.from_file(str(path)).encode(text).ids
    return word_starts(path)[ids].tolist()


def test_words_of_byte_level_bpe(tmp_path: Path) -> None:
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(special_tokens=["<eod>"], initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator([" at at at"], trainer)
    path = saved(tmp_path / "tokenizer.json", inner)
    tokens = tokenizers.Tokenizer.from_file(str(path)).encode("c at, x").tokens
    assert dict(zip(tokens, begins(path, "c at, x"), strict=True)) == {
        "c": False, "Ġat": True, ",": True, "Ġ": True, "x": False,
    }  # fmt: skip
    assert word_starts(path)[inner.token_to_id("<eod>")]


def test_words_of_wordpiece_and_sentencepiece(tmp_path: Path) -> None:
    pieces = {"[UNK]": 0, "play": 1, "##ing": 2, "##s": 3, "he": 4}
    inner = tokenizers.Tokenizer(tokenizers.models.WordPiece(pieces, unk_token="[UNK]"))
    assert word_starts(saved(tmp_path / "pieces.json", inner)).tolist() == [True, True, False, False, True]
    marked = [("<unk>", 0.0), ("▁play", -1.0), ("ing", -2.0), ("▁", -3.0), (".", -3.0)]
    inner = tokenizers.Tokenizer(tokenizers.models.Unigram(marked, 0))
    assert word_starts(saved(tmp_path / "marked.json", inner)).tolist() == [False, True, False, True, True]


@pytest.mark.parametrize("length", [1, 2])
def test_short_rows(length: int) -> None:
    batch = masked(rows_of(3, length), np.arange(3), rate=1.0, word_starts=np.zeros(VOCAB, np.bool_))
    assert batch.weights.all()


def test_samples_of_a_stream_are_the_same_in_any_parts(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, counting([30, 7, 90, 12]))
    how = Masking(3, MASK, VOCAB)
    stream = ShardStream(dataset, "train", 8, seed=2, documents=True)
    ids, rows = stream.rows(5, 11)
    whole = how(rows, ids)
    assert whole.weights.any()
    parts = [stream.rows(5, 11, part, 3) for part in range(3)]
    batches = [how(rows, ids) for ids, rows in parts]
    for name in whole._fields:
        assert np.array_equal(np.concatenate([getattr(batch, name) for batch in batches]), getattr(whole, name))
