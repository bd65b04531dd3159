"""Small data sets for tests, written without a tokenizer run."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from raytron.data.manifest import Manifest, ShardEntry, Source, Split, Unigram, write_manifest
from raytron.data.shard_file import digest_of, offsets_of, token_dtype, write_shard
from raytron.data.shards import Dataset, open_dataset

TOKENIZER = b'{"stands for": "a tokenizer"}'


def make_dataset(
    folder: Path,
    train: Sequence[Sequence[Sequence[int]]],
    validation: Sequence[Sequence[Sequence[int]]] = (),
    vocab: int = 1000,
    **changes: Any,
) -> Dataset:
    """A data set whose splits are given as shards of documents of token ids; `changes` go into its manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_bytes(TOKENIZER)
    splits: list[tuple[Split, Sequence[Sequence[Sequence[int]]]]] = [("train", train), ("validation", validation)]
    entries = [
        write_entry(folder, f"{split}-{number:05d}.arrow", split, documents, vocab)
        for split, shards in splits
        for number, documents in enumerate(shards)
    ]
    counts = np.bincount([t for shard in train for document in shard for t in document], minlength=vocab)
    manifest = Manifest(
        shards=tuple(entries),
        tokenizer_sha256=hashlib.sha256(TOKENIZER).hexdigest(),
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
    folder: Path, name: str, split: Split, documents: Sequence[Sequence[int]], vocab: int = 1000
) -> ShardEntry:
    tokens = np.array([token for document in documents for token in document], token_dtype(vocab))
    lengths = np.array([len(document) for document in documents], np.int64)
    path = folder / name
    write_shard(path, tokens, offsets_of(lengths), np.arange(len(documents), dtype=np.uint64))
    return ShardEntry(name, split, len(documents), len(tokens), path.stat().st_size, digest_of(path))
