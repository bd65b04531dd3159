"""One training sample on one page, from its id to its text: what `raytron inspect PATH --sample ID` prints.

sample 5 of an endless sequence ─► source, epoch, sample of it ─► shard, tokens ─► documents, their ends, text

or, of text that is tokenized as it is read, files and bytes in place of shard and tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from raytron.config import RunConfig, load
from raytron.data.blend_check import step_of
from raytron.data.check import data_folder
from raytron.data.open_shards import Piece
from raytron.data.reader import ChopReader, PackReader
from raytron.data.run_data import RunData, open_run_data, source_names
from raytron.data.shard_file import Shard
from raytron.data.shards import Dataset
from raytron.data.stream import SampleStream
from raytron.data.text_reader import TextReader
from raytron.data.tokenizer import Tokenizer
from raytron.errors import DataError, Problem, RaytronError

RULER = 64  # characters
SHOWN_DOCUMENTS = 12
SHOWN_CHARACTERS = 60  # of a document's text, from either end


def describe_sample(path: str | Path, sample: int, sequence_length: int | None = None, seed: int = 0) -> str:
    """Where a training sample comes from, which documents it holds and where they end.

    path: a run directory, whose configuration says all; or a data set, of which `sequence_length` and `seed` make samples.
    sample: its id, from 0. Raises DataError where there is no such sample or the data can't be read.
    """
    path = Path(path)
    if sample < 0:
        raise DataError(Problem("--sample", f"there is no sample {sample}", "give a number from 0"))
    run = (path / "config.yaml").exists()
    if run and sequence_length is not None:
        what = f"the configuration in {path} says how long samples are"
        raise DataError(Problem("--sequence-length", what, "leave it out, or give the path of a data set"))
    config = load(path / "config.yaml") if run else _alone(path, sequence_length, seed)
    data = open_run_data(config.replace(**{"evaluate.batches": 0, "data.validation": []}), data_folder(config))
    stream = data.train()
    assert isinstance(stream, SampleStream)
    return "\n".join(_page(data, stream, sample, run))


def _alone(path: Path, sequence_length: int | None, seed: int) -> RunConfig:
    """The configuration of a run over one data set."""
    if sequence_length is None or sequence_length < 1:
        what = "a data set alone has no samples: they are as long as a run wants them"
        raise DataError(
            Problem("--sequence-length", what, "give their length in tokens, or the path of a run directory")
        )
    return RunConfig(seed=seed, sequence_length=sequence_length).replace(**{"data.dataset": str(path)})


def _page(data: RunData, stream: SampleStream, sample: int, run: bool) -> Iterator[str]:
    place = stream.order.locate(np.array([sample], np.int64))
    number, epoch, inner = (int(part[0]) for part in place)
    dataset, reader = data.sources[number], stream.readers[number]
    name = f"{number} {source_names(data.config)[number]}, " if data.config.data.blend else ""
    yield f"sample {sample:,}" + (f", of step {step_of(data.config, sample):,}" if run else "")
    yield f"  source      {name}{dataset.name}"
    yield f"  epoch       {epoch} of it, from 0: its sample {inner:,} of {reader.size:,}"
    if isinstance(reader, ChopReader | PackReader):
        assert isinstance(dataset, Dataset)
        yield from _documents(data, dataset, reader, inner)
    elif isinstance(reader, TextReader):
        yield from _slices(data, reader, inner)


def _documents(data: RunData, dataset: Dataset, reader: ChopReader | PackReader, inner: int) -> Iterator[str]:
    """The documents of one sample, piece by piece, as they lie in the shards."""
    length = data.config.sequence_length + isinstance(reader, PackReader)  # a bin is shown whole, with its last label
    pieces = [piece._replace(stop=min(piece.stop, piece.start + length)) for piece in reader.pieces(np.array([inner]))]
    for piece in pieces[:SHOWN_DOCUMENTS]:
        shard = reader.shards[piece.shard]
        yield f"  shard       {shard.path.name}, tokens {piece.start:,} to {piece.stop - 1:,} of {len(shard.tokens):,}"
    parts = [part for piece in pieces for part in _parts(reader.shards[piece.shard], piece)]
    yield f"  documents   {_named(parts)}"
    yield "  " + _ruler([part.column + part.stop - part.start for part in parts if part.stop == part.end], length)
    if data.config.data.fim.rate:
        yield "  as it lies in the shards: data.fim moves middles of documents afterwards"
    tokenizer = _tokenizer(dataset)
    for part in parts[:SHOWN_DOCUMENTS]:
        cut = [f"begins {part.start - part.begin:,} tokens before it"] * (part.begin < part.start)
        cut += [f"goes on for {part.end - part.stop:,} tokens"] * (part.end > part.stop)
        yield (
            f"  {part.column:>8,} to {part.column + part.stop - part.start - 1:<8,} document {part.document:,}, "
            f"id {int(part.shard.doc_ids[part.document]):016x}{', ' if cut else ''}{' and '.join(cut)}"
        )
        if tokenizer is not None:
            yield f"             {_text(tokenizer.decode(part.shard.tokens[part.start : part.stop].tolist()))}"
    if len(parts) > SHOWN_DOCUMENTS:
        yield f"  and {len(parts) - SHOWN_DOCUMENTS} more documents"
    filled = sum(part.stop - part.start for part in parts)
    if filled < length:
        yield f"  {filled:>8,} to {length - 1:<8,} padding"


def _slices(data: RunData, reader: TextReader, inner: int) -> Iterator[str]:
    """The documents of one sample of text, as they are read and tokenized now."""
    length, manifest = data.config.sequence_length + 1, reader.corpus.manifest
    window, tokens, lengths = reader.encoded([inner])[0]
    stops = np.cumsum(lengths).tolist()
    yield f"  documents   {len(window.slices)}, tokenized now"
    yield "  " + _ruler([stop for stop, each in zip(stops, window.slices, strict=True) if each.ends], length)
    if data.config.data.fim.rate:
        yield "  as it was tokenized: data.fim moves middles of documents afterwards"
    tokenizer = Tokenizer(reader.corpus.tokenizer, manifest.rule.eod_name)
    for each, stop, count in zip(window.slices[:SHOWN_DOCUMENTS], stops, lengths.tolist(), strict=False):
        unit = manifest.units[each.unit]
        place = f"row {each.at:,} from {unit.start} on" if unit.kind in ("parquet", "arrow") else f"byte {each.at:,}"
        yield (
            f"  {stop - count:>8,} to {stop - 1:<8,} document id {each.document:016x}, bytes {each.begin:,} to "
            f"{each.end - 1:,}{'' if each.ends else ' and goes on'}"
        )
        yield f"             {unit.path}, {place}"
        yield f"             {_text(tokenizer.decode(tokens[stop - count : stop].tolist()))}"
    if len(window.slices) > SHOWN_DOCUMENTS:
        yield f"  and {len(window.slices) - SHOWN_DOCUMENTS} more documents"
    if len(tokens) < length:
        yield f"  {len(tokens):>8,} to {length - 1:<8,} padding"
    if len(tokens) > length:
        yield f"  {length:>8,} to {len(tokens) - 1:<8,} cut off"


class Part(NamedTuple):
    """What a sample holds of one document."""

    column: int  # where it begins in the sample
    shard: Shard
    document: int  # its number in the shard
    start: int  # tokens of the shard: what the sample holds,
    stop: int
    begin: int  # and the whole document
    end: int


def _parts(shard: Shard, piece: Piece) -> Iterator[Part]:
    first = int(np.searchsorted(shard.offsets, piece.start, side="right")) - 1
    last = int(np.searchsorted(shard.offsets, piece.stop - 1, side="right")) - 1
    for document in range(first, last + 1):
        begin, end = int(shard.offsets[document]), int(shard.offsets[document + 1])
        start, stop = max(begin, piece.start), min(end, piece.stop)
        yield Part(piece.column + start - piece.start, shard, document, start, stop, begin, end)


def _named(parts: Sequence[Part]) -> str:
    """Which documents, in words."""
    first, last = parts[0], parts[-1]
    if len({part.shard.path for part in parts}) > 1 or last.document - first.document != len(parts) - 1:
        return f"{len(parts)}"
    return f"{len(parts)}: {first.document:,} to {last.document:,} of the shard's {first.shard.documents:,}"


def _ruler(ends: list[int], length: int) -> str:
    """A sample as a line, with a bar in the cell where a document ends."""
    cells = ["─"] * min(RULER, length)
    for end in ends:
        if end <= length:
            cells[(end - 1) * len(cells) // length] = "┤"
    return "├" + "".join(cells)


def _tokenizer(dataset: Dataset) -> Tokenizer | None:
    """What turns its ids into text; None where that can't be read."""
    built = dataset.manifest.build.get("tokenizer")
    eod = str(built.get("eod", "")) if isinstance(built, dict) else ""
    try:
        return Tokenizer(dataset.tokenizer, eod)
    except RaytronError:
        return None


def _text(text: str) -> str:
    """Both ends of a text, on one line."""
    if len(text) > 2 * SHOWN_CHARACTERS:
        text = f"{text[:SHOWN_CHARACTERS]} … {text[-SHOWN_CHARACTERS:]}"
    return repr(text)
