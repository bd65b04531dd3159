"""The text of slices of documents, fetched from the files of a corpus in as few reads as their places allow.

    text                 the slice's own bytes of the file
    jsonl                the line of the document, of whose field the slice is a part
    parquet, arrow       the row of the document, from its row group or record batch

Neighbours in a file are read at once. What is remote is fetched by exact ranges, all of a batch together; of Parquet
the row group is read that holds the row.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet

from raytron.data.files import Range, opened, read_ranges, scheme_of
from raytron.data.records import Unit, arrow_batches
from raytron.data.windows import Slice
from raytron.errors import DataError, Problem

GAP_BYTES = 2**14  # between two ranges of a file that are read as one
MOST_BYTES = 2**22  # of one read that joins several
OPEN_TABLES = 2
CHANGED = "put the text back as it was, or begin a run with it in another run_dir"


class Texts:
    """Reads slices. units: of the corpus; key: the field or column that holds the text."""

    def __init__(self, units: Sequence[Unit], key: str):
        self.units, self._key = units, key
        self._tables: OrderedDict[int, _Table] = OrderedDict()  # by the number of their unit, the latest used last

    def read(self, slices: Sequence[Slice]) -> list[bytes]:
        """The text of each slice, in UTF-8. Raises DataError where a file is not as it was."""
        found: list[bytes] = [b""] * len(slices)
        flat = [n for n, each in enumerate(slices) if self.units[each.unit].kind in ("text", "jsonl")]
        ranges = [self._range(slices[n]) for n in flat]
        for number, data in zip(flat, _fetched(ranges), strict=True):
            found[number] = self._part(slices[number], data)
        rows = set(range(len(slices))).difference(flat)
        for number in sorted(rows, key=lambda number: slices[number]):  # each row group once
            each = slices[number]
            try:
                found[number] = self._table(each.unit).row(each.at)[each.begin : each.end]
            except (OSError, ValueError, KeyError, IndexError, AttributeError, pa.ArrowException) as error:
                raise self.changed(each, str(error)) from None
        return found

    def changed(self, one: Slice, how: str = "") -> DataError:
        """What to raise where a slice is not the text that it was."""
        what = "is not as it was when its documents were indexed"
        return DataError(Problem(self.units[one.unit].path, f"{what}{': ' * bool(how)}{how}", CHANGED))

    def _range(self, each: Slice) -> Range:
        unit = self.units[each.unit]
        if unit.kind == "text":
            return Range(unit.path, each.at + each.begin, each.at + each.end)
        return Range(unit.path, each.at, each.at + each.size)

    def _part(self, each: Slice, data: bytes | OSError) -> bytes:
        """The slice's text, of what was read for it."""
        if isinstance(data, OSError):
            raise self.changed(each, str(data))
        if self.units[each.unit].kind == "text":
            return data
        try:
            text: str = json.loads(data)[self._key]
            return text.encode()[each.begin : each.end]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise self.changed(each, f"no document is at byte {each.at}") from None

    def _table(self, number: int) -> _Table:
        if number not in self._tables:
            unit = self.units[number]
            self._tables[number] = (_Parquet if unit.kind == "parquet" else _Arrow)(unit, self._key)
            if len(self._tables) > OPEN_TABLES:
                self._tables.popitem(last=False)
        self._tables.move_to_end(number)
        return self._tables[number]


def _fetched(ranges: Sequence[Range]) -> list[bytes | OSError]:
    """The bytes of each range; in their place what was wrong, where its file can't be read."""
    found: list[bytes | OSError] = [b""] * len(ranges)
    joined = _joined(ranges)
    for scheme in {scheme_of(whole.url) for whole, _ in joined}:
        here = [each for each in joined if scheme_of(each[0].url) == scheme]
        read = _local if scheme is None else _remote
        for (whole, members), got in zip(here, read([whole for whole, _ in here]), strict=True):
            for number in members:
                one, data = ranges[number], got
                if not isinstance(data, OSError):
                    data = data[one.start - whole.start : one.stop - whole.start]
                found[number] = data
    return found


def _joined(ranges: Sequence[Range]) -> list[tuple[Range, list[int]]]:
    """Ranges that cover all of `ranges`, and the numbers of those that each covers."""
    joined: list[tuple[Range, list[int]]] = []
    for number, one in sorted(enumerate(ranges), key=lambda each: each[1]):
        last = joined[-1][0] if joined else None
        near = last is not None and last.url == one.url and one.start - last.stop <= GAP_BYTES
        if last is not None and near and max(last.stop, one.stop) - last.start <= MOST_BYTES:
            joined[-1] = (last._replace(stop=max(last.stop, one.stop)), [*joined[-1][1], number])
        else:
            joined.append((one, [number]))
    return joined


def _local(ranges: Sequence[Range]) -> Iterator[bytes | OSError]:
    for one in ranges:
        try:
            with open(one.url, "rb", buffering=0) as file:
                file.seek(one.start)
                yield file.read(one.stop - one.start)
        except OSError as error:
            yield error


def _remote(ranges: Sequence[Range]) -> Iterator[bytes | OSError]:
    """Of one store."""
    try:
        yield from read_ranges(ranges)
    except OSError as error:
        yield from [error] * len(ranges)


class _Table(Protocol):
    """The rows of one unit."""

    def row(self, number: int) -> bytes:
        """The text of a row, counted in the unit."""
        ...


class _Parquet:
    """The row group that was read last stays in memory."""

    def __init__(self, unit: Unit, key: str):
        self._source = opened(unit.path)
        self._file = parquet.ParquetFile(self._source)
        self._first, self._key = unit.start, key
        groups = range(unit.start, unit.stop)
        self._ends = np.cumsum([self._file.metadata.row_group(group).num_rows for group in groups])
        self._group, self._column = -1, pa.chunked_array([], pa.string())

    def row(self, number: int) -> bytes:
        group = int(np.searchsorted(self._ends, number, side="right"))
        if group != self._group:
            self._group, self._column = -1, None
            self._column = self._file.read_row_group(self._first + group, [self._key]).column(self._key)
            self._group = group
        text: str = self._column[number - (int(self._ends[group - 1]) if group else 0)].as_py()
        return text.encode()


class _Arrow:
    """A file of this machine is mapped."""

    def __init__(self, unit: Unit, key: str):
        with arrow_batches(unit.path) as (batches, _):
            wanted = (batch for _, batch in zip(range(unit.stop - unit.start), batches(unit.start), strict=False))
            self._columns = [batch.column(key) for batch in wanted]
        self._ends = np.cumsum([len(column) for column in self._columns])

    def row(self, number: int) -> bytes:
        batch = int(np.searchsorted(self._ends, number, side="right"))
        text: str = self._columns[batch][number - (int(self._ends[batch - 1]) if batch else 0)].as_py()
        return text.encode()
