"""What a data set says of itself: `manifest.json`, the file that is written last and read first.

It lists every shard with its counts and digest, the tokenizer by its digest, what the data was made from, and how
surprising one token is to a model that knows only how often each occurs: the unigram entropy H = -Σ p ln p, in nats,
over the training tokens. A model whose loss is below H has learned something of the order of tokens.

The manifest carries a digest of itself. A checkpoint records that digest, so one number says whether a run goes on with
the very data that it began with.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from raytron.data.shard_file import replacing
from raytron.errors import DataError, Problem

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")
FILE_NAME = "manifest.json"
FORMAT = "raytron-tokens"
VERSION = 1
LATER = ("bad_records", "bad_examples", "backend")  # keys that VERSION 1 did not always have
MEND = "tokenize the data set again"


@dataclass(frozen=True)
class ShardEntry:
    path: str  # relative to the manifest's folder
    split: Split
    documents: int
    tokens: int
    bytes: int  # of the file
    xxh3_128: str  # of the file, in hex


@dataclass(frozen=True)
class Source:
    name: str  # as the configuration gives it
    files: int
    bytes: int  # read from those files


@dataclass(frozen=True)
class Unigram:
    """How often each token id occurs in the training split."""

    nats: float  # entropy of one token drawn at random
    tokens: int
    distinct: int  # ids that occur at all
    counts: str  # of every id, ascending, separated by spaces

    @classmethod
    def of(cls, counts: NDArray[np.int64]) -> Unigram:
        """From counts (vocabulary,); no tokens have no surprise."""
        total = int(counts.sum())
        share = counts[counts > 0] / max(total, 1)
        nats = float(-(share * np.log(share)).sum()) + 0.0
        return cls(nats, total, int((counts > 0).sum()), " ".join(map(str, counts.tolist())))


@dataclass(frozen=True)
class Manifest:
    shards: tuple[ShardEntry, ...]
    tokenizer_sha256: str
    vocab: int
    eod: int  # id of the token that ends each document
    sources: tuple[Source, ...]
    validation_fraction: float
    unigram: Unigram
    build: Mapping[str, Any]  # the `data` section of the configuration that it was made by
    corpus_xxh3_128: str  # of all document ids, in order: equal text gives an equal digest
    skipped: int = 0  # files, or parts of files, without a document
    bad_records: int = 0  # left out, with `data.on_bad_record` of `skip`
    bad_examples: tuple[str, ...] = ()  # where the first few are, and what is wrong with them
    backend: str = ""  # the library that encoded; not part of the digest, for the ids are the same

    @property
    def hash(self) -> str:
        """SHA-256 of everything that the manifest says of the data, in hex."""
        body = {key: value for key, value in _body(self).items() if key != "backend"}
        text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Puts the manifest into a folder, whole or not at all."""
    with replacing(folder / FILE_NAME) as temporary:
        text = json.dumps({**_body(manifest), "manifest_sha256": manifest.hash}, indent=1, ensure_ascii=False)
        temporary.write_text(text + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> Manifest:
    """Reads and checks a manifest; does not look at the shards. Raises DataError."""
    path = folder / FILE_NAME
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        remedy = "give the folder that `raytron tokenize` wrote, or tokenize the corpus"
        raise DataError(Problem(str(folder), f"is no data set: it holds no {FILE_NAME}", remedy)) from None
    except (OSError, ValueError) as error:
        raise DataError(Problem(str(path), f"not readable: {error}", MEND)) from None
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise DataError(Problem(str(path), "is not the manifest of a data set", "give another folder"))
    if raw.get("version") != VERSION:
        what = f"has format version {raw.get('version')!r}; this Raytron reads version {VERSION}"
        raise DataError(Problem(str(path), what, "use the Raytron that wrote it, or tokenize the corpus again"))
    try:
        manifest = _parse(raw)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(Problem(str(path), f"a key is missing or of a wrong type: {error}", MEND)) from None
    if raw.get("manifest_sha256") != manifest.hash:
        what = "was changed after it was written: its own digest does not match"
        raise DataError(Problem(str(path), what, MEND))
    _check_paths(folder, manifest)
    return manifest


def _body(manifest: Manifest) -> dict[str, Any]:
    """What is written; keys of LATER that say nothing are left out, as they were before there were any."""
    said = {key: value for key, value in asdict(manifest).items() if value or key not in LATER}
    return {"format": FORMAT, "version": VERSION, **said}


def _parse(raw: Mapping[str, Any]) -> Manifest:
    for kind, keys in ((int, ("vocab", "eod", "skipped")), (str, ("tokenizer_sha256", "corpus_xxh3_128"))):
        for key in keys:
            if not isinstance(raw[key], kind):
                raise TypeError(f"{key} is {raw[key]!r}")
    shards = tuple(ShardEntry(**entry) for entry in raw["shards"])
    for shard in shards:
        numbers = (shard.documents, shard.tokens, shard.bytes)
        known = isinstance(shard.path, str) and shard.split in ("train", "validation")
        if not known or not all(isinstance(n, int) and n >= 0 for n in numbers):
            raise ValueError(f"the entry of shard {shard.path!r}")
    return Manifest(
        shards=shards,
        tokenizer_sha256=raw["tokenizer_sha256"],
        vocab=raw["vocab"],
        eod=raw["eod"],
        sources=tuple(Source(**source) for source in raw["sources"]),
        validation_fraction=float(raw["validation_fraction"]),
        unigram=Unigram(**raw["unigram"]),
        build=dict(raw["build"]),
        corpus_xxh3_128=raw["corpus_xxh3_128"],
        skipped=raw["skipped"],
        bad_records=int(raw.get("bad_records", 0)),
        bad_examples=tuple(map(str, raw.get("bad_examples", ()))),
        backend=str(raw.get("backend", "")),
    )


def _check_paths(folder: Path, manifest: Manifest) -> None:
    """Refuses shards outside the folder, whether by an absolute path, by `..` or by a link."""
    root = folder.resolve()
    outside = [
        Problem(str(folder / FILE_NAME), f"shard {shard.path!r} lies outside the data set", MEND)
        for shard in manifest.shards
        if not (root / shard.path).resolve().is_relative_to(root)
    ]
    if outside:
        raise DataError("\n".join(map(str, outside)))
