"""A data set, or an index of text, on one page: what `raytron inspect PATH` prints."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from raytron.data.manifest import SPLITS
from raytron.data.pack import plans_in
from raytron.data.shards import Dataset, open_dataset
from raytron.data.text_index import TextCorpus, holds_text, open_text
from raytron.data.text_reader import TextReader

BAR = 32  # characters of the longest bar
SHOWN_SOURCES = 12
READ = 64  # samples of text that are read at once


def describe(path: str | Path, verify: bool = False) -> str:
    """Counts, tokenizer, sources and document lengths of a data set, as text.

    `verify` also reads every byte of it. Raises DataError where it can't be opened, is incomplete, or is damaged.
    """
    if holds_text(path):
        return "\n".join(_text(open_text(path), verify))
    dataset = open_dataset(path)
    lines = [f"data set {dataset.name}", f"  hash        {dataset.hash}", ""]
    lines += [*_splits(dataset), "", *_tokenizer(dataset), "", *_sources(dataset), "", *_lengths(dataset)]
    for plan in plans_in(dataset.path, dataset, verify):
        lines += ["", f"  {'packed':<12}" + str(plan).replace("\n", f"\n  {'':<12}")]
    if verify:
        dataset.verify()
        lines += ["", "verified: every digest, document boundary and token id is as it should be"]
    return "\n".join(lines)


def _text(text: TextCorpus, verify: bool) -> Iterator[str]:
    """An index of text. Raises DataError where `verify` finds a part, or text, that is not as it was."""
    said = text.manifest
    yield from (f"index of text {text.name}", f"  hash        {text.hash}", "")
    yield f"  {'split':<12}{'samples':>10}{'documents':>13}{'text':>12}"
    for split in SPLITS:
        size = sum(part.text_bytes for part in text.parts(split)) / 2**20
        yield f"  {split:<12}{text.samples(split):>10,}{text.documents(split):>13,}{size:>8.1f} MiB"
    yield ""
    yield f"  tokenizer   {text.tokenizer.name}, {text.vocab} ids, end of document {text.eod}"
    yield f"  sha256      {text.tokenizer_sha256}"
    yield f"  a sample    {said.rule.sequence_length} tokens, cut for {100 * said.fill_for:.0f} % of them by estimate"
    measured = f"{100 * said.fill:.1f} % of a sample are tokens, {100 * said.cut:.2f} % of all tokens are cut off"
    yield f"  measured    {said.mean:.3f} bytes per token; {measured}"
    yield f"  files       {len({unit.path for unit in said.units}):,}"
    if said.bad_records:
        yield f"  bad records {said.bad_records:,} left out, such as"
        yield from (f"  {'':<12}{example}" for example in said.bad_examples)
    if verify:
        text.verify()
        for split in SPLITS:
            reader = TextReader(text, split) if text.samples(split) else None
            for first in range(0, text.samples(split), READ):
                assert reader is not None
                reader.encoded(range(first, min(first + READ, text.samples(split))))
        yield from ("", "verified: the text of every sample is what was indexed")


def _splits(dataset: Dataset) -> Iterator[str]:
    yield f"  {'split':<12}{'shards':>8}{'documents':>13}{'tokens':>16}{'size':>12}"
    for split in SPLITS:
        entries = dataset.entries(split)
        size = int(entries.column("bytes").sum()) / 2**20
        counts = f"{dataset.documents(split):>13,}{dataset.tokens(split):>16,}"
        yield f"  {split:<12}{len(entries):>8}{counts}{size:>8.1f} MiB"


def _tokenizer(dataset: Dataset) -> Iterator[str]:
    unigram = dataset.manifest.unigram
    yield f"  tokenizer   {dataset.tokenizer.name}, {dataset.vocab} ids, end of document {dataset.eod}"
    yield f"  sha256      {dataset.manifest.tokenizer_sha256}"
    if dataset.manifest.backend:
        yield f"  encoded by  {dataset.manifest.backend}"
    yield f"  entropy     {unigram.nats:.4f} nats per token (unigram, {unigram.distinct} ids in use)"


def _sources(dataset: Dataset) -> Iterator[str]:
    sources = dataset.manifest.sources
    for number, source in enumerate(sources[:SHOWN_SOURCES]):
        head = "sources" if number == 0 else ""
        yield f"  {head:<12}{source.name}: {source.files:,} files, {source.bytes / 2**20:.1f} MiB"
    if len(sources) > SHOWN_SOURCES:
        yield f"  {'':<12}and {len(sources) - SHOWN_SOURCES} more"
    if dataset.manifest.skipped:
        yield f"  {'skipped':<12}{dataset.manifest.skipped:,} files or parts of files without text"
    if dataset.manifest.bad_records:
        yield f"  {'bad records':<12}{dataset.manifest.bad_records:,} left out, such as"
        yield from (f"  {'':<12}{example}" for example in dataset.manifest.bad_examples)


def _lengths(dataset: Dataset) -> Iterator[str]:
    """A bar for each power of two of document lengths."""
    lengths = _document_lengths(dataset)
    bins = np.bincount(np.frexp(lengths)[1] - 1)  # bin b: lengths in [2^b, 2^(b+1))
    first = int(np.flatnonzero(bins)[0])
    middle, longest = int(np.median(lengths)), int(lengths.max())
    yield f"  tokens per document: median {middle:,}, mean {lengths.mean():,.0f}, longest {longest:,}"
    for power in range(first, len(bins)):
        bar = "█" * round(BAR * int(bins[power]) / int(bins.max()))
        bar = bar or ("▏" if bins[power] else "")
        yield f"  {2**power:>11,} – {2 ** (power + 1) - 1:<11,} {bar:<{BAR}} {bins[power]:,}"


def _document_lengths(dataset: Dataset) -> NDArray[np.int64]:
    """(documents,) tokens of each, over all splits."""
    return np.concatenate([np.diff(dataset.read(entry).offsets) for entry in dataset.manifest.shards])
