"""Machines that are about to be taken away say so in advance: who says it, and who listens.

A `Source` is asked now and then whether its node has notice to leave; a `Watcher` on that node asks all sources in a thread
of its own and tells of each notice once. Clouds answer on an address that only the machine itself can reach
(`raytron.actors.metadata`); Ray tells of nodes that are drained (`raytron.actors.drain`).

    cloud ─► Source ─► Watcher ─► drain_node ─► Ray ─► the run sees a node that leaves, whoever said so

A source that can't be reached, or answers nonsense, says nothing about notices: what was known stays known.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

POLL_S = 2.0  # the shortest notice is 30 s
SILENCE_S = 30.0  # between two questions to a source that has failed several times in a row
FAILURES = 5  # in a row, after which a source is asked less often


class Notice(NamedTuple):
    """A node is about to leave."""

    node: str  # as Ray calls it
    deadline: float | None  # seconds since the epoch; None: not known, so as soon as can be
    reason: str  # in words
    certain: bool = True  # False: it may be taken sooner than others


class SourceError(Exception):
    """A source could not be asked, or its answer could not be understood."""


class Source(Protocol):
    """One who knows whether one node is to leave."""

    def poll(self) -> Notice | None:
        """The notice that stands now, the same each time; None: there is none. Raises SourceError. Takes at most seconds."""


class Fake:
    """A source that says what it is told to: answers one by one, the last one for ever."""

    def __init__(self, *answers: Notice | SourceError | None):
        self.answers = deque(answers)
        self.polls = 0

    def poll(self) -> Notice | None:
        self.polls += 1
        answer = self.answers.popleft() if len(self.answers) > 1 else self.answers[0] if self.answers else None
        if isinstance(answer, SourceError):
            raise answer
        return answer


def _nothing(notice: Notice) -> None:
    pass


class Watcher:
    """Asks sources from a thread, and tells of each notice once.

        watcher = Watcher(lambda: sources("auto", node), drain)
        watcher.start()
        ...
        watcher.close()

    find: makes the sources, in the thread, since it may take seconds to tell where one is.
    told: is called in the thread with each notice; should it fail, it is called again.
    withdrawn: is called with a notice that stands no longer; should it come again, it is told again.
    """

    def __init__(
        self,
        find: Callable[[], Sequence[Source]],
        told: Callable[[Notice], None],
        withdrawn: Callable[[Notice], None] = _nothing,
        *,
        poll_s: float = POLL_S,
    ):
        self.find, self.told, self.withdrawn, self.poll_s = find, told, withdrawn, poll_s
        self.standing: dict[int, Notice] = {}  # by number of the source
        self.error: str | None = None  # the last one of a source, or of who was told
        self._failures: dict[int, int] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="notices", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self, timeout_s: float = 10.0) -> None:
        """Stops asking; waits for the question that is under way."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        sources = self.find()
        rounds = 0
        while sources and not self._over.is_set():
            for number, source in enumerate(sources):
                often = self._failures.get(number, 0) < FAILURES
                if often or rounds % max(1, round(SILENCE_S / self.poll_s)) == 0:
                    self.ask(number, source)
            rounds += 1
            self._over.wait(self.poll_s)

    def ask(self, number: int, source: Source) -> None:
        """One question to one source."""
        try:
            notice = source.poll()
        except SourceError as error:
            self._failures[number] = self._failures.get(number, 0) + 1
            self.error = str(error)
            return
        self._failures[number] = 0
        before = self.standing.get(number)
        if notice == before:
            return
        try:
            if notice is not None:
                self.told(notice)
                self.standing[number] = notice
            elif before is not None:
                self.withdrawn(before)
                del self.standing[number]
        except Exception as error:  # whoever is told may be out of reach: a node's notice must not be lost for it
            self.error = f"{type(error).__name__}: {error}"
