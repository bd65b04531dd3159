"""From a unit of a corpus to its records, one at a time: in bounded memory, however large the file.

    text                            the unit is one record
    jsonl, jsonl.gz, jsonl.zst      a line is one: an object whose field `key` is the text, or the messages
    parquet, arrow                  a row is one: column `key`

A record that can't be used (no JSON, no such field, no UTF-8, longer than LONGEST_RECORD) is yielded as the Problem that
says so; what becomes of it is `data.on_bad_record`. A file that breaks off, or is damaged so that what follows can't be
read, always stops: how much is lost is not known.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import mmap
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO, Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as parquet
import xxhash

from raytron.data.chat import PAIR_KEYS, Chat, ChatError, Message, Segment, messages_of, pair_of, transcript
from raytron.data.files import opened, scheme_of
from raytron.errors import DataError, Problem

Kind = Literal["text", "jsonl", "jsonl.gz", "jsonl.zst", "parquet", "arrow"]

LONGEST_RECORD = 64 * 2**20  # bytes
WINDOW_BYTES = 2**20  # in which a line end is looked for, where a text is cut
ROWS_BYTES = 4 * 2**20  # of rows that are decoded at once
MOST_ROWS = 1024
SHOWN_BAD = 8
REMEDIES = {
    "text": "set data.text_key to the field that holds the text",
    "chat": "set data.messages_key to the field that holds the messages",
    "preference": "give each record the fields chosen and rejected",
}
MEND = "mend the file or leave it out"


@dataclass(frozen=True)
class Unit:
    """What is read in one go: a range of one file."""

    path: str
    kind: Kind
    start: int  # bytes of text; row groups of Parquet; record batches of Arrow
    stop: int
    bytes: int  # of text, about
    skip_broken: bool = False  # a file that is not UTF-8 has no document (else it is a bad record)
    stamp: str = ""  # of the file, when it was found


@dataclass(frozen=True)
class Fields:
    """What of a record is used, and what is done with a bad one."""

    key: str = "text"  # of the text, of the messages, or of one side of a pair
    metadata_keys: tuple[str, ...] = ()
    on_bad_record: str = "stop"
    format: str = "text"  # `data.format`

    @property
    def columns(self) -> tuple[str, ...]:
        """What a table's column may be called that a document is made of."""
        return PAIR_KEYS if self.format == "preference" else (self.key,)


class Record(NamedTuple):
    text: str
    metadata: str | None = None  # a JSON object of the fields that are kept
    messages: tuple[Message, ...] = ()  # of a conversation, whose text is its transcript
    first: int = 0  # the message from which on the assistant's turns are learned
    segments: tuple[Segment, ...] = ()  # of a conversation that a template was laid over
    rejected: tuple[Message, ...] = ()  # the other side of a pair that is not divided yet
    pair: int | None = None  # a digest of both sides, of one side of a pair
    chosen: bool | None = None  # which side
    at: int = 0  # where it lies: the byte of the file that its line or text begins with; the row, counted in its unit
    size: int = 0  # bytes of that line or text


@dataclass
class Tally:
    """The bad records that were skipped."""

    bad: int = 0
    examples: list[str] = field(default_factory=list)  # the first few, in words

    def add(self, problem: Problem) -> None:
        self.bad += 1
        if len(self.examples) < SHOWN_BAD:
            self.examples.append(f"{problem.where}: {problem.what}")


def records(unit: Unit, fields: Fields, tally: Tally, chat: Chat | None = None) -> Iterator[Record]:
    """The records of a unit, none of them blank; conversations in segments, where `chat` is given.

    Raises DataError naming the file (and line or row) that can't be read; with `on_bad_record` of `skip`, bad records are
    counted in `tally` instead.
    """
    for found in _found(unit, fields):
        if isinstance(found, Record):
            sides = [found] if not found.rejected else _sides(found)
            ready = [_in_segments(side, unit.path, chat) if chat is not None else side for side in sides]
            found = next((one for one in ready if isinstance(one, Problem)), found)
        if isinstance(found, Record):
            yield from (one for one in ready if isinstance(one, Record) and one.text and not one.text.isspace())
        elif fields.on_bad_record == "skip":
            tally.add(found)
        else:
            raise DataError(found._replace(remedy=f"{found.remedy}; or set data.on_bad_record to skip"))


