"""A Ray node of this machine with a network of its own, whose cable can be pulled: like a node that loses its power it goes
without a word, and breaks no connection.

    this machine  ── cable ──  [ a network namespace: raylet, workers, keeper ]

Needs Linux, root, and iproute2.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from shutil import which

import ray

HERE, THERE = "10.213.77.1", "10.213.77.2"  # ends of the cable
START_S = 60.0


def possible() -> bool:
    """Whether this process may make one."""
    if os.geteuid() != 0 or which("ip") is None:
        return False
    name = f"raytron-try-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode == 0
    if made:
        _ip("netns", "del", name)
    return made


class Apart:
    """A node of the cluster at `address`. Ended with `close`."""

    def __init__(self, address: str, cpus: int, log: Path):
        self.space, self._cable = f"raytron-{os.getpid()}", f"rt{os.getpid()}"
        _ip("netns", "add", self.space)
        _ip("link", "add", self._cable, "type", "veth", "peer", "name", f"{self._cable}p")
        _ip("link", "set", f"{self._cable}p", "netns", self.space)
        _ip("addr", "add", f"{HERE}/24", "dev", self._cable)
        _ip("link", "set", self._cable, "up")
        for words in (
            ("addr", "add", f"{THERE}/24", "dev", f"{self._cable}p"),
            ("link", "set", f"{self._cable}p", "up"),
            ("link", "set", "lo", "up"),
            ("route", "add", "default", "via", HERE),
        ):
            _ip("-n", self.space, *words)
        ray_start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--address", address]
        with log.open("w") as file:
            self._process = subprocess.Popen(
                ["ip", "netns", "exec", self.space, *ray_start, "--node-ip-address", THERE, "--num-cpus", str(cpus)],
                stdout=file,
                stderr=file,
            )

    def node_id(self) -> str:
        """Once Ray knows it."""
        end = time.monotonic() + START_S
        while time.monotonic() < end:
            for node in ray.nodes():
                if node["NodeManagerAddress"] == THERE and node["Alive"]:
                    return str(node["NodeID"])
            time.sleep(0.1)
        raise TimeoutError(f"no node at {THERE} after {START_S:g} s")

    def unplug(self) -> None:
        """Nothing comes or goes any more."""
        _ip("link", "set", self._cable, "down")

    def close(self) -> None:
        """Ends all that runs there."""
        told = subprocess.run(["ip", "netns", "pids", self.space], capture_output=True, text=True).stdout
        for pid in map(int, told.split()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.kill()
        self._process.wait()
        _ip("link", "del", self._cable)
        _ip("netns", "del", self.space)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
