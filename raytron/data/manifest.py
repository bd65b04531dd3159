"""What a data set says of itself: `manifest.json`, the file that is written last and read first.

It lists every shard with its counts and digest (or, of very many, the table that does: `raytron.data.shard_table`), the
tokenizer by its digest, what the data was made from, and how surprising one token is to a model that knows only how often
each occurs: the unigram entropy H = -Σ p ln p, in nats, over the training tokens. A model whose loss is below H has
learned something of the order of tokens.

The manifest carries a digest of itself. A checkpoint records that digest, so one number says whether a run goes on with
the very data that it began with.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raytron.data.shard_file import replacing
from raytron.data.shard_table import CODES, TABLE_FROM, TABLE_NAME, ShardTable
from raytron.data.shard_table import ShardEntry as ShardEntry
from raytron.data.shard_table import Split as Split
from raytron.errors import DataError, Problem

SPLITS: tuple[Split, ...] = CODES
FILE_NAME = "manifest.json"
FORMAT = "raytron-tokens"
VERSION = 1
TABLE_VERSION = 2  # of a manifest whose shards stand in a table beside it
LATER = ("bad_records", "bad_examples", "backend")  # keys that were not always there
MEND = "tokenize the data set again"


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
    shards: Sequence[ShardEntry]
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

    @cached_property
    def table(self) -> ShardTable:
        """The shards as columns."""
        return ShardTable.of(self.shards)

    @cached_property
    def hash(self) -> str:
        """SHA-256 of everything that the manifest says of the data, in hex."""
        body = {key: value for key, value in _body(self).items() if key != "backend"}
        text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Puts the manifest into a folder, whole or not at all; before it the table of its shards, if it has one."""
    if len(manifest.shards) >= TABLE_FROM:
        with replacing(folder / TABLE_NAME) as temporary:
            manifest.table.write(temporary)
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
    if raw.get("version") not in (VERSION, TABLE_VERSION):
        what = f"has format version {raw.get('version')!r}; this Raytron reads versions {VERSION} and {TABLE_VERSION}"
        raise DataError(Problem(str(path), what, "use the Raytron that wrote it, or tokenize the corpus again"))
    try:
        manifest = _parse(raw, _shards(folder, raw))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(Problem(str(path), f"a key is missing or of a wrong type: {error}", MEND)) from None
    if raw.get("manifest_sha256") != manifest.hash:
        what = "was changed after it was written: its own digest does not match"
        raise DataError(Problem(str(path), what, MEND))
    _check_paths(folder, manifest)
    return manifest


def _body(manifest: Manifest) -> dict[str, Any]:
    """What stands in the file, but for its own digest; keys of LATER that say nothing are left out, as they were before
    there were any."""
    table = len(manifest.shards) >= TABLE_FROM
    shards: Any = [vars(entry) for entry in manifest.shards] if not table else None
    if table:
        shards = {"file": TABLE_NAME, "count": len(manifest.shards), "sha256": manifest.table.sha256}
    said = {key: getattr(manifest, key) for key in Manifest.__dataclass_fields__}
    said |= {"shards": shards, "sources": list(map(asdict, manifest.sources)), "unigram": asdict(manifest.unigram)}
    said = {key: value for key, value in said.items() if value or key not in LATER}
    return {"format": FORMAT, "version": TABLE_VERSION if table else VERSION, **said}


def _shards(folder: Path, raw: Mapping[str, Any]) -> Sequence[ShardEntry]:
    """The entries that a manifest lists, or those of its table. Raises DataError where the table is missing or damaged, and
    otherwise as `_parse`."""
    if raw["version"] == TABLE_VERSION:
        path = folder / TABLE_NAME
        try:
            table = ShardTable.read(path)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise DataError(Problem(str(path), f"the table of shards is not readable: {error}", MEND)) from None
        if (len(table), table.sha256) != (raw["shards"]["count"], raw["shards"]["sha256"]):
            raise DataError(Problem(str(path), "was changed after it was written: its digest does not match", MEND))
        return table
    shards = tuple(ShardEntry(**entry) for entry in raw["shards"])
    for shard in shards:
        numbers = (shard.documents, shard.tokens, shard.bytes)
        known = isinstance(shard.path, str) and shard.split in ("train", "validation")
        digest = isinstance(shard.xxh3_128, str) and re.fullmatch("[0-9a-f]{32}", shard.xxh3_128)
        if not known or not digest or not all(isinstance(n, int) and n >= 0 for n in numbers):
            raise ValueError(f"the entry of shard {shard.path!r}")
    return shards


def _parse(raw: Mapping[str, Any], shards: Sequence[ShardEntry]) -> Manifest:
    for kind, keys in ((int, ("vocab", "eod", "skipped")), (str, ("tokenizer_sha256", "corpus_xxh3_128"))):
        for key in keys:
            if not isinstance(raw[key], kind):
                raise TypeError(f"{key} is {raw[key]!r}")
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
    """Refuses shards outside the folder, whether by an absolute path, by `..` or by a link to a folder. (A shard that is a
    link itself is refused when it is read.)"""
    root = folder.resolve()
    wrong = {name for name in manifest.table.folders if not (root / name).resolve().is_relative_to(root)}
    wrong |= {name for name in manifest.table.folders if ".." in PurePosixPath(name).parts}
    outside = [
        Problem(str(folder / FILE_NAME), f"shard {shard.path!r} lies outside the data set", MEND)
        for shard in (manifest.shards if wrong else ())
        if shard.path[: shard.path.rfind("/") + 1] in wrong
    ]
    if outside:
        raise DataError("\n".join(map(str, outside)))
