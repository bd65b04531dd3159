"""The index of text that is tokenized as it is read: which bytes of which files make which sample.

    run_dir/text/index.json       what there is: units of the corpus, rule, tokenizer, parts, what was measured
                 tokenizer.json
                 train-000000.arrow, …, validation-000000.arrow, …

A part is an Arrow file, a row a sample: its *slices* (`raytron.data.windows`) and a digest of its text. A sample is found
by one look into a part, its text read and tokenized; the digest says whether it is the text that was indexed. An index
has about 2 % of the size of the text, is mapped, and holds no text.

Its hash covers the text, how it is cut and the tokenizer, not names or times of files: equal hashes, equal samples.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from raytron.config import RunConfig
from raytron.data.manifest import Split
from raytron.data.records import Unit
from raytron.data.shard_file import digest_of, offsets_of, replacing
from raytron.data.shards import TOKENIZER_NAME, ids_beyond
from raytron.data.windows import Slice, Window
from raytron.errors import DataError, Problem

FILE_NAME = "index.json"
FORMAT = "raytron-text-index 1"  # another number where another index would be made of the same text
AGAIN = "remove the folder: it is made again when a run needs it"
ROWS = 1 << 14  # samples of one record batch
COLUMNS = (
    ("unit", pa.int32()), ("at", pa.int64()), ("size", pa.int64()), ("begin", pa.int64()), ("end", pa.int64()),
    ("ends", pa.uint8()), ("document", pa.uint64()),
)  # fmt: skip
SLICES = pa.large_list(pa.struct(list(COLUMNS)))
DECIDES = (
    "sequence_length",
    "alone",
    "validation_fraction",
    "tokenizer_sha256",
    "eod_name",
)  # of the rule, what samples are
SCHEMA = pa.schema([("slices", SLICES), ("digest", pa.uint64())], metadata={"format": FORMAT})


@dataclass(frozen=True)
class TextPart:
    """Some samples of one split, in a file."""

    path: str  # relative to the index
    split: Split
    samples: int
    documents: int  # that end in it
    text_bytes: int
    bytes: int  # of the file
    xxh3_128: str  # of the file, in hex
    content: str  # xxh3-128 of what decides its samples: texts, ids of documents, where they are cut


@dataclass(frozen=True)
class TextRule:
    """How text becomes samples."""

    sequence_length: int  # S: samples of S + 1 tokens, the last of which is only a label
    alone: bool  # a sample holds one document, or a part of it
    text_key: str
    on_bad_record: str
    validation_fraction: float
    tokenizer_sha256: str
    eod_name: str
    fill: float | None  # these as they were asked for
    backend: str
    tokenizer_vocab: int | None  # of one that was trained for it
    tokenizer_mb: float | None


@dataclass(frozen=True)
class TextManifest:
    rule: TextRule
    worth: tuple[int, ...]  # the estimate that windows were cut by (`raytron.data.estimate`),
    fill_for: float  # and the share of the sequence length that they were cut for
    mean: float  # bytes of a token, as measured
    nats: float  # entropy of one token drawn at random, as measured
    vocab: int
    eod: int
    backend: str  # `data.tokenizer.backend` that samples are encoded by
    units: tuple[Unit, ...]
    parts: tuple[TextPart, ...]
    bad_records: int = 0
    bad_examples: tuple[str, ...] = ()
    fill: float = 0.0  # share of a training sample that is not padding; both measured on some samples
    cut: float = 0.0  # share of all tokens that is cut off

    @cached_property
    def hash(self) -> str:
        """SHA-256 of all that decides the samples, in hex."""
        decides = {
            "format": FORMAT,
            "rule": {key: getattr(self.rule, key) for key in DECIDES},
            "worth": self.worth,
            "fill_for": self.fill_for,
            "parts": [[part.split, part.samples, part.content] for part in self.parts],
        }
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class TextCorpus:
    """An opened index: cheap to hold, to copy and to pickle. It stands where a `Dataset` does."""

    path: Path
    manifest: TextManifest

    @property
    def name(self) -> str:
        return str(self.path)

    @property
    def tokenizer(self) -> Path:
        """The path of its tokenizer.json."""
        return self.path / TOKENIZER_NAME

    @property
    def tokenizer_sha256(self) -> str:
        return self.manifest.rule.tokenizer_sha256

    @property
    def vocab(self) -> int:
        return self.manifest.vocab

    @property
    def eod(self) -> int:
        return self.manifest.eod

    @property
    def hash(self) -> str:
        return self.manifest.hash

    @property
    def unigram_entropy(self) -> float:
        """Nats per training token, as measured on a part of the text."""
        return self.manifest.nats

    def parts(self, split: Split) -> list[TextPart]:
        return [part for part in self.manifest.parts if part.split == split]

    def samples(self, split: Split) -> int:
        return sum(part.samples for part in self.parts(split))

    def documents(self, split: Split) -> int:
        return sum(part.documents for part in self.parts(split))

    def tokens(self, split: Split) -> int:
        """About: by the mean of what was measured."""
        text = sum(part.text_bytes for part in self.parts(split))
        return round(text / self.manifest.mean) + self.documents(split)

    def misfits(self, *, vocab: int | None = None, tokenizer_sha256: str | None = None) -> list[Problem]:
        """As `Dataset.misfits`. Another tokenizer is none: then the text is indexed for it."""
        return ids_beyond(vocab, self.name, self.vocab)

    def verify(self) -> None:
        """Reads every byte of the index. Raises DataError where a part is not as it was written."""
        for part in self.manifest.parts:
            path = self.path / part.path
            if not path.exists() or digest_of(path) != part.xxh3_128:
                raise DataError(Problem(str(path), "is missing or damaged: its digest is not the index's", AGAIN))

    @property
    def notice(self) -> str:
        """In words, how well samples are filled."""
        said = self.manifest
        bad = f"; {said.bad_records:,} bad records left out, such as {said.bad_examples[0]}" if said.bad_records else ""
        return (
            f"text: {self.samples('train'):,} samples an epoch, tokenized as they are read; cut for "
            f"{100 * said.fill_for:.0f} % of their length by estimate, {100 * said.fill:.1f} % of a sample are tokens, the "
            f"rest padding, and {100 * said.cut:.2f} % of all tokens are cut off (measured on some samples){bad}"
        )


class OpenPart:
    """The samples of a part, mapped."""

    def __init__(self, path: Path):
        try:
            with path.open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            reader = pa.ipc.open_file(pa.BufferReader(pa.py_buffer(mapped)))
            if not reader.schema.equals(SCHEMA):
                raise ValueError("it has other columns")
            batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        except (OSError, ValueError, pa.ArrowException) as error:
            raise DataError(Problem(str(path), f"not a readable part of an index: {error}", AGAIN)) from None
        lists = [batch.column("slices") for batch in batches]
        self._offsets = [column.offsets.to_numpy() for column in lists]
        self._columns = [[column.values.field(name).to_numpy() for name, _ in COLUMNS] for column in lists]
        self._digests = [batch.column("digest").to_numpy() for batch in batches]
        self._ends = np.cumsum([len(batch) for batch in batches], dtype=np.int64)

    def window(self, number: int) -> Window:
        """What one sample is made of."""
        batch = int(np.searchsorted(self._ends, number, side="right"))
        row = number - (int(self._ends[batch - 1]) if batch else 0)
        inside = slice(*self._offsets[batch][row : row + 2].tolist())
        rows = zip(*(column[inside].tolist() for column in self._columns[batch]), strict=True)
        slices = [Slice(unit, at, size, begin, end, bool(ends), document) for
                  unit, at, size, begin, end, ends, document in rows]  # fmt: skip
        return Window(slices, digest=int(self._digests[batch][row]))


class PartWriter:
    """Collects the samples of one split, and writes them as a part, whole or not at all."""

    def __init__(self, path: Path, split: Split):
        self.path, self.split = path, split
        self._held: list[Window] = []
        self._batches: list[pa.RecordBatch] = []
        self._content = xxhash.xxh3_128()
        self._samples = self._documents = self._text_bytes = 0

    def add(self, windows: Iterable[Window]) -> None:
        for window in windows:
            self._held.append(window)
            if len(self._held) == ROWS:
                self._pack()

    def finish(self) -> TextPart | None:
        """The part; None, and no file, where there is no sample."""
        self._pack()
        if not self._samples:
            return None
        with (
            replacing(self.path) as temporary,
            pa.OSFile(str(temporary), "wb") as sink,
            pa.ipc.new_file(sink, SCHEMA) as writer,
        ):
            for batch in self._batches:
                writer.write_batch(batch)
        counts = (self._samples, self._documents, self._text_bytes, self.path.stat().st_size)
        return TextPart(self.path.name, self.split, *counts, digest_of(self.path), self._content.hexdigest())

    def _pack(self) -> None:
        """Turns the windows that are held into columns."""
        windows, self._held = self._held, []
        if not windows:
            return
        rows = [each for window in windows for each in window.slices]
        columns = {
            name: np.array(values, kind.to_pandas_dtype())
            for (name, kind), values in zip(COLUMNS, zip(*rows, strict=True), strict=True)
        }
        arrays = [pa.array(columns[name], kind) for name, kind in COLUMNS]
        counts = np.array([len(window.slices) for window in windows], np.int64)
        digests = np.array([window.digest for window in windows], np.uint64)
        structs = pa.StructArray.from_arrays(arrays, fields=list(SLICES.value_type))
        lists = pa.LargeListArray.from_arrays(pa.array(offsets_of(counts)), structs)
        self._batches.append(pa.record_batch([lists, pa.array(digests)], schema=SCHEMA))
        lengths = columns["end"] - columns["begin"]
        for decides in (counts, digests, lengths, columns["ends"], columns["document"]):
            self._content.update(np.ascontiguousarray(decides).data)
        self._samples += len(windows)
        self._documents += int(columns["ends"].sum())
        self._text_bytes += int(lengths.sum())


def write_index(folder: Path, manifest: TextManifest) -> None:
    """Puts the index into its folder, when all its parts are there."""
    said = {"format": FORMAT, **asdict(manifest), "hash": manifest.hash}
    with replacing(folder / FILE_NAME) as temporary:
        temporary.write_text(json.dumps(said, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def open_text(folder: str | Path) -> TextCorpus:
    """Opens the index in a folder; parts and files are not looked at. Raises DataError where there is none, or it was
    changed."""
    path = Path(folder) / FILE_NAME
    try:
        raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if raw.pop("format") != FORMAT:
            raise ValueError("it is of another version")
        stated = raw.pop("hash")
        raw["rule"] = TextRule(**raw["rule"])
        raw["units"] = tuple(Unit(**unit) for unit in raw["units"])
        raw["parts"] = tuple(TextPart(**part) for part in raw["parts"])
        raw["worth"] = tuple(raw["worth"])
        raw["bad_examples"] = tuple(raw["bad_examples"])
        manifest = TextManifest(**raw)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(Problem(str(path), f"not a readable index of text: {error}", AGAIN)) from None
    if stated != manifest.hash:
        raise DataError(Problem(str(path), "was changed after it was written", AGAIN))
    return TextCorpus(path.parent, manifest)


def holds_text(place: str | Path) -> bool:
    """Whether an index of text lies in a folder."""
    return (Path(place) / FILE_NAME).exists()


def text_folder(config: RunConfig, entry: int | None = None) -> Path:
    """Where the index of a run's text lies, or that of an entry of its blend."""
    folder = Path(config.run_dir) / "text"
    return folder if entry is None else folder / f"{entry:02d}"
