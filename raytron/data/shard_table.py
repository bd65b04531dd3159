"""The shards of a data set as columns: what a manifest of very many shards keeps beside itself.

    shards.arrow    path │ split │ documents │ tokens │ bytes │ xxh3_128        a row a shard, read in place

Ten thousand million documents are some 60,000 shards. As objects they would take seconds and a hundred megabytes to
read; as columns of a memory map they take milliseconds, and a table of where samples begin is one running sum of one
column. A manifest of fewer than TABLE_FROM shards lists them itself, for people to read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

Split = Literal["train", "validation"]
CODES: tuple[Split, ...] = ("train", "validation")  # of the column `split`
TABLE_NAME = "shards.arrow"
TABLE_FROM = 1000  # shards
SCHEMA = pa.schema(
    [
        ("path", pa.string()), ("split", pa.uint8()), ("documents", pa.int64()), ("tokens", pa.int64()),
        ("bytes", pa.int64()), ("xxh3_128", pa.binary(16)),
    ]
)  # fmt: skip


@dataclass(frozen=True)
class ShardEntry:
    path: str  # relative to the manifest's folder
    split: Split
    documents: int
    tokens: int
    bytes: int  # of the file
    xxh3_128: str  # of the file, in hex


class ShardTable(Sequence[ShardEntry]):
    """The entries of some shards. rows: a record batch of SCHEMA."""

    def __init__(self, rows: Any):
        self._rows = rows

    @classmethod
    def of(cls, entries: Sequence[ShardEntry]) -> ShardTable:
        """Any entries as a table. Raises ValueError where a digest is none."""
        if isinstance(entries, ShardTable):
            return entries
        columns = [
            [entry.path for entry in entries],
            [CODES.index(entry.split) for entry in entries],
            [entry.documents for entry in entries],
            [entry.tokens for entry in entries],
            [entry.bytes for entry in entries],
            [bytes.fromhex(entry.xxh3_128) for entry in entries],
        ]
        arrays = [pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)]
        return cls(pa.record_batch(arrays, schema=SCHEMA))

    @classmethod
    def read(cls, path: Path) -> ShardTable:
        """Maps the file that `write` made. Raises OSError or ValueError where it is none."""
        with pa.memory_map(str(path)) as file:
            reader = pa.ipc.open_file(file)
            if reader.schema != SCHEMA or reader.num_record_batches != 1:
                raise ValueError(f"{path.name} is no table of shards")
            return cls(reader.get_batch(0))

    def write(self, path: Path) -> None:
        """The table as one Arrow IPC file."""
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
            writer.write_batch(self._rows)

    @property
    def sha256(self) -> str:
        """Of all that the table says, however it is stored, in hex."""
        state = hashlib.sha256()
        for name in ("split", "documents", "tokens", "bytes"):
            state.update(np.ascontiguousarray(self.column(name)).data)
        digests = self._rows.column("xxh3_128")
        assert digests.offset == 0, "a part of a table"
        ends, paths = self._path_buffers()
        for piece in (ends.data, paths.data, digests.buffers()[1][: 16 * len(self)]):
            state.update(piece)
        return state.hexdigest()

    def _path_buffers(self) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
        """Where each path begins and the last ends (shards + 1,), and the bytes of all of them; of a whole table."""
        column = self._rows.column("path")
        assert column.offset == 0, "a part of a table"
        ends = np.frombuffer(column.buffers()[1], np.int32, len(self) + 1)
        return ends, np.frombuffer(column.buffers()[2], np.uint8, int(ends[-1]))

    def column(self, name: str) -> NDArray[Any]:
        """(shards,) a column of numbers, in place."""
        found: NDArray[Any] = self._rows.column(name).to_numpy(zero_copy_only=True)
        return found

    def of_split(self, split: Split) -> ShardTable:
        """The entries of one split, in place where they stand together."""
        found = np.flatnonzero(self.column("split") == CODES.index(split))
        if not len(found) or found[-1] - found[0] + 1 == len(found):
            return ShardTable(self._rows.slice(int(found[0]) if len(found) else 0, len(found)))
        return ShardTable(self._rows.take(pa.array(found)))

    @property
    def folders(self) -> set[str]:
        """Of all paths, what stands up to their last `/`."""
        if ord("/") not in self._path_buffers()[1]:
            return {""}
        return {path[: path.rfind("/") + 1] for path in self._rows.column("path").to_pylist()}

    def __len__(self) -> int:
        return int(self._rows.num_rows)

    @overload
    def __getitem__(self, at: int) -> ShardEntry: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[ShardEntry]: ...
    def __getitem__(self, at: int | slice) -> ShardEntry | Sequence[ShardEntry]:
        if isinstance(at, slice):
            return [self[number] for number in range(*at.indices(len(self)))]
        row = range(len(self))[at]
        path, split, documents, tokens, size, digest = (column[row].as_py() for column in self._rows.columns)
        return ShardEntry(path, CODES[split], documents, tokens, size, digest.hex())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ShardTable) and bool(self._rows.equals(other._rows))

    __hash__ = None  # type: ignore[assignment]
