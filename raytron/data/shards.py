"""A tokenized data set: a folder with a manifest, a tokenizer and shards.

    manifest.json     what there is, with digests
    tokenizer.json    how text became tokens
    train-00000.arrow, …, validation-00000.arrow, …

`open_dataset` reads the manifest alone (milliseconds, however large the data); `Dataset.verify` reads every byte. A data
set may lie in an object store: then manifest and tokenizer are copied into the cache of this user, and of the shards only
what samples hold is fetched (`raytron.data.ranged`).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from raytron.data.files import RANGE_BYTES, exists, opened, read_file, url_of
from raytron.data.loss_spans import spans_fit
from raytron.data.manifest import FILE_NAME, Manifest, ShardEntry, Split, read_manifest
from raytron.data.ranged import RangedShard
from raytron.data.shard_file import REBUILD, Shard, digest_of, read_shard, replacing
from raytron.data.shard_table import TABLE_NAME, ShardTable
from raytron.errors import DataError, Problem

TOKENIZER_NAME = "tokenizer.json"


@dataclass(frozen=True)
class Dataset:
    """An opened data set: cheap to hold, to copy and to pickle; shards are mapped when they are asked for."""

    path: Path  # the folder; of a remote one, that of the copies of all but its shards
    manifest: Manifest
    url: str | None = None  # where its shards lie, if not in the folder

    @property
    def name(self) -> str:
        """Where it is, as people write it."""
        return self.url or str(self.path)

    def path_of(self, entry: ShardEntry) -> str:
        """Where a shard is."""
        return str(self.path / entry.path) if self.url is None else f"{self.url}/{entry.path}"

    @property
    def tokenizer(self) -> Path:
        """The path of its tokenizer.json."""
        return self.path / TOKENIZER_NAME

    @property
    def tokenizer_sha256(self) -> str:
        return self.manifest.tokenizer_sha256

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
        """Maps one shard, or finds where a remote one lies.

        Raises DataError where it is missing, a link out of the folder, or not what its entry says.
        """
        if self.url is not None:
            return self._fitting(RangedShard(self.path_of(entry), entry.bytes), entry)
        path = self.path / entry.path
        if path.is_symlink() and not path.resolve().is_relative_to(self.path.resolve()):
            raise DataError(Problem(str(path), "the shard lies outside the data set", REBUILD))
        return self._fitting(read_shard(path), entry)

    def _fitting(self, shard: Shard, entry: ShardEntry) -> Shard:
        """The shard, if it is what its entry says."""
        if (len(shard.tokens), shard.documents) != (entry.tokens, entry.documents):
            what = (
                f"holds {len(shard.tokens)} tokens in {shard.documents} documents; "
                f"the manifest says {entry.tokens} in {entry.documents}"
            )
            raise DataError(Problem(self.path_of(entry), what, REBUILD))
        return shard

    def misfits(self, *, vocab: int | None = None, tokenizer_sha256: str | None = None) -> list[Problem]:
        """What keeps a model with `vocab` token ids, or whoever holds that tokenizer, from using this data set."""
        found = ids_beyond(vocab, self.name, self.vocab)
        if tokenizer_sha256 is not None and tokenizer_sha256 != self.manifest.tokenizer_sha256:
            what = f"was tokenized with another tokenizer ({self.manifest.tokenizer_sha256[:12]}…"
            remedy = f"use {self.tokenizer}, or tokenize the corpus with your tokenizer"
            found.append(Problem(self.name, f"{what}, not {tokenizer_sha256[:12]}…)", remedy))
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
        if self.url is not None:
            return self._remote_problems(entry)
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

    def _remote_problems(self, entry: ShardEntry) -> list[Problem]:
        """The same of a copy of a remote shard, which is fetched for it."""
        with tempfile.TemporaryDirectory(prefix="raytron-") as folder:
            copy = Path(folder) / entry.path
            copy.parent.mkdir(parents=True, exist_ok=True)
            try:
                with opened(self.path_of(entry)) as remote, copy.open("wb") as file:
                    shutil.copyfileobj(remote, file, RANGE_BYTES)
            except FileNotFoundError:
                return [Problem(self.path_of(entry), "the shard is missing", REBUILD)]
            found = Dataset(Path(folder), self.manifest)._shard_problems(entry)
        return [problem._replace(where=self.path_of(entry)) for problem in found]


def ids_beyond(vocab: int | None, name: str, ids: int) -> list[Problem]:
    """What keeps a model with `vocab` token ids from using data of so many, by its name. None: any model will do."""
    if vocab is None or ids <= vocab:
        return []
    what = f"its token ids go up to {ids - 1}, the model's only to {vocab - 1}"
    return [Problem(name, what, f"set model.vocab to {ids} or more")]


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
    """Opens the data set in a folder, or at a URL, by its manifest.

    Raises DataError where the folder holds no manifest, one of another format version, a damaged one, one whose shards
    lie outside the folder, a tokenizer that is missing or another's, or no training token at all.
    """
    url = url_of(path)
    folder = _copied(url) if url is not None else Path(str(path).removeprefix("file://"))
    dataset = Dataset(folder, read_manifest(folder), url)
    found = dataset._tokenizer_problems()
    if not dataset.tokens("train"):
        found.append(Problem(dataset.name, "holds no training token", "tokenize a corpus that has text"))
    if found:
        raise DataError("\n".join(map(str, found)))
    return dataset


def holds_dataset(place: str | Path) -> bool:
    """Whether a data set lies in a folder or at a URL. Raises DataError where a store can't be reached."""
    url = url_of(place)
    return exists(f"{url}/{FILE_NAME}") if url is not None else (Path(place) / FILE_NAME).exists()


def cache_folder() -> Path:
    """Where this user's copies of small remote files go: XDG_CACHE_HOME, or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "raytron"


def _copied(url: str) -> Path:
    """A folder with copies of all that a remote data set holds but its shards, fetched now. Raises DataError."""
    folder = cache_folder() / "data" / hashlib.sha256(url.encode()).hexdigest()[:24]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in (TOKENIZER_NAME, TABLE_NAME, FILE_NAME):  # the manifest last: it tells of the others
            if name != TABLE_NAME or exists(f"{url}/{name}"):
                _copy(f"{url}/{name}", folder / name)
    except FileNotFoundError:
        remedy = "give the place of a data set, or tokenize the corpus"
        raise DataError(
            Problem(url, f"is no data set: it holds no {FILE_NAME}, or no {TOKENIZER_NAME}", remedy)
        ) from None
    except OSError as error:
        remedy = "set XDG_CACHE_HOME to a folder with room"
        raise DataError(Problem(str(folder), f"a copy can't be kept: {error.strerror}", remedy)) from None
    return folder


def _copy(url: str, path: Path) -> None:
    content = read_file(url)
    if not path.exists() or path.read_bytes() != content:
        with replacing(path) as temporary:
            temporary.write_bytes(content)
