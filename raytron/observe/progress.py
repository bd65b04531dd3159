"""A run on the screen: a live line in a terminal, plain lines elsewhere; events stand above it as they come.

    step  42/100 ━━━━━━━━━╸━━━━━━━━━━━  loss 4.212  31,200 tokens/s  131 ms/step  0:00:08 left

Both take the same two calls, `event(record)` and `metric(record)`, so that whoever follows a run need not know which.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from raytron.observe.records import Record

SMOOTHING = 0.9  # of the step time, from step to step
PLAIN_EVERY_S = 10.0  # between two plain lines
PREPARING_EVERY_S = 2.0


class NewsLike(Protocol):
    """Some events and some metrics."""

    @property
    def events(self) -> list[Record]: ...
    @property
    def metrics(self) -> list[Record]: ...


class Screen:
    """Shows a run while it is used as a context manager. steps: where the run ends."""

    def __init__(self, steps: int, file: TextIO | None = None):
        self.steps = steps
        self.console = Console(file=file or sys.stdout, highlight=False, soft_wrap=True)
        self.live = self.console.is_terminal
        self._seconds: float | None = None  # smoothed step time
        self._told = 0.0  # when the last line on preparation was written
        self._shown = 0.0  # when the last plain line was written
        self._last: Record | None = None  # a metric that no plain line has shown yet
        columns = (
            TextColumn("step {task.completed:>4.0f}/{task.total:.0f}"),
            BarColumn(),
            TextColumn("{task.fields[text]}"),
        )
        self._progress = Progress(*columns, console=self.console, transient=False, disable=not self.live)
        self._task: TaskID | None = None

    def __enter__(self) -> Screen:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._plain_rest()
        self._progress.stop()

    def news(self, news: NewsLike) -> None:
        """Shows all that is new."""
        for record in news.events:
            self.event(record)
        for record in news.metrics:
            self.metric(record)

    def event(self, record: Record) -> None:
        """Prints what happened; the plan as a page of its own. The progress of a preparation is shown now and then."""
        if record["event"] == "preparing":
            if time.monotonic() - self._told >= PREPARING_EVERY_S:
                self._told = time.monotonic()
                self.console.print(f"preparing data: {record['message']}", markup=False)
            return
        if not self.live:
            self._plain_rest()
        shown = record.get("page")
        self.console.print(f"\n{shown}\n" if shown else record["message"], markup=False)

    def metric(self, record: Record) -> None:
        """Moves on by one step."""
        seconds = float(record["step_time_s"])
        self._seconds = seconds if self._seconds is None else SMOOTHING * self._seconds + (1 - SMOOTHING) * seconds
        text = self._text(record)
        if self.live:
            if self._task is None:
                self._task = self._progress.add_task("train", total=self.steps, text="")
            self._progress.update(self._task, completed=record["step"], text=text)
            return
        self._last = record
        if time.monotonic() - self._shown >= PLAIN_EVERY_S or record["step"] >= self.steps:
            self._plain_rest()

    def _plain_rest(self) -> None:
        if self._last is not None:
            step = f"step {self._last['step']:>5}/{self.steps}"
            self.console.print(f"{step}  {self._text(self._last)}", markup=False)
            self._last, self._shown = None, time.monotonic()

    def _text(self, record: Record) -> str:
        seconds = self._seconds or 0.0
        loss = record["loss"]
        parts = [
            "loss not finite" if loss is None else f"loss {loss:.3f}",
            f"{record['tokens'] / max(seconds, 1e-9):,.0f} tokens/s",
            f"{seconds * 1e3:.0f} ms/step",
            f"{clock(seconds * max(0, self.steps - record['step']))} left",
        ]
        if record.get("skipped_steps"):
            parts.append(f"{record['skipped_steps']} skipped")
        return "  ".join(parts)


def clock(seconds: float) -> str:
    """1:02:03"""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
