"""What a run tells: events and records of steps, to its files, to clients that follow, to gauges and boards.

`metrics.jsonl` holds exactly one line for each committed step: what is taken back by a recovery is cut off, and told in
`events.jsonl`, which only grows.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Any, NamedTuple

from ray.util.metrics import Gauge

from raytron.config import RunConfig
from raytron.observe.board import TensorBoard
from raytron.observe.records import JsonLines, Metrics, Record, event
from raytron.training.run_directory import RunDirectory

HELD = 20_000  # records and events kept for clients; files keep all
Cursor = tuple[int, int, int]  # which life of the teller, and how many events and records of it are known
BEGINNING: Cursor = (0, 0, 0)
GAUGES = {"loss": "nats", "tokens_per_s": "tokens/s", "step_time_s": "s", "grad_norm": ""}


class News(NamedTuple):
    """What a client has not seen yet, and where to go on asking. `over`: nothing will follow."""

    events: list[Record]
    metrics: list[Record]
    cursor: Cursor
    over: bool


class Log:
    """Records that clients follow by a count; only the newest are held."""

    def __init__(self) -> None:
        self._held: deque[Record] = deque(maxlen=HELD)
        self._count = 0

    def append(self, record: Record) -> None:
        self._held.append(record)
        self._count += 1

    def since(self, cursor: int) -> tuple[list[Record], int]:
        new = min(self._count - cursor, len(self._held))
        return (list(self._held)[-new:] if new > 0 else []), self._count


class Chronicle:
    """The teller of one run. last: the record of the newest committed step, empty at first."""

    def __init__(self, config: RunConfig, directory: RunDirectory):
        self.name = config.name
        self.last: Record = {}
        self._lock = threading.Lock()
        self._life = time.time_ns()
        self._events, self._metrics = Log(), Log()
        self._event_file, self._metric_file = JsonLines(directory.events), Metrics(directory.metrics)
        self._gauges = {key: Gauge(f"raytron_{key}", description=f"{key} {unit}".strip(), tag_keys=("run",))
                        for key, unit in GAUGES.items()} if config.observe.ray_metrics else {}  # fmt: skip
        self._board = TensorBoard(config.run_dir) if config.observe.tensorboard else None

    def say(self, kind: str, message: str, **facts: Any) -> None:
        """An event: to the file, and to whoever follows."""
        told = event(kind, message, **facts)
        with self._lock:
            self._event_file.append(told)
            self._events.append(told)

    def whisper(self, kind: str, message: str, **facts: Any) -> None:
        """An event for those who follow now; no file keeps it."""
        with self._lock:
            self._events.append(event(kind, message, **facts))

    def record(self, record: Record) -> None:
        """One committed step."""
        with self._lock:
            self._metric_file.append(record)
            self._metrics.append(record)
            self.last = record
        for key, gauge in self._gauges.items():
            gauge.set(record[key], tags={"run": self.name})
        if self._board is not None:
            self._board.write(record)

    def rewind(self, step: int) -> list[Record]:
        """Takes back the records of steps after `step`, since they will be done again; returns them."""
        with self._lock:
            return self._metric_file.rewind(step)

    @property
    def last_step(self) -> int:
        """The newest step in metrics.jsonl, 0 for none."""
        return self._metric_file.last_step

    def since(self, cursor: Cursor, over: bool) -> News:
        """What happened since a cursor; that of an earlier life means the beginning of this one."""
        _, seen_events, seen_metrics = cursor if cursor[0] == self._life else BEGINNING
        with self._lock:
            events, at = self._events.since(seen_events)
            metrics, to = self._metrics.since(seen_metrics)
        return News(events, metrics, (self._life, at, to), over)

    def close(self) -> None:
        if self._board is not None:
            self._board.close()
