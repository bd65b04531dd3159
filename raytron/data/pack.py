"""Which documents make up which sample: a *pack plan*, made once for a data set and kept in a file.

A document of n tokens, in a sample of S + 1 (the last is only a label), is one *piece* where it fits. A longer one is cut
every S tokens, and a piece begins with the last token of the piece before, so that each of its n - 1 labels counts once:

    S = 4    d0 d1 d2 d3 d4 d5 d6    ──►    d0 d1 d2 d3 d4  │  d4 d5 d6

or it is left out, where documents may not be cut (a conversation). A document of one token has no label and is left out.
Pieces go to bins of S + 1 tokens, a bin a sample: `best_fit` packs them (`raytron.data.best_fit`), a window of pieces at a
time, so that memory is bounded and a bin's documents lie near each other; `pad` gives each piece a bin of its own.

    file       one record batch for each window, a row for each bin
               pieces: large_list<struct<start: int64, length: int32>>     start: token of the split, shards end to end
    metadata   of the file: what it is a plan of; of each batch: what it cut, dropped and padded, and its digest

Nothing is drawn: the plan is a function of the document lengths and the rule alone.
"""

from __future__ import annotations

import json
import mmap
import operator
from collections.abc import Iterator, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from raytron.data.best_fit import Packing, best_fit
from raytron.data.manifest import Split
from raytron.data.shard_file import replacing
from raytron.data.shards import Dataset
from raytron.errors import DataError, Problem

FORMAT = "raytron-pack-plan 1"  # another number where another plan would be made of the same documents
WINDOW = 1 << 21  # pieces
AGAIN = "remove the file: it is made again when a run needs it"
PIECES = pa.large_list(pa.struct([("start", pa.int64()), ("length", pa.int32())]))


@dataclass(frozen=True)
class PackRule:
    """How the documents of a split become samples."""

    split: Split
    packing: Literal["best_fit", "pad"]
    sequence_length: int  # S: bins hold S + 1 tokens
    whole: bool = False  # documents longer than a bin are left out; else they are cut

    @property
    def name(self) -> str:
        return f"{self.split}-{self.packing}{'-whole' * self.whole}-{self.sequence_length}"


@dataclass(frozen=True)
class PackReport:
    """What a plan, or a part of it, did to the documents."""

    documents: int = 0
    tokens: int = 0  # of all these documents
    cut: int = 0  # documents in several pieces
    dropped: int = 0  # documents left out: longer than a sample
    dropped_tokens: int = 0  # in those
    single: int = 0  # documents left out: of one token
    pieces: int = 0
    bins: int = 0
    padding: int = 0  # tokens

    def __add__(self, other: PackReport) -> PackReport:
        return PackReport(*map(operator.add, astuple(self), astuple(other)))

    def share(self, sequence_length: int) -> float:
        """Of the tokens of all bins, those that are padding."""
        return self.padding / max(self.bins * (sequence_length + 1), 1)


class Pieces(NamedTuple):
    """Slices of documents, in the order of the data."""

    starts: NDArray[np.int64]  # (pieces,) from the beginning of what they are slices of
    lengths: NDArray[np.int64]  # (pieces,)


class PackPlan:
    """An opened plan, mapped into memory."""

    def __init__(self, path: Path, rule: PackRule, report: PackReport, batches: Sequence[pa.RecordBatch]):
        self.path, self.rule, self.report = path, rule, report
        columns = [batch.column("pieces") for batch in batches]
        self._offsets = [column.offsets.to_numpy() for column in columns]
        self._starts = [column.values.field("start").to_numpy() for column in columns]
        self._lengths = [column.values.field("length").to_numpy() for column in columns]
        self._ends = np.cumsum([len(column) for column in columns], dtype=np.int64)  # bins up to and with each batch

    @property
    def bins(self) -> int:
        """Samples that it makes."""
        return int(self._ends[-1]) if len(self._ends) else 0

    def bin(self, number: int) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """The pieces of one bin: first tokens, counted over the split's shards end to end, and lengths."""
        batch = int(np.searchsorted(self._ends, number, side="right"))
        row = number - (int(self._ends[batch - 1]) if batch else 0)
        inside = slice(*self._offsets[batch][row : row + 2].tolist())
        return self._starts[batch][inside], self._lengths[batch][inside]

    def __str__(self) -> str:
        rule, report = self.rule, self.report
        share = 100 * report.share(rule.sequence_length)
        return (
            f"{rule.name}: {report.bins:,} samples, {report.padding:,} tokens of padding ({share:.3f} %)\n"
            f"{report.documents:,} documents: {report.cut:,} cut ({report.pieces:,} pieces in all), {report.dropped:,} too "
            f"long and left out ({report.dropped_tokens:,} tokens), {report.single:,} of one token"
        )


