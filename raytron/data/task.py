"""One task of tokenization: some units of the corpus, read, encoded and written, in bounded memory.

    records ─► batches of about CHUNK_CHARS ─► ids ─► a part under way for each split ─► parts ─► receipt

A record longer than a piece is encoded piece by piece. Whatever the files' sizes, a task holds one record, one batch and
its ids, and of each document of a part its id and its length.

A document's id is a digest of its text, and that chooses its split: it stays in its split when text is added later, and
two copies of one document never stand on both sides.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from raytron.data.chat import Chat, encode
from raytron.data.fast import Encoder
from raytron.data.parts import Done, Splits, read_receipt, write_receipt
from raytron.data.records import Fields, Record, Tally, Unit, records
from raytron.data.tokenizer import PIECE_CHARS, Tokenizer, pieces

CHUNK_CHARS = 2**20  # text that is encoded at once


@dataclass(frozen=True)
class Job:
    """What is the same for every task."""

    folder: str  # where parts are written; the same directory on every node
    tokenizer: str
    eod: str
    text_key: str  # or the key of the messages
    validation_fraction: float
    part_tokens: int = 2**27  # after which a part ends
    metadata_keys: tuple[str, ...] = ()
    on_bad_record: str = "stop"
    backend: str = "auto"
    tokenizer_sha256: str = ""  # a file that is another one now is loaded anew
    format: str = "text"  # `data.format`
    chat_template: str | None = None  # of conversations, in Jinja; None: records are text

    @property
    def fields(self) -> Fields:
        return Fields(self.text_key, self.metadata_keys, self.on_bad_record, self.format)

    @property
    def types(self) -> dict[str, pa.DataType]:
        """Of the columns beside the tokens and the ids of documents."""
        types = {"metadata": pa.large_string()} if self.metadata_keys else {}
        if self.format != "text":
            types["loss_spans"] = pa.list_(pa.int32())
        return types if self.format != "preference" else {**types, "pair_id": pa.uint64(), "chosen": pa.bool_()}

    def key(self, units: Sequence[Unit], tokenizer_sha256: str) -> str:
        """A digest of what decides the result of a task: equal keys, equal parts."""
        decides = (tokenizer_sha256, self.eod, self.validation_fraction, self.part_tokens, astuple(self.fields))
        text = json.dumps([decides, self.chat_template, [astuple(unit) for unit in units]])
        return xxhash.xxh3_128_hexdigest(text.encode())


def tokenize_group(group: int, units: Sequence[Unit], job: Job) -> tuple[Done, NDArray[np.int64]]:
    """Does one task, or finds it done. Returns what was done and the counts (vocab,) of its training ids.

    Raises DataError for text that can't be read.
    """
    tokenizer = _tokenizer(job.tokenizer, job.eod, job.tokenizer_sha256)
    folder, key = Path(job.folder), job.key(units, tokenizer.sha256)
    before = read_receipt(folder, key, group)
    if before is not None:
        return before
    work = _Work(group, tokenizer, job)
    try:
        for unit in units:
            work.read(unit)
        done = work.finish()
    finally:
        work.splits.abandon()
    write_receipt(folder, key, done, work.splits.counts)
    return done, work.splits.counts


class _Work:
    """A task under way."""

    def __init__(self, group: int, tokenizer: Tokenizer, job: Job):
        self.group, self.job, self.eod = group, job, tokenizer.eod
        self.encoder = Encoder(tokenizer, job.backend)
        self.chat = None if job.chat_template is None else Chat(job.chat_template, tokenizer)
        fraction, limit = job.validation_fraction, job.part_tokens
        self.splits = Splits(Path(job.folder), group, tokenizer.vocab, fraction, limit, job.types)
        self._batch: list[Record] = []
        self._chars = self._skipped = self._documents = 0
        self._order = xxhash.xxh3_128()
        self._tally = Tally()

    def read(self, unit: Unit) -> None:
        """Takes in the records of a unit."""
        held = False
        for record in records(unit, self.job.fields, self._tally, self.chat):
            held = True
            if self.chat is None and len(record.text) > PIECE_CHARS:
                self._flush()
                self._take_giant(record)
                continue
            self._batch.append(record)
            self._chars += len(record.text)
            if self._chars >= CHUNK_CHARS and not record.chosen:  # a pair stays in one part
                self._flush()
        self._skipped += not held

    def finish(self) -> Done:
        self._flush()
        return Done(
            group=self.group,
            parts=self.splits.finish(),
            digest=self._order.hexdigest(),
            documents=self._documents,
            skipped=self._skipped,
            bad=self._tally.bad,
            bad_examples=tuple(self._tally.examples),
            backend=self.encoder.name,
            reason=self.encoder.reason,
        )

    def _flush(self) -> None:
        """Encodes the batch, and hands its documents on."""
        batch, self._batch, self._chars = self._batch, [], 0
        if not batch:
            return
        ids = [xxhash.xxh3_64_intdigest(record.text.encode("utf-8")) for record in batch]
        kept: dict[str, Sequence[Any]] = {"metadata": [one.metadata for one in batch]} if self.job.metadata_keys else {}
        if self.chat is not None:
            flat, lengths, kept["loss_spans"] = encode([one.segments for one in batch], self.encoder, self.eod)
        else:
            flat, lengths = self.encoder.encode([record.text for record in batch])
            flat, lengths = np.insert(flat, np.cumsum(lengths), self.eod), lengths + 1
        keys = ids
        if self.job.format == "preference":
            keys = [one.pair or 0 for one in batch]
            kept |= {"pair_id": keys, "chosen": [one.chosen for one in batch]}
        self.splits.add(flat, lengths, ids, kept, keys)
        self._note(ids)

    def _take_giant(self, record: Record) -> None:
        """Encodes a long document, piece by piece."""
        digest = xxhash.xxh3_64()
        for piece in pieces(record.text):
            digest.update(piece.encode("utf-8"))
        encoded = (self.encoder.encode([piece])[0] for piece in pieces(record.text))
        end = np.array([self.eod], np.uint32)
        kept = {"metadata": record.metadata} if self.job.metadata_keys else {}
        self.splits.add_pieces(chain(encoded, [end]), digest.intdigest(), kept)
        self._note([digest.intdigest()])

    def _note(self, ids: Sequence[int]) -> None:
        self._order.update(np.array(ids, np.uint64).tobytes())
        self._documents += len(ids)


@functools.lru_cache(maxsize=1)
def _tokenizer(path: str, eod: str, sha256: str) -> Tokenizer:
    """Loaded once a process for the tasks of a job, each of which has one CPU and so starts no threads."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return Tokenizer(path, eod)
