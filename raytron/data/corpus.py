"""Which text a run learns from: `data.sources` resolved to files, and files to documents, always in one order.

A source is a file, a folder, a glob, or the word `python-stdlib`: the Python sources of the interpreter that runs, tens
of MB of real text that every machine has. A document is

    .jsonl, .jsonl.gz   a line's `text_key`
    .parquet            a row's column `text_key`
    anything else       the whole file as UTF-8 text

A file larger than UNIT_BYTES is cut into *units* that are read apart: JSONL and text at line ends (a line belongs to the
unit in which it begins, and a text document then is one unit's text), Parquet between row groups. So a task's memory
is bounded and one large file keeps many tasks busy.
"""

from __future__ import annotations

import glob
import gzip
import json
import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, BinaryIO, Literal

import pyarrow as pa
import pyarrow.parquet as parquet

from raytron.data.manifest import Source
from raytron.errors import ConfigError, DataError, Problem

STDLIB = "python-stdlib"
UNIT_BYTES = 16 * 2**20
FOLDER_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet", ".txt", ".text", ".md", ".rst", ".py")
PACKED_SUFFIXES = (".gz", ".zst", ".xz", ".bz2", ".zip", ".tar")
NOT_THE_LIBRARY = ("site-packages", "dist-packages", "__pycache__")
GZIP_RATIO = 4  # what gzip makes of text, for counting text that is not read yet
NO_END = 2**62
WHERE = "data.sources"

Kind = Literal["text", "jsonl", "jsonl.gz", "parquet"]


@dataclass(frozen=True)
class Unit:
    """What is read in one go: a range of one file."""

    path: str
    kind: Kind
    start: int  # bytes of text; row groups of Parquet
    stop: int
    bytes: int  # of text, about
    skip_broken: bool = False  # a file that is not UTF-8 has no document (else it is an error)


@dataclass(frozen=True)
class Corpus:
    units: tuple[Unit, ...]
    sources: tuple[Source, ...]
    text_key: str

    @property
    def bytes(self) -> int:
        return sum(unit.bytes for unit in self.units)


def resolve(sources: Sequence[str], text_key: str = "text", max_bytes: int | None = None) -> Corpus:
    """Finds every file of the sources, in the order given and sorted within each; reads no text.

    `max_bytes` ends the corpus after about that much text: gzip counts as four times its size, Parquet as its column
    uncompressed; the last line or row group stays whole. Raises ConfigError with every source that can't be used.
    """
    found: list[Problem] = []
    units: list[Unit] = []
    described: list[Source] = []
    left = NO_END if max_bytes is None else max_bytes
    for name in sources:
        paths = _files_of(name, found)
        chosen = _within([unit for path in paths for unit in _units_of(path, name, text_key, found)], left)
        left -= sum(unit.bytes for unit in chosen)
        units += chosen
        described.append(Source(name, len({unit.path for unit in chosen}), sum(unit.bytes for unit in chosen)))
    if not found and not units:
        found.append(Problem(WHERE, "no document: every file is empty", "give files that hold text"))
    if found:
        raise ConfigError(found)
    return Corpus(tuple(units), tuple(described), text_key)


def documents(unit: Unit, text_key: str) -> Iterator[str]:
    """The documents of a unit, none of them blank. Raises DataError naming the file (and line) that can't be read."""
    try:
        for text in _READERS[unit.kind](unit, text_key):
            if text and not text.isspace():
                yield text
    except UnicodeDecodeError as error:
        if unit.skip_broken:
            return
        what = f"is not UTF-8 text: byte 0x{error.object[error.start]:02x}, {error.start} bytes after {unit.start}"
        raise DataError(Problem(unit.path, what, "convert the file to UTF-8 or leave it out")) from None
    except (OSError, EOFError, pa.ArrowException) as error:
        raise DataError(Problem(unit.path, f"can't be read: {error}", "mend the file or leave it out")) from None


def sample(corpus: Corpus, max_bytes: int, order: Iterable[int]) -> Iterator[str]:
    """About `max_bytes` of documents from units taken in `order`, from each no more than its fair share."""
    share = max(max_bytes // max(len(corpus.units), 1), 2**20)
    left = max_bytes
    for number in order:
        from_unit = min(share, left)
        for text in documents(corpus.units[number], corpus.text_key):
            piece = text[:from_unit]
            yield piece
            size = len(piece.encode("utf-8", "surrogatepass"))
            from_unit, left = from_unit - size, left - size
            if from_unit <= 0:
                break
        if left <= 0:
            return


def _files_of(name: str, found: list[Problem]) -> list[str]:
    """The files that a source names, sorted."""
    if name == STDLIB:
        root = sysconfig.get_paths()["stdlib"]
        files = _walk(root, (".py",), NOT_THE_LIBRARY)
        remedy = "give a path to text"
    elif os.path.isdir(name):
        files = _walk(name, FOLDER_SUFFIXES)
        remedy = f"put files with one of {', '.join(FOLDER_SUFFIXES)} there, or give a glob such as {name}/*"
    elif os.path.exists(name):
        files, remedy = [name], ""
    elif glob.has_magic(name):
        files = sorted(path for path in glob.glob(name, recursive=True) if os.path.isfile(path))
        remedy = "give a pattern that matches files"
    else:
        found.append(Problem(WHERE, f"{name} does not exist", f"give a file, a folder, a glob or the word {STDLIB}"))
        return []
    if not files:
        found.append(Problem(WHERE, f"{name} has no file to read", remedy))
    return files


def _walk(root: str, suffixes: tuple[str, ...], without: tuple[str, ...] = ()) -> list[str]:
    """All files below a folder with one of the suffixes, sorted by their path in it.

    Leaves out what is hidden and folders named in `without`.
    """
    files = []
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if name[0] != "." and name not in without]
        files += [os.path.join(folder, name) for name in names if name.endswith(suffixes) and name[0] != "."]
    return sorted(files, key=lambda path: _parts_below(root, path))


