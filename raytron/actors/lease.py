"""A lease: workers and keepers outlive their controller, but not for long.

    the controller answers                            the lease is renewed
    it has died, and Ray is starting it again         ranks train on, to be adopted by it (`raytron.actors.adoption`)
    it is gone for good, or silent for too long       the process ends itself

They are detached actors: an actor that belongs to the controller would die with it. So nobody else ends those that it leaves
behind, and each asks for itself whether it is still wanted.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from enum import StrEnum

import ray

from raytron.actors.cluster import NAMESPACE

PERIODS = 10  # questions in the time of a lease
SHORTEST_PERIOD_S = 1.0
GONE_TWICE = 2  # answers in a row that there is no such actor, until that is believed


class Answer(StrEnum):
    LIVES = "lives"
    SILENT = "silent"
    GONE = "gone"


class Lease:
    """Asks for its controller every so often, from a thread of its own, and calls `end` when the lease is over.

    ask: for an answer within so many seconds. lease_s: how long the controller may be silent.
    """

    def __init__(self, ask: Callable[[float], Answer], lease_s: float, end: Callable[[], None]):
        self.ask, self.lease_s, self.end = ask, lease_s, end
        self.period_s = max(SHORTEST_PERIOD_S, lease_s / PERIODS)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="lease", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """The process will end in another way."""
        self._over.set()

    def _watch(self) -> None:
        heard, gone = time.monotonic(), 0
        while not self._over.wait(self.period_s):
            answer = self.ask(self.period_s)
            if answer is Answer.LIVES:
                heard = time.monotonic()
            gone = gone + 1 if answer is Answer.GONE else 0
            if gone >= GONE_TWICE or time.monotonic() - heard > self.lease_s:
                self.end()
                return


def ask_for(controller: str) -> Callable[[float], Answer]:
    """Asks Ray for the actor of this name, and the actor for a sign of life."""

    def ask(timeout_s: float) -> Answer:
        try:
            actor = ray.get_actor(controller, namespace=NAMESPACE)
        except ValueError:
            return Answer.GONE
        try:
            ray.get(actor.lives.remote(), timeout=timeout_s)
        except (ray.exceptions.RayError, TimeoutError):
            return Answer.SILENT
        return Answer.LIVES

    return ask


def exit_now() -> None:
    """Ends this process at once: what it had to leave behind, it has left."""
    os._exit(1)
