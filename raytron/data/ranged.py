"""Shards that lie in an object store, read by exact byte ranges: a sample of 8 KiB costs about that many bytes.

    shard      │ head ┆ tokens ····[range]······ ┆ offsets ┆ doc_id ┆ … ┆ tail │
    fetched    ├──────┤            ├─────┤                               ├────┤       head and tail once: where all lies
                                                 ├─────────┤ only where documents are to be told apart

Where the columns of an Arrow file lie stands in its head and tail. They are laid in an empty map of the file's size, whose
other pages take no memory, and Arrow opens that: so no second parser of its format is needed, and what is asked of the
store is known to the byte. All ranges of a batch are asked for at once (`raytron.data.files.read_ranges`).
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raytron.data.files import Range, read_ranges
from raytron.data.shard_file import REBUILD, Shard, documents_in
from raytron.errors import DataError, Problem

ENDS_BYTES = (8 * 1024, 1024 * 1024)  # of a shard, from either end: enough for its schema and footer, or else more


class Place(NamedTuple):
    """Where an array lies in a file."""

    start: int  # byte
    length: int  # elements
    dtype: np.dtype[Any]

    def range_of(self, url: str, first: int, stop: int) -> Range:
        """The bytes of elements [first, stop)."""
        return Range(url, self.start + first * self.dtype.itemsize, self.start + stop * self.dtype.itemsize)


class RangedTokens:
    """Tokens of a remote shard, in place of an array: a slice is fetched when it is asked for."""

    def __init__(self, url: str, place: Place):
        self.url, self.place, self.dtype = url, place, place.dtype

    def __len__(self) -> int:
        return self.place.length

    def __getitem__(self, at: slice) -> NDArray[Any]:
        first, stop, _ = at.indices(self.place.length)
        (data,) = read_ranges([self.range_of(first, max(first, stop))])
        return np.frombuffer(data, self.dtype)

    def range_of(self, first: int, stop: int) -> Range:
        return self.place.range_of(self.url, first, stop)


class RangedShard(Shard):
    """A shard behind a URL, of `size` bytes. Its tokens are fetched slice by slice, other columns whole when they are asked
    for first. Raises DataError where it is missing or no shard."""

    def __init__(self, url: str, size: int):
        self.__dict__ |= {"url": url, "size": size, "path": Path(url)}
        places = self._places
        self.__dict__["tokens"] = RangedTokens(url, places["tokens"])

    tokens: RangedTokens  # type: ignore[assignment]
    url: str
    size: int

    @property
    def documents(self) -> int:
        return self._places["offsets"].length - 1

    @cached_property
    def offsets(self) -> NDArray[np.int64]:
        return self._array("offsets")

    @cached_property
    def doc_ids(self) -> NDArray[np.uint64]:
        return self._array("doc_id")

    @cached_property
    def columns(self) -> Mapping[str, pa.Array]:
        """The loss spans, if there are any; other columns are not read over the network."""
        if "spans.offsets" not in self._places:
            return {}
        offsets, values = self._array("spans.offsets"), self._array("spans.values")
        return {"loss_spans": pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values, pa.int32()))}

    def _array(self, name: str) -> NDArray[Any]:
        place = self._places[name]
        (data,) = read_ranges([place.range_of(self.url, 0, place.length)])
        return np.frombuffer(data, place.dtype)

    @cached_property
    def _places(self) -> dict[str, Place]:
        for ends in ENDS_BYTES:
            try:
                return self._find(min(ends, self.size))
            except FileNotFoundError:
                raise DataError(Problem(self.url, "the shard is missing", REBUILD)) from None
            except (OSError, ValueError, KeyError, pa.ArrowException) as error:
                problem = Problem(self.url, f"not a readable shard: {error}", REBUILD)
        raise DataError(problem)

    def _find(self, ends: int) -> dict[str, Place]:
        """Where everything lies, by as many bytes from either end."""
        ranges = [Range(self.url, 0, ends), Range(self.url, self.size - ends, self.size)]
        if 2 * ends >= self.size:
            ranges = [Range(self.url, 0, self.size)]
        hollow = mmap.mmap(-1, max(self.size, 1))
        for each, data in zip(ranges, read_ranges(ranges), strict=True):
            hollow[each.start : each.stop] = data
        whole = pa.py_buffer(hollow)
        rows = documents_in(whole)
        lists = rows.column("tokens")
        ids, width = rows.column("doc_id"), np.dtype(lists.type.value_type.to_pandas_dtype())
        found = {
            "offsets": _place(whole, lists.buffers()[1], len(rows) + 1, np.int64),
            "tokens": _place(whole, lists.buffers()[3], lists.buffers()[3].size // width.itemsize, width),
            "doc_id": _place(whole, ids.buffers()[1], len(rows), np.uint64),
        }
        if "loss_spans" in rows.schema.names:
            spans = rows.column("loss_spans")
            if spans.type != pa.list_(pa.int32()):
                raise ValueError(f"the column `loss_spans` is {spans.type}, not a list of int32")
            found["spans.offsets"] = _place(whole, spans.buffers()[1], len(rows) + 1, np.int32)
            found["spans.values"] = _place(whole, spans.buffers()[3], spans.buffers()[3].size // 4, np.int32)
        return found


def _place(whole: pa.Buffer, part: pa.Buffer, count: int, dtype: Any) -> Place:
    return Place(part.address - whole.address, count, np.dtype(dtype))
