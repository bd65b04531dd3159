"""Which text a run learns from: `data.sources` resolved to files, and files to units, always in one order.

A source is a file, a folder, a glob, a URL of those (s3://, gs://, https://, …), or the word `python-stdlib`: the Python
sources of the interpreter that runs, tens of MB of real text that every machine has. A document is

    .jsonl, .jsonl.gz, .jsonl.zst   a line's `text_key`
    .parquet, .arrow                a row's column `text_key`
    anything else                   the whole file as UTF-8 text

A folder that `datasets` (Hugging Face) saved is read as the files that its state.json lists, in that order.

A file larger than UNIT_BYTES is cut into *units* that are read apart: JSONL and text at line ends (a line belongs to the
unit in which it begins, and a text document then is one unit's text), Parquet between row groups, Arrow between record
batches. So a task's memory is bounded and one large file keeps many tasks busy.
"""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import xxhash

from raytron.data.files import File, exists, find, is_folder, opened, scheme_of
from raytron.data.manifest import Source
from raytron.data.records import Fields, Kind, Tally, Unit, arrow_batches, records
from raytron.errors import ConfigError, DataError, Problem

STDLIB = "python-stdlib"
UNIT_BYTES = 16 * 2**20
FOLDER_SUFFIXES = (
    ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".arrow", ".txt", ".text", ".md", ".rst", ".py"
)  # fmt: skip
PACKED_SUFFIXES = (".gz", ".zst", ".xz", ".bz2", ".zip", ".tar")
NOT_THE_LIBRARY = ("site-packages", "dist-packages", "__pycache__")
PACKED_RATIO = 4  # what gzip or Zstandard make of text, for counting text that is not read yet
NO_END = 2**62
WHERE = "data.sources"
KEYS = {"text": "data.text_key", "chat": "data.messages_key", "preference": "data.format"}  # where a column is named
SAVED, SAVED_SPLITS = "state.json", "dataset_dict.json"  # what marks a folder of `datasets`


@dataclass(frozen=True)
class Corpus:
    units: tuple[Unit, ...]
    sources: tuple[Source, ...]
    fields: Fields

    @property
    def bytes(self) -> int:
        return sum(unit.bytes for unit in self.units)

    @property
    def stamp(self) -> str:
        """A digest of which ranges of which files there are, as they were when they were found: not of their contents."""
        return xxhash.xxh3_128_hexdigest(json.dumps([astuple(unit) for unit in self.units]).encode())


def resolve(
    sources: Sequence[str], text_key: str = "text", max_bytes: int | None = None, *, fields: Fields | None = None
) -> Corpus:
    """Finds every file of the sources, in the order given and sorted within each; reads no text.

    `max_bytes` ends the corpus after about that much text: what is packed counts as four times its size, Parquet as its
    column uncompressed; the last line, row group or record batch stays whole. fields: what is used of each record; None:
    `text_key` alone. Raises ConfigError with every source that can't be used.
    """
    fields = fields or Fields(text_key)
    found: list[Problem] = []
    units: list[Unit] = []
    described: list[Source] = []
    left = NO_END if max_bytes is None else max_bytes
    for name in sources:
        files = _files_of(name, found)
        chosen = _within([unit for file in files for unit in _units_of(file, name, fields, found)], left)
        left -= sum(unit.bytes for unit in chosen)
        units += chosen
        described.append(Source(name, len({unit.path for unit in chosen}), sum(unit.bytes for unit in chosen)))
    if not found and not units:
        found.append(Problem(WHERE, "no document: every file is empty", "give files that hold text"))
    if found:
        raise ConfigError(list(dict.fromkeys(found)))
    return Corpus(tuple(units), tuple(described), fields)


