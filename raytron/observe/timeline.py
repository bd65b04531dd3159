"""The meshes of a run as a drawing: one line for each epoch, from its event log.

1  PP1·DP2·CP1·TP1  ━━━━━━━━━━━━━╸                         steps 1 to 12
2  PP1·DP1·CP1·TP1                ╺━━━━━━━━━━╸              steps 13 to 20   rank 1: the process died; 1.9 s
3  PP1·DP2·CP1·TP1                            ╺━━━━━━━━━━╸  steps 21 to 32   as asked; 0.7 s
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from raytron.observe.records import Record

WIDTH = 48  # characters of the longest bar
ENDS = ("complete", "stopped", "error")


@dataclass
class Epoch:
    """The life of one mesh. times in seconds since the epoch; pause_s: from the end of the one before to this begin."""

    number: int
    mesh: str
    begin: float
    first: int  # step that it began with, from 1
    pause_s: float
    why: str  # it was built, where that was not the run's beginning
    end: float = 0.0
    last: int = 0


def epochs(events: Sequence[Record]) -> list[Epoch]:
    """The epochs of the newest launch, in order."""
    found: list[Epoch] = []
    why, since = "", None
    for event in events:
        kind, now = event["event"], float(event["time"])
        if kind == "plan":
            found, why, since = [], "", None
        elif kind in ("lost", "mesh", "schedule", *ENDS):
            if found and found[-1].end == 0.0:
                found[-1].end, found[-1].last = now, int(event.get("step", 0))
                since = now
            why = str(event.get("why", event["message"]))
        elif kind == "workers":
            if found and found[-1].end == 0.0:
                found[-1].end = now
            pause = now - since if since is not None else 0.0
            found.append(Epoch(int(event["epoch"]), str(event["mesh"]), now, int(event["step"]) + 1, pause, why))
            if len(found) > 1:
                found[-2].last = int(event["step"])
            why, since = "", None
    if found and found[-1].end == 0.0 and events:
        found[-1].end = float(events[-1]["time"])
    return found


def draw(events: Sequence[Record]) -> str:
    """The drawing; empty where no mesh was built."""
    found = epochs(events)
    if not found:
        return ""
    begin, whole = found[0].begin, max(found[-1].end - found[0].begin, 1e-9)
    width = max(len(epoch.mesh) for epoch in found)
    lines = []
    for epoch in found:
        left = round((epoch.begin - begin) / whole * (WIDTH - 1))
        length = max(1, round((epoch.end - begin) / whole * WIDTH) - left)
        bar = (" " * left + "━" * length).ljust(WIDTH)
        steps = f"steps {epoch.first} to {epoch.last}" if epoch.last >= epoch.first else "no step"
        why = f"   {epoch.why}; {epoch.pause_s:.1f} s" if epoch.why else ""
        lines.append(f"{epoch.number:>3}  {epoch.mesh.ljust(width)}  {bar}  {steps}{why}")
    return "\n".join(lines)
