"""Every exception that Raytron raises on purpose.

RaytronError
├── ConfigError        a configuration or plan with problems; carries all of them (exit code 2)
├── ScheduleError      a pipeline schedule that is invalid or would deadlock
├── DataError          a corpus, data set or tokenizer that can't be used as asked
├── CheckpointError    a checkpoint that is missing, damaged or does not fit
├── ClusterError       the cluster can't hold what the plan needs
├── GuardError         a step's numbers are not finite, or leap, and the run is to stop for it
└── WorkerError        an exception inside a worker, with its rank, stage and step
    └── OutOfMemoryError   its device's or its host's memory did not hold what was planned
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple


class Problem(NamedTuple):
    """One thing that is wrong, said so that its reader can mend it."""

    where: str  # "mesh.tp"
    what: str  # "16 heads cannot be cut in 3 equal parts"
    remedy: str  # "use 1, 2, 4, 8 or 16"

    def __str__(self) -> str:
        return f"{self.where}: {self.what}\n    remedy: {self.remedy}"


class RaytronError(Exception):
    """The root of all exceptions that Raytron raises on purpose."""


class ConfigError(RaytronError):
    """A configuration, or a plan made from it, has problems; all are reported at once."""

    def __init__(self, problems: Sequence[Problem]):
        self.problems = tuple(problems)
        count = len(self.problems)
        head = f"{count} problem{'s' if count != 1 else ''} in the configuration"
        super().__init__("\n".join([head, *(f"  {problem}" for problem in self.problems)]))

    def __reduce__(self) -> tuple[type, tuple[tuple[Problem, ...]]]:
        return type(self), (self.problems,)


class ScheduleError(RaytronError):
    """A schedule is malformed, or its simulation stops in a deadlock that the message names."""


class DataError(RaytronError):
    """A corpus, data set or tokenizer can't be used as asked."""


class CheckpointError(RaytronError):
    """A checkpoint is missing, damaged, or does not fit what it is loaded into."""


class ClusterError(RaytronError):
    """The cluster can't hold what the plan needs, or could not be reached."""


class GuardError(RaytronError):
    """A step's loss or gradient is not finite, or leaps, and the configuration wants the run to stop."""


class WorkerError(RaytronError):
    """An exception inside a worker. The first line names where; the worker's traceback follows."""

    def __init__(self, rank: int, where: str, cause: str, trace: str = ""):
        self.rank, self.where, self.cause, self.trace = rank, where, cause, trace
        super().__init__(f"rank {rank} ({where}): {cause}" + (f"\n{trace}" if trace else ""))

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.rank, self.where, self.cause, self.trace)


class OutOfMemoryError(WorkerError):
    """A worker ran out of memory. host: of its host, else of its device."""

    def __init__(self, rank: int, where: str, cause: str, trace: str = "", *, host: bool = False):
        self.host = host
        super().__init__(rank, where, cause, trace)

    def __reduce__(self) -> tuple[object, ...]:
        return functools.partial(type(self), host=self.host), (self.rank, self.where, self.cause, self.trace)
