"""From the parts that tasks write to the shards of a data set.

A task's training part and, more so, its validation part can be far smaller than a shard, and each file's end wastes part
of a sample. So consecutive parts of a split are joined, in the order of the corpus, until a shard is full; a part that
fills one only gets a second name. The result depends on the parts alone, not on who wrote them or when, and the parts
stay: whoever is stopped here begins with them again.

A corpus of few documents may leave one split without any (documents are chosen by hash). Then its other split's last
tokens are cut off for validation: a single text file has a validation split too.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from raytron.data.manifest import SPLITS, ShardEntry, Split
from raytron.data.parts import Part
from raytron.data.shard_file import (
    digest_of,
    offsets_of,
    read_shard,
    replacing,
    token_chunks,
    write_shard,
    write_shard_of,
)


def compact(folder: Path, parts: Sequence[Part], shard_tokens: int, fraction: float) -> list[ShardEntry]:
    """Makes shards of about `shard_tokens` tokens, training first, in `folder`.

    `fraction` of the tokens are cut off for validation where it is above 0 and only one split has documents.
    """
    filled = [part for part in parts if part.documents]
    cut_off = fraction > 0 and len({part.split for part in filled}) == 1
    if cut_off:
        filled = [replace(part, split="train") for part in filled]
    entries: list[ShardEntry] = []
    for split in SPLITS:
        runs = _runs([part for part in filled if part.split == split], shard_tokens)
        entries += [_join(folder / shard_name(split, number), run) for number, run in enumerate(runs)]
    return _cut_tail(folder, entries, fraction) if cut_off else entries


def shard_name(split: Split, number: int) -> str:
    return f"{split}-{number:05d}.arrow"


def _runs(parts: Sequence[Part], shard_tokens: int) -> Iterator[list[Part]]:
    """Consecutive parts that together hold at least `shard_tokens`; the last run may hold less."""
    run: list[Part] = []
    for part in parts:
        run.append(part)
        if sum(one.tokens for one in run) >= shard_tokens:
            yield run
            run = []
    if run:
        yield run


def _join(path: Path, run: Sequence[Part]) -> ShardEntry:
    """One shard of the parts."""
    documents, tokens = sum(part.documents for part in run), sum(part.tokens for part in run)
    if len(run) == 1:
        _name_again(path, Path(run[0].path))
        return _entry(path, run[0].split, documents, tokens, run[0].xxh3_128)
    shards = [read_shard(Path(part.path)) for part in run]
    columns = {name: pa.concat_arrays([shard.columns[name] for shard in shards]) for name in shards[0].columns}
    write_shard_of(
        path,
        chain.from_iterable(token_chunks(shard.path) for shard in shards),
        shards[0].tokens.dtype.type,
        offsets_of(np.concatenate([np.diff(shard.offsets) for shard in shards])),
        np.concatenate([shard.doc_ids for shard in shards]),
        columns=columns,
    )
    return _entry(path, run[0].split, documents, tokens)


def _name_again(path: Path, part: Path) -> None:
    """The same file under another name; a copy where the file system has no links."""
    with replacing(path) as temporary:
        try:
            os.link(part, temporary)
        except OSError:
            shutil.copyfile(part, temporary)


def _entry(path: Path, split: Split, documents: int, tokens: int, digest: str = "") -> ShardEntry:
    return ShardEntry(path.name, split, documents, tokens, path.stat().st_size, digest or digest_of(path))


def _cut_tail(folder: Path, entries: Sequence[ShardEntry], fraction: float) -> list[ShardEntry]:
    """Moves the last `fraction` of all tokens, but at most half of the last shard, to a validation shard."""
    *before, last = entries
    tail = min(int(fraction * sum(entry.tokens for entry in entries)), last.tokens // 2)
    if not tail:
        return list(entries)
    path, held_out = folder / last.path, folder / shard_name("validation", 0)
    shard, total = read_shard(path), last.tokens
    cut = total - tail
    head_documents = int(np.searchsorted(shard.offsets[:-1], cut))
    tail_first = int(np.searchsorted(shard.offsets, cut, side="right")) - 1  # the document that holds token `cut`
    tail_offsets = np.maximum(shard.offsets[tail_first:] - cut, 0)
    columns = _cut_columns(shard.columns, tail_first, shard.documents, cut - int(shard.offsets[tail_first]), None)
    write_shard(held_out, shard.tokens[cut:], tail_offsets, shard.doc_ids[tail_first:], columns=columns)
    head_offsets = np.minimum(shard.offsets[: head_documents + 1], cut)
    columns = _cut_columns(shard.columns, 0, head_documents, 0, cut - int(shard.offsets[head_documents - 1]))
    write_shard(path, shard.tokens[:cut], head_offsets, shard.doc_ids[:head_documents], columns=columns)
    return [
        *before,
        _entry(path, "train", head_documents, cut),
        _entry(held_out, "validation", shard.documents - tail_first, tail),
    ]


def _cut_columns(
    columns: Mapping[str, Any], first: int, stop: int, from_token: int, to_token: int | None
) -> dict[str, pa.Array]:
    """What is kept of documents [first, stop), of which the first begins at its token `from_token`, or the last ends at its
    token `to_token`: loss spans are those of what is left."""
    cut = {name: column.slice(first, stop - first) for name, column in columns.items()}
    if "loss_spans" in cut and first < stop:
        spans = cut["loss_spans"]
        row = 0 if to_token is None else len(spans) - 1
        pairs = np.array(spans[row].as_py(), np.int64).reshape(-1, 2)
        pairs = np.clip(pairs, from_token, to_token) - from_token
        left = pa.array([pairs[pairs[:, 0] < pairs[:, 1]].ravel().tolist()], spans.type)
        cut["loss_spans"] = pa.concat_arrays([spans.slice(0, row), left, spans.slice(row + 1)])
    return cut
