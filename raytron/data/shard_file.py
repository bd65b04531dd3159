"""One file of tokens: an uncompressed Arrow IPC file that is read in place.

A shard is one record batch, a row a document:

    tokens: large_list<uint16 | uint32>   the document's ids, its end-of-document token last
    doc_id: uint64                        what chose its split
    metadata: large_string                where `data.metadata_keys` asks for it: a JSON object
    loss_spans: list<int32>               of conversations: pairs [start, stop) of its tokens that are learned
    pair_id: uint64, chosen: bool         of preferences: the document beside it has the same id, and is the other side

Arrow stores a list column as two flat buffers, so the whole shard is one array of tokens, in which a training sample is
one slice, and one array of offsets, where the documents begin: no index file, nothing is scanned or copied at start-up.

    values    t t t t e t t e t t t t t e        offsets    0 5 8 14

A shard is written beside its name, flushed to the disk, then renamed: a name that exists is a shard that is whole. Its
tokens need not fit into memory: Arrow lays the file out around as many zeros, which take none, and the tokens are then
written over them.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from raytron.errors import DataError, Problem

CHUNK_BYTES = 8 * 2**20
REBUILD = "tokenize the data set again, or restore it from a copy"


class Spans(NamedTuple):
    """The loss spans of documents: pairs [start, stop), ascending and apart, counted from the document's first token.

    A token in a span counts in the loss as a label, what a model is to say; the others are only what it is told.
    """

    offsets: NDArray[np.int32]  # (documents + 1,): those of document d are values[offsets[d]:offsets[d + 1]]
    values: NDArray[np.int32]  # (2 · spans,)


@dataclass(frozen=True, eq=False)
class Shard:
    """The arrays of one shard, as views of the file."""

    path: Path
    tokens: NDArray[np.uint16] | NDArray[np.uint32]  # (number of tokens,)
    offsets: NDArray[np.int64]  # (documents + 1,): document d is tokens[offsets[d]:offsets[d + 1]]
    doc_ids: NDArray[np.uint64]  # (documents,)
    columns: Mapping[str, pa.Array] = field(default_factory=dict)  # what else the rows hold, each (documents,)

    @property
    def documents(self) -> int:
        return len(self.doc_ids)

    def begins(self, start: int, stop: int) -> NDArray[np.int64]:
        """Where documents begin among the tokens [start, stop), counted from `start`; 0 for the one that `start` is in."""
        offsets = self.offsets
        begins = offsets[offsets.searchsorted(start, "right") - 1 : offsets.searchsorted(stop)] - start
        begins[0] = 0
        return begins

    @cached_property
    def spans(self) -> Spans | None:
        """The loss spans of its documents; None: every token counts. Raises DataError where they are of another type."""
        lists = self.columns.get("loss_spans")
        if lists is None:
            return None
        if lists.type != pa.list_(pa.int32()):
            what = f"the column `loss_spans` is {lists.type}, not a list of int32"
            raise DataError(Problem(str(self.path), what, REBUILD))
        return Spans(lists.offsets.to_numpy(zero_copy_only=True), lists.values.to_numpy(zero_copy_only=True))


def token_dtype(vocab: int) -> type[np.uint16] | type[np.uint32]:
    """The narrowest type that holds every id of a vocabulary."""
    return np.uint16 if vocab <= 2**16 else np.uint32


def write_shard(
    path: Path,
    tokens: NDArray[np.uint16] | NDArray[np.uint32],
    offsets: NDArray[np.int64],
    doc_ids: NDArray[np.uint64],
    *,
    columns: Mapping[str, pa.Array] | None = None,
) -> None:
    """Writes a shard so that it is either whole or absent. Shapes as in `Shard`; the folder must exist."""
    with replacing(path) as temporary:
        _write(temporary, tokens, offsets, doc_ids, columns or {})


def write_shard_of(
    path: Path,
    tokens: Iterable[NDArray[Any]],
    dtype: type[np.uint16] | type[np.uint32],
    offsets: NDArray[np.int64],
    doc_ids: NDArray[np.uint64],
    *,
    columns: Mapping[str, pa.Array] | None = None,
) -> None:
    """Writes the file that `write_shard` would, its tokens coming in pieces that together are offsets[-1] long."""
    total = int(offsets[-1])
    with replacing(path) as temporary:
        _write(temporary, np.zeros(total, dtype), offsets, doc_ids, columns or {})
        start = _values_start(temporary)
        with temporary.open("r+b") as file:
            file.seek(start)
            for piece in tokens:
                file.write(np.ascontiguousarray(piece, dtype).data)
            written = (file.tell() - start) // np.dtype(dtype).itemsize
        if written != total:
            raise ValueError(f"{written} tokens were given, not {total}")


def token_chunks(path: Path) -> Iterator[NDArray[Any]]:
    """The tokens of a shard in pieces of CHUNK_BYTES, read rather than mapped: each is all that is in memory."""
    shard = read_shard(path)
    dtype, left = shard.tokens.dtype, shard.tokens.nbytes
    start = _values_start(path)
    del shard
    with path.open("rb") as file:
        file.seek(start)
        while left:
            data = file.read(min(CHUNK_BYTES, left))
            if not data:
                raise DataError(Problem(str(path), "was cut off while it was read", REBUILD))
            left -= len(data)
            yield np.frombuffer(data, dtype)


def _write(
    path: Path,
    tokens: NDArray[Any],
    offsets: NDArray[np.int64],
    doc_ids: NDArray[np.uint64],
    columns: Mapping[str, pa.Array],
) -> None:
    lists = pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(tokens))
    arrays = {"tokens": lists, "doc_id": pa.array(doc_ids, pa.uint64()), **columns}
    schema = pa.schema([pa.field(name, array.type) for name, array in arrays.items()])
    rows = pa.record_batch(list(arrays.values()), schema=schema)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(rows)


def _values_start(path: Path) -> int:
    """At which byte of a shard its tokens begin."""
    with pa.memory_map(str(path)) as source:
        whole = source.read_buffer()
        values = pa.ipc.open_file(whole).get_batch(0).column("tokens").values.buffers()[1]
        return int(values.address - whole.address)


def read_shard(path: Path) -> Shard:
    """Maps a shard into memory, checking its structure but not its contents.

    Pages are read ahead only as far as they are asked for: samples are read in random order, and the system's guess
    would multiply what is read from a cold disk. Raises DataError.
    """
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if hasattr(mmap, "MADV_RANDOM"):
            mapped.madvise(mmap.MADV_RANDOM)
        rows = documents_in(pa.py_buffer(mapped))
        lists = rows.column("tokens")
        return Shard(
            path,
            lists.values.to_numpy(zero_copy_only=True),
            lists.offsets.to_numpy(zero_copy_only=True),
            rows.column("doc_id").to_numpy(zero_copy_only=True),
            {name: rows.column(name) for name in rows.schema.names if name not in ("tokens", "doc_id")},
        )
    except FileNotFoundError:
        raise DataError(Problem(str(path), "the shard is missing", REBUILD)) from None
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise DataError(Problem(str(path), f"not a readable shard: {error}", REBUILD)) from None


def documents_in(file: Any) -> Any:
    """The one record batch in the bytes of a shard, a pyarrow buffer. Raises ValueError, KeyError or ArrowException for what
    is none."""
    reader = pa.ipc.open_file(pa.BufferReader(file))
    if reader.num_record_batches != 1:
        raise ValueError(f"{reader.num_record_batches} record batches where there should be one")
    rows = reader.get_batch(0)
    kind = rows.column("tokens").type
    if not pa.types.is_large_list(kind) or kind.value_type not in (pa.uint16(), pa.uint32()):
        raise ValueError(f"the column `tokens` is {kind}, not a large list of uint16 or uint32")
    return rows


def offsets_of(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where documents of these lengths (d,) begin, and the end: (d + 1,)."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def digest_of(path: Path) -> str:
    """The xxh3-128 digest of a file's bytes, in hex."""
    state = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            state.update(chunk)
    return state.hexdigest()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name to write to; on leaving it is flushed to the disk and renamed to `path`, on failure removed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        _flush(temporary)
        os.replace(temporary, path)
        _flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Returns when a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
