"""From a configuration to a data set on the disk: what `raytron tokenize` does, and `raytron train` first of all.

    resolve sources ─► train (or copy) the tokenizer ─► tokenize into parts ─► join into shards ─► manifest

The manifest is written last: a folder without one is an unfinished attempt. The next one goes on with the tokenizer and
the parts that it left, where configuration and corpus are the same, and clears them away where they are not. A folder
with one is used as it is where it was made by the same configuration, and refused where it was not.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from raytron.config import DataConfig, RunConfig
from raytron.data.chat import TEMPLATE_NAME
from raytron.data.check import (
    build_config,
    data_folder,
    dataset_problems,
    fields_of,
    max_bytes,
    other_build,
    template_of,
)
from raytron.data.compact import compact
from raytron.data.corpus import Corpus, resolve, sample
from raytron.data.manifest import FILE_NAME, SPLITS, Manifest, ShardEntry, Unigram, write_manifest
from raytron.data.order import permute
from raytron.data.shard_file import replacing, token_chunks, token_dtype
from raytron.data.shard_table import TABLE_NAME
from raytron.data.shards import TOKENIZER_NAME, open_dataset
from raytron.data.task import Job
from raytron.data.tokenize import Report, Tokenized, require_ray, tokenize_corpus
from raytron.data.tokenizer import Tokenizer, train_tokenizer
from raytron.errors import ConfigError, DataError, Problem

PARTS = "parts"
ATTEMPT = "attempt.json"  # among the parts
ATTEMPT_VERSION = 1  # of what parts and receipts are
TOKENIZER_SHARE = 0.25  # of the time, about, for the progress that is reported


def silent(fraction: float, message: str) -> None:
    """Reports nothing."""


def ensure_dataset(config: RunConfig, report: Report = silent) -> Path:
    """The folder of the data set that a run reads, prepared now where it is not there yet.

    Ray must be initialised if it is to be prepared. Raises ConfigError where the data set does not fit the run or was
    prepared by another configuration, DataError where it or the corpus can't be used, ClusterError without Ray.
    """
    folder = data_folder(config)
    if config.data.dataset is None:
        prepare(config.data, folder, report)
    dataset = open_dataset(folder)
    found = dataset_problems(dataset, config)
    if found:
        raise ConfigError(found)
    return folder


def prepare(data: DataConfig, directory: str | Path, report: Report = silent) -> Path:
    """Makes a data set in `directory`, or leaves the one that the same configuration made there. Returns the folder.

    Ray must be initialised, if there is something to do. Raises as `ensure_dataset`.
    """
    folder = Path(directory)
    if (folder / FILE_NAME).exists():
        found = other_build(open_dataset(folder), data)
        if found:
            raise ConfigError(found)
        shutil.rmtree(folder / PARTS, ignore_errors=True)  # of one that was stopped when all was done
        report(1.0, f"the data set in {folder} is complete")
        return folder
    corpus = resolve(data.sources, data.text_key, max_bytes(data), fields=fields_of(data))
    require_ray()
    _clear(folder, _attempt(data, corpus))
    tokenizer = make_tokenizer(data, corpus, folder / TOKENIZER_NAME, report)
    _tokenize(data, corpus, tokenizer, folder, report)
    shutil.rmtree(folder / PARTS, ignore_errors=True)
    report(1.0, f"the data set in {folder} is complete")
    return folder


def _attempt(data: DataConfig, corpus: Corpus) -> str:
    """What an attempt is known by: the configuration, the corpus as it was found, and the tokenizer, if one is given."""
    given = data.tokenizer
    digest = None if given.path is None else Tokenizer(given.path, given.eod, given.pattern).sha256
    build, template = build_config(data), template_of(data)
    facts = {"build": build, "corpus": corpus.stamp, "tokenizer": digest, "template": template}
    return json.dumps({"version": ATTEMPT_VERSION, **facts})


def _clear(folder: Path, attempt: str) -> None:
    """Makes the folder, with what the same attempt left there and nothing else; refuses one that holds other files."""
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    ours = [path for path in folder.iterdir() if _is_ours(path)]
    foreign = sorted(path.name for path in folder.iterdir() if path not in ours)
    if foreign:
        what = f"holds no data set, but other files: {', '.join(foreign[:5])}"
        raise DataError(Problem(str(folder), what, "give a folder that is empty or does not exist"))
    mark = folder / PARTS / ATTEMPT
    same = mark.is_file() and mark.read_text(encoding="utf-8") == attempt
    for path in ours:
        if path.is_dir() and not same:
            shutil.rmtree(path)
        elif path.is_file() and not (same and path.name == TOKENIZER_NAME):
            path.unlink()
    (folder / PARTS).mkdir(exist_ok=True)
    for path in (folder / PARTS).glob(".*"):  # what tasks had not finished
        path.unlink()
    with replacing(mark) as temporary:
        temporary.write_text(attempt, encoding="utf-8")


def _is_ours(path: Path) -> bool:
    name = path.name.strip(".").split(".")[0] + path.suffix
    shard = any(path.name.lstrip(".").startswith(f"{split}-") for split in SPLITS)
    known = path.name in (PARTS, TEMPLATE_NAME, TABLE_NAME) or name == TOKENIZER_NAME or path.suffix == ".tmp"
    return known or (shard and path.suffix == ".arrow")


def make_tokenizer(data: DataConfig, corpus: Corpus, path: Path, report: Report) -> Tokenizer:
    """Puts tokenizer.json in place: the given one, or one trained on text from all over the corpus."""
    given = data.tokenizer
    if given.path is not None:
        return Tokenizer(given.path, given.eod, given.pattern).save(path)
    if path.exists():
        return Tokenizer(path, given.eod)
    report(0.0, f"training a tokenizer of {given.vocab} ids on {min(given.train_mb, corpus.bytes / 2**20):.1f} MiB")
    count = len(corpus.units)
    order = permute(np.arange(count), count, 0).tolist()
    texts = sample(corpus, int(given.train_mb * 2**20), order)
    return train_tokenizer(path, texts, given.vocab, given.eod)


def _tokenize(data: DataConfig, corpus: Corpus, tokenizer: Tokenizer, folder: Path, report: Report) -> None:
    """Writes shards and manifest."""
    parts = folder.absolute() / PARTS
    shard_bytes = int(data.shard_mb * 2**20)
    id_bytes = np.dtype(token_dtype(tokenizer.vocab)).itemsize
    shard_tokens = max(shard_bytes // id_bytes, 1)
    job = Job(
        folder=str(parts),
        tokenizer=str(tokenizer.path.absolute()),
        eod=data.tokenizer.eod,
        text_key=fields_of(data).key,
        validation_fraction=data.validation_fraction,
        part_tokens=shard_tokens,
        metadata_keys=data.metadata_keys,
        on_bad_record=data.on_bad_record,
        backend=data.tokenizer.backend,
        tokenizer_sha256=tokenizer.sha256,
        format=data.format,
        chat_template=template_of(data),
    )
    if job.chat_template is not None:
        (folder / TEMPLATE_NAME).write_text(job.chat_template, encoding="utf-8")

    def share(fraction: float, message: str) -> None:
        report(TOKENIZER_SHARE + (0.99 - TOKENIZER_SHARE) * fraction, message)

    tokenized = tokenize_corpus(corpus, job, tokenizer.vocab, shard_bytes, share)
    if not any(part.documents for part in tokenized.parts):
        raise DataError(Problem("data.sources", "no document: the files hold no text", "give files that hold text"))
    report(0.99, "joining shards")
    shards = compact(folder, tokenized.parts, shard_tokens, data.validation_fraction)
    write_manifest(
        folder,
        Manifest(
            shards=tuple(shards),
            tokenizer_sha256=tokenizer.sha256,
            vocab=tokenizer.vocab,
            eod=tokenizer.eod,
            sources=corpus.sources,
            validation_fraction=data.validation_fraction,
            unigram=Unigram.of(_train_counts(folder, shards, tokenized)),
            build=build_config(data),
            corpus_xxh3_128=tokenized.corpus_xxh3_128,
            skipped=tokenized.skipped,
            bad_records=tokenized.bad,
            bad_examples=tokenized.bad_examples,
            backend=tokenized.backend,
        ),
    )


def _train_counts(folder: Path, shards: list[ShardEntry], tokenized: Tokenized) -> NDArray[np.int64]:
    """Counts (vocab,) of the training tokens: what the tasks counted, unless a tail was cut off since."""
    train = [entry for entry in shards if entry.split == "train"]
    if sum(entry.tokens for entry in train) == tokenized.counts.sum():
        return tokenized.counts
    counts = np.zeros_like(tokenized.counts)
    for entry in train:
        for tokens in token_chunks(folder / entry.path):
            counts += np.bincount(tokens, minlength=len(counts))
    return counts
