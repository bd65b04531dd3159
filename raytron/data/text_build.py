"""Indexes the text of a run: one pass over its lines and rows, nothing tokenized but what measures it.

    resolve sources ─► tokenizer ─► density ─► a task a group of units: documents ─► windows ─► parts ─► index.json

The pass finds where documents begin, their ids (which choose their split, as in a tokenized data set), and bad records.
A little text is indexed here, much by tasks all over the cluster: where windows end depends on the corpus and the rule
alone, so the index is the same. It is used again as long as rule, tokenizer and files (by size and time) are the same;
where they are not it is made anew, and a run that has a checkpoint goes on if the new one has the hash that it recorded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from raytron.config import RunConfig
from raytron.data.corpus import Corpus
from raytron.data.density import Density, measure
from raytron.data.estimate import Estimate
from raytron.data.fast import FAST, Encoder
from raytron.data.manifest import SPLITS, Unigram
from raytron.data.order import permute
from raytron.data.parts import is_validation
from raytron.data.prepare import make_tokenizer
from raytron.data.records import SHOWN_BAD, Fields, Tally, Unit, records
from raytron.data.shards import TOKENIZER_NAME
from raytron.data.text_index import (
    FILE_NAME,
    PartWriter,
    TextCorpus,
    TextManifest,
    TextPart,
    TextRule,
    open_text,
    write_index,
)
from raytron.data.text_reader import TextReader, fullness, no_text
from raytron.data.text_sources import indexed, resolve_text, rule_of
from raytron.data.tokenize import Report, group_units, over_cluster, units_of
from raytron.data.windows import Cutter
from raytron.errors import DataError, Problem, RaytronError

MIB = 2**20
GROUP_BYTES = 64 * MIB  # of text, that windows run through
HERE_BYTES = 64 * MIB  # of text, up to which it is indexed in this process
MEASURED_BYTES = 4 * MIB  # of text, that density is measured on,
MEASURED_BYTES_HERE = 2**15  # from places all over the corpus, at least so much of each,
MEASURED_WINDOWS_HERE = 2  # and so many samples
MEASURED_SAMPLES = 64


@dataclass(frozen=True)
class TextJob:
    """What is the same for every task."""

    folder: str
    rule: TextRule
    estimate: Estimate
    fill: float  # share of the sequence length that windows are cut for


def ensure_text(config: RunConfig, sources: Sequence[str], folder: Path, report: Report) -> TextCorpus:
    """The index of text in a folder, made now where it is not there or the files are not as they were.

    Ray must be initialised where there is much text. Raises ConfigError or DataError where it can't be indexed.
    """
    corpus = resolve_text(config.data, sources)
    there = _there(config, corpus, folder)
    if there is not None:
        report(1.0, f"the index of the text in {folder} is complete")
        return there
    _clear(folder)
    tokenizer = make_tokenizer(config.data, corpus, folder / TOKENIZER_NAME, report)
    rule = rule_of(config, tokenizer)
    report(0.25, "measuring how much text a token has")
    encoder = Encoder(tokenizer, config.data.tokenizer.backend)
    density = _density(corpus, encoder, rule)
    fill_for = density.fill if rule.fill is None else rule.fill
    job = TextJob(str(folder.absolute()), rule, density.estimate, fill_for)
    manifest = TextManifest(
        rule=rule,
        worth=density.estimate.worth,
        fill_for=fill_for,
        mean=density.mean,
        nats=Unigram.of(density.counts).nats,
        vocab=tokenizer.vocab,
        eod=tokenizer.eod,
        backend=FAST if encoder.name == FAST else "tokenizers",
        units=corpus.units,
        parts=(),
    )
    made = TextCorpus(folder, _indexed(corpus, job, manifest, report))
    if not made.samples("train"):
        raise DataError(no_text(made, "train")._replace(where=", ".join(sources)))
    reader = TextReader(made, "train")
    count = min(MEASURED_SAMPLES, reader.size)
    fill, cut = fullness(reader, permute(np.arange(count), reader.size, 0).tolist())
    write_index(folder, replace(made.manifest, fill=fill, cut=cut))
    return open_text(folder)


def index_group(group: int, first: int, units: Sequence[Unit], job: TextJob) -> dict[str, Any]:
    """One task: the parts of some units, and its bad records, as plain values. first: number of the first unit.

    Raises DataError for text that can't be read.
    """
    folder, rule, tally = Path(job.folder), job.rule, Tally()
    cutters = {split: Cutter(job.estimate, job.fill * rule.sequence_length, alone=rule.alone) for split in SPLITS}
    writers = {split: PartWriter(folder / f"{split}-{group:06d}.arrow", split) for split in SPLITS}
    fields = Fields(rule.text_key, (), rule.on_bad_record)
    for number, unit in enumerate(units, first):
        for record in records(unit, fields, tally):
            text = record.text.encode("utf-8")
            document = xxhash.xxh3_64_intdigest(text)
            split = SPLITS[is_validation(document, rule.validation_fraction)]
            writers[split].add(cutters[split].add(number, record.at, record.size, document, text))
    for split, writer in writers.items():
        writer.add(cutters[split].finish())
    parts = [part for part in (writer.finish() for writer in writers.values()) if part is not None]
    return {"group": group, "parts": [asdict(part) for part in parts], "bad": tally.bad, "examples": tally.examples}


def _indexed(corpus: Corpus, job: TextJob, manifest: TextManifest, report: Report) -> TextManifest:
    """A manifest with the parts of all groups."""
    groups = group_units(corpus.units, GROUP_BYTES)
    firsts = list(accumulate((len(group) for group in groups), initial=0))[:-1]
    done: dict[int, Mapping[str, Any]] = {}
    for facts in _facts(corpus, groups, firsts, job):
        if "error" in facts:
            raise DataError(facts["error"])
        done[facts["group"]] = facts
        report(0.3 + 0.7 * len(done) / len(groups), f"indexed {len(done)} of {len(groups)} parts of the text")
    ordered = [done[number] for number in range(len(groups))]
    parts = [TextPart(**part) for facts in ordered for part in facts["parts"]]
    return replace(
        manifest,
        parts=tuple(parts),
        bad_records=sum(facts["bad"] for facts in ordered),
        bad_examples=tuple([example for facts in ordered for example in facts["examples"]][:SHOWN_BAD]),
    )


def _facts(
    corpus: Corpus, groups: Sequence[Sequence[Unit]], firsts: Sequence[int], job: TextJob
) -> Iterator[Mapping[str, Any]]:
    """What each task gives: here, one after another, or over the cluster, in any order."""
    if corpus.bytes <= HERE_BYTES:
        yield from (
            index_group(n, first, units, job) for n, (first, units) in enumerate(zip(firsts, groups, strict=True))
        )
        return
    for row in over_cluster(_task, groups, firsts=list(firsts), job=job):
        yield json.loads(row["facts"])


def _task(batch: dict[str, Any], firsts: Sequence[int], job: TextJob) -> dict[str, Any]:
    """The Ray Data function: one row in, one row of facts out. An expected error is a row too, so it keeps its text."""
    group = int(batch["group"][0])
    try:
        return {"facts": [json.dumps(index_group(group, firsts[group], units_of(batch), job))]}
    except RaytronError as error:
        return {"facts": [json.dumps({"error": str(error)})]}


def _there(config: RunConfig, corpus: Corpus, folder: Path) -> TextCorpus | None:
    """The index that lies in a folder, if it is whole, and of this corpus by this configuration."""
    found = indexed(config, corpus, folder)
    try:
        if found is not None:
            found.verify()
    except DataError:
        return None
    return found


def _clear(folder: Path) -> None:
    """Makes the folder, without an index or what another attempt left."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in [*folder.glob("*.arrow"), folder / FILE_NAME, folder / TOKENIZER_NAME]:
        path.unlink(missing_ok=True)


