"""Small data sets for tests, written without a tokenizer run."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from raytron.data.manifest import Manifest, ShardEntry, Source, Split, Unigram, write_manifest
from raytron.data.shard_file import digest_of, offsets_of, token_dtype, write_shard
from raytron.data.shards import Dataset, open_dataset

TOKENIZER = b'{"stands for": "a tokenizer"}'


def make_dataset(
    folder: Path,
    train: Sequence[Sequence[Sequence[int]]],
    validation: Sequence[Sequence[Sequence[int]]] = (),
    vocab: int = 1000,
    spans: Sequence[Sequence[Sequence[int]]] | None = None,
    tokenizer: bytes = TOKENIZER,
    **changes: Any,
) -> Dataset:
    """A data set whose splits are given as shards of documents of token ids; `changes` go into its manifest.

    spans: of each document of each training shard, the loss spans as one flat list.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_bytes(tokenizer)
    splits: list[tuple[Split, Sequence[Sequence[Sequence[int]]]]] = [("train", train), ("validation", validation)]
    entries = [
        write_entry(
            folder,
            f"{split}-{number:05d}.arrow",
            split,
            documents,
            vocab,
            spans[number] if spans and split == "train" else None,
        )
        for split, shards in splits
        for number, documents in enumerate(shards)
    ]
    counts = np.bincount([t for shard in train for document in shard for t in document], minlength=vocab)
    manifest = Manifest(
        shards=tuple(entries),
        tokenizer_sha256=hashlib.sha256(tokenizer).hexdigest(),
        vocab=vocab,
        eod=0,
        sources=(Source("made", 1, 1),),
        validation_fraction=0.1,
        unigram=Unigram.of(counts),
        build={},
        corpus_xxh3_128="0" * 32,
    )
    write_manifest(folder, replace(manifest, **changes))
    return open_dataset(folder)


def write_entry(
    folder: Path,
    name: str,
    split: Split,
    documents: Sequence[Sequence[int]],
    vocab: int = 1000,
    spans: Sequence[Sequence[int]] | None = None,
) -> ShardEntry:
    tokens = np.array([token for document in documents for token in document], token_dtype(vocab))
    lengths = np.array([len(document) for document in documents], np.int64)
    path = folder / name
    write_shard(path, tokens, offsets_of(lengths), np.arange(len(documents), dtype=np.uint64), columns=spans_of(spans))
    return ShardEntry(name, split, len(documents), len(tokens), path.stat().st_size, digest_of(path))


def spans_of(spans: Sequence[Sequence[int]] | None) -> dict[str, Any]:
    """Flat lists of pairs, one for each document, as the column of a shard."""
    return {} if spans is None else {"loss_spans": pa.array([list(pairs) for pairs in spans], pa.list_(pa.int32()))}


def counting(*shards: Sequence[int], first: int = 1) -> list[list[list[int]]]:
    """Shards of documents of these lengths, whose tokens count up over all of them: each says where it is from."""
    numbers = itertools.count(first)
    return [[[next(numbers) for _ in range(length)] for length in lengths] for lengths in shards]
