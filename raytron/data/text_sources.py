"""Which text can be tokenized as it is read, and by which rule: files in which a document is found without what is before
it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from raytron.config import DataConfig, RunConfig
from raytron.data.corpus import Corpus, resolve
from raytron.data.files import scheme_of
from raytron.data.records import Fields, Unit
from raytron.data.text_index import TextCorpus, TextRule, open_text
from raytron.data.tokenizer import Tokenizer
from raytron.errors import ConfigError, Problem, RaytronError

MIB = 2**20
LARGEST_ROW_GROUP = 64 * MIB  # bytes of its text: a sample reads one whole
PREPARE = "or let it be tokenized first (data.source: tokens)"


def resolve_text(data: DataConfig, sources: Sequence[str], where: str = "data.sources") -> Corpus:
    """The units of text to be tokenized as it is read, with absolute paths; reads no text.

    where: the key that names the sources. Raises ConfigError with everything that can't be read document by document.
    """
    limit = None if data.max_mb is None else int(data.max_mb * MIB)
    try:
        corpus = resolve(sources, data.text_key, limit, fields=fields_of_text(data))
        found = list(dict.fromkeys(problem for unit in corpus.units for problem in _unfit(unit)))
        if found:
            raise ConfigError(found)
    except ConfigError as error:
        told = [each._replace(where=where) if each.where == "data.sources" else each for each in error.problems]
        raise ConfigError(told) from None
    here = [scheme_of(unit.path) is None for unit in corpus.units]
    units = [
        replace(unit, path=os.path.abspath(unit.path)) if local else unit
        for unit, local in zip(corpus.units, here, strict=True)
    ]
    return replace(corpus, units=tuple(units))


def fields_of_text(data: DataConfig) -> Fields:
    """What is used of each record."""
    return Fields(data.text_key, (), data.on_bad_record)


def rule_of(config: RunConfig, tokenizer: Tokenizer) -> TextRule:
    """How a configuration makes samples of text."""
    data = config.data
    return TextRule(
        sequence_length=config.sequence_length,
        alone=data.packing == "pad",
        text_key=data.text_key,
        on_bad_record=data.on_bad_record,
        validation_fraction=data.validation_fraction,
        tokenizer_sha256=tokenizer.sha256,
        tokenizer_vocab=data.tokenizer.vocab if data.tokenizer.path is None else None,
        tokenizer_mb=data.tokenizer.train_mb if data.tokenizer.path is None else None,
        eod_name=data.tokenizer.eod,
        backend=data.tokenizer.backend,
        fill=data.text_fill,
    )


def indexed(config: RunConfig, corpus: Corpus, folder: Path) -> TextCorpus | None:
    """The index that lies in a folder, if it is of this corpus by this configuration; its parts are not looked at."""
    given = config.data.tokenizer
    try:
        found = open_text(folder)
        path, pattern = (found.tokenizer, None) if given.path is None else (given.path, given.pattern)
        rule = rule_of(config, Tokenizer(path, given.eod, pattern))
    except RaytronError:
        return None
    return found if found.manifest.units == corpus.units and found.manifest.rule == rule else None


def _unfit(unit: Unit) -> Iterator[Problem]:
    where = "data.sources"
    if unit.kind in ("jsonl.gz", "jsonl.zst"):
        what = f"{unit.path} is packed: a document in it is found only by unpacking all before it"
        yield Problem(where, what, f"unpack it, {PREPARE}")
    if unit.kind == "arrow" and scheme_of(unit.path) is not None:
        what = f"{unit.path} is a remote Arrow file, whose documents are found only by reading all of it"
        yield Problem(where, what, f"fetch it, give Parquet or JSONL, {PREPARE}")
    if unit.kind == "parquet" and unit.stop - unit.start == 1 and unit.bytes > LARGEST_ROW_GROUP:
        what = f"{unit.path} has a row group of {unit.bytes / MIB:.0f} MiB, which each sample of it would read whole"
        yield Problem(where, what, f"write it with row groups of at most {LARGEST_ROW_GROUP // MIB} MiB, {PREPARE}")