def _density(corpus: Corpus, encoder: Encoder, rule: TextRule) -> Density:
    """What is measured on text from all over the corpus. Raises DataError where there is none."""
    tokenizer = encoder.tokenizer
    share = max(MEASURED_BYTES_HERE, MEASURED_WINDOWS_HERE * 4 * rule.sequence_length)
    texts = _spread(corpus, max(MEASURED_BYTES // share, 1), share)
    try:
        return measure(texts, encoder.encode, rule.sequence_length, tokenizer.vocab, tokenizer.eod)
    except ValueError:
        what = "no document: the files hold no text"
        raise DataError(Problem("data.sources", what, "give files that hold text")) from None


def _spread(corpus: Corpus, places: int, share: int) -> Iterator[str]:
    """About `share` bytes of documents, the last of them cut, from each of so many places; of little text all of it."""
    if corpus.bytes <= places * share:
        yield from (record.text for unit in corpus.units for record in records(unit, corpus.fields, Tally()))
        return
    ends = np.cumsum([unit.bytes for unit in corpus.units])
    for place in range(places):
        at = corpus.bytes * place // places
        number = int(np.searchsorted(ends, at, side="right"))
        unit, left = corpus.units[number], share
        into = 1 - (int(ends[number]) - at) / unit.bytes  # the share of the unit that is before
        start = unit.start + int((unit.stop - unit.start) * into)
        stop = min(start + share, unit.stop) if unit.kind == "text" else unit.stop
        for record in records(replace(unit, start=start, stop=stop), corpus.fields, Tally()):
            yield record.text[:left]
            left -= len(record.text.encode())
            if left <= 0:
                break