def documents(unit: Unit, key: str) -> Iterator[str]:
    """The texts of a unit; a bad record is an error."""
    return (record.text for record in records(unit, Fields(key), Tally()))


def _found(unit: Unit, fields: Fields) -> Iterator[Record | Problem]:
    """Records, and problems in place of those that can't be used. Raises DataError for damage of a file."""
    try:
        for found in READERS[unit.kind](unit, fields):
            if isinstance(found, Record) and not _is_unicode(found.text + (found.metadata or "")):
                yield Problem(unit.path, "a record has half a surrogate pair, which is no text", MEND)
            else:
                yield found
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, pa.ArrowException) as error:
        raise DataError(Problem(unit.path, f"can't be read: {error}", MEND)) from None


def _sides(record: Record) -> list[Record]:
    """Two documents, the chosen one first."""
    chosen, rejected = record.messages, record.rejected
    pair = xxhash.xxh3_64_intdigest(f"{transcript(chosen)}\n\n{transcript(rejected)}".encode())
    return [
        record._replace(text=transcript(side), messages=side, rejected=(), pair=pair, chosen=side is chosen)
        for side in (chosen, rejected)
    ]


def _in_segments(record: Record, path: str, chat: Chat) -> Record | Problem:
    try:
        return record._replace(segments=tuple(chat.segments(record.messages, record.first)))
    except ChatError as error:
        return Problem(path, f"the conversation that begins {record.text[:40]!r} {error}", MEND)


def _is_unicode(text: str) -> bool:
    try:
        return text.isascii() or text.encode("utf-8") is not None
    except UnicodeEncodeError:
        return False


def text_start(file: IO[bytes], offset: int) -> int:
    """Where a text may be cut, at or after a byte offset: a line's begin, or where none is near, a character's."""
    if offset == 0:
        return 0
    file.seek(offset - 1)
    window = file.read(WINDOW_BYTES)
    end = window.find(b"\n")
    if end >= 0 or len(window) < WINDOW_BYTES:
        return offset + (end if end >= 0 else len(window) - 1)
    inside = 1
    while inside < 4 and window[inside] & 0xC0 == 0x80:
        inside += 1
    return offset - 1 + inside


def line_start(file: IO[bytes], offset: int) -> int:
    """Where the first line begins at or after a byte offset."""
    if offset == 0:
        return 0
    file.seek(offset - 1)
    _pass_line(file)
    return file.tell()


def _pass_line(file: IO[bytes]) -> int:
    """Reads to the end of a line, keeping none of it; how many bytes."""
    passed = 0
    while piece := file.readline(WINDOW_BYTES):
        passed += len(piece)
        if piece.endswith(b"\n"):
            break
    return passed


def _read_text(unit: Unit, fields: Fields) -> Iterator[Record | Problem]:
    with opened(unit.path) as file:
        stop, start = text_start(file, unit.stop), text_start(file, unit.start)
        file.seek(start)
        content = file.read(stop - start)
    mark = len(codecs.BOM_UTF8) if start == 0 and content.startswith(codecs.BOM_UTF8) else 0
    try:
        yield Record(content[mark:].decode("utf-8"), at=start + mark, size=len(content) - mark)
    except UnicodeDecodeError as error:
        if not unit.skip_broken:
            what = f"is not UTF-8 text: byte 0x{error.object[error.start]:02x}, {error.start} bytes after {start}"
            yield Problem(unit.path, what, "convert the file to UTF-8 or leave it out")


def _read_jsonl(unit: Unit, fields: Fields) -> Iterator[Record | Problem]:
    with opened(unit.path) as file:
        position = line_start(file, unit.start)
        file.seek(position)
        while position < unit.stop:
            size, found = _line(file, unit.path, f"the line at byte {position}", fields)
            if not size:
                return
            yield found._replace(at=position, size=size) if isinstance(found, Record) else found
            position += size