def cut(offsets: NDArray[np.int64], sequence_length: int, whole: bool) -> tuple[Pieces, PackReport]:
    """The pieces of documents that begin at `offsets` (documents + 1,), and what became of the documents."""
    lengths = np.diff(offsets)
    long = np.flatnonzero(lengths > sequence_length + 1)
    count = (lengths > 1).astype(np.int64)  # pieces of each document, none of a single token
    single = len(count) - int(count.sum())
    count[long] = 0 if whole else -(-(lengths[long] - 1) // sequence_length)
    document = np.repeat(np.arange(len(lengths)), count)
    pieces = Pieces(offsets[document], lengths[document])
    several = count[long]  # pieces of each that is cut
    number = np.arange(several.sum()) - np.repeat(
        np.cumsum(several) - several, several
    )  # of each piece in its document
    at = np.repeat(np.cumsum(count)[long] - several, several) + number
    pieces.starts[at] += number * sequence_length
    pieces.lengths[at] = np.minimum(pieces.lengths[at] - number * sequence_length, sequence_length + 1)
    report = PackReport(
        documents=len(lengths),
        tokens=int(lengths.sum()),
        cut=0 if whole else len(long),
        dropped=len(long) if whole else 0,
        dropped_tokens=int(lengths[long].sum()) if whole else 0,
        single=single,
        pieces=len(document),
    )
    return pieces, report


def make_plan_file(dataset: Dataset, rule: PackRule, path: Path, window: int = WINDOW) -> None:
    """Makes the plan of a split and writes it, whole or not at all. Raises DataError where it has no sample."""
    about = {"format": FORMAT, "dataset": dataset.hash, "rule": json.dumps(asdict(rule), sort_keys=True)}
    schema = pa.schema([("pieces", PIECES)], metadata=about)
    bins = 0
    with replacing(path) as temporary:
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            for pieces, report in _windows(dataset, rule, window):
                batch, report = _packed(pieces, report, rule, schema)
                about_batch = {"report": json.dumps(asdict(report)), "xxh3_128": _digest(batch)}
                writer.write_batch(batch, custom_metadata=about_batch)
                bins += report.bins
        if not bins:
            raise DataError(no_sample(dataset, rule))


def _windows(dataset: Dataset, rule: PackRule, window: int) -> Iterator[tuple[Pieces, PackReport]]:
    """All pieces of a split, `window` of them at a time. The last, with what is left, carries the report of all."""
    held, report, first = Pieces(np.empty(0, np.int64), np.empty(0, np.int64)), PackReport(), 0
    for entry in dataset.entries(rule.split):
        pieces, added = cut(dataset.read(entry).offsets + first, rule.sequence_length, rule.whole)
        held = Pieces(*map(np.concatenate, zip(held, pieces, strict=True)))
        report, first = report + added, first + entry.tokens
        while len(held.starts) > window:
            yield Pieces(held.starts[:window], held.lengths[:window]), PackReport()
            held = Pieces(held.starts[window:], held.lengths[window:])
    yield held, report


def _packed(pieces: Pieces, report: PackReport, rule: PackRule, schema: pa.Schema) -> tuple[pa.RecordBatch, PackReport]:
    """The bins of a window of pieces as rows, and its report with what only packing tells."""
    capacity = rule.sequence_length + 1
    if rule.packing == "best_fit":
        packing = best_fit(pieces.lengths, capacity)
    else:
        packing = Packing(np.arange(len(pieces.lengths)), np.arange(1, len(pieces.lengths) + 1))
    starts, lengths = pa.array(pieces.starts[packing.order]), pa.array(pieces.lengths[packing.order].astype(np.int32))
    each = pa.StructArray.from_arrays([starts, lengths], fields=list(PIECES.value_type))
    offsets = pa.array(np.concatenate([np.zeros(1, np.int64), packing.ends]))
    batch = pa.record_batch([pa.LargeListArray.from_arrays(offsets, each)], schema=schema)
    padding = len(packing.ends) * capacity - int(pieces.lengths.sum())
    return batch, report + PackReport(bins=len(packing.ends), padding=padding)


def read_plan(path: Path, verify: bool = False) -> tuple[PackPlan, str]:
    """Opens a plan, and the hash of the data set that it is of. verify: also reads every byte. Raises DataError."""
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        reader = pa.ipc.open_file(pa.BufferReader(pa.py_buffer(mapped)))
        about = {key.decode(): value.decode() for key, value in (reader.schema.metadata or {}).items()}
        if about.get("format") != FORMAT or reader.schema.field("pieces").type != PIECES:
            raise ValueError(f"its format is {about.get('format')!r}, not {FORMAT!r}")
        batches, report = [], PackReport()
        for number in range(reader.num_record_batches):
            batch, said = reader.get_batch_with_custom_metadata(number)
            if verify and said[b"xxh3_128"].decode() != _digest(batch):
                raise ValueError("is damaged: its digest is not the one that it was written with")
            batches.append(batch)
            report += PackReport(**json.loads(said[b"report"]))
        return PackPlan(path, PackRule(**json.loads(about["rule"])), report, batches), about["dataset"]
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise DataError(Problem(str(path), f"not a readable pack plan: {error}", AGAIN)) from None


def open_plan(dataset: Dataset, rule: PackRule, folders: Sequence[Path], verify: bool = False) -> PackPlan:
    """The plan of a data set: the first that one of the folders has, or else made in the first that can be written to.

    verify: reads every byte of one that is there.
    Raises DataError where there is no sample, a plan is damaged or another's, or no folder can be written to.
    """
    paths = _paths(dataset, rule, folders)
    path = next((path for path in paths if path.exists()), None)
    return _opened(dataset, rule, path or _make_in_first(dataset, rule, paths), verify)


def find_plan(dataset: Dataset, rule: PackRule, folders: Sequence[Path]) -> PackPlan | None:
    """As `open_plan`, but makes none: None where no folder has it."""
    found = next((path for path in _paths(dataset, rule, folders) if path.exists()), None)
    return None if found is None else _opened(dataset, rule, found)


def _paths(dataset: Dataset, rule: PackRule, folders: Sequence[Path]) -> list[Path]:
    return [folder / f"{rule.name}-{dataset.hash[:8]}.arrow" for folder in folders]


def _opened(dataset: Dataset, rule: PackRule, path: Path, verify: bool = False) -> PackPlan:
    plan, of = read_plan(path, verify)
    if of != dataset.hash or plan.rule != rule:
        raise DataError(Problem(str(path), f"is not a plan of {dataset.name} by the rule {rule.name}", AGAIN))
    return plan


def _make_in_first(dataset: Dataset, rule: PackRule, paths: Sequence[Path]) -> Path:
    reason = "no folder was given"
    for path in paths:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            make_plan_file(dataset, rule, path)
            return path
        except OSError as error:
            reason = str(error)
    raise DataError(Problem(str(paths[-1]), f"the pack plan can't be written: {reason}", "give a run_dir with room"))


def plans_in(folder: Path, dataset: Dataset, verify: bool = False) -> list[PackPlan]:
    """The plans of a data set that lie in a folder. Raises DataError where one is damaged."""
    read = [read_plan(path, verify) for path in sorted(folder.glob(f"*-{dataset.hash[:8]}.arrow"))]
    return [plan for plan, of in read if of == dataset.hash]


def _digest(batch: pa.RecordBatch) -> str:
    """xxh3-128 of the numbers of a batch, in hex."""
    column = batch.column("pieces")
    state = xxhash.xxh3_128()
    for array in (column.offsets, column.values.field("start"), column.values.field("length")):
        state.update(array.to_numpy())
    return str(state.hexdigest())


def no_sample(dataset: Dataset, rule: PackRule) -> Problem:
    """What to say where no document of a split makes a sample."""
    what = f"the {rule.split} split holds no document of 2 to {rule.sequence_length + 1} tokens"
    remedy = "use a larger sequence_length, or data.too_long=cut"
    if not rule.whole:
        what, remedy = f"the {rule.split} split holds no document of 2 tokens or more", "use a larger corpus"
    return Problem(dataset.name, what, remedy)
