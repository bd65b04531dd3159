"""How long a rank was busy in each step: its wall time without the time that it waited for others.

CPU     wall time of the step − what the mesh's `waiting` counted in it
CUDA    the time that the actions of the schedule took on the device, between pairs of events; an action begins when its
        input is there, so receives do not count, but collectives within an action (tensor, context and expert
        parallel) do: a slow device shows in all ranks of its tp group. Not run yet.
"""

from __future__ import annotations

import time
from collections import deque
from typing import NamedTuple

import torch

from raytron.parallel.mesh import Mesh
from raytron.parallel.pipeline import Watch
from raytron.plan.actions import Action

HELD = 2000  # steps


class Busy(NamedTuple):
    step: int
    busy_s: float
    wall_s: float


class DeviceClock:
    """A watch that marks the begin and end of every action on the device, and passes on what it is told."""

    active = True

    def __init__(self, inner: Watch | None):
        self.inner = inner
        self._marks: list[torch.cuda.Event] = []

    def now(self) -> float:
        mark: torch.cuda.Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        mark.record()
        self._marks.append(mark)
        return self.inner.now() if self.inner is not None and self.inner.active else 0.0

    def saw(self, action: Action, start: float, end: float) -> None:
        if self.inner is not None and self.inner.active:
            self.inner.saw(action, start, end)

    def take(self) -> float:
        """Seconds of all actions since the last call; the device must be done with them."""
        marks, self._marks = self._marks, []
        milliseconds = (start.elapsed_time(end) for start, end in zip(marks[::2], marks[1::2], strict=True))
        return float(sum(milliseconds)) / 1e3


class BusyClock:
    """Measures the steps of one rank: `begin`, a step, `end`. seen: the newest steps, for whoever collects them.

    watch: what the engine is to tell of its actions.
    """

    def __init__(self, mesh: Mesh, watch: Watch | None):
        self.mesh = mesh
        self.device = DeviceClock(watch) if mesh.device.type == "cuda" else None
        self.watch: Watch | None = watch if self.device is None else self.device
        self.seen: deque[Busy] = deque(maxlen=HELD)
        self._start = self._waited = 0.0

    def begin(self) -> None:
        self._start, self._waited = time.perf_counter(), self.mesh.waiting.seconds

    @property
    def seconds(self) -> float:
        """Of wall time since the step began."""
        return time.perf_counter() - self._start

    def end(self, step: int) -> float:
        """Keeps what step number `step` took; its wall time in seconds."""
        wall = self.seconds
        busy = wall - (self.mesh.waiting.seconds - self._waited) if self.device is None else self.device.take()
        self.seen.append(Busy(step, busy, wall))
        return wall
