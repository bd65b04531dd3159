"""Whether what memory gave to a run has proved good: for its first steps it is on probation.

    memory gives step k ─► built ─► k+1   k+2   k+3 ─► it was good
                             │  a rank raises something of its own, here or while it reads
                             │  bad numbers in every run of a step, or replicas that differ
                             │  processes die again without a step of progress
                             └─► memory is demoted: the run goes on from disk, if it has a step up to k

Digests tell that memory holds what was written, not that what was written was good, nor that it was read to the right place.
So a state that leads to something bad at once is given up before the run is: if the same comes again from disk, memory was
not to blame, and then it counts as it would have without.
"""

from __future__ import annotations

from typing import Any

from raytron.actors.budget import Kind
from raytron.checkpoint.catalog import Generation
from raytron.checkpoint.sources import MemoryGeneration

PROBATION = 3  # steps after which a state counts as good


class Probation:
    """Of one run. since: the step that memory gave to the newest mesh; None: its state came from elsewhere. epoch: its."""

    def __init__(self) -> None:
        self.since: int | None = None
        self.epoch = 0
        self._stands = False  # the mesh was built
        self._again = False  # processes died after that
        self._lost_at = -1  # the newest step at the loss before
        self._doubt: str | None = None

    def begin(self, epoch: int, source: MemoryGeneration | Generation | None) -> None:
        """The mesh of an epoch is about to be built from a state."""
        self.since, self.epoch = source.step if isinstance(source, MemoryGeneration) else None, epoch
        self._stands, self._again, self._doubt = False, False, None

    def stands(self) -> None:
        """All ranks have read it."""
        self._stands = True

    def suspects(self, step: int) -> bool:
        """Whether what goes wrong after `step` committed ones may come from memory."""
        return self.since is not None and step - self.since < PROBATION

    def saw(self, record: dict[str, Any]) -> None:
        """A committed step, with what was found in it."""
        if not self.suspects(int(record["step"]) - 1):
            return
        found, replicas = record.get("rerun"), record.get("replicas")
        if found is not None and not found["transient"]:
            self._doubt = f"step {record['step']}: {found['message']}"
        if replicas is not None and not replicas["agrees"]:
            self._doubt = str(replicas["message"])

    def take(self) -> str | None:
        """What committed steps have said against the state, once."""
        doubt, self._doubt = self._doubt, None
        return doubt

    def lost(self, kind: Kind) -> None:
        """Processes of the mesh are gone."""
        self._again = self._stands and kind is Kind.CRASHED

    def verdict(self, step: int) -> str | None:
        """After a loss, before the next mesh, once all is known up to the newest committed step: what speaks against going
        on from memory again; a loss does that followed another one without a step of progress."""
        stuck = self._again and self.suspects(step) and step <= self._lost_at
        self._again, self._lost_at = False, step
        return self.take() or (f"after step {step} it came to nothing twice" if stuck else None)
