"""Nodes of `ray.cluster_utils` that are lost as real ones are: all their processes at once."""

from __future__ import annotations

import contextlib
import os
import signal
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ray.cluster_utils import Cluster


def lose(cluster: Cluster, node: Any) -> None:
    """Ends a node without a warning. Ray alone would kill its raylet, whose workers then end themselves within a second."""
    for pid in processes(node):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    cluster.remove_node(node, allow_graceful=False)


def processes(node: Any) -> list[int]:
    """The ids of all processes of a node, each before those that it has started."""
    return descendants([info.process.pid for infos in node.all_processes.values() for info in infos])


def descendants(pids: Iterable[int]) -> list[int]:
    """Some processes and all that they have started, and these, and so on."""
    started = defaultdict(list)
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = (place / "stat").read_text().rpartition(")")[2].split()[1]
            started[int(parent)].append(int(place.name))
    found = list(dict.fromkeys(pids))
    for pid in found:  # it grows
        found += [each for each in started[pid] if each not in found]
    return found
