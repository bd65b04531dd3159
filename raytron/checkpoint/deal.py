"""Who writes what: each rank offers the rectangles that it holds, and each rectangle finds one writer.

    rank 0 offers  a[0:4]  b[0:2]         writes  a[0:4]
    rank 1 offers  a[0:4]  b[2:4]   ──►   writes  b[2:4]
    rank 2 offers          b[0:2]         writes  b[0:2]

Ranks that hold the same rectangle hold equal values, so one of them writes it: the biggest rectangles are dealt first, each
to the holder with the fewest bytes so far. What remains must cover every tensor exactly, which is proved before a byte is
written. The deal depends on the mesh alone, not on values: it is made once and serves every save of that mesh.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from raytron.checkpoint.coverage import Box, coverage_problem
from raytron.checkpoint.peers import Agreed
from raytron.checkpoint.record import ELEMENT_BYTES, Chunk, FileRecord, Records, TensorRecord
from raytron.checkpoint.safetensors_file import Entry, layout
from raytron.errors import CheckpointError

SHARD_BYTES = 4 << 30  # a rank begins another file beyond this


class Offer(NamedTuple):
    """A rectangle that a rank holds. dtype by its safetensors name; shape: of the global tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    box: Box

    @property
    def bytes(self) -> int:
        return self.box.volume * ELEMENT_BYTES[self.dtype]

    @property
    def entry(self) -> Entry:
        """As it stands in a shard."""
        key = self.name if self.box.sizes == self.shape else f"{self.name}{self.box}"
        return Entry(key, self.dtype, self.box.sizes, self.bytes)


class Offered(NamedTuple):
    """What one rank holds, and what is wrong with it."""

    offers: list[Offer]
    problems: list[str]


class Shard(NamedTuple):
    """One file: the rectangles in it, in the order in which they stand."""

    file: str
    offers: list[Offer]

    @property
    def bytes(self) -> int:
        """Of the rectangles alone."""
        return sum(offer.bytes for offer in self.offers)


class Deal(NamedTuple):
    """The shards of each rank, and every global tensor: its dtype and shape."""

    shards: list[list[Shard]]
    tensors: dict[str, tuple[str, tuple[int, ...]]]


def deal(ranks: Sequence[Offered]) -> Deal:
    """Choose one writer for each rectangle. Raises Agreed, with all problems, where the rectangles do not cover their
    tensors exactly, or ranks disagree about a tensor."""
    raise_all("its tensors", by_rank((rank, text) for rank, said in enumerate(ranks) for text in said.problems))
    held: dict[str, list[tuple[int, Offer]]] = defaultdict(list)
    for rank, said in enumerate(ranks):
        for offer in said.offers:
            held[offer.name].append((rank, offer))
    raise_all("its tensors", [text for name, pieces in held.items() if (text := _disagreement(name, pieces))])
    chosen = _choose(held, len(ranks))
    boxes: dict[str, list[Box]] = {name: [] for name in held}
    for offers in chosen:
        for offer in offers:
            boxes[offer.name].append(offer.box)
    tensors = {name: (pieces[0][1].dtype, pieces[0][1].shape) for name, pieces in held.items()}
    uncovered = {name: coverage_problem(shape, boxes[name]) for name, (_, shape) in tensors.items()}
    raise_all("its tensors", [f"{name}: {problem}" for name, problem in uncovered.items() if problem])
    return Deal([_shards(rank, offers) for rank, offers in enumerate(chosen)], tensors)


def records(made: Deal, step: int, files: Sequence[Sequence[FileRecord]]) -> Records:
    """What is written down about a save whose ranks reported these files. Raises CheckpointError if one is missing."""
    reported = {file.name: file for each in files for file in each}
    planned = [shard for shards in made.shards for shard in shards]
    missing = sorted({shard.file for shard in planned} ^ set(reported))
    if missing:
        raise CheckpointError(f"planned and reported files differ: {', '.join(missing[:5])}")
    chunks: dict[str, list[Chunk]] = {name: [] for name in made.tensors}
    for shard in planned:
        _, begins = layout([offer.entry for offer in shard.offers], step)
        for offer, begin in zip(shard.offers, begins, strict=True):
            chunks[offer.name].append(Chunk(offer.box, shard.file, begin))
    tensors = {name: TensorRecord(*kind, tuple(chunks[name])) for name, kind in made.tensors.items()}
    return Records(dict(sorted(reported.items())), tensors)


def by_rank(problems: Iterable[tuple[int, str]]) -> list[str]:
    """Problems that several ranks share, said once."""
    ranks: dict[str, list[int]] = defaultdict(list)
    for rank, problem in problems:
        ranks[problem].append(rank)
    return [f"{problem} (on rank{'s' * (len(r) > 1)} {', '.join(map(str, r))})" for problem, r in ranks.items()]


def raise_all(what: str, problems: list[str]) -> None:
    """Raises Agreed with all problems, if there are any."""
    if problems:
        raise Agreed("\n  ".join([f"{what}: {len(problems)} problem{'s' * (len(problems) > 1)}", *problems]))


def _disagreement(name: str, pieces: list[tuple[int, Offer]]) -> str | None:
    """Ranks that hold parts of one tensor must agree on its shape and dtype."""
    kinds = {(offer.shape, offer.dtype): rank for rank, offer in reversed(pieces)}
    if len(kinds) == 1:
        return None
    said = (f"{shape} {dtype} on rank {rank}" for (shape, dtype), rank in kinds.items())
    return f"{name}: ranks disagree about its shape or dtype: {', '.join(sorted(said))}"


def _choose(held: dict[str, list[tuple[int, Offer]]], ranks: int) -> list[list[Offer]]:
    """One writer for each non-empty rectangle: the biggest first, to the least loaded of its holders."""
    holders: dict[Offer, list[int]] = defaultdict(list)
    for pieces in held.values():
        for rank, offer in pieces:
            if offer.bytes:
                holders[offer].append(rank)
    chosen: list[list[Offer]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    for offer, able in sorted(holders.items(), key=lambda entry: -entry[0].bytes):
        writer = min(able, key=lambda rank: load[rank])
        load[writer] += offer.bytes
        chosen[writer].append(offer)
    return chosen


def _shards(rank: int, offers: list[Offer]) -> list[Shard]:
    """A rank's rectangles in the order in which they are written, wide elements first, so that each is aligned."""
    shards: list[Shard] = []
    room = 0
    for offer in sorted(offers, key=lambda offer: (-ELEMENT_BYTES[offer.dtype], offer.entry.key)):
        if not shards or offer.bytes > room:
            shards.append(Shard(f"rank{rank:05d}-{len(shards):03d}.safetensors", []))
            room = SHARD_BYTES
        shards[-1].offers.append(offer)
        room -= offer.bytes
    return shards