def sample(corpus: Corpus, max_bytes: int, order: Iterable[int]) -> Iterator[str]:
    """About `max_bytes` of documents from units taken in `order`, from each no more than its fair share."""
    share = max(max_bytes // max(len(corpus.units), 1), 2**20)
    left = max_bytes
    for number in order:
        from_unit = min(share, left)
        for record in records(corpus.units[number], corpus.fields, Tally()):
            piece = record.text[:from_unit]
            yield piece
            size = len(piece.encode("utf-8"))
            from_unit, left = from_unit - size, left - size
            if from_unit <= 0:
                break
        if left <= 0:
            return


def _files_of(name: str, found: list[Problem]) -> list[File]:
    """The files that a source names, sorted."""
    try:
        if name == STDLIB:
            return _with_suffix(find(sysconfig.get_paths()["stdlib"], NOT_THE_LIBRARY) or [], (".py",))
        files = find(name)
        if files is None:
            remedy = f"give a file, a folder, a glob, a URL or the word {STDLIB}"
            found.append(Problem(WHERE, f"{name} does not exist", remedy))
            return []
        if is_folder(name):
            return _files_in(name, files, found)
    except (OSError, ValueError) as error:
        found.append(Problem(WHERE, f"{name} can't be read: {error}", "mend it or leave it out"))
        return []
    except DataError as error:
        found.append(error.args[0])
        return []
    if not files:
        found.append(Problem(WHERE, f"{name} has no file to read", "give a pattern that matches files"))
    return files


def _files_in(folder: str, files: list[File], found: list[Problem]) -> list[File]:
    """The files of a folder that are read: those that `datasets` lists, or all with a suffix that is known."""
    folder = folder.rstrip("/")
    if exists(f"{folder}/{SAVED_SPLITS}"):
        with opened(f"{folder}/{SAVED_SPLITS}") as file:
            splits = json.load(file)["splits"]
        what = f"{folder} holds the splits {', '.join(splits)} of a data set"
        found.append(Problem(WHERE, what, f"name one of them, such as {folder}/{splits[0]}"))
        return []
    if exists(f"{folder}/{SAVED}"):
        with opened(f"{folder}/{SAVED}") as file:
            listed = [entry["filename"] for entry in json.load(file).get("_data_files", [])]
        by_path = {file.path: file for file in files}
        missing = [name for name in listed if f"{folder}/{name}" not in by_path]
        if missing:
            found.append(Problem(WHERE, f"{folder} lacks {missing[0]}, which its {SAVED} lists", "save it again"))
        return [by_path[f"{folder}/{name}"] for name in listed if name not in missing]
    chosen = _with_suffix(files, FOLDER_SUFFIXES)
    if not chosen:
        remedy = f"put files with one of {', '.join(FOLDER_SUFFIXES)} there, or give a glob such as {folder}/*"
        found.append(Problem(WHERE, f"{folder} has no file to read", remedy))
    return chosen


def _with_suffix(files: Iterable[File], suffixes: tuple[str, ...]) -> list[File]:
    return [file for file in files if file.path.endswith(suffixes)]


def _kind_of(path: str) -> Kind | None:
    """How a file is read; None where it is packed in a way that is not."""
    kinds: tuple[Kind, ...] = ("jsonl", "jsonl.gz", "jsonl.zst", "parquet", "arrow")
    for kind in kinds:
        if path.endswith(f".{kind}"):
            return kind
    return None if path.endswith(PACKED_SUFFIXES) else "text"


def _units_of(file: File, source: str, fields: Fields, found: list[Problem]) -> list[Unit]:
    """The units of a file; none where it is empty."""
    kind = _kind_of(file.path)
    if kind is None:
        remedy = "unpack it; of packed files only .jsonl.gz and .jsonl.zst are read"
        found.append(Problem(WHERE, f"{file.path} is packed", remedy))
        return []
    chat = fields.format != "text"
    if kind == "text" and (fields.metadata_keys or chat):
        where, what = ("data.format", "no messages") if chat else ("data.metadata_keys", "no fields to keep")
        remedy = "give JSONL, Parquet or Arrow" if chat else "leave it empty, or give JSONL, Parquet or Arrow"
        found.append(Problem(where, f"{file.path} is plain text, which has {what}", remedy))
        return []
    if kind in ("jsonl.gz", "jsonl.zst"):
        return [Unit(file.path, kind, 0, NO_END, file.size * PACKED_RATIO, stamp=file.stamp)] if file.size else []
    try:
        if kind == "parquet":
            return _parquet_units(file, fields, found)
        if kind == "arrow":
            return _arrow_units(file, fields, found)
    except (OSError, ValueError, pa.ArrowException) as error:
        found.append(Problem(WHERE, f"{file.path} can't be read: {error}", "mend the file or leave it out"))
        return []
    except DataError as error:
        found.append(error.args[0])
        return []
    return [
        Unit(file.path, kind, start, stop, stop - start, source == STDLIB, file.stamp)
        for start, stop in ((n, min(n + UNIT_BYTES, file.size)) for n in range(0, file.size, UNIT_BYTES))
    ]


def _parquet_units(file: File, fields: Fields, found: list[Problem]) -> list[Unit]:
    """Runs of row groups whose text column is about UNIT_BYTES uncompressed."""
    with opened(file.path) as source, parquet.ParquetFile(source) as opened_file:
        schema, meta = opened_file.schema_arrow, opened_file.metadata
    if not _has_columns(file.path, schema, fields, found):
        return []
    paths = [meta.schema.column(i).path.split(".")[0] for i in range(meta.num_columns)]
    columns = [i for i, name in enumerate(paths) if name == fields.key]  # several, where it holds messages
    groups = [meta.row_group(i) for i in range(meta.num_row_groups)]
    sizes = [sum(group.column(i).total_uncompressed_size for i in columns) for group in groups]
    return _runs(file, "parquet", sizes)


def _arrow_units(file: File, fields: Fields, found: list[Problem]) -> list[Unit]:
    """Runs of record batches of about UNIT_BYTES; of a remote file, which would be read for it, one unit."""
    with arrow_batches(file.path) as (batches, _):
        first = next(batches(0), None)
        if first is None or not _has_columns(file.path, first.schema, fields, found):
            return []
        if scheme_of(file.path) is not None:
            return [Unit(file.path, "arrow", 0, NO_END, file.size, stamp=file.stamp)]
        return _runs(file, "arrow", [batch.column(fields.key).nbytes for batch in batches(0)])


def _has_columns(path: str, schema: Any, fields: Fields, found: list[Problem]) -> bool:
    """Whether a table has the columns that are used, text being text and messages a list."""
    columns, key = ", ".join(schema.names), KEYS[fields.format]
    needed = ("chosen", "rejected") if fields.format == "preference" else (fields.key,)
    wanted = [*((key, name) for name in needed), *(("data.metadata_keys", key) for key in fields.metadata_keys)]
    missing = [
        Problem(where, f"{path} has no column {key!r}", f"use one of its columns: {columns}")
        for where, key in wanted
        if key not in schema.names
    ]
    found += missing
    if missing or fields.format == "preference":  # answers are text or messages
        return not missing
    kind, types = schema.field(fields.key).type, pa.types
    texts, lists = (types.is_string, types.is_large_string, types.is_string_view), (types.is_list, types.is_large_list)
    if any(is_one(kind) for is_one in (lists if fields.format == "chat" else texts)):
        return True
    remedy = f"name a column of {'messages' if fields.format == 'chat' else 'text'}"
    found.append(Problem(key, f"column {fields.key!r} of {path} is {kind}", remedy))
    return False


def _runs(file: File, kind: Kind, sizes: Sequence[int]) -> list[Unit]:
    """Units of consecutive pieces of a file, of which `sizes` are the bytes of text."""
    units, start, total = [], 0, 0
    for number, size in enumerate(sizes):
        total += size
        if total >= UNIT_BYTES or number == len(sizes) - 1:
            units.append(Unit(file.path, kind, start, number + 1, total, stamp=file.stamp))
            start, total = number + 1, 0
    return units


def _within(units: Sequence[Unit], left: int) -> list[Unit]:
    """The first units that together hold `left` bytes of text, the last one shortened where it can be."""
    chosen = []
    for unit in units:
        if left <= 0:
            break
        if unit.bytes > left and unit.kind not in ("parquet", "arrow"):
            unit = replace(unit, stop=unit.start + left, bytes=left)
        chosen.append(unit)
        left -= unit.bytes
    return chosen
