"""A tokenized data set: a folder with a manifest, a tokenizer and shards.

    manifest.json     what there is, with digests
    tokenizer.json    how text became tokens
    train-00000.arrow, …, validation-00000.arrow, …

`open_dataset` reads the manifest alone (milliseconds, however large the data); `Dataset.verify` reads every byte.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from raytron.data.loss_spans import spans_fit
from raytron.data.manifest import Manifest, ShardEntry, Split, read_manifest
from raytron.data.shard_file import REBUILD, Shard, digest_of, read_shard
from raytron.data.shard_table import ShardTable
from raytron.errors import DataError, Problem

TOKENIZER_NAME = "tokenizer.json"


@dataclass(frozen=True)
class Dataset:
    """An opened data set: cheap to hold, to copy and to pickle; shards are mapped when they are asked for."""

    path: Path
    manifest: Manifest

    @property
    def tokenizer(self) -> Path:
        """The path of its tokenizer.json."""
        return self.path / TOKENIZER_NAME

    @property
    def vocab(self) -> int:
        """Token ids are in [0, vocab)."""
        return self.manifest.vocab

    @property
    def eod(self) -> int:
        """Id of the token that ends each document."""
        return self.manifest.eod

    @property
    def hash(self) -> str:
        """One digest of the whole data set: equal for equal data only."""
        return self.manifest.hash

    @property
    def unigram_entropy(self) -> float:
        """Nats per training token, for a model that knows only how often each occurs."""
        return self.manifest.unigram.nats

    def entries(self, split: Split) -> ShardTable:
        """The shards of a split, as a sequence of ShardEntry and as columns."""
        return self.manifest.table.of_split(split)

    def tokens(self, split: Split) -> int:
        return int(self.entries(split).column("tokens").sum())

    def documents(self, split: Split) -> int:
        return int(self.entries(split).column("documents").sum())

    def read(self, entry: ShardEntry) -> Shard:
        """Maps one shard. Raises DataError where it is missing, a link out of the folder, or not what its entry says."""
        path = self.path / entry.path
        if path.is_symlink() and not path.resolve().is_relative_to(self.path.resolve()):
            raise DataError(Problem(str(path), "the shard lies outside the data set", REBUILD))
        shard = read_shard(path)
        if (len(shard.tokens), shard.documents) != (entry.tokens, entry.documents):
            what = (
                f"holds {len(shard.tokens)} tokens in {shard.documents} documents; "
                f"the manifest says {entry.tokens} in {entry.documents}"
            )
            raise DataError(Problem(str(path), what, REBUILD))
        return shard

    def misfits(self, *, vocab: int | None = None, tokenizer_sha256: str | None = None) -> list[Problem]:
        """What keeps a model with `vocab` token ids, or whoever holds that tokenizer, from using this data set."""
        found = []
        if vocab is not None and self.vocab > vocab:
            what = f"its token ids go up to {self.vocab - 1}, the model's only to {vocab - 1}"
            found.append(Problem(str(self.path), what, f"set model.vocab to {self.vocab} or more"))
        if tokenizer_sha256 is not None and tokenizer_sha256 != self.manifest.tokenizer_sha256:
            what = f"was tokenized with another tokenizer ({self.manifest.tokenizer_sha256[:12]}…"
            remedy = f"use {self.tokenizer}, or tokenize the corpus with your tokenizer"
            found.append(Problem(str(self.path), f"{what}, not {tokenizer_sha256[:12]}…)", remedy))
        return found

    def verify(self) -> None:
        """Reads every byte: digests, structure, token ids. Raises DataError with everything that is wrong."""
        found = self._tokenizer_problems()
        for entry in self.manifest.shards:
            found += self._shard_problems(entry)
        if found:
            raise DataError("\n".join(map(str, found)))

    def _tokenizer_problems(self) -> list[Problem]:
        try:
            digest = hashlib.sha256(self.tokenizer.read_bytes()).hexdigest()
        except OSError:
            return [Problem(str(self.tokenizer), "the tokenizer is missing", REBUILD)]
        if digest != self.manifest.tokenizer_sha256:
            return [Problem(str(self.tokenizer), "is not the tokenizer that made this data set", REBUILD)]
        return []

    def _shard_problems(self, entry: ShardEntry) -> list[Problem]:
        path = self.path / entry.path
        try:
            if path.stat().st_size != entry.bytes:
                what = f"has {path.stat().st_size} bytes; the manifest says {entry.bytes}"
                return [Problem(str(path), what, REBUILD)]
            if digest_of(path) != entry.xxh3_128:
                return [Problem(str(path), "is damaged: its digest is not the manifest's", REBUILD)]
            return [Problem(str(path), what, REBUILD) for what in _content_faults(self.read(entry), self.vocab)]
        except OSError:
            return [Problem(str(path), "the shard is missing", REBUILD)]
        except DataError as error:
            return [error.args[0]]


def _content_faults(shard: Shard, vocab: int) -> list[str]:
    """What is wrong with the tokens and offsets of a shard."""
    found = []
    if len(shard.tokens) and int(shard.tokens.max()) >= vocab:
        found.append(f"token id {int(shard.tokens.max())} is beyond the vocabulary of {vocab}")
    lengths = np.diff(shard.offsets)
    if shard.offsets[0] != 0 or shard.offsets[-1] != len(shard.tokens) or (len(lengths) and lengths.min() < 1):
        found.append("document boundaries are out of order")
    if shard.spans is not None and not spans_fit(shard.spans, lengths):
        found.append("loss spans are not pairs that ascend within their document")
    return found


def open_dataset(path: str | Path) -> Dataset:
    """Opens the data set in a folder by its manifest.

    Raises DataError where the folder holds no manifest, one of another format version, a damaged one, one whose shards
    lie outside the folder, a tokenizer that is missing or another's, or no training token at all.
    """
    folder = Path(path)
    dataset = Dataset(folder, read_manifest(folder))
    found = dataset._tokenizer_problems()
    if not dataset.tokens("train"):
        found.append(Problem(str(folder), "holds no training token", "tokenize a corpus that has text"))
    if found:
        raise DataError("\n".join(map(str, found)))
    return dataset
