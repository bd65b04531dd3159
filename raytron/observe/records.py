"""What a run leaves to read: one JSON object per line, appended and flushed, never rewritten but to take back steps.

    metrics.jsonl   one line for each committed step       {"step": 7, "loss": 4.21, ...}
    events.jsonl    one line for each thing that happened  {"time": ..., "event": "checkpoint", "message": ..., ...}

A process that dies while it writes leaves a torn last line; a reader passes over it, and the next writer cuts it off.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Record = dict[str, Any]


class JsonLines:
    """A file of JSON objects that one process appends to. Numbers that are not finite are written as null."""

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _cut_torn_line(self.path)
        self._file = self.path.open("a", encoding="utf-8")

    def append(self, record: Record) -> None:
        self._file.write(dump(record) + "\n")
        self._file.flush()

    def keep(self, wanted: Callable[[Record], bool]) -> list[Record]:
        """Rewrites the file, whole or not at all, with the wanted records; returns the others."""
        records = read_records(self.path)
        dropped = [record for record in records if not wanted(record)]
        if dropped:
            self._file.close()
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text("".join(dump(record) + "\n" for record in records if wanted(record)), encoding="utf-8")
            os.replace(temporary, self.path)
            self._file = self.path.open("a", encoding="utf-8")
        return dropped

    def close(self) -> None:
        self._file.close()


class Metrics(JsonLines):
    """Exactly one line for each committed step. last_step: the newest one that is written, 0 for none."""

    def __init__(self, path: Path | str):
        super().__init__(path)
        self.last_step = max((record["step"] for record in read_records(path)), default=0)

    def append(self, record: Record) -> None:
        """Writes the next step. Raises ValueError for a step that is not after the last one."""
        if record["step"] <= self.last_step:
            raise ValueError(f"step {record['step']} is not after step {self.last_step} of {self.path}")
        super().append(record)
        self.last_step = record["step"]

    def rewind(self, step: int) -> list[Record]:
        """Takes back all steps after `step`, since the run goes on from there; returns their records: the work redone."""
        redone = self.keep(lambda record: record["step"] <= step)
        self.last_step = min(self.last_step, step)
        return redone


def dump(record: Record) -> str:
    """One line of JSON."""
    return json.dumps(_finite(record), ensure_ascii=False, allow_nan=False)


def read_records(path: Path | str) -> list[Record]:
    """All whole records of a file; none where there is no file."""
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    records = []
    for line in text.split("\n"):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def event(kind: str, message: str, **facts: Any) -> Record:
    """A record of something that happened now; `time` is in seconds since the epoch."""
    return {"time": round(time.time(), 3), "event": kind, "message": message, **facts}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cut_torn_line(path: Path) -> None:
    if not path.exists():
        return
    with path.open("r+b") as file:
        data = file.read()
        if data and not data.endswith(b"\n"):
            file.truncate(data.rfind(b"\n") + 1)
