"""The checkpoints of one rank's trainer: begun at a step, ended at a later one, told of in reports.

While a checkpoint is written behind the training, the ranks agree by a bit of each step's scalar all-reduce: who still
writes sets it. A result that comes one step late (`optimizer.at_once`) may tell of a step that began before the
present phase did; such news is old, and nobody acts on it.
"""

from __future__ import annotations

import logging
from collections import deque
from pathlib import Path

from raytron.checkpoint.peers import Hook, no_hook
from raytron.checkpoint.saver import Phase, Saved, Saver
from raytron.errors import CheckpointError
from raytron.observe.records import Record
from raytron.parallel.layout import Slice
from raytron.parallel.mesh import Mesh

WRITING = 1 << 7  # of a step's request bits: the highest, which no client asks for
State = dict[str, Slice]
log = logging.getLogger(__name__)


class Saves:
    """Collective over the mesh, but for `bit`, `phase` and `reports`. background: whether `begin` returns before all is
    written."""

    def __init__(self, mesh: Mesh, background: bool, hook: Hook = no_hook):
        self.saver, self.background = Saver(mesh.control, mesh.device, hook=hook), background
        self._reports: deque[Record] = deque(maxlen=1000)

    @property
    def bit(self) -> int:
        """What this rank has to say with its next step."""
        return WRITING if self.saver.busy else 0

    @property
    def phase(self) -> Phase:
        return self.saver.phase

    def heard(self, phase: Phase, request: int) -> None:
        """After a step that began in `phase`, with the union of all ranks' bits: goes on where no rank writes any more."""
        if phase != Phase.IDLE and phase == self.saver.phase and not request & WRITING:
            self._note(self.saver.advance())

    def save(self, directory: Path | str, step: int, state: State, facts: Record) -> Path:
        """A committed generation; before it, the one under way ends. Raises CheckpointError on every rank."""
        self.settle()
        saved = self.saver.save(directory, step, state, facts)
        self._note(saved)
        return saved.path

    def begin(self, directory: Path | str, step: int, state: State, facts: Record) -> Path | None:
        """Where a generation will be, once a report says so; None where it could not begin, which is reported as well.

        One that is still under way ends first, and ranks wait for it.
        """
        try:
            if not self.background:
                return self.save(directory, step, state, facts)
            self.settle()
            return self.saver.begin(directory, step, state, facts)
        except CheckpointError as error:
            self._note(Saved(Path(directory), step, 0.0, 0.0, 0, str(error)))
            return None

    def before_update(self) -> None:
        """The state is about to change: waits until what is to be saved of it is copied."""
        self.saver.hold()

    def settle(self) -> None:
        """Waits until nothing is under way."""
        self._note(self.saver.finish())

    def reports(self) -> list[Record]:
        """How checkpoints have ended since the last call; equal on all ranks."""
        given = []
        while self._reports:  # whoever asks may be another thread
            given.append(self._reports.popleft())
        return given

    def _note(self, saved: Saved | None) -> None:
        if saved is None:
            return
        if saved.error is not None and self.saver.peers.rank == 0:
            log.error("%s", saved.error)
        event = "checkpoint" if saved.error is None else "checkpoint_failed"
        self._reports.append({"event": event, **saved._asdict(), "path": str(saved.path)})
