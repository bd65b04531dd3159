"""What was lost: a failure is told apart from its consequences.

    a process or node died                     the cause; errors of its peers are consequences      → restart
    a worker raised an exception of its own    it would raise again                                 → stop, with that cause
    a worker ran out of memory                 the same, whether it says so or Ray ended it         → stop, or recompute more
    only lost connections or timeouts          whoever has not answered is silent and counts as lost → restart

What comes next is the matter of `raytron.actors.moves`.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping

from ray.exceptions import OutOfMemoryError as KilledForMemory
from ray.exceptions import RayActorError, RayTaskError

from raytron.actors.budget import Kind
from raytron.actors.worker import PeerError
from raytron.errors import GuardError, OutOfMemoryError, WorkerError
from raytron.training.guard import Rollback


class WorkersLost(Exception):
    """Some ranks are gone, or silent. ranks: those to replace; the others may be rebuilt in place."""

    def __init__(self, ranks: Collection[int], why: str, *, preempted: bool = False):
        self.ranks, self.why, self.preempted = tuple(sorted(ranks)), why, preempted
        named = f"rank{'s' if len(self.ranks) != 1 else ''} {', '.join(map(str, self.ranks))}: " if self.ranks else ""
        super().__init__(f"{named}{why}")

    def __reduce__(self) -> tuple[object, ...]:
        return functools.partial(type(self), preempted=self.preempted), (self.ranks, self.why)

    @property
    def kind(self) -> Kind:
        return Kind.PREEMPTED if self.preempted else Kind.CRASHED


def is_death(error: BaseException) -> bool:
    """Whether an exception of a call says that the actor is gone or can't be reached."""
    return isinstance(error, RayActorError | KilledForMemory)


def cause_of(error: BaseException) -> BaseException:
    """The exception that a worker raised, out of Ray's wrapping."""
    if isinstance(error, RayTaskError):
        return error.cause if isinstance(error.cause, BaseException) else error
    return error


def is_settled(failures: Mapping[int, BaseException]) -> bool:
    """Whether the failures so far name a cause, so that nothing is gained by waiting for more."""
    return any(is_death(error) for error in failures.values())


def verdict(
    failures: Mapping[int, BaseException], silent: Collection[int], doing: Mapping[int, str] | None = None
) -> BaseException:
    """The exception that some failed ranks amount to. silent: ranks that have not answered yet; doing: what ranks were last
    known to do."""
    for rank, error in sorted(failures.items()):
        if isinstance(error, KilledForMemory):  # the text of any other SIGKILL names memory as a possible cause, too
            where = (doing or {}).get(rank, "at its work")
            why = f"Ray ended the process since its node was out of memory: {first_line(error)}"
            return OutOfMemoryError(rank, where, why, str(error), host=True)
    dead = {rank for rank, error in failures.items() if is_death(error)}
    if dead:
        away = all(getattr(failures[rank], "preempted", False) for rank in dead)
        how = "was preempted" if away else "died"
        return WorkersLost(dead, f"the process {how}" if len(dead) == 1 else f"their processes {how}", preempted=away)
    own = [(rank, error) for rank, error in sorted(failures.items()) if not isinstance(cause_of(error), PeerError)]
    for rank, error in own:
        cause = cause_of(error)
        if isinstance(cause, WorkerError | GuardError | Rollback):
            return cause
        return WorkerError(rank, "outside its work", f"{type(cause).__name__}: {cause}", str(error))
    return WorkersLost(silent, f"lost connections: {first_line(cause_of(next(iter(failures.values()))))}")


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