def _read_packed_jsonl(unit: Unit, fields: Fields) -> Iterator[Record | Problem]:
    position, number = 0, 1
    with opened(unit.path) as packed, UNPACKERS[unit.kind](packed) as file:
        while position < unit.stop:
            size, found = _line(file, unit.path, f"line {number}", fields)
            if not size:
                return
            yield found
            position, number = position + size, number + 1


UNPACKERS: Mapping[str, Callable[[IO[bytes]], Any]] = {
    "jsonl.gz": lambda file: gzip.GzipFile(fileobj=file),
    "jsonl.zst": lambda file: io.BufferedReader(_Unpacked(pa.CompressedInputStream(pa.PythonFile(file), "zstd"))),
}


class _Unpacked(io.RawIOBase):
    """A stream of Arrow's as one of Python's, which knows lines."""

    def __init__(self, inner: Any):
        self.inner = inner

    def readable(self) -> bool:
        return True

    def readinto(self, view: Any) -> int:
        data = self.inner.read(len(view))
        view[: len(data)] = data
        return len(data)


def _line(file: IO[bytes], path: str, place: str, fields: Fields) -> tuple[int, Record | Problem]:
    """The next line: its bytes (0: there is none), and the record that it holds."""
    line = file.readline(LONGEST_RECORD + 1)
    if len(line) > LONGEST_RECORD and not line.endswith(b"\n"):
        size = len(line) + _pass_line(file)
        return size, _too_long(path, place, size)
    size = len(line)
    if not size or line.isspace():
        return size, Record("")
    try:
        record: Any = json.loads(line)
    except UnicodeDecodeError as error:
        what = f"{place} is not UTF-8 text: byte 0x{error.object[error.start]:02x}, {error.start} bytes after its begin"
        return size, Problem(path, what, MEND)
    except (ValueError, RecursionError) as error:
        return size, Problem(path, f"{place} is not JSON: {error}", MEND)
    return size, _record_of(record, path, place, fields)


def _record_of(record: Any, path: str, place: str, fields: Fields) -> Record | Problem:
    """What is used of a line's object; nulls have no text."""
    remedy = REMEDIES[fields.format]
    if not isinstance(record, dict) or fields.key not in record:
        keys = ", ".join(record) if isinstance(record, dict) else "none"
        return Problem(path, f"{place} has no field {fields.key!r}; its fields: {keys}", remedy)
    text, metadata = record[fields.key], _metadata(record, fields.metadata_keys)
    if fields.format != "text":
        return _conversation(record, metadata, path, place, fields)
    if text is not None and not isinstance(text, str):
        return Problem(path, f"{place}: field {fields.key!r} is {type(text).__name__}, not text", remedy)
    return Record(text or "", metadata)


def _conversation(
    record: Mapping[str, Any], metadata: str | None, path: str, place: str, fields: Fields
) -> Record | Problem:
    """A conversation, or a pair of them, whose text then is that of both."""
    try:
        if fields.format == "chat":
            messages = messages_of(record[fields.key])
            return Record(transcript(messages), metadata, tuple(messages))
        chosen, rejected, first = pair_of(record)
        text = f"{transcript(chosen)}\n\n{transcript(rejected)}"
        return Record(text, metadata, tuple(chosen), first, rejected=tuple(rejected))
    except ChatError as error:
        return Problem(path, f"{place} {error}", MEND)


def _metadata(record: Mapping[str, Any], keys: Sequence[str]) -> str | None:
    """A JSON object of those fields that a record has."""
    if not keys:
        return None
    return json.dumps({key: record[key] for key in keys if key in record}, ensure_ascii=False, default=str)


def _too_long(path: str, place: str, size: int) -> Problem:
    what = f"{place} has {size / 2**20:.0f} MiB; a record may have {LONGEST_RECORD / 2**20:.0f}"
    return Problem(path, what, "divide it into records")


