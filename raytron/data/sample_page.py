"""One training sample on one page, from its id to its text: what `raytron inspect PATH --sample ID` prints.

sample 5 of an endless sequence ─► source, epoch, sample of it ─► shard, tokens ─► documents, their ends, text
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from raytron.config import RunConfig, load
from raytron.data.blend_check import step_of
from raytron.data.check import data_folder
from raytron.data.reader import ChopReader
from raytron.data.run_data import RunData, open_run_data, source_names
from raytron.data.shards import Dataset
from raytron.data.stream import SampleStream
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
    yield f"  source      {name}{dataset.path}"
    yield f"  epoch       {epoch} of it, from 0: its sample {inner:,} of {reader.size:,}"
    if isinstance(reader, ChopReader):
        yield from _pieces(dataset, reader, inner)


def _pieces(dataset: Dataset, reader: ChopReader, inner: int) -> Iterator[str]:
    """The documents of one sample that is a slice of a shard."""
    shards, offsets = reader.locate(np.array([inner]))
    shard, start, length = reader.shard(int(shards[0])), int(offsets[0]), reader.sequence_length
    first = int(np.searchsorted(shard.offsets, start, side="right")) - 1
    last = int(np.searchsorted(shard.offsets, start + length - 1, side="right")) - 1
    yield f"  shard       {shard.path.name}, tokens {start:,} to {start + length - 1:,} of {len(shard.tokens):,}"
    yield f"  documents   {last - first + 1}: {first:,} to {last:,} of the shard's {shard.documents:,}"
    ends = [int(shard.offsets[document + 1]) - start for document in range(first, last + 1)]
    yield "  " + _ruler(ends, length)
    tokenizer = _tokenizer(dataset)
    for document in range(first, min(last + 1, first + SHOWN_DOCUMENTS)):
        begin, end = int(shard.offsets[document]), int(shard.offsets[document + 1])
        here = slice(max(begin, start), min(end, start + length))
        cut = [f"begins {start - begin:,} tokens before it"] * (begin < start)
        cut += [f"goes on for {end - start - length:,} tokens"] * (end > start + length)
        yield (
            f"  {here.start - start:>8,} to {here.stop - start - 1:<8,} document {document:,}, "
            f"id {int(shard.doc_ids[document]):016x}{', ' if cut else ''}{' and '.join(cut)}"
        )
        if tokenizer is not None:
            yield f"             {_text(tokenizer.decode(shard.tokens[here].tolist()))}"
    if last - first + 1 > SHOWN_DOCUMENTS:
        yield f"  and {last - first + 1 - SHOWN_DOCUMENTS} more documents"


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
