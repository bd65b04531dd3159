"""The ranks that save or load together, and how a failure of one reaches them all.

Objects travel over the given process group. Give a gloo group where the default one is NCCL: a checkpoint's plans need
no device, and a collective of objects on NCCL would put them on one. A rank that *dies* is no failure in this sense: the
others get torch.distributed's own error after the group's timeout.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from raytron.errors import CheckpointError

Hook = Callable[[str], None]  # told each phase as it begins; a test may raise or die there
T = TypeVar("T")
R = TypeVar("R")


def no_hook(_phase: str) -> None:
    """The default: nothing happens between phases."""


class Agreed(CheckpointError):
    """A failure that concerns all ranks alike, so that no rank is named for it."""


class Peers:
    """A process group seen from one of its ranks; a single process where torch.distributed is not initialised.

    alone: stay a single process although torch.distributed is initialised.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, *, alone: bool = False):
        world = dist.is_available() and dist.is_initialized()
        if group is not None and not world:
            raise CheckpointError("this rank has left the process group that saves or loads a checkpoint")
        self.alone = alone or not world
        self.group = group
        self.rank = 0 if self.alone else dist.get_rank(group)
        self.size = 1 if self.alone else dist.get_world_size(group)
        if self.rank < 0:
            raise CheckpointError("this rank is not part of the process group that saves or loads a checkpoint")

    def attempt(self, what: str, function: Callable[[], T]) -> list[T]:
        """Every rank's result, in order. If any rank fails, CheckpointError on every rank, naming all that failed."""
        result: T | None = None
        error: str | None = None
        try:
            result = function()
        except Exception as exception:
            error = brief(exception)
        outcomes = self.gather((result, error))
        failed = {rank: text for rank, (_, text) in enumerate(outcomes) if text is not None}
        if failed:
            raise CheckpointError(message_of(what, failed, self.size))
        return [result for result, _ in outcomes]  # type: ignore[misc]

    def at_first(self, what: str, value: T, function: Callable[[list[T]], list[R]]) -> R:
        """Rank 0 makes of every rank's value, in order, a result for each rank. If it fails, CheckpointError on all."""
        values: list[Any] | None = [value] if self.alone else [None] * self.size if self.rank == 0 else None
        if not self.alone:
            dist.gather_object(value, values, group=self.group, group_dst=0)
        results: list[Any] = [None] * self.size
        error: str | None = None
        if values is not None:
            try:
                results = list(function(values))
            except Exception as exception:
                error = brief(exception)
            results = [(result, error) for result in results]
        if not self.alone:
            received: list[Any] = [None]
            dist.scatter_object_list(received, results if self.rank == 0 else None, group=self.group, group_src=0)
            results = received
        result, error = results[0]
        if error is not None:
            raise CheckpointError(f"{what}: {error}")
        return result  # type: ignore[no-any-return]

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in order."""
        if self.alone:
            return [value]
        values: list[T | None] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values  # type: ignore[return-value]

    def translate(self, what: str, failure: CheckpointException) -> CheckpointError:
        """torch's report of the ranks that failed as ours."""
        errors = {rank: exception for rank, (exception, _) in failure.failures.items()}
        for exception in errors.values():
            if isinstance(exception, Agreed):
                return CheckpointError(str(exception))
        return CheckpointError(message_of(what, {rank: brief(each) for rank, each in errors.items()}, self.size))


def brief(exception: BaseException) -> str:
    """An exception in a few words; with the place that raised it, unless it is one that names its file."""
    if isinstance(exception, CheckpointError):
        return str(exception)
    if isinstance(exception, OSError) and exception.filename and exception.strerror:
        return f"{exception.filename}: {exception.strerror}"
    frames = traceback.extract_tb(exception.__traceback__)
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(exception).__name__}: {exception}{place}"


def message_of(what: str, failed: dict[int, str], size: int) -> str:
    """What failed on which rank of `size`."""
    if size == 1:
        return f"{what}: {failed[0]}"
    return "\n  ".join([f"{what}:", *(f"rank {rank}: {text}" for rank, text in sorted(failed.items()))])
