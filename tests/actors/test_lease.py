"""A lease ends when its controller is gone, or silent for too long, and not before."""

from __future__ import annotations

import itertools
import threading
import time

import pytest

from raytron.actors import lease as lease_module
from raytron.actors.lease import Answer, Lease


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lease_module, "SHORTEST_PERIOD_S", 0.01)


def ends(answers, lease_s, within_s):
    """The number of questions until the lease was over; None: it is not over."""
    asked, over = itertools.count(), threading.Event()
    count = 0

    def ask(timeout_s):
        nonlocal count
        count = next(asked) + 1
        return answers(count)

    lease = Lease(ask, lease_s, over.set)
    ended = over.wait(within_s)
    lease.close()
    return count if ended else None


def test_it_goes_on_while_the_controller_lives():
    assert ends(lambda count: Answer.LIVES, lease_s=0.1, within_s=0.5) is None


def test_it_ends_when_the_controller_is_gone_twice_in_a_row():
    assert ends(lambda count: Answer.GONE, lease_s=10.0, within_s=5.0) == 2
    assert ends(lambda count: Answer.GONE if count % 2 else Answer.LIVES, lease_s=0.1, within_s=0.5) is None


def test_it_ends_when_the_controller_is_silent_for_as_long_as_the_lease():
    start = time.monotonic()
    assert ends(lambda count: Answer.SILENT, lease_s=0.3, within_s=5.0) is not None
    assert time.monotonic() - start >= 0.3


def test_a_controller_that_comes_back_renews_it():
    assert ends(lambda count: Answer.LIVES if count % 5 == 0 else Answer.SILENT, lease_s=0.2, within_s=0.6) is None
