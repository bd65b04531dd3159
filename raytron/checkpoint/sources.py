"""What the nodes' memory still holds of a run, and the newest step that it holds whole.

    node A   000003-00000-0.segment   epoch 3, rank 0, step 41 ─┐
             000003-00000-1.segment   epoch 3, rank 0, step 40 ─┼─► step 41: rank 1's is not there; not whole
    node B   000003-00001-1.segment   epoch 3, rank 1, step 40 ─┘   step 40: covers every tensor exactly: take it

`survey` reads the heads on one node and checks the digests; `choose` is arithmetic over what all nodes found. A step counts
only if the rectangles of one epoch cover every tensor that the state has, each element exactly once: no tensor is missing
(each head carries the inventory of the whole state), and ranks agree about the facts. Rectangles that several segments hold
alike are held alike: replicas, what was parked beside what was written, copies on a partner node.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from raytron.checkpoint.coverage import Box, coverage_problem
from raytron.checkpoint.files import to_json
from raytron.checkpoint.segment import SUFFIX, Head, Origin, Rectangle, read_segment
from raytron.errors import CheckpointError

THREADS = 4  # that read segments
MOST_NAMED = 5  # of missing tensors, in a reason


@dataclass(frozen=True)
class Held:
    """A complete segment, and where it lies. `node` is whatever the surveyor calls its place."""

    node: str
    path: str
    head: Head

    @property
    def epoch(self) -> int:
        return self.head.origin.epoch

    @property
    def step(self) -> int:
        return self.head.step

    def __str__(self) -> str:
        origin = self.head.origin
        return (
            f"step {self.step} of rank {origin.rank} of {origin.world}, epoch {origin.epoch} ({self.node}: {self.path})"
        )


class Survey(NamedTuple):
    """What a folder holds, and why the rest was passed over."""

    held: list[Held]
    passed_over: list[str]


class Stands(NamedTuple):
    """Where a rectangle stands: byte `start` of segment number `source`."""

    source: int
    start: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as memory holds it: its rectangles, and for each all segments in which it stands."""

    dtype: str
    shape: tuple[int, ...]
    boxes: dict[Box, tuple[Stands, ...]]


@dataclass(frozen=True)
class MemoryGeneration:
    """A step that memory holds whole: a generation like those on disk, for as long as nobody writes to its segments."""

    epoch: int
    step: int
    facts: dict[str, Any]
    mesh: str  # that wrote it
    sources: tuple[Held, ...]
    tensors: dict[str, StoredTensor]

    def __str__(self) -> str:
        nodes = len({held.node for held in self.sources})
        return f"step {self.step} in memory (epoch {self.epoch}, {self.mesh}, {nodes} node{'s' * (nodes > 1)})"


class Choice(NamedTuple):
    """The newest whole step, if there is one, and why newer ones are not it: one text each, newest first."""

    generation: MemoryGeneration | None
    reasons: list[str]


def survey(folder: Path | str, node: str, *, digests: bool = True) -> Survey:
    """All complete segments in a folder. Those that are damaged or not complete are named with the reason.

    digests: every byte is read and checked; otherwise heads alone.
    """

    def look(path: Path) -> Held | str:
        try:
            return Held(node, str(path), read_segment(path, digests=digests))
        except CheckpointError as error:
            return f"{node}: {error}"

    with ThreadPoolExecutor(max_workers=THREADS) as pool:
        seen = list(pool.map(look, sorted(Path(folder).glob(f"*{SUFFIX}"))))
    return Survey([each for each in seen if isinstance(each, Held)], [each for each in seen if isinstance(each, str)])


def choose(held: Iterable[Held], *, up_to: int | None = None) -> Choice:
    """The newest step that is held whole by one epoch; of two epochs with the same step the later one.

    up_to: the newest step that may be chosen, for those who go back on purpose.
    """
    groups: dict[tuple[int, int], list[Held]] = defaultdict(list)
    for each in held:
        if up_to is None or each.step <= up_to:
            groups[each.step, each.epoch].append(each)
    reasons: list[str] = []
    for step, epoch in sorted(groups, reverse=True):
        try:
            return Choice(_generation(groups[step, epoch]), reasons)
        except CheckpointError as error:
            reasons.append(f"step {step} of epoch {epoch} is not whole in memory: {error}")
    return Choice(None, reasons)


def _generation(held: Sequence[Held]) -> MemoryGeneration:
    """The segments of one step and epoch as a generation. Raises CheckpointError saying what is missing."""
    first = held[0]
    origin = first.head.origin
    for other in held[1:]:
        if _told(other) != _told(first):
            raise CheckpointError(f"{other} and {first} do not tell of the same state")
    tensors = _tensors(held)
    if origin.inventory.tensors != len(tensors):
        missing = f"{origin.inventory.tensors - len(tensors)} of {origin.inventory.tensors} tensors are nowhere"
        raise CheckpointError(f"{missing}; {_absent(origin, held)}")
    problems = [
        f"{name}: {problem}"
        for name, tensor in tensors.items()
        if (problem := coverage_problem(tensor.shape, list(tensor.boxes)))
    ]
    if problems:
        more = f" and {len(problems) - MOST_NAMED} more" if len(problems) > MOST_NAMED else ""
        raise CheckpointError(f"{'; '.join(problems[:MOST_NAMED])}{more}; {_absent(origin, held)}")
    return MemoryGeneration(origin.epoch, first.step, first.head.facts, origin.mesh, tuple(held), tensors)


def _told(held: Held) -> tuple[object, ...]:
    """What all segments of one step and epoch say alike."""
    origin = held.head.origin
    return origin.world, origin.mesh, origin.inventory, to_json(held.head.facts)


def _absent(origin: Origin, held: Sequence[Held]) -> str:
    """The ranks of which nothing is there."""
    absent = sorted(set(range(origin.world)) - {each.head.origin.rank for each in held})
    if not absent:
        return "all ranks have left something"
    return f"nothing is there of rank{'s' * (len(absent) > 1)} {', '.join(map(str, absent))}"


def _tensors(held: Sequence[Held]) -> dict[str, StoredTensor]:
    """All rectangles by tensor. Raises CheckpointError where segments disagree about a tensor, or it is not in the state."""
    kinds: dict[str, tuple[str, tuple[int, ...]]] = {}
    boxes: dict[str, dict[Box, list[Stands]]] = defaultdict(lambda: defaultdict(list))
    for number, each in enumerate(held):
        for rectangle in each.head.rectangles:
            part = rectangle.part
            kind = part.dtype, part.shape
            if kinds.setdefault(part.name, kind) != kind:
                raise CheckpointError(f"{part.name}: {each} holds it as {kind}, others as {kinds[part.name]}")
            _add(boxes[part.name], rectangle, number)
    return {
        name: StoredTensor(dtype, shape, {box: tuple(stands) for box, stands in boxes[name].items()})
        for name, (dtype, shape) in kinds.items()
    }


def _add(boxes: dict[Box, list[Stands]], rectangle: Rectangle, source: int) -> None:
    if rectangle.part.box.volume:
        boxes[rectangle.part.box].append(Stands(source, rectangle.start))
