"""Which rank holds wrong bits, when ranks that must hold equal parameters do not: judged by fingerprints alone.

    three or more hold one thing      the majority is right; whoever differs is named
    two hold one thing                one of them is wrong, and nothing tells which: run the same steps again from the newest
                                      state that was agreed upon, and look at the same step

A rank with wrong parameters makes wrong gradients, which are summed: from the next step on all ranks hold something else
than they should. But before the sum its own gradients are wrong alone. So each rank keeps a trail: what its own gradients
were in each step. Where nothing goes wrong the second run leaves the same trail, and the first step that differs names the
rank; where no step does, it went wrong in the last update, and the rank is the one whose fingerprint differs from its first
(`verdict`).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

Fingerprints = Mapping[str, Mapping[int, int]]  # by what is held (a key of the mesh), then by rank
Trails = Mapping[int, tuple[int, ...]]


class Check(NamedTuple):
    """One comparison; equal on all ranks."""

    step: int  # committed steps whose state was compared
    agreed: dict[str, int]  # fingerprint of what all that hold it agree on
    differing: dict[str, dict[int, int]]  # fingerprint by rank of what they do not
    faulty: tuple[int, ...]  # named by majorities
    suspects: tuple[int, ...]  # of whom some are wrong, where there is no majority
    trails: dict[
        int, tuple[int, ...]
    ]  # by rank, fingerprints of its own gradients in the last steps, 0 where not known

    @property
    def agrees(self) -> bool:
        return not self.differing

    def __str__(self) -> str:
        if self.agrees:
            return f"all replicas agree after step {self.step}"
        parts = []
        if self.faulty:
            parts.append(f"{_ranks(self.faulty)} differ{'s' if len(self.faulty) == 1 else ''} from the majority")
        if self.suspects:
            parts.append(f"{_ranks(self.suspects)} can't be told apart")
        return f"replicas hold different parameters after step {self.step}: {'; '.join(parts)}"

    def of(self, key: str, rank: int) -> int | None:
        """A rank's fingerprint; None where it has none."""
        return self.differing[key].get(rank) if key in self.differing else self.agreed.get(key)

    def record(self, *, trails: bool) -> dict[str, Any]:
        """For JSON. trails: of checks that agree, too; else they are left out, since they grow with the mesh."""
        found: dict[str, Any] = {"step": self.step, "agrees": self.agrees, "message": str(self), "agreed": self.agreed}
        if trails or not self.agrees:
            found["trails"] = {str(rank): list(trail) for rank, trail in self.trails.items()}
        if self.agrees:
            return found
        differing = {key: {str(rank): value for rank, value in held.items()} for key, held in self.differing.items()}
        return found | {"differing": differing, "faulty": list(self.faulty), "suspects": list(self.suspects)}

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> Check:
        """The way back of `record`."""
        held = {
            key: {int(rank): value for rank, value in by.items()} for key, by in record.get("differing", {}).items()
        }
        faulty, suspects = (tuple(record.get(key, ())) for key in ("faulty", "suspects"))
        trails = {int(rank): tuple(trail) for rank, trail in record.get("trails", {}).items()}
        return cls(record["step"], dict(record["agreed"]), held, faulty, suspects, trails)


def compare(step: int, fingerprints: Fingerprints, trails: Trails) -> Check:
    """What a comparison of all ranks' fingerprints says."""
    differing = {key: dict(held) for key, held in fingerprints.items() if len(set(held.values())) > 1}
    agreed = {key: next(iter(held.values())) for key, held in fingerprints.items() if key not in differing}
    faulty: set[int] = set()
    suspects: set[int] = set()
    for held in differing.values():
        value, count = Counter(held.values()).most_common(1)[0]
        if 2 * count > len(held):
            faulty |= {rank for rank, other in held.items() if other != value}
        else:
            suspects |= set(held)
    return Check(step, agreed, differing, tuple(sorted(faulty)), tuple(sorted(suspects - faulty)), dict(trails))


def by_key(rows: Iterable[tuple[int, Sequence[Sequence[int]]]]) -> dict[str, dict[int, int]]:
    """Fingerprints by key, from each rank's own [key, fingerprint] pairs; key 0: nothing."""
    out: dict[str, dict[int, int]] = defaultdict(dict)
    for rank, pairs in rows:
        for key, value in pairs:
            if key:
                out[f"{key & (1 << 64) - 1:016x}"][rank] = value
    return dict(out)


class Verdict(NamedTuple):
    ranks: tuple[int, ...]  # to be replaced; none: it is nobody's fault
    why: str


def verdict(first: Check, second: Check) -> Verdict:
    """Whose fault a difference is.

    first: the check that found it; second: of the same step on the same mesh, after the steps since the newest agreed state
    were run again, its record with trails.

    Raises ValueError for checks of different steps or meshes, and without trails.
    """
    if first.step != second.step or first.trails.keys() != second.trails.keys():
        raise ValueError(
            f"step {first.step} on {len(first.trails)} ranks can't be judged by step {second.step} on {len(second.trails)}"
        )
    for check, when in ((first, f"after step {first.step}"), (second, "when the steps were run again")):
        if check.faulty and not check.suspects:
            return Verdict(check.faulty, f"{_ranks(check.faulty)}: not what the majority held {when}")
    step, changed = _parted(first, second)
    if not changed:
        return Verdict(
            (), "the same difference came back to the bit: a fault of the program, or of a device that errs alike"
        )
    if set(changed) >= set(first.suspects):
        return Verdict(
            (), f"all of them did otherwise in step {step}: kernels that are not deterministic tell nobody apart"
        )
    return Verdict(
        changed, f"{_ranks(changed)}: did otherwise in step {step} when it was run again, and others did not"
    )


def _parted(first: Check, second: Check) -> tuple[int, tuple[int, ...]]:
    """The first step in which ranks did otherwise than in the first run, and which: of those that hold what differs, if any
    of them did (a fault passes through a pipeline within the step)."""
    length = max(map(len, first.trails.values()), default=0)
    for back in range(length, 0, -1):
        pairs = ((rank, trail[-back], second.trails[rank][-back]) for rank, trail in first.trails.items())
        changed = {rank for rank, before, after in pairs if before and after and before != after}
        if changed:
            return first.step - back + 1, tuple(sorted(changed & set(first.suspects) or changed))
    changed = {
        rank
        for key, held in first.differing.items()
        for rank, value in held.items()
        if second.of(key, rank) not in (None, value)
    }
    return first.step, tuple(sorted(changed))


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
