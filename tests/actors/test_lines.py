"""Lines: a process that dies is known of at once, and what its node's other lines say is known with it."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import time

import pytest

from raytron.actors.lines import ALONE_S, SETTLE_S, TELLS_S, Line, Lines, LineTo, judged, name_in

HOMES = {"worker-0": "a", "worker-1": "b", "keeper-a": "a", "keeper-b": "b"}
HOLD = """
import sys, time
from raytron.actors.lines import Line, LineTo
lines = [Line(LineTo(sys.argv[1], int(sys.argv[2]), sys.argv[3]), name) for name in sys.argv[4:]]
print("there", flush=True)
time.sleep(60)
"""


@pytest.fixture
def lines():
    made = Lines("127.0.0.1")
    yield made
    made.close()


def until(holds, timeout_s=10.0):
    end = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_node_that_is_killed_is_gone_at_once(lines):
    """One process stands for all of a node: its lines break together, by the kernel's hand."""
    to = [lines.to.host, str(lines.to.port), lines.to.secret]
    node_b = subprocess.Popen([sys.executable, "-c", HOLD, *to, "worker-1", "keeper-b"], stdout=subprocess.PIPE)
    here = [Line(lines.to, "worker-0"), Line(lines.to, "keeper-a")]
    assert node_b.stdout.readline() == b"there\n"
    until(lambda: all(lines.holds(name) for name in HOMES))
    assert not lines.gone(HOMES).nodes
    node_b.send_signal(signal.SIGSTOP)
    time.sleep(2 * SETTLE_S)
    assert not lines.gone(HOMES).nodes, "who is silent is not gone"
    killed = time.monotonic()
    node_b.kill()
    until(lambda: lines.gone(HOMES).nodes)
    assert time.monotonic() - killed < 1
    assert lines.gone(HOMES) == ({"b"}, frozenset())
    assert lines.broke("keeper-b")
    assert not lines.broke("worker-0")
    here[0].close()
    until(lambda: lines.broke("worker-0"))
    assert lines.gone(HOMES, settle=True).nodes == {"b"}, "the keeper of a lives"
    node_b.wait()


def test_a_new_line_of_the_same_name_takes_the_place_of_the_old(lines):
    first = Line(lines.to, "worker-0")
    until(lambda: lines.holds("worker-0"))
    second = Line(lines.to, "worker-0")
    until(lambda: lines._whole["worker-0"].getpeername() == second._socket.getsockname())
    first.close()
    time.sleep(0.1)
    assert lines.holds("worker-0")
    second.close()
    until(lambda: lines.broke("worker-0"))


def test_strangers_have_no_line(lines):
    wrong = Line(lines.to._replace(secret="0" * 32), "worker-0")
    with socket.create_connection(lines.to[:2]) as noise:
        noise.sendall(b"x" * 2000)
        noise.settimeout(5)
        with contextlib.suppress(ConnectionError):
            assert noise.recv(1) == b""
    wrong.close()
    assert not lines.holds("worker-0")
    assert not lines.broke("worker-0")
    for greeting in (b"{", b"[]", b'{"secret": "s"}', b'{"secret": "t", "name": "x"}', b"\xff\n"):
        assert name_in(greeting, "s") is None, greeting
    assert name_in(b'{"secret": "s", "name": "x"}\n', "s") == "x"


def test_who_cannot_open_a_line_goes_without(caplog):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    Line(LineTo("127.0.0.1", port, "s"), "worker-0").close()
    assert "no line to the controller" in caplog.text


@pytest.mark.parametrize(
    ("whole", "broken", "nodes", "names", "unsettled"),
    [
        ({"worker-1", "keeper-b"}, {}, "", "", ""),
        ({"keeper-b"}, {"worker-1": 1.0}, "", "", ""),  # its node lives: Ray will tell
        ({"keeper-b"}, {"worker-1": 2 * TELLS_S}, "", "worker-1", ""),  # and it did not
        (set(), {"worker-1": 1.0, "keeper-b": SETTLE_S / 2}, "", "", "b"),
        (set(), {"worker-1": 1.0, "keeper-b": 2 * SETTLE_S}, "b", "", ""),
        (set(), {"worker-1": ALONE_S / 2}, "", "", ""),  # one line alone: Ray has a second to say why
        (set(), {"worker-1": 2 * ALONE_S}, "b", "", ""),
        (set(), {"worker-7": 2 * ALONE_S}, "", "", ""),  # of nobody that is asked for
    ],
)
def test_what_broken_lines_mean(whole, broken, nodes, names, unsettled):
    """Of node b; broken: for so many seconds. Both lines of node a hold."""
    since = {name: 100.0 - seconds for name, seconds in broken.items()}
    found, early = judged(HOMES, {*whole, "worker-0", "keeper-a"}, since, 100.0)
    assert found == (frozenset(nodes.split()), frozenset(names.split()))
    assert early == set(unsettled.split())
