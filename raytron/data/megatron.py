"""Data sets of Megatron-LM, its `.bin` and `.idx` files: read into a data set of ours, and written from one.

    PREFIX.bin   token ids of all sequences, one after another
    PREFIX.idx   "MMIDIDX\\0\\0", version 1 (uint64), dtype code (uint8), number of sequences (uint64),
                 number of document bounds (uint64), then
                 tokens of each sequence (int32), its first byte in .bin (int64),
                 document bounds (int64): document d is sequences [bounds[d], bounds[d + 1])

All numbers are little-endian. The files say neither which tokenizer made them nor where a document's text came from: who
reads them names the tokenizer, and a document's id, which chooses its split, is a digest of its tokens.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from raytron.data.compact import compact
from raytron.data.manifest import SPLITS, Manifest, Source, Split, Unigram, write_manifest
from raytron.data.parts import Splits
from raytron.data.shard_file import replacing, token_chunks, token_dtype
from raytron.data.shards import TOKENIZER_NAME, Dataset, open_dataset
from raytron.data.tokenizer import Tokenizer
from raytron.errors import ConfigError, DataError, Problem

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<QBQQ")  # version, dtype code, sequences, document bounds
CODES: dict[int, type[np.number[Any]]] = {
    1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 6: np.float64, 7: np.float32, 8: np.uint16
}  # fmt: skip
BATCH_TOKENS = 2**20  # that are in memory at once
MOST_TOKENS = 2**31 - 1  # of a sequence
AGAIN = "fetch the files again, or make them again"


@dataclass(frozen=True, eq=False)
class Index:
    """What an .idx file says."""

    dtype: np.dtype[Any]
    lengths: NDArray[np.int32]  # (sequences,) tokens
    starts: NDArray[np.int64]  # (sequences,) bytes
    bounds: NDArray[np.int64]  # (documents + 1,) sequences


def import_megatron(
    prefix: str | Path,
    directory: str | Path,
    tokenizer: str | Path,
    eod: str = "<|endoftext|>",
    *,
    pattern: str | None = None,
    validation_fraction: float = 0.02,
    shard_mb: float = 256.0,
) -> Dataset:
    """Makes a data set in `directory` from PREFIX.bin and PREFIX.idx, whose ids are those of `tokenizer`.

    The end-of-document token is put after each document that does not end with it. Raises DataError where the files are
    damaged or have ids beyond the tokenizer's, or the folder is not empty; ConfigError for the tokenizer.
    """
    folder = Path(directory)
    index = read_index(prefix)
    if not 0 < validation_fraction < 1:
        what = f"{validation_fraction} is no share of the documents"
        raise ConfigError([Problem("validation_fraction", what, "use more than 0 and less than 1")])
    loaded = Tokenizer(tokenizer, eod, pattern)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise DataError(Problem(str(folder), "is not empty", "give a folder that is empty or does not exist"))
    loaded.save(folder / TOKENIZER_NAME)
    shard_tokens = max(int(shard_mb * 2**20) // np.dtype(token_dtype(loaded.vocab)).itemsize, 1)
    splits = Splits(folder, 0, loaded.vocab, validation_fraction, shard_tokens)
    order, empty = xxhash.xxh3_128(), 0
    try:
        with _bin(prefix).open("rb") as file:
            for first, last in _batches(index):
                empty += _take(file, index, first, last, loaded, splits, order)
        parts = splits.finish()
    finally:
        splits.abandon()
    shards = compact(folder, parts, shard_tokens, validation_fraction)
    for part in parts:
        Path(part.path).unlink()
    counts = np.zeros(loaded.vocab, np.int64)
    for entry in shards:
        if entry.split == "train":
            for chunk in token_chunks(folder / entry.path):
                counts += np.bincount(chunk, minlength=loaded.vocab)
    write_manifest(
        folder,
        Manifest(
            shards=tuple(shards),
            tokenizer_sha256=loaded.sha256,
            vocab=loaded.vocab,
            eod=loaded.eod,
            sources=(Source(str(_bin(prefix)), 1, _bin(prefix).stat().st_size),),
            validation_fraction=validation_fraction,
            unigram=Unigram.of(counts),
            build={"megatron": str(prefix)},
            corpus_xxh3_128=order.hexdigest(),
            skipped=empty,
        ),
    )
    return open_dataset(folder)


def export_megatron(dataset: str | Path, prefix: str | Path) -> list[Path]:
    """Writes each split of a data set as PREFIX-train.bin and .idx, and the same for validation; the .bin files.

    A document becomes a sequence. Raises DataError where the data set can't be read, or a file is there already.
    """
    opened = open_dataset(dataset)
    written = []
    for split in SPLITS:
        if opened.entries(split):
            target = Path(f"{prefix}-{split}")
            there = [path for path in (_bin(target), _idx(target)) if path.exists()]
            if there:
                raise DataError(Problem(str(there[0]), "is there already", "give another prefix, or remove it"))
            written.append(_export_split(opened, split, target))
    return written


def read_index(prefix: str | Path) -> Index:
    """Reads PREFIX.idx, and checks it against the size of PREFIX.bin. Raises DataError."""
    path = _idx(prefix)
    try:
        content, size = path.read_bytes(), _bin(prefix).stat().st_size
    except OSError as error:
        what = f"can't be read: {error.strerror}"
        raise DataError(Problem(str(error.filename), what, "give the prefix that .bin and .idx share")) from None
    try:
        index = _parsed(content)
        _check(index, size)
    except (ValueError, KeyError, struct.error) as error:
        raise DataError(Problem(str(path), f"is not Megatron's index of a data set: {error}", AGAIN)) from None
    return index


def write_index(path: Path, dtype: np.dtype[Any], lengths: NDArray[np.int32], bounds: NDArray[np.int64]) -> None:
    """Writes an .idx file for sequences of these lengths, which stand one after another."""
    code = next(code for code, kind in CODES.items() if np.dtype(kind) == dtype)
    ends = np.cumsum(lengths, dtype=np.int64) * dtype.itemsize
    starts = np.concatenate([np.zeros(1, np.int64), ends])[:-1]
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(MAGIC + HEADER.pack(VERSION, code, len(lengths), len(bounds)))
        for array, kind in ((lengths, "<i4"), (starts, "<i8"), (bounds, "<i8")):
            file.write(array.astype(kind).tobytes())


def _parsed(content: bytes) -> Index:
    if content[: len(MAGIC)] != MAGIC:
        raise ValueError(f"it begins with {content[: len(MAGIC)]!r}")
    version, code, sequences, bounds = HEADER.unpack_from(content, len(MAGIC))
    if version != VERSION:
        raise ValueError(f"its version is {version}, not {VERSION}")
    kind = CODES.get(code)
    if kind is None or not np.issubdtype(kind, np.integer):
        raise ValueError(f"its code {code} is no type of token ids")
    offset, arrays = len(MAGIC) + HEADER.size, []
    for count, item in ((sequences, "<i4"), (sequences, "<i8"), (bounds, "<i8")):
        arrays.append(np.frombuffer(content, item, count, offset))
        offset += arrays[-1].nbytes
    return Index(np.dtype(kind).newbyteorder("<"), *arrays)


def _check(index: Index, size: int) -> None:
    """Raises ValueError where sequences or documents are not one after another, or not those of a file of `size` bytes."""
    ends = np.cumsum(index.lengths, dtype=np.int64) * index.dtype.itemsize
    if (index.lengths < 0).any() or (len(ends) and not np.array_equal(index.starts[1:], ends[:-1])):
        raise ValueError("its sequences don't stand one after another")
    held = int(ends[-1]) if len(ends) else 0
    if len(index.starts) and index.starts[0] != 0:
        raise ValueError("its first sequence does not begin at 0")
    if held != size:
        raise ValueError(f"its sequences take {held} bytes, and the .bin file has {size}")
    bounds = index.bounds
    if not len(bounds) or bounds[0] != 0 or bounds[-1] != len(index.lengths) or (np.diff(bounds) < 0).any():
        raise ValueError("its documents are not all sequences, one after another")


def _document_lengths(index: Index) -> NDArray[np.int64]:
    """(documents,) tokens of each."""
    before = np.concatenate([np.zeros(1, np.int64), np.cumsum(index.lengths, dtype=np.int64)])
    return np.diff(before[index.bounds])


def _batches(index: Index) -> Iterator[tuple[int, int]]:
    """Ranges of documents of about BATCH_TOKENS; one that is longer is alone."""
    ends = np.cumsum(_document_lengths(index))
    first, before = 0, 0
    while first < len(ends):
        last = max(int(np.searchsorted(ends, before + BATCH_TOKENS, side="right")), first + 1)
        yield first, last
        first, before = last, int(ends[last - 1])


def _take(file: IO[bytes], index: Index, first: int, last: int, to: Tokenizer, splits: Splits, order: Any) -> int:
    """Hands the next documents on; how many of them were empty."""
    lengths = _document_lengths(index)[first:last]
    if last - first == 1 and lengths[0] > 2 * BATCH_TOKENS:
        _take_giant(file, index, int(lengths[0]), to, splits, order)
        return 0
    tokens = _read(file, index, int(lengths.sum()), to)
    documents = [one for one in np.split(tokens, np.cumsum(lengths)[:-1]) if len(one)]
    end = np.array([to.eod], np.uint32)
    documents = [one if one[-1] == to.eod else np.concatenate([one, end]) for one in documents]
    ids = [xxhash.xxh3_64_intdigest(one.tobytes()) for one in documents]
    order.update(np.array(ids, np.uint64).tobytes())
    if documents:
        sizes = np.array([len(one) for one in documents], np.int64)
        splits.add(np.concatenate(documents), sizes, ids)
    return len(lengths) - len(documents)


def _take_giant(file: IO[bytes], index: Index, length: int, to: Tokenizer, splits: Splits, order: Any) -> None:
    """Hands on a document that is read twice, in pieces: for its id, and for its tokens."""
    digest, begin = xxhash.xxh3_64(), file.tell()
    for piece in _pieces(file, index, length, to):
        digest.update(piece.tobytes())
    file.seek(begin)
    order.update(np.array([digest.intdigest()], np.uint64).tobytes())
    splits.add_pieces(_pieces(file, index, length, to), digest.intdigest())


def _pieces(file: IO[bytes], index: Index, length: int, to: Tokenizer) -> Iterator[NDArray[np.uint32]]:
    """The tokens of a document, the end-of-document token last."""
    last = -1
    for start in range(0, length, BATCH_TOKENS):
        piece = _read(file, index, min(BATCH_TOKENS, length - start), to)
        last = int(piece[-1])
        yield piece
    if last != to.eod:
        yield np.array([to.eod], np.uint32)


def _read(file: IO[bytes], index: Index, count: int, to: Tokenizer) -> NDArray[np.uint32]:
    """The next `count` tokens. Raises DataError where one is beyond the vocabulary."""
    tokens = np.frombuffer(file.read(count * index.dtype.itemsize), index.dtype)
    if len(tokens) != count:
        raise DataError(Problem(file.name, "was cut off while it was read", AGAIN))
    if count and (tokens.min() < 0 or tokens.max() >= to.vocab):
        wrong = tokens.min() if tokens.min() < 0 else tokens.max()
        what = f"token id {wrong} is not in the vocabulary of {to.vocab}"
        raise DataError(Problem(file.name, what, "give the tokenizer that made these files"))
    return tokens.astype(np.uint32)


def _export_split(dataset: Dataset, split: Split, target: Path) -> Path:
    lengths: list[NDArray[np.int64]] = []
    dtype: np.dtype[Any] = np.dtype("<u2")
    with replacing(_bin(target)) as temporary, temporary.open("wb") as file:
        for entry in dataset.entries(split):
            shard = dataset.read(entry)
            dtype = np.dtype("<u2" if shard.tokens.dtype == np.uint16 else "<i4")
            lengths.append(np.diff(shard.offsets))
            for chunk in token_chunks(shard.path):
                file.write(chunk.astype(dtype, copy=False).data)
    every = np.concatenate(lengths)
    if every.max() > MOST_TOKENS:
        what = f"a document has {every.max():,} tokens; a sequence of Megatron's may have {MOST_TOKENS:,}"
        raise DataError(Problem(str(dataset.path), what, "divide it, and tokenize again"))
    write_index(_idx(target), dtype, every.astype(np.int32), np.arange(len(every) + 1, dtype=np.int64))
    return _bin(target)


def _bin(prefix: str | Path) -> Path:
    return Path(f"{prefix}.bin")


def _idx(prefix: str | Path) -> Path:
    return Path(f"{prefix}.idx")