def _parts_below(root: str, path: str) -> list[str]:
    """The names on the way from a folder down to a file."""
    return path[len(root) :].strip(os.sep).split(os.sep)


def _units_of(path: str, source: str, text_key: str, found: list[Problem]) -> list[Unit]:
    """The units of a file; none where it is empty."""
    try:
        if path.endswith(".parquet"):
            return _parquet_units(path, text_key, found)
        size = os.path.getsize(path)
    except (OSError, pa.ArrowException) as error:
        found.append(Problem(WHERE, f"{path} can't be read: {error}", "mend the file or leave it out"))
        return []
    if path.endswith(".jsonl.gz"):
        return [Unit(path, "jsonl.gz", 0, NO_END, size * GZIP_RATIO)]
    if path.endswith(PACKED_SUFFIXES):
        found.append(Problem(WHERE, f"{path} is packed", "unpack it; of packed files only .jsonl.gz is read"))
        return []
    kind: Kind = "jsonl" if path.endswith(".jsonl") else "text"
    starts = range(0, size, UNIT_BYTES)
    ranges = [(start, min(start + UNIT_BYTES, size)) for start in starts]
    return [Unit(path, kind, start, stop, stop - start, source == STDLIB) for start, stop in ranges]


def _parquet_units(path: str, text_key: str, found: list[Problem]) -> list[Unit]:
    """Runs of row groups whose text column is about UNIT_BYTES uncompressed."""
    with parquet.ParquetFile(path) as file:
        schema, meta = file.schema_arrow, file.metadata
    if text_key not in schema.names:
        columns = ", ".join(schema.names)
        found.append(
            Problem("data.text_key", f"{path} has no column {text_key!r}", f"use one of its columns: {columns}")
        )
        return []
    kind = schema.field(text_key).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        found.append(Problem("data.text_key", f"column {text_key!r} of {path} is {kind}", "name a column of text"))
        return []
    column = [meta.schema.column(i).path for i in range(meta.num_columns)].index(text_key)
    sizes = [meta.row_group(i).column(column).total_uncompressed_size for i in range(meta.num_row_groups)]
    units, start, total = [], 0, 0
    for number, size in enumerate(sizes):
        total += size
        if total >= UNIT_BYTES or number == len(sizes) - 1:
            units.append(Unit(path, "parquet", start, number + 1, total))
            start, total = number + 1, 0
    return units


def _within(units: Sequence[Unit], left: int) -> list[Unit]:
    """The first units that together hold `left` bytes of text, the last one shortened where it can be."""
    chosen = []
    for unit in units:
        if left <= 0:
            break
        if unit.bytes > left and unit.kind != "parquet":
            unit = replace(unit, stop=unit.start + left, bytes=left)
        chosen.append(unit)
        left -= unit.bytes
    return chosen


def _read_text(unit: Unit, text_key: str) -> Iterator[str]:
    with open(unit.path, "rb") as file:
        end = _line_start(file, unit.stop)
        begin = _line_start(file, unit.start)
        file.seek(begin)
        yield file.read(end - begin).decode("utf-8-sig" if begin == 0 else "utf-8")


def _read_jsonl(unit: Unit, text_key: str) -> Iterator[str]:
    with open(unit.path, "rb") as file:
        position = _line_start(file, unit.start)
        file.seek(position)
        while position < unit.stop and (line := file.readline()):
            yield _text_of(line, unit.path, f"the line at byte {position}", text_key)
            position += len(line)


def _read_packed_jsonl(unit: Unit, text_key: str) -> Iterator[str]:
    position = 0
    with gzip.open(unit.path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if position >= unit.stop:
                return
            yield _text_of(line, unit.path, f"line {number}", text_key)
            position += len(line)


def _read_parquet(unit: Unit, text_key: str) -> Iterator[str]:
    with parquet.ParquetFile(unit.path) as file:
        groups = list(range(unit.start, unit.stop))
        for rows in file.iter_batches(batch_size=256, row_groups=groups, columns=[text_key]):
            yield from (text for text in rows.column(0).to_pylist() if text is not None)


_READERS = {"text": _read_text, "jsonl": _read_jsonl, "jsonl.gz": _read_packed_jsonl, "parquet": _read_parquet}


def _line_start(file: BinaryIO, offset: int) -> int:
    """Where the first line begins at or after a byte offset."""
    if offset == 0:
        return 0
    file.seek(offset - 1)
    file.readline()
    return file.tell()


def _text_of(line: bytes, path: str, place: str, text_key: str) -> str:
    """The text of one line of JSONL; blank lines and nulls have none."""
    if line.isspace():
        return ""
    try:
        record: Any = json.loads(line.decode("utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(Problem(path, f"{place} is not JSON: {error}", "mend the file or leave it out")) from None
    if not isinstance(record, dict) or text_key not in record:
        keys = ", ".join(record) if isinstance(record, dict) else "none"
        what = f"{place} has no field {text_key!r}; its fields: {keys}"
        raise DataError(Problem(path, what, "set data.text_key to the field that holds the text"))
    text = record[text_key]
    if text is not None and not isinstance(text, str):
        what = f"{place}: field {text_key!r} is {type(text).__name__}, not text"
        raise DataError(Problem(path, what, "set data.text_key to the field that holds the text"))
    return text or ""
