"""Out of memory, told apart from other failures as far as it can be.

    torch.OutOfMemoryError, "CUDA error: out of memory"      a device's                                 ┐ the rank says so,
    MemoryError, ENOMEM, torch's allocator on a CPU          the host's                                 ┘ step and phase
    Ray's memory monitor kills a process                     the host's; Ray says so, the last beat tells the step
    the kernel kills a process                               looks like any other SIGKILL: a crash, and lost again and again
                                                             the run stops, with what had been planned

A restart would run out again, so there is none, unless something changes: with `recovery.on_out_of_memory: recompute` the
run goes on, once, with more recomputation.
"""

from __future__ import annotations

import errno

import torch

from raytron.config import RecoveryConfig
from raytron.errors import OutOfMemoryError
from raytron.plan.plan import Plan
from raytron.plan.relief import Relief, explained, relieve

DEVICE_WORDS = ("cuda error: out of memory", "cuda out of memory")
HOST_WORDS = ("can't allocate memory", "not enough memory: you tried to allocate")


def where_exhausted(error: BaseException | None) -> str | None:
    """ "device" or "host", where an exception, or one that caused it, says that this memory has run out; else None."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        text = str(error).lower() if isinstance(error, RuntimeError) else ""
        if isinstance(error, torch.OutOfMemoryError) or any(words in text for words in DEVICE_WORDS):
            return "device"
        if isinstance(error, MemoryError) or any(words in text for words in HOST_WORDS):
            return "host"
        if isinstance(error, OSError) and error.errno == errno.ENOMEM:
            return "host"
        error = error.__cause__
    return None


class Exhaustion:
    """Of one run: whether it may be tried once more."""

    def __init__(self, config: RecoveryConfig):
        self.config = config
        self.tried: Relief | None = None

    def relief(self, error: OutOfMemoryError, plan: Plan) -> Relief | None:
        """What to go on with, once in a run; None where it has to stop."""
        if self.config.on_out_of_memory == "stop" or self.tried is not None:
            return None
        self.tried = relieve(plan, error.rank, host=error.host)
        return self.tried

    def explained(self, error: OutOfMemoryError, plan: Plan) -> OutOfMemoryError:
        """The error that the run stops with: what had been planned, and what can be done."""
        cause = f"{error.cause}\n    {explained(plan, error.rank)}\n    remedy: {self._remedy(error, plan)}"
        return OutOfMemoryError(error.rank, error.where, cause, error.trace, host=error.host)

    def _remedy(self, error: OutOfMemoryError, plan: Plan) -> str:
        lower = "lower micro_batch_size, raise mesh.tp, mesh.pp or mesh.cp, or set data_parallel.zero higher"
        if self.tried is not None:
            return f"{self.tried} was not enough; {lower}"
        stronger = relieve(plan, error.rank, host=error.host)
        if stronger is None:
            return f"no stronger memory.recompute needs less; {lower}"
        return f"set {stronger}, or recovery.on_out_of_memory=recompute, which does that by itself; or {lower}"