def _read_parquet(unit: Unit, fields: Fields) -> Iterator[Record | Problem]:
    with opened(unit.path) as source, parquet.ParquetFile(source, buffer_size=WINDOW_BYTES) as file:
        groups, names = list(range(unit.start, unit.stop)), file.schema_arrow.names
        columns = [name for name in (*fields.columns, *fields.metadata_keys) if name in names]
        count = sum(file.metadata.row_group(group).num_rows for group in groups)
        row = 0
        for rows in file.iter_batches(_rows_at_once(unit.bytes, count), groups, columns):
            yield from _rows(rows, unit.path, f"row groups {unit.start} to {unit.stop - 1}", row, fields, row)
            row += len(rows)


def _read_arrow(unit: Unit, fields: Fields) -> Iterator[Record | Problem]:
    before = 0  # rows of the unit
    with arrow_batches(unit.path) as (batches, release):
        for number, batch in enumerate(batches(unit.start)):
            if unit.start + number >= unit.stop:
                return
            wanted = (*fields.columns, *fields.metadata_keys)
            batch = batch.select([name for name in wanted if name in batch.schema.names])
            step = _rows_at_once(batch.nbytes, len(batch))
            for row in range(0, len(batch), step):
                place = f"record batch {unit.start + number}"
                yield from _rows(batch.slice(row, step), unit.path, place, row, fields, before + row)
                release()
            before += len(batch)


@contextmanager
def arrow_batches(path: str) -> Iterator[tuple[Callable[[int], Iterator[Any]], Callable[[], None]]]:
    """The record batches of an Arrow file or stream, from a number on; and how to let go of the memory that they are in.

    A file of this machine is mapped, so that a batch takes no memory of its own but the pages that are touched.
    """
    with opened(path) as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if scheme_of(path) is None else None
        is_file = file.read(6) == b"ARROW1"

        def batches(start: int) -> Iterator[Any]:
            file.seek(0)
            source = pa.PythonFile(file) if mapped is None else pa.BufferReader(pa.py_buffer(mapped))
            if is_file:
                reader = pa.ipc.open_file(source)
                yield from (reader.get_batch(number) for number in range(start, reader.num_record_batches))
            else:
                yield from (batch for number, batch in enumerate(pa.ipc.open_stream(source)) if number >= start)

        def release() -> None:
            if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
                mapped.madvise(mmap.MADV_DONTNEED)  # of a file: read again from the disk, if ever

        yield batches, release


def _rows_at_once(size: int, rows: int) -> int:
    """How many of `rows` rows, which have `size` bytes, are about ROWS_BYTES."""
    return min(max(ROWS_BYTES * rows // max(size, 1), 1), MOST_ROWS)


def _rows(rows: Any, path: str, place: str, first: int, fields: Fields, at: int) -> Iterator[Record | Problem]:
    """The records of some rows. first: the number of the first row, for its name; at: its number in the unit."""
    if fields.format != "text":
        for number, row in enumerate(rows.to_pylist()):
            yield _record_of(row, path, f"row {first + number} of {place}", fields)
        return
    kept = [_metadata(row, fields.metadata_keys) for row in rows.select(list(fields.metadata_keys)).to_pylist()]
    kept = kept or [None] * len(rows)
    for number, (value, metadata) in enumerate(zip(rows.column(fields.key), kept, strict=True)):
        try:
            text = value.as_py()
        except UnicodeDecodeError:
            yield Problem(path, f"row {first + number} of {place} is not UTF-8 text", MEND)
            continue
        if text is not None and len(text) > LONGEST_RECORD:
            yield _too_long(path, f"row {first + number} of {place}", len(text))
        elif text is not None:
            yield Record(text, metadata, at=at + number)


READERS: Mapping[Kind, Callable[[Unit, Fields], Iterator[Record | Problem]]] = {
    "text": _read_text,
    "jsonl": _read_jsonl,
    "jsonl.gz": _read_packed_jsonl,
    "jsonl.zst": _read_packed_jsonl,
    "parquet": _read_parquet,
    "arrow": _read_arrow,
}
