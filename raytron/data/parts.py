"""What a task of tokenization leaves behind: parts, each a small shard, and a receipt that says they are whole.

    parts/000007-train-000.arrow   tokens of one split, at most about a shard's worth
          000007-train-001.arrow
          000007-validation-000.arrow
          000007.json              written last: what the task was, counts, size and digest of each part

Tokens go to the disk as they come, so that a task's memory does not grow with its text. A task whose receipt is there,
was given for the same work, and whose parts have their digests, is not done again: that is how an attempt goes on where
one before it was killed.
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raytron.data.manifest import SPLITS, Split
from raytron.data.order import mix64
from raytron.data.shard_file import CHUNK_BYTES, digest_of, offsets_of, replacing, token_dtype, write_shard_of

Types = Mapping[str, pa.DataType]  # of columns beside the tokens and the ids of documents
Columns = Mapping[str, Sequence[Any]]  # their values, one for each document


@dataclass(frozen=True)
class Part:
    """Some documents of one split, in a file; their place in the corpus is that of the part in a list."""

    path: str
    split: Split
    documents: int
    tokens: int
    bytes: int = 0  # of the file
    xxh3_128: str = ""  # of the file, in hex


class PartWriter:
    """Writes the documents of one split, one part after another.

    stem: of the files' names. limit: tokens after which a part ends, with what was added when it was reached. types: of
    what else is kept of each document, by the name of its column.
    """

    def __init__(
        self,
        folder: Path,
        stem: str,
        split: Split,
        dtype: type[np.uint16] | type[np.uint32],
        limit: int,
        types: Types,
    ):
        self.folder, self.stem, self.split, self.dtype, self.limit = folder, stem, split, dtype, limit
        self.types = types
        self.parts: list[Part] = []
        self._spooled = folder / f".{stem}.{os.getpid()}.spool"
        self._begin()

    def _begin(self) -> None:
        self._file: Any = None
        self._lengths, self._ids = array("q"), array("Q")
        self._kept: dict[str, list[Any]] = {name: [] for name in self.types}
        self._tokens = self._under_way = 0

    def extend(self, tokens: NDArray[np.uint32]) -> None:
        """Tokens (n,) of a document that goes on."""
        if self._file is None:
            self._file = self._spooled.open("wb")
        self._file.write(tokens.astype(self.dtype).data)
        self._under_way += len(tokens)

    def end(self, doc_id: int, kept: Mapping[str, Any]) -> None:
        """Ends the document that goes on. kept: a value for each column."""
        length, self._under_way = self._under_way, 0
        self._add_facts([length], [doc_id], {name: [value] for name, value in kept.items()})

    def add(self, tokens: NDArray[np.uint32], lengths: Sequence[int], ids: Sequence[int], kept: Columns) -> None:
        """Whole documents, their tokens (sum of lengths,) one after another. kept: the values of each column."""
        if len(lengths):
            self.extend(tokens)
            self._under_way = 0
            self._add_facts(lengths, ids, kept)

    def finish(self) -> list[Part]:
        """Every part."""
        self._close()
        return self.parts

    def abandon(self) -> None:
        """Takes back what is not a part yet."""
        if self._file is not None:
            self._file.close()
        self._spooled.unlink(missing_ok=True)

    def _add_facts(self, lengths: Sequence[int], ids: Sequence[int], kept: Columns) -> None:
        self._lengths.extend(lengths)
        self._ids.extend(ids)
        self._tokens += sum(lengths)
        for name, kind in self.types.items():
            self._kept[name].append(pa.array(kept[name], kind))
        if self._tokens >= self.limit:
            self._close()

    def _close(self) -> None:
        if self._file is None:
            return
        self._file.close()
        path = self.folder / f"{self.stem}-{len(self.parts):03d}.arrow"
        columns = {name: pa.concat_arrays(arrays) for name, arrays in self._kept.items()}
        offsets = offsets_of(np.frombuffer(self._lengths, np.int64))
        write_shard_of(path, self._spool(), self.dtype, offsets, np.frombuffer(self._ids, np.uint64), columns=columns)
        size, digest = path.stat().st_size, digest_of(path)
        self.parts.append(Part(str(path), self.split, len(self._lengths), self._tokens, size, digest))
        self._spooled.unlink()
        self._begin()

    def _spool(self) -> Iterator[NDArray[Any]]:
        """The tokens that were put aside, in pieces."""
        with self._spooled.open("rb") as file:
            while data := file.read(CHUNK_BYTES):
                yield np.frombuffer(data, self.dtype)


class Splits:
    """The parts under way of one task, a writer for each split, and how often each id occurs in training.

    A document's id chooses its split, the validation split with probability `fraction`; documents that belong together
    have one key in its place.
    """

    def __init__(self, folder: Path, group: int, vocab: int, fraction: float, limit: int, types: Types | None = None):
        self.fraction = fraction
        self.counts = np.zeros(vocab, np.int64)
        dtype = token_dtype(vocab)
        self.writers = {
            split: PartWriter(folder, f"{group:06d}-{split}", split, dtype, limit, types or {}) for split in SPLITS
        }

    def add(
        self,
        tokens: NDArray[np.uint32],
        lengths: NDArray[np.int64],
        ids: Sequence[int],
        kept: Columns | None = None,
        keys: Sequence[int] | None = None,
    ) -> None:
        """Whole documents: their tokens (sum of lengths,), the end of each included, and for each its length, its id and
        the value of each column."""
        held_out = np.array([is_validation(one, self.fraction) for one in keys or ids], bool)
        for split, writer in self.writers.items():
            chosen = held_out if split == "validation" else ~held_out
            rows = np.flatnonzero(chosen).tolist()
            taken = tokens[np.repeat(chosen, lengths)]
            values = {name: [column[row] for row in rows] for name, column in (kept or {}).items()}
            writer.add(taken, lengths[chosen].tolist(), [ids[row] for row in rows], values)
            self._count(split, taken)

    def add_pieces(
        self, pieces: Iterable[NDArray[np.uint32]], doc_id: int, kept: Mapping[str, Any] | None = None
    ) -> None:
        """One document, its tokens in pieces, its end included."""
        split: Split = "validation" if is_validation(doc_id, self.fraction) else "train"
        for piece in pieces:
            self.writers[split].extend(piece)
            self._count(split, piece)
        self.writers[split].end(doc_id, kept or {})

    def finish(self) -> tuple[Part, ...]:
        """Every part, training first."""
        return tuple(part for writer in self.writers.values() for part in writer.finish())

    def abandon(self) -> None:
        """Takes back what is not a part yet."""
        for writer in self.writers.values():
            writer.abandon()

    def _count(self, split: Split, tokens: NDArray[np.uint32]) -> None:
        if split == "train":
            self.counts += np.bincount(tokens, minlength=len(self.counts))


def is_validation(doc_id: int, fraction: float) -> bool:
    """Whether a document belongs to the validation split: true for `fraction` of all ids."""
    return mix64(doc_id) < fraction * 2**64


@dataclass(frozen=True)
class Done:
    """What one task did."""

    group: int  # its number
    parts: tuple[Part, ...]
    digest: str  # xxh3-128 of the ids of its documents, in order
    documents: int = 0
    skipped: int = 0  # files, or parts of files, without a document
    bad: int = 0  # records that were skipped
    bad_examples: tuple[str, ...] = ()
    backend: str = ""  # the library that encoded
    reason: str = ""  # why gigatoken did not
    kept: bool = False  # an attempt before this one did it

    @property
    def tokens(self) -> int:
        return sum(part.tokens for part in self.parts)

    @classmethod
    def of(cls, facts: dict[str, Any], folder: Path | None = None) -> Done:
        """From plain values; parts named relative to `folder`, where it is given."""
        parts = [Part(**part) for part in facts["parts"]]
        if folder is not None:
            parts = [Part(**{**asdict(part), "path": str(folder / part.path)}) for part in parts]
        return cls(**{**facts, "parts": tuple(parts), "bad_examples": tuple(facts["bad_examples"])})


def write_receipt(folder: Path, key: str, done: Done, counts: NDArray[np.int64]) -> None:
    """Says that a task is done. key: what the work was. counts: (vocab,) of each id in its training parts."""
    facts = asdict(done)
    for part in facts["parts"]:
        part["path"] = Path(part["path"]).name
    with replacing(_receipt(folder, done.group)) as temporary:
        temporary.write_text(json.dumps({"key": key, "done": facts, "counts": " ".join(map(str, counts.tolist()))}))


def read_receipt(folder: Path, key: str, group: int) -> tuple[Done, NDArray[np.int64]] | None:
    """What a task did before, if it was the same work and its parts are as they were; else None."""
    try:
        facts = json.loads(_receipt(folder, group).read_text())
        if facts["key"] != key:
            return None
        done = Done.of({**facts["done"], "kept": True}, folder)
        counts = np.array(facts["counts"].split(), np.int64)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return (done, counts) if all(map(_is_whole, done.parts)) else None


def _receipt(folder: Path, group: int) -> Path:
    return folder / f"{group:06d}.json"


def _is_whole(part: Part) -> bool:
    path = Path(part.path)
    try:
        return path.stat().st_size == part.bytes and digest_of(path) == part.xxh3_128
    except OSError:
        return False
