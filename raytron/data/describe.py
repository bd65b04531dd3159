"""A data set on one page: what `raytron inspect DATASET` prints."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from raytron.data.manifest import SPLITS
from raytron.data.pack import plans_in
from raytron.data.shards import Dataset, open_dataset

BAR = 32  # characters of the longest bar
SHOWN_SOURCES = 12


def describe(path: str | Path, verify: bool = False) -> str:
    """Counts, tokenizer, sources and document lengths of a data set, as text.

    `verify` also reads every byte of it. Raises DataError where it can't be opened, is incomplete, or is damaged.
    """
    dataset = open_dataset(path)
    lines = [f"data set {dataset.name}", f"  hash        {dataset.hash}", ""]
    lines += [*_splits(dataset), "", *_tokenizer(dataset), "", *_sources(dataset), "", *_lengths(dataset)]
    for plan in plans_in(dataset.path, dataset, verify):
        lines += ["", f"  {'packed':<12}" + str(plan).replace("\n", f"\n  {'':<12}")]
    if verify:
        dataset.verify()
        lines += ["", "verified: every digest, document boundary and token id is as it should be"]
    return "\n".join(lines)


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
